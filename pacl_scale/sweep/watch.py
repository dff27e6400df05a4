"""A run whose checkpoints are evaluated as they appear."""

from pathlib import Path

import yaml

from pacl_scale import checkpoint, storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger
from pacl_scale.sweep.cells import Cell, Evaluations, weights_of

log = get_logger("pacl_scale.sweep")


class Watch:
    """The checkpoints of a run that is being trained; each is copied, as the run deletes old ones."""

    def __init__(self, run: str, sweep: Path, grid: Evaluations) -> None:
        self.run, self.grid = run.rstrip("/"), grid
        self.copies = sweep / "checkpoints" / self.run.rpartition("/")[2]
        self._copied: set[int] = set()
        self._known: set[int] = set()

    def new(self) -> list[Cell]:
        """Cells of the checkpoints that came since the last look, those of earlier calls among them."""
        folder = self._settings().get("checkpoint", {}).get("folder") or storage.join(self.run, "checkpoints")
        for step in checkpoint.steps_in(folder):
            if step not in self._copied:
                self._copied.add(step)
                self._copy(storage.join(folder, f"{step:08d}"), step)
        found: list[Cell] = []
        for step in checkpoint.steps_in(str(self.copies)):
            if step not in self._known:
                self._known.add(step)
                (weights,) = weights_of(self.copies.name, str(self.copies / f"{step:08d}"), every=False)
                found += self.grid.cells(weights)
        return found

    def is_over(self) -> bool:
        """Whether the run has trained all its steps and its last checkpoint was seen."""
        steps = self._settings().get("steps")
        return steps is not None and steps in self._known

    def _copy(self, path: str, step: int) -> None:
        target = str(self.copies / f"{step:08d}")
        if storage.exists(storage.join(target, checkpoint.STATE)):
            return
        try:
            # Weights and side-car only, the side-car last: without it there is no checkpoint.
            for name in (checkpoint.MODEL, checkpoint.STATE):
                storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(path, name)))
        except UserError as error:
            log.warning("checkpoint passed over", path=path, why=str(error))

    def _settings(self) -> dict:
        saved = storage.join(self.run, "config.yaml")
        return yaml.safe_load(storage.read_bytes(saved)) or {} if storage.exists(saved) else {}
