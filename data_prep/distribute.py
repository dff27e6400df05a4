"""Who makes the shards: supervised processes of this machine, or one of img2dataset's own distributors.

The guards of a download are set up inside :func:`data_prep.fetch.download_shard`, so they hold wherever it runs.
img2dataset's distributors swallow what went wrong with a shard; a shard that they did not make is known by its
missing counts.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.imports import without
from data_prep.workers import Outcome, run_tasks
from pacl_scale.errors import UserError

DISTRIBUTORS = ("processes", "multiprocessing", "pyspark", "ray")

MakeShard = Callable[[int], tuple[int, int, dict[str, int]]]
"""Makes a shard; returns its rows, its samples, and its failures by cause."""

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Supervised:
    """A shard in a child process that can be killed at its deadline, called by img2dataset's distributors.

    Args:
        work: makes one shard.
        deadline_s: seconds for an attempt, of which there are three.
        in_child: False inside a process that may have no children.
    """

    work: MakeShard
    deadline_s: float
    in_child: bool = True

    def __call__(self, shard: int) -> tuple[bool, int]:
        """As img2dataset's Downloader: whether it was made, and which."""
        if self.in_child:
            (outcome,) = run_tasks(self.work, [shard], 1, self.deadline_s)
            fault = outcome.fault
        else:
            fault = _attempt(self.work, shard)
        if fault is not None:
            print(f"shard {shard} could not be made: {fault}", flush=True)
        return fault is None, shard


def distribute(
    how: str,
    work: MakeShard,
    shards: Sequence[int],
    processes: int,
    deadline_s: float,
) -> Iterator[Outcome]:
    """Make ``shards``; yields each shard's outcome with ``processes``, and nothing with the other distributors.

    Raises:
        UserError: the distributor's package is not installed.
    """
    processes = min(processes, len(shards))
    if how == "processes":
        yield from run_tasks(work, shards, processes, deadline_s)
        return
    require(how)
    _set_environment()
    with without("torch"), warnings.catch_warnings():
        # It imports a module of the standard library that is on its way out.
        warnings.simplefilter("ignore", DeprecationWarning)
        from img2dataset import distributor
    call = {
        "multiprocessing": distributor.multiprocessing_distributor,
        "pyspark": distributor.pyspark_distributor,
        "ray": distributor.ray_distributor,
    }[how]
    # A process of multiprocessing's pool may have no children; there the deadline of a shard cannot be kept.
    supervised = Supervised(work, deadline_s, in_child=how != "multiprocessing")
    call(processes, supervised, shards, SHARDS_PER_JOB, 1)


def _set_environment() -> None:
    # Workers of Spark and Ray are started by others and must find this package too.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(CHECKOUT), *filter(None, paths)]))
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


def _attempt(work: Callable[[int], Any], shard: int) -> str | None:
    try:
        work(shard)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
