"""A run whose checkpoints are evaluated as they appear."""

import time
from pathlib import Path

from pacl_scale import checkpoint, claims, storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger
from pacl_scale.run_folder import checkpoints_of, settings_of
from pacl_scale.sweep.cells import Cell, Evaluations, weights_of

log = get_logger("pacl_scale.sweep")


class Watch:
    """The checkpoints of a run that is being trained; each is copied, as the run deletes old ones."""

    def __init__(self, run: str, sweep: Path, grid: Evaluations, idle_minutes: float, ask_seconds: float) -> None:
        self.run, self.grid = run.rstrip("/"), grid
        self.copies = sweep / "checkpoints" / self.run.rpartition("/")[2]
        self._copied: set[int] = set()
        self._known: set[int] = set()
        self._idle_s, self._ask_s = 60 * idle_minutes, ask_seconds
        self._news = self._asked = time.monotonic()

    def new(self) -> list[Cell]:
        """Cells of the checkpoints that came since the last look, those of earlier calls among them."""
        folder = checkpoints_of(self.run)
        for step in checkpoint.steps_in(folder):
            if step not in self._copied and self._copy(checkpoint.path_of(folder, step), step):
                self._copied.add(step)
        found: list[Cell] = []
        for step in checkpoint.steps_in(str(self.copies)):
            if step not in self._known:
                self._known.add(step)
                self._news = time.monotonic()
                (weights,) = weights_of(self.copies.name, checkpoint.path_of(str(self.copies), step), every=False)
                found += self.grid.cells(weights)
        return found

    def is_over(self) -> bool:
        """Whether the run has trained all its steps and its last checkpoint was seen, or goes on no more.

        It does not when its job (or process) is over, or, where none is known, when no checkpoint came for long.
        """
        steps = settings_of(self.run).get("steps")
        if steps is not None and steps in self._known:
            return True
        now = time.monotonic()
        if now - self._asked < self._ask_s:
            return False
        self._asked = now
        note = claims.read(Path(self.run)) if storage.is_local(self.run) else None
        if note is None:
            return now - self._news > self._idle_s
        try:
            lives = claims.state_of_note(note) is not None
        except UserError as error:
            log.warning("Slurm does not answer", why=str(error))
            return False
        # What it saved last may have come since the last look.
        if lives or self._has_unseen():
            return False
        log.warning("the run ended before its last step", run=self.run, job=note.job)
        return True

    def _has_unseen(self) -> bool:
        return bool(set(checkpoint.steps_in(checkpoints_of(self.run))) - self._known)

    def _copy(self, path: str, step: int) -> bool:
        """Copy what an evaluation needs; whether it is there. What failed is tried again at the next look."""
        target = checkpoint.path_of(str(self.copies), step)
        if storage.exists(storage.join(target, checkpoint.STATE)):
            return True
        try:
            # Weights and side-car only, the side-car last: without it there is no checkpoint.
            for name in (checkpoint.MODEL, checkpoint.STATE):
                storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(path, name)))
        except UserError as error:
            log.warning("checkpoint could not be copied", path=path, why=str(error))
            return False
        return True
