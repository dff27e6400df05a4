"""One living job per run directory: ``<run>/jobs/0001.json``, ``0002.json``, ... note the jobs of a run, newest last.

A note is made complete and then linked to the next free number, which succeeds once, whoever tries. So of two jobs that
start at the same time one has the run, on any file system that knows hard links.
"""

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from pacl_scale.controller import state_of
from pacl_scale.errors import UserError
from pacl_scale.run_folder import checkpoints_of, settings_of

FOLDER = "jobs"
LOCAL = "local:"


@dataclass
class Note:
    """A job of a run, and how it fares."""

    job: str
    """Slurm's number of the job; ``local:HOST:PID:STARTED`` for a training without Slurm."""
    step: int = 0
    """Newest checkpoint when this attempt started."""
    fruitless: int = 0
    """Attempts in a row before this one that left no newer one."""
    attempt: int = 0
    """Times that Slurm had started the job before."""
    over: bool = False
    """It said itself that it ended; Slurm is asked about the others."""


def enter(run: Path, job: str) -> Note:
    """Have a run for ``job``, or find that it has it already; returns its note.

    Raises:
        UserError: another job of the run is queued or running, or the note cannot be written.
    """
    while True:
        number, note = _newest(run)
        if note and note.job == job:
            return note
        if note:
            refuse_if_alive(run, note)
        mine = Note(job, newest_step(run))
        if _written(run, number + 1, mine, is_new=True):
            return mine


def read(run: Path) -> Note | None:
    """The note of the newest job of a run, if there was one."""
    return _newest(run)[1]


def update(run: Path, note: Note) -> None:
    """Replace the newest note, which must be of the same job."""
    number, before = _newest(run)
    if before and before.job == note.job:
        _written(run, number, note, is_new=False)


def refuse_if_alive(run: Path, note: Note) -> None:
    """Raise :class:`UserError` if the noted job is still queued or running."""
    if note.over or not (state := state_of_note(note)):
        return
    if note.job.startswith(LOCAL):
        _, host, pid, _ = note.job.split(":")
        lost = "" if host == socket.gethostname() else f", or delete {run / FOLDER} if it is gone"
        raise UserError(f"run {run} is trained by process {pid} on {host}; wait for it or end it{lost}")
    raise UserError(f"job {note.job} of run {run} is {state}; wait for it, or end it with: scancel {note.job}")


def state_of_note(note: Note) -> str | None:
    """State of a noted job, as in ``RUNNING``; ``None`` if it is over. A process of another host counts as alive."""
    if note.over:
        return None
    if not note.job.startswith(LOCAL):
        return state_of(note.job)
    _, host, pid, started = note.job.split(":")
    if host != socket.gethostname():
        return "RUNNING"
    try:
        return "RUNNING" if int(psutil.Process(int(pid)).create_time()) == int(started) else None
    except psutil.NoSuchProcess:
        return None


@contextmanager
def held_here(run: Path) -> Iterator[None]:
    """Have a run for this process, without Slurm, for the length of a ``with`` block."""
    me = psutil.Process()
    note = enter(run, f"{LOCAL}{socket.gethostname()}:{me.pid}:{int(me.create_time())}")
    try:
        yield
    finally:
        # On a full disk too: a process that is gone is over.
        with suppress(UserError):
            update(run, replace(note, over=True))


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint of a run; 0 without one."""
    settings = settings_of(str(run))
    folder = checkpoints_of(str(run), settings)
    if not settings and not os.path.isdir(folder):
        return 0
    from pacl_scale import checkpoint

    return max(checkpoint.steps_in(folder), default=0)


def _newest(run: Path) -> tuple[int, Note | None]:
    numbers = [int(file.stem) for file in (run / FOLDER).glob("*.json") if file.stem.isdecimal()]
    if not numbers:
        return 0, None
    file = _file(run, max(numbers))
    try:
        return max(numbers), Note(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read; look whether a job of the run lives, then delete it") from error


def _written(run: Path, number: int, note: Note, is_new: bool) -> bool:
    """Write a note whole; whether it worked out, which it does not where a new one's number is taken."""
    file = _file(run, number)
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
        if is_new:
            os.link(partial, file)
        else:
            partial.replace(file)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return True


def _file(run: Path, number: int) -> Path:
    return run / FOLDER / f"{number:04d}.json"
