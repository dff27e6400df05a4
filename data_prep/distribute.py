"""Who makes the shards: supervised processes of this machine, or one of img2dataset's own distributors.

The guards of a download are set up inside :func:`data_prep.fetch.download_shard`, so they hold wherever it runs.
img2dataset's distributors say nothing before their end, swallow what went wrong with a shard, and its pool waits for
ever for a process that was killed. So they run in a process of their own while this one watches the shards appear at
their place; a shard that is not made is known by its missing counts.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from data_prep import beside
from data_prep.imports import light_img2dataset
from data_prep.workers import ATTEMPTS, Outcome, die_with_parent, run_tasks
from pacl_scale.errors import UserError

MakeShard = Callable[[int], tuple[int, int, dict[str, int]]]
"""Makes a shard; returns its rows, its samples, and its failures by cause."""

LOOK_SECONDS = 5.0
"""Between two looks at what a distributor of img2dataset has made."""


@dataclass(frozen=True)
class Supervised:
    """A shard in a child process that can be killed at its deadline, called by img2dataset's distributors.

    Args:
        work: makes one shard.
        deadline_s: seconds for an attempt, of which there are three.
        notes: folder of this machine where a note with its process id lies beside each shard in the making, for
            processes that nobody else watches and that may have no children of multiprocessing's; ``None`` for others.
    """

    work: MakeShard
    deadline_s: float
    notes: str | None = None

    def __call__(self, shard: Any) -> tuple[bool, Any]:
        """As img2dataset's Downloader: whether it was made, and which."""
        if self.notes is None:
            (outcome,) = run_tasks(self.work, [shard], 1, self.deadline_s)
            fault = outcome.fault
        else:
            fault = self._noted(Path(self.notes) / f"{shard}.pid", shard)
        if fault is not None:
            print(f"shard {shard} could not be made: {fault}", flush=True)
        return fault is None, shard

    def _noted(self, note: Path, shard: Any) -> str | None:
        die_with_parent()
        note.write_text(str(os.getpid()))
        process, pipe = beside.start("data_prep.distribute", "supervise")
        try:
            pipe.send((self.work, shard, self.deadline_s))
            fault: str | None = pipe.recv()
        except (EOFError, OSError):
            fault = f"its supervisor died ({process.wait()})"
        pipe.close()
        process.wait()
        note.unlink()
        return fault


def supervise(pipe: Connection) -> None:
    """Make the shard that comes through the pipe, and say what went wrong; die with the other end."""
    work, shard, deadline_s = pipe.recv()
    Thread(target=_end_with, args=(pipe,), daemon=True).start()
    (outcome,) = run_tasks(work, [shard], 1, deadline_s)
    pipe.send(outcome.fault)


def _end_with(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


def distribute(
    how: str,
    work: MakeShard,
    shards: Sequence[int],
    processes: int,
    deadline_s: float,
    finished: Callable[[], Iterable[int]],
    value_of: Callable[[int], Any],
    scratch: str,
) -> Generator[Outcome, None, None]:
    """Make ``shards``; yields the outcome of each as it becomes known.

    Args:
        finished: numbers of the shards that are at their place.
        value_of: what ``work`` has given for one of those.
        scratch: folder of this machine.

    Raises:
        UserError: the distributor's package is not installed.
    """
    processes = min(processes, len(shards))
    if how == "processes":
        yield from run_tasks(work, shards, processes, deadline_s)
        return
    require(how)
    notes = Path(scratch) / "notes"
    notes.mkdir(exist_ok=True)
    # A process of multiprocessing's pool may have no children, and nobody notices when it is killed.
    supervised = Supervised(work, deadline_s, str(notes) if how == "multiprocessing" else None)
    waiting = set(shards)
    for _ in range(ATTEMPTS):
        process = get_context("spawn").Process(target=_call, args=(how, supervised, sorted(waiting), processes))
        process.start()
        was_lost = False
        try:
            while not was_lost and process.is_alive():
                process.join(LOOK_SECONDS)
                was_lost = any(map(_is_orphaned, notes.iterdir()))
                for shard in sorted(waiting & set(finished())):
                    waiting.remove(shard)
                    yield Outcome(shard, None, value_of(shard))
        finally:
            _kill(process.pid)
            process.join()
        for note in notes.iterdir():
            note.unlink()
        if not was_lost:
            break
    for shard in sorted(waiting):
        yield Outcome(shard, f"see the log of {how}")


def _is_orphaned(note: Path) -> bool:
    """Whether a shard in the making has lost its process."""
    try:
        number = int(note.read_text() or os.getpid())
    except FileNotFoundError:
        return False  # done meanwhile
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(number: int | None) -> None:
    """Kill a process and all below it."""
    try:
        top = psutil.Process(number)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _call(how: str, supervised: Supervised, shards: Sequence[int], processes: int) -> None:
    die_with_parent()
    _set_environment()
    with light_img2dataset():
        from img2dataset import distributor
    call = {
        "multiprocessing": distributor.multiprocessing_distributor,
        "pyspark": distributor.pyspark_distributor,
        "ray": distributor.ray_distributor,
    }[how]
    call(processes, supervised, shards, SHARDS_PER_JOB, 1)


def _set_environment() -> None:
    # Workers of Spark and Ray are started by others and must find this package too.
    os.environ["PYTHONPATH"] = beside.environment()["PYTHONPATH"]
    # Spark would take whatever "python3" is; the other two would call home.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


SHARDS_PER_JOB = 1000
"""Shards of one Spark job; each is a task."""


def require(how: str) -> None:
    """Raise UserError if the packages of a distributor are missing."""
    if how in ("pyspark", "ray"):
        try:
            __import__(how)
        except ImportError as error:
            raise UserError(
                f"fetch.distributor={how} needs the package {how}: pip install 'pacl-scale[{how}]'"
            ) from error
