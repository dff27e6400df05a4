"""Blocks of remote shards kept on a local disk, within a bound, for all processes of the machine.

Ranges differ from epoch to epoch and from rank to rank, so what is kept is not the ranges but the aligned blocks that
they touch: ``<folder>/pacl-blocks/<shard and version>/<block number>``, each with its CRC at the end. Nothing else in
the folder, which may be a scratch disk that others use, is ever touched. A block's age is that of its
file, which a reader renews; the oldest go when the bound is reached. The bytes in use are counted in one file under a
lock, so that the bound holds for all processes together; a count that a killed process left too high is put right when
blocks are next thrown away.
"""

import fcntl
import os
import re
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

if TYPE_CHECKING:
    from pacl_scale.data.ranges import Piece, RangeClient

log = get_logger(__name__)

BLOCK_BYTES = 1 << 20
CRC_BYTES = 4
LEFT_AFTER_CLEANING = 0.9
"""Share of the bound that is kept when the oldest blocks go, so that they go many at a time."""
FOLDER_NAME = "pacl-blocks"
COUNT_NAME = "bytes"
PARTIAL = ".part"
OWN_FILE = re.compile(r"[0-9a-f]{32}/[0-9]+(\.[0-9a-f]{8}\.part)?")
"""What may be thrown away: blocks, and what a killed process left of one."""


class DiskCache:
    """A folder of blocks, shared by any number of threads and processes of this machine.

    Args:
        folder: made if need be; the blocks lie in a folder of their own in it.
        bound: bytes that all blocks together may take.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str, bound: int) -> None:
        self.folder, self.bound = Path(folder) / FOLDER_NAME, bound
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._count():
                pass
        except OSError as error:
            raise UserError(f"data.read.disk_cache: {folder} cannot be written to ({error.strerror})") from error

    def get(self, shard: str, block: int, size: int) -> bytes | None:
        """A block of ``size`` bytes; None where it is not there. One that is damaged is thrown away."""
        path = self.folder / shard / str(block)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
        if len(body) != size or struct.pack("<I", zlib.crc32(body)) != crc:
            log.warning("damaged block in the disk cache", path=str(path))
            path.unlink(missing_ok=True)
            return None
        # Another process may just have thrown it away.
        with suppress(OSError):
            os.utime(path)
        return body

    def put(self, shard: str, block: int, content: bytes) -> None:
        """Keep a block. A disk that is full or broken costs the cache, not the run: it is said once."""
        path = self.folder / shard / str(block)
        partial = path.with_name(f"{block}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        size = len(content) + CRC_BYTES
        if size > self.bound:
            return
        try:
            # Written under the lock, so that whoever counts the files finds all that were counted.
            with self._count() as count:
                if path.exists():
                    return
                used = read_count(count)
                used = used if used + size <= self.bound else self._clean(size)
                write_count(count, used + size)
                path.parent.mkdir(exist_ok=True)
                partial.write_bytes(content + struct.pack("<I", zlib.crc32(content)))
                # A reader sees no block or a whole one.
                partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                log.warning("the disk cache cannot be written", folder=str(self.folder), error=str(error))

    def _clean(self, needed: int) -> int:
        """Throw away the oldest blocks; the bytes that are left. The lock is held."""
        found = []
        for path in self.folder.glob("*/*"):
            if not OWN_FILE.fullmatch(path.relative_to(self.folder).as_posix()):
                continue
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in found)
        most = min(self.bound - needed, int(LEFT_AFTER_CLEANING * self.bound))
        for _, size, path in sorted(found):
            if used <= most:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextmanager
    def _count(self) -> Iterator[int]:
        """The file that counts the bytes in use, locked against all threads and processes."""
        # A descriptor of its own each time: flock excludes open files, so threads exclude each other as well.
        descriptor = os.open(self.folder / COUNT_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def read_count(descriptor: int) -> int:
    """The number in a counting file; 0 where there is none yet."""
    digits = os.pread(descriptor, 32, 0).strip()
    return int(digits) if digits.isdigit() else 0


def write_count(descriptor: int, value: int) -> None:
    """Put ``value`` into a counting file."""
    os.pwrite(descriptor, b"%31d\n" % value, 0)


class CachedClient:
    """A :class:`~pacl_scale.data.ranges.RangeClient` that asks another one only for blocks that are not on the disk.

    The first read of a shard asks the store for one byte, and with it for the shard's size and version, which are part
    of the blocks' place: blocks of a shard that was replaced are never found again (where the store names no version,
    only its size tells).

    Args:
        client: reads from the store.
        cache: where blocks are kept.
        root_url: of the data set.
        sizes: bytes of each shard by name, as indexed.
    """

    def __init__(self, client: "RangeClient", cache: DiskCache, root_url: str, sizes: dict[str, int]) -> None:
        self._client, self._cache, self._root_url, self._sizes = client, cache, root_url, sizes
        self._known: dict[str, Piece] = {}
        self._lock = threading.Lock()

    def get(self, name: str, start: int, stop: int) -> "Piece":
        """See :class:`~pacl_scale.data.ranges.RangeClient`."""
        known = self._known.get(name)
        if known is None:
            known = self._client.get(name, 0, 1)
            with self._lock:
                self._known[name] = known
        total = self._sizes[name]
        if known.size not in (None, total) or stop > total:
            return known._replace(content=b"")
        shard = blake2b(f"{self._root_url}/{name} {known.size} {known.version}".encode(), digest_size=16).hexdigest()
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        sizes = {n: min(total, (n + 1) * BLOCK_BYTES) - n * BLOCK_BYTES for n in range(first, last)}
        blocks = {number: self._cache.get(shard, number, size) for number, size in sizes.items()}
        for begin, end in _gaps(blocks):
            piece = self._client.get(name, begin * BLOCK_BYTES, min(end * BLOCK_BYTES, total))
            if len(piece.content) != sum(sizes[n] for n in range(begin, end)) or piece.version != known.version:
                # Too short, or of another version: whoever asked has to judge, and nothing is kept.
                with self._lock:
                    self._known.pop(name, None)
                return piece._replace(content=b"")
            for number in range(begin, end):
                at = (number - begin) * BLOCK_BYTES
                block = blocks[number] = piece.content[at : at + sizes[number]]
                self._cache.put(shard, number, block)
        content = b"".join(block or b"" for block in blocks.values())
        offset = first * BLOCK_BYTES
        return known._replace(content=content[start - offset : stop - offset])


def _gaps(blocks: dict[int, bytes | None]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers whose block is missing, as bounds."""
    gaps: list[tuple[int, int]] = []
    for number, block in blocks.items():
        if block is not None:
            continue
        if gaps and gaps[-1][1] == number:
            gaps[-1] = (gaps[-1][0], number + 1)
        else:
            gaps.append((number, number + 1))
    return gaps
