"""One run at a time on a data set, on any store: claims are files, and a claim that sees another gives way.

Object stores do not all know how to create a file only if there is none, so nobody takes a lock: each run writes
its own claim first and looks for others after. Of two runs at least one sees the other; if both do, both refuse.
A claim is renewed as long as its run lives. It is dead if it was not renewed for two minutes by the store's own
clock, or at once if its process was on this machine and is gone, or if it is an earlier attempt of this Slurm job.

A run that could not renew its claim for so long, say because its store or its machine was away, may find it taken: the
one that came after has removed it. It then stops within :data:`RENEW_SECONDS`.

Runs on different parts of a data set (:class:`data_prep.parts.Part`) do not mind each other.
"""

import contextlib
import json
import os
import posixpath
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from data_prep import layout
from data_prep.parts import WHOLE, Part
from pacl_scale import storage
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

CLAIMS_FOLDER = ".claims"
RENEW_SECONDS = 20.0
DEAD_AFTER_SECONDS = 120.0


class Busy(UserError):
    """Another run is at work on the same shards."""

    def __init__(self, message: str, on_whole: bool) -> None:
        super().__init__(message)
        self.on_whole = on_whole
        """Whether it is at work on all shards, as a run that prepares the list is for a while."""


@dataclass(frozen=True)
class Claim:
    """Who works on which part of a data set.

    ``machine`` tells process ids of different machines and containers apart; ``job`` is Slurm's, ``attempt`` counts
    how often Slurm has started it before.
    """

    host: str
    machine: str
    pid: int
    part: int = 0
    parts: int = 1
    job: str = ""
    attempt: int = 0


@contextlib.contextmanager
def only_run(root_url: str, part: Part = WHOLE) -> Iterator[None]:
    """Refuse to go on where another run works on the same shards of ``root_url``; keep others out until the end.

    Also the proof that the place can be written to, before any work is done. A block in the main thread is interrupted
    when its claim was taken.

    Raises:
        Busy: another run is at work.
        UserError: the place cannot be written to.
        RunFailed: another run has taken the claim.
    """
    folder = storage.join(root_url, CLAIMS_FOLDER)
    ours = storage.join(folder, f"{uuid.uuid4().hex}.json")
    claim = _own_claim(part)
    content = json.dumps(asdict(claim)).encode()
    with _explained_as(root_url, ours):
        storage.write_bytes(ours, content)
    over = threading.Event()
    main = threading.main_thread() if threading.current_thread() is threading.main_thread() else None

    def stop(number: int, frame: object) -> None:
        if not over.is_set():
            raise _Taken

    # Not SIGINT, which a job in the background of a script is born to ignore.
    before = signal.signal(signal.SIGUSR1, stop) if main else None
    renewal = threading.Thread(target=_renew, args=(ours, content, over, main), name="claim", daemon=True)
    try:
        _refuse_if_taken(root_url, folder, ours, claim)
        renewal.start()
        yield
    except _Taken as error:
        raise RunFailed(f"{root_url}: another run took this one for dead and has taken over") from error
    finally:
        over.set()
        if renewal.is_alive():
            renewal.join()
        if main:
            signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)
        storage.remove(ours)
        if storage.is_local(folder):
            # Another run may have claimed meanwhile; then the folder is not empty and stays.
            with contextlib.suppress(OSError):
                Path(storage.filesystem(folder)[1]).rmdir()


def _own_claim(part: Part) -> Claim:
    job = os.environ.get("SLURM_JOB_ID", "")
    job = f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}" if job else ""
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return Claim(socket.gethostname(), _machine(), os.getpid(), part.number, part.of, job, attempt)


def _refuse_if_taken(root_url: str, folder: str, ours: str, own: Claim) -> None:
    times = _claims(folder)
    now = times[posixpath.basename(ours)]
    for name, renewed in times.items():
        url = storage.join(folder, name)
        if name == posixpath.basename(ours):
            continue
        claim = _read(url)
        if claim is None:
            continue  # it ended between our two looks
        if now - renewed > DEAD_AFTER_SECONDS or _is_gone(claim, own):
            log.warning("a run before this one was killed", host=claim.host, pid=claim.pid)
            storage.remove(url)
            continue
        theirs = Part(claim.part, claim.parts)
        if not theirs.overlaps(Part(own.part, own.parts)):
            continue
        where = "there" if theirs.is_whole else f"on its {theirs}"
        raise Busy(
            f"{root_url}: another run is at work {where} (process {claim.pid} on {claim.host}); "
            f"if it is dead, wait {DEAD_AFTER_SECONDS:g} s",
            theirs.is_whole,
        )


def _claims(folder: str) -> dict[str, float]:
    """When each claim was renewed, in seconds of the store's clock, by name."""
    files, path = storage.filesystem(folder)
    with storage.explained(folder):
        files.invalidate_cache()
        entries = [entry for entry in files.ls(path, detail=True) if entry["name"].endswith(".json")]
    return {posixpath.basename(entry["name"]): _time_of(entry) for entry in entries}


def _time_of(entry: dict[str, Any]) -> float:
    when = entry.get("LastModified", entry.get("mtime", entry.get("updated")))
    return when.timestamp() if isinstance(when, datetime) else float(when or 0.0)


def _read(url: str) -> Claim | None:
    try:
        return Claim(**json.loads(storage.read_bytes(url)))
    except (UserError, ValueError, TypeError):
        return None


def _is_gone(claim: Claim, own: Claim) -> bool:
    if own.job and claim.job == own.job and claim.attempt < own.attempt:
        return True  # Slurm starts a job again only after its end
    return claim.machine == _machine() and not psutil.pid_exists(claim.pid)


def _machine() -> str:
    """What a process id is valid in: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class _Taken(BaseException):
    """Like KeyboardInterrupt: nothing on the way out may take it for a fault of its own."""


def _renew(url: str, content: bytes, over: threading.Event, main: threading.Thread | None) -> None:
    """Renew a claim until it is ``over``, or was taken by another run; the latter interrupts the ``main`` thread."""
    folder, _, name = url.rpartition("/")
    while not over.wait(RENEW_SECONDS):
        try:
            if name not in layout.file_sizes(folder):
                log.warning("the claim of this run was taken", claim=url)
                if main is not None:
                    signal.pthread_kill(main.ident or 0, signal.SIGUSR1)
                return
            storage.write_bytes(url, content)
        except Exception as error:
            # A store that is away for a while costs renewals; whether also the run is seen when it is back.
            log.warning("the claim could not be renewed", reason=str(error))


@contextlib.contextmanager
def _explained_as(root_url: str, url: str) -> Iterator[None]:
    """Faults of the claim's own file are told as faults of the place that the user named."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(url, root_url)) from error
