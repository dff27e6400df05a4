"""The loop of a sweep: look at the cells' files, queue what is missing, again until every cell is settled."""

import json
import math
import statistics
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pacl_scale.errors import RunFailed
from pacl_scale.log import get_logger
from pacl_scale.sweep import cells as cells_room
from pacl_scale.sweep import ledger
from pacl_scale.sweep.cells import Cell
from pacl_scale.sweep.queues import LocalQueue, SlurmQueue
from pacl_scale.sweep.watch import Watch
from pacl_scale.sweep.worker import HERE, SAVE_SECONDS, Kind, Pack, may_try

if TYPE_CHECKING:
    from pacl_scale.sweep.table import Display

IDLE_JOBS = 3
"""Jobs in a row that end before they began a cell, after which the sweep is given up."""

FOLD_SECONDS = 30.0
"""Results are folded at most so often while cells are worked on."""

log = get_logger("pacl_scale.sweep")


@dataclass(frozen=True)
class Limits:
    """How long and how often."""

    attempts: int
    job_minutes: float
    cell_minutes: float
    cell_limit_minutes: float
    save_s: float = SAVE_SECONDS


@dataclass
class Job:
    """A job that this or an earlier call queued."""

    name: str
    cells: list[str]
    call: str
    missed: int = field(default=0)
    """Looks in a row that did not find it."""


class Runner:
    """The cells of a sweep and what becomes of them."""

    def __init__(self, folder: Path, kind: Kind, limits: Limits, queue: LocalQueue | SlurmQueue | None) -> None:
        self.folder, self.kind, self.limits, self.queue = folder, kind, limits, queue
        self.call = uuid.uuid4().hex[:8]
        self.cells: dict[str, Cell] = {}
        self.entries: dict[str, ledger.Entry] = {}
        self.done: set[str] = set()
        self.jobs: dict[str, Job] = {}
        self._idle_jobs = 0
        if isinstance(queue, SlurmQueue):
            self.jobs = {one.name: one for one in read_jobs(folder)}

    def add(self, found: Iterable[Cell], write: bool = True) -> None:
        """Take up cells; those that are finished are never done again."""
        for cell in found:
            if cell.name in self.cells:
                continue
            self.cells[cell.name] = cell
            if write:
                entry = cells_room.prepare(cell, self.folder)
            else:
                entry = ledger.read(cell.folder(self.folder)) or ledger.Entry(cell.name, cell.hash)
            self.entries[cell.name] = entry
            if cells_room.is_done(cell, self.folder, self.kind, entry):
                self.done.add(cell.name)
            elif write and entry.last and entry.last.outcome == "done":
                ledger.end(cell.folder(self.folder), entry, "lost", "its result is gone")

    @property
    def unsettled(self) -> list[str]:
        """Cells that are still to be worked on, in this call or by jobs that live."""
        owned = self.owned()
        return [name for name in self.cells if name not in self.done and (name in owned or self.may_try(name))]

    def may_try(self, name: str) -> bool:
        """Whether a cell has attempts left in this call."""
        return may_try(self.entries[name], self.call, self.limits.attempts)

    def owned(self) -> set[str]:
        """Cells of jobs that live and have not given them up."""
        return {
            name
            for job in self.jobs.values()
            for name in job.cells
            if name in self.entries and may_try(self.entries[name], job.call, self.limits.attempts)
        }

    def failures(self) -> dict[str, str]:
        """Cells that ended without a result, and why."""
        return {
            name: (last.why if (last := self.entries[name].last) else "it was never started")
            for name in self.cells
            if name not in self.done
        }

    def run(
        self,
        display: "Display",
        poll_seconds: float,
        watch: Watch | None,
        detach: bool,
        fold: Callable[[], object],
    ) -> None:
        """Until every cell is settled, or, detached, until all are queued; ``fold`` is called as results come.

        Raises:
            RunFailed: jobs end before they begin anything.
        """
        folded, when = len(self.done), time.monotonic()
        while True:
            if watch:
                self.add(watch.new())
            self.look()
            owned = self.owned()
            missing = [name for name in self.unsettled if name not in owned]
            assert self.queue is not None
            # Jobs that could not start now would have a throttle of their own later.
            if missing and (detach or self.queue.has_room(len(self.jobs))):
                self.submit(missing)
            if len(self.done) > folded and time.monotonic() - when >= FOLD_SECONDS:
                fold()
                folded, when = len(self.done), time.monotonic()
            display.show(self)
            if detach or (not self.unsettled and (watch is None or watch.is_over())):
                return
            time.sleep(poll_seconds)

    def look(self) -> None:
        """Read the files of cells that are not done, and drop jobs that are over."""
        assert self.queue is not None
        alive = self.queue.alive(soon=any(job.missed for job in self.jobs.values()))
        for name, cell in self.cells.items():
            if name in self.done:
                continue
            entry = ledger.read(cell.folder(self.folder))
            if entry is None:
                continue
            self.entries[name] = entry
            if entry.last and entry.last.outcome == "done" and cells_room.is_done(cell, self.folder, self.kind, entry):
                self.done.add(name)
        if alive is None:
            return
        self.adopt(alive)
        for job in list(self.jobs.values()):
            job.missed = 0 if job.name in alive else job.missed + 1
            # Files of a job that has just ended may be a moment late on a shared file system.
            if job.missed >= 2:
                self.bury(job)

    def adopt(self, alive: set[str]) -> None:
        """Take up jobs that work on cells and that nobody noted: their call ended while it queued them."""
        for name, entry in self.entries.items():
            last = entry.last
            if last and last.outcome == "running" and last.job in alive:
                mine = self.jobs.setdefault(last.job, Job(last.job, [], last.call))
                if name not in mine.cells:
                    mine.cells.append(name)

    def bury(self, job: Job) -> None:
        """A job is over: what it left half done is lost, what it did not begin is queued again."""
        del self.jobs[job.name]
        began = False
        for name in job.cells:
            entry = self.entries.get(name)
            if entry is None or entry.last is None or entry.last.call != job.call:
                continue
            began = True
            if entry.last.outcome == "running" and entry.last.job in (job.name, HERE):
                why = f"job {entry.last.job} ended while it ran on {entry.last.node}"
                ledger.end(self.cells[name].folder(self.folder), entry, "lost", why)
        mine = job.call == self.call
        self._idle_jobs = 0 if began or not mine else self._idle_jobs + 1
        if self._idle_jobs >= IDLE_JOBS:
            where = self.folder / ("packs" if isinstance(self.queue, LocalQueue) else "slurm")
            raise RunFailed(f"{IDLE_JOBS} jobs in a row ended before they began a cell; their logs are in {where}")

    def submit(self, names: list[str]) -> None:
        """Queue cells, packed into jobs."""
        assert self.queue is not None
        lengths = self.lengths()
        bins = packed({name: self.length_of(name, lengths) for name in names}, self.limits.job_minutes)
        packs = [self._pack(part) for part in bins]
        longest = max(sum(self.length_of(name, lengths) for name in part) for part in bins)
        minutes = math.ceil(1.5 * max(longest, self.limits.job_minutes)) + 5
        left = list(bins)
        for queued in self.queue.submit(packs, minutes, others=list(self.jobs)):
            for name in queued:
                self.jobs[name] = Job(name, left.pop(0), self.call)
            # After each array: should the next be refused, the next call knows this one.
            write_jobs(self.folder, self.jobs.values())
            log.info("queued", jobs=len(queued), first=queued[0])

    def plan(self) -> str:
        """What a call would do."""
        todo = [name for name in self.cells if name not in self.done]
        lengths = self.lengths()
        bins = packed({name: self.length_of(name, lengths) for name in todo}, self.limits.job_minutes)
        lines = [f"{len(self.cells)} cells, {len(self.done)} done; {len(todo)} to do in {len(bins)} jobs"]
        lines += [f"  job {number}: {', '.join(part)}" for number, part in enumerate(bins)]
        return "\n".join(lines)

    def lengths(self) -> dict[str, float]:
        """Minutes that cells took, by what they have in common."""
        measured: dict[str, list[float]] = {}
        for name in self.done:
            if last := self.entries[name].last:
                measured.setdefault(self.likeness(name), []).append(last.seconds / 60)
        return {like: statistics.median(times) for like, times in measured.items()}

    def length_of(self, name: str, lengths: dict[str, float]) -> float:
        """Expected minutes of a cell."""
        return lengths.get(self.likeness(name), self.limits.cell_minutes)

    def likeness(self, name: str) -> str:
        """What cells of the same length have in common."""
        labels = self.cells[name].labels
        return json.dumps([labels.get("data_set"), labels.get("protocol"), labels["settings"]], sort_keys=True)

    def _pack(self, names: list[str]) -> Pack:
        file = self.folder / "packs" / f"{self.call}-{uuid.uuid4().hex[:6]}.json"
        limit_s = 60 * self.limits.cell_limit_minutes
        folder = str(self.folder / "cells")
        return Pack(str(file), folder, names, self.kind, self.call, self.limits.attempts, limit_s, self.limits.save_s)


def packed(lengths: dict[str, float], job_minutes: float) -> list[list[str]]:
    """Cells in jobs of at most ``job_minutes``, in order; a longer one is alone."""
    bins: list[list[str]] = []
    filled = math.inf
    for name, minutes in lengths.items():
        # What is due to rounding is no reason for another job.
        if filled + minutes > job_minutes + 1e-9:
            bins.append([])
            filled = 0.0
        bins[-1].append(name)
        filled += minutes
    return bins


def read_jobs(folder: Path) -> list[Job]:
    """The jobs that an earlier call queued and did not see the end of."""
    try:
        return [Job(**one) for one in json.loads((folder / "jobs.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def write_jobs(folder: Path, jobs: Iterable[Job]) -> None:
    """Remember jobs for the next call."""
    ledger.write_json(folder / "jobs.json", [{"name": j.name, "cells": j.cells, "call": j.call} for j in jobs])
