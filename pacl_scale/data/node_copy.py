"""The index of a remote data set, once on each machine: unpacked in a file there, mapped by all its processes.

An index of 30 million samples takes 600 MB of memory and is some 300 MB to fetch. With eight ranks on a node that would
be eight times either. So whoever comes first writes the columns as they lie in memory to a file in the folder for
temporary files (``TMPDIR``), while the others wait for it, and all map that file: its pages are in memory once.

A copy's name holds the index's place and version at the store (its ETag, or its time), so an index that was written
anew is never mistaken for the old one. It begins with JSON of all that the index says beside its columns, and their
sums.
"""

import fcntl
import json
import mmap
import os
import struct
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pacl_scale.log import get_logger

log = get_logger(__name__)

SMALLEST = 4 << 20
"""Bytes of an index from which it is shared; a smaller one is read by each process, as that costs nothing."""

KEPT_S = 7 * 86400
"""Copies that were not opened for so long are thrown away when the next one is written."""

MAGIC = b"pacl index copy 1\n"
PAGE = 4096
ENDING = ".columns"

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Unpacked:
    """An index as it is copied: its columns, and all else that it says as JSON."""

    columns: Columns
    meta: dict[str, Any]


def shared(url: str, version: str, read: Callable[[], Unpacked]) -> Unpacked:
    """What ``read`` returns, from this machine's copy, which is made with it if need be.

    Where no copy can be kept (no space, a folder that is another's) the process has its own in memory, and a warning
    says so.

    Args:
        url: of the index.
        version: changes whenever the index does.
        read: fetches and unpacks it.

    Raises:
        Whatever ``read`` raises.
    """
    unpacked = damaged = None
    try:
        # A second time where the copy that was there is damaged.
        for _ in range(2):
            with _locked(url) as folder:
                path = folder / f"{_digest(url)}-{_digest(version)}{ENDING}"
                if not path.exists() or path.stat().st_ino == damaged:
                    unpacked = unpacked or read()
                    _throw_away_old(folder, path)
                    _write(path, unpacked)
                damaged = path.stat().st_ino
            # All look through it at the same time, not one after the other.
            if (found := open_copy(path)) is not None:
                return found
    except OSError as error:
        log.warning("the index is not shared between the processes of this machine", why=str(error), index=url)
    return unpacked or read()


def open_copy(path: Path) -> Unpacked | None:
    """The copy at ``path``, mapped; None where there is none, or one that is damaged."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    try:
        meta, begin = _read_head(mapped)
        columns = {}
        for name, dtype in meta["columns"].items():
            columns[name] = np.frombuffer(mapped, dtype, meta["samples"], begin)
            begin = _next_page(begin + columns[name].nbytes)
        if {name: sum_of(column) for name, column in columns.items()} != meta["sums"]:
            raise ValueError("its columns are damaged")
    except (KeyError, TypeError, ValueError, struct.error) as error:
        log.warning("damaged copy of an index", path=str(path), why=str(error))
        return None
    # Summing has touched every page; they stay in the machine's memory, but need not count as this process's.
    mapped.madvise(mmap.MADV_DONTNEED)
    with suppress(OSError):
        os.utime(path)
    return Unpacked(columns, meta["index"])


def sum_of(column: np.ndarray) -> int:
    """Sum in 64 bits: a thirtieth of a CRC's time, and no flipped bit leaves it as it was."""
    return int(column.sum(dtype=np.uint64))


def _write(path: Path, unpacked: Unpacked) -> None:
    columns = unpacked.columns
    meta = {
        "index": unpacked.meta,
        "samples": len(next(iter(columns.values()))),
        "columns": {name: column.dtype.str for name, column in columns.items()},
        "sums": {name: sum_of(column) for name, column in columns.items()},
    }
    head = json.dumps(meta).encode()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("wb") as file:
            file.write(MAGIC + struct.pack("<Q", len(head)) + head)
            for column in columns.values():
                file.seek(_next_page(file.tell()))
                file.write(column.data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_head(mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The JSON, and where the first column begins."""
    begin = len(MAGIC) + 8
    if mapped[: len(MAGIC)] != MAGIC:
        raise ValueError("it is none")
    (length,) = struct.unpack("<Q", mapped[len(MAGIC) : begin])
    return json.loads(mapped[begin : begin + length]), _next_page(begin + length)


def _throw_away_old(folder: Path, path: Path) -> None:
    """Other versions of the same index, and what nobody has opened for long. Who has one mapped keeps it."""
    for other in folder.glob(f"*{ENDING}*"):
        with suppress(OSError):
            same = other.name.split("-")[0] == path.name.split("-")[0]
            if same or time.time() - other.stat().st_mtime > KEPT_S:
                other.unlink()


@contextmanager
def _locked(url: str) -> Iterator[Path]:
    """The folder of copies, this user's alone, while no other process is at this index; a killed one's lock ends with
    it."""
    folder = Path(tempfile.gettempdir()) / f"pacl-index-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    descriptor = os.open(folder / f"{_digest(url)}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _next_page(offset: int) -> int:
    return -(-offset // PAGE) * PAGE
