"""Ranged reads of the shards of one data set: what may pass is retried, what changed is noticed.

S3 is read through botocore (the client beneath s3fs) in threads: with ranges of a megabyte it is as fast as the Rust
client obstore and nearly twice as fast as s3fs, finds credentials where every AWS tool does, tells the size and ETag
with every range, and a process that forks can make itself a new one. Local files are read with ``pread``; everything
else through fsspec.
"""

import errno
import os
import random
import threading
import time
from collections import Counter
from typing import Any, NamedTuple, Protocol

from pacl_scale import storage
from pacl_scale.data.disk_cache import CachedClient, DiskCache
from pacl_scale.data.index import SampleIndex
from pacl_scale.errors import RunFailed, UserError

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 10.0
LONGEST_READ = 10
"""Times read.timeout_s that a whole range may take."""
BODY_BYTES = 256 << 10
INDEX_AGAIN = "run the index step again"

PASSING_CODES = ("SlowDown", "InternalError", "RequestTimeout", "RequestTimeTooSkewed", "ServiceUnavailable")
"""S3 error codes that are worth another try, beside every HTTP status from 500 on and 429."""


class ShardChanged(UserError):
    """A shard is no longer what was indexed."""


class PassingFault(Exception):
    """A fault that may be gone at the next try; the message is the cause under which it is counted."""


class Closed(Exception):
    """The stream was closed before a read was done."""


class Piece(NamedTuple):
    """Some bytes of a file, and what the store said of the file with them."""

    content: bytes
    size: int | None
    """Of the whole file, in bytes; None where the store does not say."""
    version: str | None
    """Changes when the file does; None where the store does not say."""


class RangeClient(Protocol):
    """Reads bytes ``start`` to ``stop`` of a shard. Must be safe to call from several threads."""

    def get(self, name: str, start: int, stop: int) -> Piece:
        """Raises PassingFault, FileNotFoundError, PermissionError, or what cannot be helped."""
        ...


class ShardReader:
    """Bytes of an indexed data set's shards.

    Args:
        index: says where and how large the shards are.
        connections: threads that will read at the same time.
        timeout_s: seconds without an answer, or without a further byte, after which a try is given up.
        retries: further tries after a fault that may pass.
        disk_cache: keeps blocks of the shards; None reads from the store every time.
    """

    def __init__(
        self,
        index: SampleIndex,
        connections: int,
        timeout_s: float,
        retries: int,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self.index = index
        self._disk_cache = disk_cache
        self.retried: Counter[str] = Counter()
        self._connections, self._timeout_s, self._retries = connections, timeout_s, retries
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._versions: dict[int, str] = {}
        self._client: RangeClient | None = None

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a shard.

        Raises:
            ShardChanged: the shard is gone, or no longer the one that was indexed.
            UserError: the store refuses.
            RunFailed: it still fails after all tries; an outage is no mistake of the user, and passes.
            Closed: :meth:`close` was called meanwhile.
        """
        url = self.url(shard)
        for attempt in range(self._retries + 1):
            try:
                with storage.explained(url):
                    piece = self._open().get(self.index.shards[shard].name, start, stop)
                if len(piece.content) != stop - start:
                    self._notice_change(shard, piece)
                    raise PassingFault("short body")
                self._notice_change(shard, piece)
                return piece.content
            except PassingFault as fault:
                self._wait(url, attempt, fault)
            except storage.StoreUnavailable as error:
                self._wait(url, attempt, PassingFault(type(error.__cause__).__name__))
            except UserError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise ShardChanged(f"{url} was indexed but is gone; {INDEX_AGAIN}") from error
                raise
        raise AssertionError("unreachable: the last try raises")

    def url(self, shard: int) -> str:
        """Where a shard lies."""
        return storage.join(self.index.root_url, self.index.shards[shard].name)

    def close(self) -> None:
        """Let no read begin a further try."""
        self._closing.set()

    def again(self) -> "ShardReader":
        """A reader of the same shards over the same connections, that is not closed and has counted nothing."""
        other = ShardReader(self.index, self._connections, self._timeout_s, self._retries, self._disk_cache)
        other._client = self._client
        return other

    def _open(self) -> RangeClient:
        with self._lock:
            if self._client is None:
                root_url = self.index.root_url
                client = open_client(root_url, self._connections, self._timeout_s)
                if self._disk_cache and not storage.is_local(root_url):
                    sizes = {shard.name: shard.size for shard in self.index.shards}
                    client = CachedClient(client, self._disk_cache, root_url, sizes)
                self._client = client
            return self._client

    def _notice_change(self, shard: int, piece: Piece) -> None:
        indexed = self.index.shards[shard].size
        if piece.size is not None and piece.size != indexed:
            raise ShardChanged(
                f"{self.url(shard)} has {piece.size:,} bytes, but {indexed:,} when it was indexed; {INDEX_AGAIN}"
            )
        if piece.version is not None and self._versions.setdefault(shard, piece.version) != piece.version:
            raise ShardChanged(f"{self.url(shard)} was replaced while it was being read")

    def _wait(self, url: str, attempt: int, fault: PassingFault) -> None:
        """Wait before the next try: twice as long each time, and a random part of it, so that ranks do not march in
        step against a store that is slow already."""
        with self._lock:
            self.retried[str(fault)] += 1
        if attempt == self._retries:
            raise RunFailed(f"{url}: the store still fails after {attempt + 1} tries ({fault})") from fault
        longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt)
        if self._closing.wait(random.uniform(longest / 2, longest)):
            raise Closed


def open_client(root_url: str, connections: int, timeout_s: float) -> RangeClient:
    """The client for a folder's protocol."""
    if storage.is_local(root_url):
        return FileClient(root_url)
    if root_url.startswith(("s3://", "s3a://")):
        return S3Client(root_url, connections, timeout_s)
    return FsspecClient(root_url, timeout_s)


class FileClient:
    """Files of this machine, or of a file system mounted on it."""

    def __init__(self, root_url: str) -> None:
        _, self._root = storage.filesystem(root_url)

    def get(self, name: str, start: int, stop: int) -> Piece:
        """See :class:`RangeClient`."""
        try:
            descriptor = os.open(os.path.join(self._root, name), os.O_RDONLY)
            try:
                content = os.pread(descriptor, stop - start, start)
                status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            # Network file systems lose a handle or an answer now and then.
            if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN):
                raise PassingFault(errno.errorcode[error.errno]) from error
            raise
        return Piece(content, status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")


class S3Client:
    """An S3 bucket, or anything that speaks its protocol, through botocore."""

    def __init__(self, root_url: str, connections: int, timeout_s: float) -> None:
        import botocore.session
        from botocore.config import Config

        self._longest_s = LONGEST_READ * timeout_s
        self._bucket, _, self._prefix = root_url.partition("://")[2].partition("/")
        self._client: Any = botocore.session.Session().create_client(
            "s3",
            config=Config(
                max_pool_connections=connections,
                connect_timeout=timeout_s,
                read_timeout=timeout_s,
                # Tries are counted and spaced by ShardReader.
                retries={"total_max_attempts": 1},
                # A checksum is of the whole object, and cannot be checked on a range.
                response_checksum_validation="when_required",
            ),
        )

    def get(self, name: str, start: int, stop: int) -> Piece:
        """See :class:`RangeClient`."""
        from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

        key = storage.join(self._prefix, name) if self._prefix else name
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
            content = self._whole(answer["Body"])
        except ClientError as error:
            raise _explain_s3(error) from error
        except (ConnectionError, HTTPClientError) as error:
            raise PassingFault(type(error).__name__) from error
        total = answer.get("ContentRange", "").rpartition("/")[2]
        return Piece(content, int(total) if total.isdigit() else None, answer.get("ETag"))

    def _whole(self, body: Any) -> bytes:
        began, pieces = time.monotonic(), []
        for piece in body.iter_chunks(BODY_BYTES):
            pieces.append(piece)
            # A store that drips never meets the time-out, which begins anew with each byte.
            if time.monotonic() - began > self._longest_s:
                body.close()
                raise PassingFault("slow body")
        return b"".join(pieces)


class FsspecClient:
    """Any other protocol that fsspec knows; whether a file was replaced shows in its size only."""

    def __init__(self, root_url: str, timeout_s: float) -> None:
        options: dict[str, Any] = {}
        if root_url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(LONGEST_READ * timeout_s, sock_connect=timeout_s, sock_read=timeout_s)
            options = {"client_kwargs": {"timeout": limits}}
        self._files, self._root = storage.filesystem(root_url, **options)
        self._sizes: dict[str, int | None] = {}

    def get(self, name: str, start: int, stop: int) -> Piece:
        """See :class:`RangeClient`."""
        path = storage.join(self._root, name)
        try:
            if name not in self._sizes:
                self._sizes[name] = self._files.info(path).get("size")
            content = self._files.cat_file(path, start=start, end=stop)
            if len(content) == self._sizes[name] and len(content) > stop - start:
                raise UserError(
                    f"{path}: the server sends whole files where ranges are asked for; use one that does not"
                )
            return Piece(content, self._sizes[name], None)
        except (UserError, FileNotFoundError, PermissionError, NotImplementedError):
            # These do not pass: asking again would only delay the reader's sentence.
            raise
        except Exception as error:
            # Every protocol has its own errors (aiohttp's, paramiko's, ...); what does not pass ends the tries.
            raise PassingFault(type(error).__name__) from error


def _explain_s3(error: Any) -> Exception:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500 or status == 429 or code in PASSING_CODES:
        return PassingFault(f"{status} {code}".strip())
    if code == "NoSuchBucket":
        return FileNotFoundError("the bucket does not exist")
    if status in (404, 416):
        # 416: the range begins beyond the end, so the shard that was indexed is gone as well.
        return FileNotFoundError(str(error))
    if status in (401, 403):
        return PermissionError(str(error))
    return error
