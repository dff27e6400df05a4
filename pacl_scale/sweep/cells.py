"""From a sweep's settings to its cells: what each is, what its result depends on, and where it lies.

A cell is one call of ``python -m pacl_scale.evaluate`` on one data set, or one training. Its folder's name ends in a
hash of everything that decides the result, so that a cell whose settings, weights or protocol changed is another one.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pacl_scale import checkpoint, config
from pacl_scale.errors import UserError
from pacl_scale.run_folder import checkpoints_of
from pacl_scale.sweep import ledger
from pacl_scale.sweep.worker import SETTINGS, Kind

if TYPE_CHECKING:
    from pacl_scale.evaluate.command import EvaluateConfig

NOT_IN_HASH = ("output", "batch_size", "threads", "device", "methods", "checkpoint", "check_data", "part", "parts")
"""Keys of an evaluation that do not change its figures, or that stand in the hash as what they mean."""

TASKS = ("segmentation", "retrieval", "classification")
NOT_YET = "-"
"""Stands for the checkpoint until it is known."""

TRAINING_NOT_IN_HASH = ("run", "distributed", "log_every", "max_bad_steps")


@dataclass
class Cell:
    """One cell of the grid."""

    name: str
    hash: str
    labels: dict[str, Any]
    """What it is: checkpoint, step, samples, data_set, protocol, and each swept setting."""
    settings: str
    """Its configuration as YAML."""
    command: str

    def folder(self, sweep: Path) -> Path:
        """Where everything about it lies."""
        return sweep / "cells" / self.name


@dataclass(frozen=True)
class Weights:
    """A checkpoint of the grid."""

    name: str
    path: str
    step: int
    samples: int
    """Pictures seen in training."""
    digest: str


@dataclass
class Evaluations:
    """The parsed part of a grid of evaluations, from which the cells of any checkpoint are made."""

    sweep: Path
    variants: list[tuple[dict[str, Any], "EvaluateConfig", dict[str, str]]] = field(default_factory=list)
    """Swept settings, the configuration of all data sets under them, and digests of the weights that are measured
    beside; one for each protocol and setting."""

    def cells(self, weights: Weights) -> Iterator[Cell]:
        """All cells of one checkpoint."""
        for swept, base, others in self.variants:
            for task in TASKS:
                for data_set, data in getattr(base, task).items():
                    only: dict[str, Any] = dict.fromkeys(TASKS, {}) | {task: {data_set: data}}
                    settings = replace(base, checkpoint=weights.path, **only)
                    yield self._cell(weights, swept, data_set, settings, others)

    def _cell(
        self,
        weights: Weights,
        swept: dict[str, Any],
        data_set: str,
        settings: "EvaluateConfig",
        others: dict[str, str],
    ) -> Cell:
        values = config.to_dict(settings)
        decides = {key: value for key, value in values.items() if key not in NOT_IN_HASH}
        digest = digest_of({"evaluate": decides, "weights": weights.digest, "others": others})
        protocol = settings.protocol.name
        labels = {"checkpoint": weights.name, "step": weights.step, "samples": weights.samples}
        labels |= {"data_set": data_set, "protocol": protocol, "settings": swept, "path": weights.path}
        words = [f"{key.rpartition('.')[2]}_{value}" for key, value in swept.items()]
        name = named([weights.name, str(weights.step), data_set, protocol, *words], digest)
        folder = self.sweep / "cells" / name
        text = yaml.safe_dump(values | {"output": str(folder)}, sort_keys=False, allow_unicode=True)
        return Cell(name, digest, labels, text, f"python -m pacl_scale.evaluate --config {folder / SETTINGS}")


def evaluations(
    sweep: Path,
    files: Sequence[str],
    protocols: Sequence[str],
    data_sets: Sequence[str],
    grid: dict[str, list[Any]],
) -> Evaluations:
    """Parse a grid of evaluations once for each protocol and combination of settings.

    Raises:
        UserError: a file or key that ``python -m pacl_scale.evaluate`` would refuse, or no data set.
    """
    from pacl_scale.evaluate.command import EvaluateConfig

    variants = []
    for protocol, swept in itertools.product([[one] for one in protocols] or [[]], combinations(grid)):
        words = [f"--config={file}" for file in [*files, *protocol]] + words_of(swept)
        # The checkpoint is filled in later; the command refuses to run without one.
        parsed = config.parse(EvaluateConfig, [*words, f"--checkpoint={NOT_YET}"], "python -m pacl_scale.evaluate")
        known = [name for task in TASKS for name in getattr(parsed, task)]
        if unknown := sorted(set(data_sets) - set(known)):
            raise UserError(f"data_sets: there is no {unknown[0]}; {', '.join(files)} has {', '.join(known) or 'none'}")
        for task in TASKS:
            chosen = {k: v for k, v in getattr(parsed, task).items() if not data_sets or k in data_sets}
            setattr(parsed, task, chosen)
        if not any(getattr(parsed, task) for task in TASKS):
            raise UserError("the sweep has no data set; name files that have some under `evaluation`, see configs/eval")
        beside = {name: path for name, path in parsed.methods.items() if path != NOT_YET}
        others = {name: _weights(name, checkpoint.resolve(path)).digest for name, path in beside.items()}
        variants.append((varied(swept, grid), parsed, others))
    names = [(variant.protocol.name, swept) for swept, variant, _ in variants]
    if twice := next((name for name, swept in names if names.count((name, swept)) > 1), None):
        raise UserError(f"two protocols are named {twice}; give each its own protocol.name")
    return Evaluations(sweep, variants)


def trainings(sweep: Path, files: Sequence[str], grid: dict[str, list[Any]]) -> list[Cell]:
    """One training for each combination of settings.

    Raises:
        UserError: a file or key that ``python -m pacl_scale.train`` would refuse.
    """
    from pacl_scale import train

    cells = []
    for swept in combinations(grid):
        words = [f"--config={file}" for file in files] + words_of(swept)
        parsed = config.parse(train.TrainConfig, words, "python -m pacl_scale.train")
        train.accumulation_of(parsed, parsed.distributed.ranks)
        if parsed.checkpoint.folder:
            raise UserError("each swept training keeps its checkpoints beside it; leave checkpoint.folder out")
        values = config.to_dict(parsed)
        digest = digest_of({"train": {k: v for k, v in values.items() if k not in TRAINING_NOT_IN_HASH}})
        swept = varied(swept, grid)
        short = [f"{key.rpartition('.')[2]}_{value}" for key, value in swept.items()]
        name = named(["train", *short], digest)
        folder = sweep / "cells" / name
        text = yaml.safe_dump(values | {"run": str(folder / "run")}, sort_keys=False, allow_unicode=True)
        labels = {"settings": swept, "steps": parsed.steps, "samples": parsed.steps * parsed.global_batch_size}
        cells.append(Cell(name, digest, labels, text, f"python -m pacl_scale.train --config {folder / SETTINGS}"))
    return cells


def weights_of(name: str, path: str, every: bool) -> list[Weights]:
    """The newest checkpoint at ``path`` (a run, a folder of checkpoints, or one itself), or every one of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = checkpoints_of(path)
    if every and (steps := checkpoint.steps_in(folder)):
        return [_weights(name, checkpoint.path_of(folder, step)) for step in steps]
    return [_weights(name, checkpoint.resolve(path))]


def _weights(name: str, path: str) -> Weights:
    state = checkpoint.read_state(path)
    samples = int(state["step"]) * int(state["config"].get("global_batch_size", 0))
    return Weights(name, path, int(state["step"]), samples, state["sha256"][checkpoint.MODEL])


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value a key, the last key fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def varied(swept: dict[str, Any], grid: dict[str, list[Any]]) -> dict[str, Any]:
    """The settings that tell cells apart: those with several values."""
    return {key: value for key, value in swept.items() if len(grid[key]) > 1}


def words_of(swept: dict[str, Any]) -> list[str]:
    """Settings as words of a command."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in swept.items()]


def digest_of(values: Any) -> str:
    """A hash of plain values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def named(parts: Sequence[str], digest: str) -> str:
    """A folder's name that a reader understands and that no other cell has."""
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(parts)).strip("._-")
    return f"{text[:120]}-{digest}"


def prepare(cell: Cell, sweep: Path) -> ledger.Entry:
    """Write what a worker needs; returns what is known of the cell."""
    folder = cell.folder(sweep)
    entry = ledger.read(folder)
    if entry is None or entry.hash != cell.hash:
        folder.mkdir(parents=True, exist_ok=True)
        entry = ledger.Entry(cell.name, cell.hash, cell.labels, cell.command)
        (folder / SETTINGS).write_text(cell.settings, encoding="utf-8")
        ledger.write(folder, entry)
    return entry


def is_done(cell: Cell, sweep: Path, kind: Kind, entry: ledger.Entry) -> bool:
    """Whether the cell's newest attempt ended well and its result is there and is of these very settings."""
    last = entry.last
    if last is None or last.outcome != "done" or entry.hash != cell.hash:
        return False
    if kind == "train":
        return cell.labels["steps"] in checkpoint.steps_in(checkpoints_of(str(cell.folder(sweep) / "run"), {}))
    from pacl_scale.evaluate.rows import read_rows

    try:
        return bool(read_rows(str(cell.folder(sweep))))
    except UserError:
        return False
