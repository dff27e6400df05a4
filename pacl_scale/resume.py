"""Beginning a run or going on with one: the run directory, the checkpoint, and what may have changed in between."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacl_scale import checkpoint, config, health, log, metrics, storage
from pacl_scale.distributed import World
from pacl_scale.errors import UserError
from pacl_scale.run_folder import checkpoints_of

if TYPE_CHECKING:
    from pacl_scale.train import TrainConfig

MAY_CHANGE_AT_RESUME = (
    "run",
    "log_every",
    "max_bad_steps",
    "micro_batch_size",
    "distributed.",
    "engine.",
    "checkpoint.",
    "validate.",
    "record.",
    "loss.backend",
    "text.cache_size",
    "data.decode_threads",
    "data.prefetch_batches",
    "data.own_process",
    "data.max_skip_share",
    "data.read.",
    "data.root",
    "data.mix",
)
"""Keys (or groups) that do not change what is learned; every other key must be as it was when a run resumes.
Where data lies may change, for the stream knows its samples again; weights of a mixture may, from there on."""

DECIDES_THE_ORDER = ("data.read.chunk_samples", "data.read.window_chunks")
"""Of those groups, keys that must stay after all."""


def open_run(settings: "TrainConfig", run: Path, world: World) -> str | None:
    """Make the run directory, or check that an existing one is this very run; returns the checkpoint to resume.

    Collective.

    Raises:
        UserError: the run was trained with other settings, its checkpoints cannot be used, or the directory cannot be
            made.
    """
    # One rank looks, for all must begin at the same step even while checkpoints come and go.
    resume_from = None
    if world.is_main:
        resume_from = storage.patiently(checkpoint.newest, checkpoint_folder(settings))
    resume_from = health.told_by_main(world, resume_from)
    if resume_from:
        # What it was trained with stands in the checkpoint itself, which may lie elsewhere than the run directory.
        trained_with = storage.patiently(checkpoint.read_state, resume_from)["config"]
        refuse_changes(trained_with, config.to_dict(settings), run)
    if world.is_main:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run directory {run} cannot be made: {error.strerror}") from error
        storage.write_bytes(str(run / "config.yaml"), config.to_yaml(settings).encode())
        storage.write_bytes(str(run / "environment.json"), json.dumps(metrics.environment(), indent=2).encode())
    attempt = len(list(run.glob("train.*.log"))) if world.is_main else 0
    log.configure(world.rank, run / f"train.{attempt}.log" if world.is_main else None)
    return resume_from


def check_unchanged(settings: "TrainConfig") -> None:
    """:func:`refuse_changes` against the newest checkpoint that can be asked, before anything is started."""
    folder = checkpoint_folder(settings)
    for step in reversed(checkpoint.steps_in(folder)):
        try:
            trained_with = checkpoint.read_state(checkpoint.path_of(folder, step))["config"]
        except UserError:
            # Training passes over what is damaged, and says so.
            continue
        refuse_changes(trained_with, config.to_dict(settings), Path(settings.run))
        return


def checkpoint_folder(settings: "TrainConfig") -> str:
    """Where this run's checkpoints lie."""
    return checkpoints_of(settings.run, {"checkpoint": {"folder": settings.checkpoint.folder}})


def refuse_changes(old: dict[str, Any], new: dict[str, Any], run: Path) -> None:
    """Raise :class:`UserError` where a run would be resumed with settings that change what it learns.

    A key that the older configuration did not have yet was at its default.
    """
    from pacl_scale.train import TrainConfig

    changes = config.differences(_filled(old, config.to_dict(TrainConfig())), new)
    forbidden = {key: change for key, change in changes.items() if not _may_change(key)}
    if forbidden:
        said = "; ".join(f"{key} was {before!r}, is {after!r}" for key, (before, after) in forbidden.items())
        raise UserError(f"{run} was trained with other settings ({said}); choose another run directory")


def _may_change(key: str) -> bool:
    return key.startswith(MAY_CHANGE_AT_RESUME) and not key.startswith(DECIDES_THE_ORDER)


def _filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for key, default in defaults.items():
        if key not in filled:
            filled[key] = default
        elif isinstance(default, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(filled[key], default)
    return filled
