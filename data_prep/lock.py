"""One run at a time on a data set, on any store: claims are files, and a claim that sees another gives way.

Object stores do not all know how to create a file only if there is none, so nobody takes a lock: each run writes
its own claim first and looks for others after. Of two runs at least one sees the other; if both do, both refuse.
A claim is renewed as long as its run lives. It is dead if it was not renewed for two minutes by the store's own
clock, or at once if its process was on this machine and is gone.
"""

import contextlib
import json
import os
import posixpath
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

CLAIMS_FOLDER = ".claims"
RENEW_SECONDS = 20.0
DEAD_AFTER_SECONDS = 120.0


@dataclass(frozen=True)
class Claim:
    """Who works on a data set: ``machine`` tells process ids of different machines and containers apart."""

    host: str
    machine: str
    pid: int


@contextlib.contextmanager
def only_run(root_url: str) -> Iterator[None]:
    """Refuse to go on where another run works on ``root_url``; keep others out until the end.

    Also the proof that the place can be written to, before any work is done.

    Raises:
        UserError: another run is at work; or the place cannot be written to.
    """
    folder = storage.join(root_url, CLAIMS_FOLDER)
    ours = storage.join(folder, f"{uuid.uuid4().hex}.json")
    content = json.dumps(asdict(Claim(socket.gethostname(), _machine(), os.getpid()))).encode()
    with _explained_as(root_url, ours):
        storage.write_bytes(ours, content)
    over = threading.Event()
    renewal = threading.Thread(target=_renew, args=(ours, content, over), name="claim", daemon=True)
    try:
        _refuse_if_taken(root_url, folder, ours)
        renewal.start()
        yield
    finally:
        over.set()
        if renewal.is_alive():
            renewal.join()
        storage.remove(ours)
        if storage.is_local(folder):
            # Another run may have claimed meanwhile; then the folder is not empty and stays.
            with contextlib.suppress(OSError):
                Path(storage.filesystem(folder)[1]).rmdir()


def _refuse_if_taken(root_url: str, folder: str, ours: str) -> None:
    times = _claims(folder)
    now = times[posixpath.basename(ours)]
    for name, renewed in times.items():
        url = storage.join(folder, name)
        if name == posixpath.basename(ours):
            continue
        claim = _read(url)
        if claim is None:
            continue  # it ended between our two looks
        if now - renewed > DEAD_AFTER_SECONDS or _is_gone(claim):
            log.warning("a run before this one was killed", host=claim.host, pid=claim.pid)
            storage.remove(url)
            continue
        raise UserError(
            f"{root_url}: another run is at work there (process {claim.pid} on {claim.host}); "
            f"if it is dead, wait {DEAD_AFTER_SECONDS:g} s"
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


def _is_gone(claim: Claim) -> bool:
    return claim.machine == _machine() and not psutil.pid_exists(claim.pid)


def _machine() -> str:
    """What a process id is valid in: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _renew(url: str, content: bytes, over: threading.Event) -> None:
    while not over.wait(RENEW_SECONDS):
        # A store that is away for a moment costs one renewal, not the run.
        with contextlib.suppress(UserError):
            storage.write_bytes(url, content)


@contextlib.contextmanager
def _explained_as(root_url: str, url: str) -> Iterator[None]:
    """Faults of the claim's own file are told as faults of the place that the user named."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(url, root_url)) from error
