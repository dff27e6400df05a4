"""The command: a sweep's settings in; jobs, a live table, and results out."""

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pacl_scale import config, log
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.submit import LOCAL, SubmitConfig
from pacl_scale.sweep import cells, results
from pacl_scale.sweep.cells import Cell, Weights
from pacl_scale.sweep.queues import LocalQueue, SlurmQueue, visible_gpus
from pacl_scale.sweep.runner import Limits, Runner
from pacl_scale.sweep.table import Display
from pacl_scale.sweep.watch import Watch
from pacl_scale.sweep.worker import Kind, save_seconds

PROG = "python -m pacl_scale.sweep"
QUEUE_KEYS = ("partition", "account", "qos")


@dataclass
class SweepConfig:
    """Evaluate checkpoints x data sets x protocols x settings, or train a grid of settings, as arrays of Slurm jobs.

    The same command again does what is missing and nothing else.
    """

    output: str = "runs/sweep"
    """Folder of the sweep, seen by all nodes: its cells, `results.csv`, tables and plots."""

    checkpoints: dict[str, str] = field(default_factory=dict)
    """Name to run directory or checkpoint, e.g. `{b16: runs/paper_b16}`."""

    every_checkpoint: bool = False
    """Every checkpoint that a run kept, instead of its newest."""

    watch: str | None = None
    """Run directory whose checkpoints are evaluated as they appear, until it has trained all its steps or its job is
    over."""

    watch_minutes: float = 720.0
    """How long a watched run of which no job is known may write no checkpoint before the watch ends."""

    evaluation: list[str] = field(default_factory=list)
    """YAML files of `python -m pacl_scale.evaluate`: data sets, controls, precision."""

    data_sets: list[str] = field(default_factory=list)
    """Names of those data sets to take; none named takes all."""

    protocols: list[str] = field(default_factory=list)
    """YAML files of protocols, each with a `protocol.name` of its own; none takes that of `evaluation`."""

    training: list[str] = field(default_factory=list)
    """YAML files of `python -m pacl_scale.train`: a sweep of trainings instead of evaluations."""

    settings: dict[str, list[Any]] = field(default_factory=dict)
    """Key of the evaluation (or training) to the values it takes, e.g. `{protocol.stride: [4, 16]}`; every combination
    is a cell."""

    cluster: str | None = None
    """YAML file with the cluster's habits, as for `python -m pacl_scale.submit`; "local" runs here; null is Slurm with
    its own defaults."""

    partition: str | None = None
    """Partition, in place of the cluster file's."""

    account: str | None = None
    """Account that is charged, in place of the cluster file's."""

    qos: str | None = None
    """Quality of service, in place of the cluster file's."""

    gpus: int = 1
    """GPUs of each job; 0 works on CPUs."""

    job_minutes: float = 60.0
    """Length of a job: cells are packed into jobs until they fill it."""

    cell_minutes: float = 10.0
    """Expected length of a cell, until one like it has been measured."""

    cell_limit_minutes: float = 240.0
    """A cell that takes longer is ended and counts as failed."""

    throttle: int = 16
    """Jobs that run at the same time."""

    attempts: int = 2
    """How often a cell that crashes or runs out of time is tried in one call. A mistake in its settings or data (exit
    status 2) is not tried again."""

    poll_seconds: float = 5.0
    """How often the cells' files are looked at."""

    ask_seconds: float = 60.0
    """How often Slurm is asked which jobs live."""

    detach: bool = False
    """Queue and leave. Call again for the table and for what failed."""

    dry_run: bool = False
    """Say what would be done, do nothing."""

    def __post_init__(self) -> None:
        if bool(self.training) == bool(self.checkpoints or self.watch):
            raise ValueError("name checkpoints (or watch a run), or name training files: one of the two")
        if self.training and (self.evaluation or self.protocols or self.data_sets):
            raise ValueError("a sweep of trainings takes no evaluation, protocols or data_sets")
        if not self.training and not self.evaluation:
            raise ValueError("name files of data sets under evaluation, e.g. configs/eval/official.yaml")
        if min(self.throttle, self.attempts) < 1 or self.gpus < 0:
            raise ValueError("throttle and attempts must be at least 1, gpus at least 0")
        minutes = (self.job_minutes, self.cell_minutes, self.cell_limit_minutes, self.watch_minutes)
        if min(*minutes, self.poll_seconds, self.ask_seconds) <= 0:
            raise ValueError("minutes and seconds must be positive")
        if self.watch and self.detach:
            raise ValueError("watch stays; it cannot detach")
        if self.cluster == LOCAL and (idle := [key for key in QUEUE_KEYS if getattr(self, key)]):
            raise ValueError(f"cluster local takes no {idle[0]}: there is no queue")


def run(argv: Sequence[str] | None) -> int:
    """Do what is missing of a sweep; returns 0.

    Raises:
        UserError: a mistake in the settings.
        RunFailed: cells failed; they are named.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    settings: SweepConfig = config.parse(SweepConfig, [spelled(word) for word in words], PROG)
    log.configure()
    folder = Path(settings.output).resolve()
    watch, found = grid_of(settings, folder)
    minutes = (settings.job_minutes, settings.cell_minutes, settings.cell_limit_minutes)
    limits = Limits(settings.attempts, *minutes)
    kind: Kind = "train" if settings.training else "evaluate"
    if settings.dry_run:
        runner = Runner(folder, kind, limits, None)
        runner.add(found, write=False)
        print(runner.plan())
        return 0
    with alone(folder), queue_of(settings, folder) as queue, Display(folder.name) as display:
        if isinstance(queue, SlurmQueue):
            limits = replace(limits, save_s=save_seconds(queue.cluster.signal_seconds))
        (folder / "sweep.yaml").write_text(config.to_yaml(settings), encoding="utf-8")
        runner = Runner(folder, kind, limits, queue)
        runner.add(found)

        def fold() -> str:
            return results.fold(folder, kind, runner.cells)

        runner.run(display, settings.poll_seconds, watch=watch, detach=settings.detach, fold=fold)
        print(fold())
    if settings.detach and runner.unsettled:
        print(f"{len(runner.unsettled)} cells are queued or running; the same command shows how they fare")
        return 0
    if failures := runner.failures():
        lines = "\n".join(f"  {name}: {why}" for name, why in failures.items())
        raise RunFailed(
            f"{len(failures)} of {len(runner.cells)} cells failed; the same command tries them again\n{lines}"
        )
    return 0


def grid_of(settings: SweepConfig, folder: Path) -> tuple[Watch | None, list[Cell]]:
    """What is watched, and the cells that are known from the start."""
    if settings.training:
        found = cells.trainings(folder, settings.training, settings.settings)
        return None, found
    grid = cells.evaluations(folder, settings.evaluation, settings.protocols, settings.data_sets, settings.settings)
    weights: list[Weights] = []
    for name, path in settings.checkpoints.items():
        weights += cells.weights_of(name, path, settings.every_checkpoint)
    watch = None
    if settings.watch:
        watch = Watch(settings.watch, folder, grid, settings.watch_minutes, settings.ask_seconds)
    return watch, [cell for one in weights for cell in grid.cells(one)]


@contextmanager
def queue_of(settings: SweepConfig, folder: Path) -> Iterator[LocalQueue | SlurmQueue]:
    """Where the sweep's jobs run, until the end of a ``with`` block."""
    queue: LocalQueue | SlurmQueue
    if settings.cluster == LOCAL:
        queue = LocalQueue(settings.throttle, settings.gpus, visible_gpus() if settings.gpus else ())
    else:
        words = [f"--cluster={settings.cluster}"] if settings.cluster else []
        cluster: SubmitConfig = config.parse(SubmitConfig, words, PROG, file_option="--cluster")
        own = {key: getattr(settings, key) for key in QUEUE_KEYS if getattr(settings, key)}
        queue = SlurmQueue(folder, replace(cluster, **own), settings.gpus, settings.throttle, settings.ask_seconds)
        if settings.job_minutes > queue.limit_minutes:
            limit = f"the partition ends jobs after {queue.limit_minutes:g} minutes"
            raise UserError(f"{limit}, and job_minutes is {settings.job_minutes:g}")
    try:
        yield queue
    finally:
        queue.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one call at a time works on a sweep.

    Raises:
        UserError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another call is at work on the sweep {folder}; wait for it or end it") from error
        except OSError as error:
            # Lustre, for one, may be mounted without locks.
            log.get_logger(PROG).warning("this file system has no locks: see that no other call works", why=str(error))
        yield


def spelled(word: str) -> str:
    """``--job-minutes`` for ``--job_minutes``, and a switch without its value."""
    key, equals, value = word.partition("=")
    if key in ("--detach", "--dry-run", "--dry_run", "--every-checkpoint", "--every_checkpoint") and not equals:
        key, equals, value = key, "=", "true"
    return (key[:2] + key[2:].replace("-", "_") if key.startswith("--") else key) + equals + value
