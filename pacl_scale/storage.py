"""Files anywhere: a path or any fsspec URL (``s3://bucket/key``), with faults put into one sentence.

Credentials and endpoints come from the environment or the cloud's own configuration files (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, ``~/.aws``), never from this project's configuration, so that no
secret can reach a log or a run directory.
"""

import errno
import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec import AbstractFileSystem

from pacl_scale.errors import RunFailed, UserError, first_line
from pacl_scale.log import get_logger

Result = TypeVar("Result")

ATTEMPTS = 7
"""How often :func:`patiently` asks a store that does not answer; with the pauses between, about half a minute."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What no waiting mends: no space, no quota, nothing to write to."""

logger = get_logger("pacl_scale.storage")


class StoreUnavailable(UserError):
    """A store did not answer, or not as it should: perhaps an address that is wrong, perhaps an outage that passes."""


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` appended; works alike for paths and URLs."""
    return posixpath.join(url.rstrip("/") if len(url) > 1 else url, *parts)


def is_local(url: str) -> bool:
    """Whether ``url`` is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def filesystem(url: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """The filesystem of ``url``, with ``options`` of its own, and the path on it.

    Raises:
        UserError: no such protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be opened: {error}") from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn the faults of a store into a :class:`UserError` of one sentence that names ``url``."""
    try:
        yield
    except PermissionError as error:
        if is_local(url):
            raise UserError(f"{url} cannot be used ({first_line(error)}); choose a place of your own") from error
        raise UserError(f"{url}: access was refused ({first_line(error)}); check the access key and secret") from error
    except FileNotFoundError as error:
        if "bucket" in str(error).lower():
            raise UserError(f"{url}: the bucket does not exist; create it first") from error
        raise UserError(f"{url}: there is no such file") from error
    except (OSError, TimeoutError) as error:
        if getattr(error, "errno", None) in FULL:
            raise UserError(f"{url} cannot be written ({first_line(error)})") from error
        raise StoreUnavailable(f"{url}: the store did not answer as it should ({first_line(error)})") from error
    except Exception as error:
        # botocore's own errors (no credentials, endpoint not reachable) share no base class with OSError.
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        failure = UserError if "Credential" in type(error).__name__ else StoreUnavailable
        raise failure(f"{url}: the store cannot be used ({first_line(error)})") from error


def patiently(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, asked again with growing pauses while a store does not answer.

    For what runs unattended; where a user waits, the first sentence is the best one.

    Raises:
        RunFailed: the store did not answer in :data:`ATTEMPTS` attempts.
        UserError: what no patience mends (no access, no such file).
    """

    def say(attempt: tenacity.RetryCallState) -> None:
        assert attempt.outcome is not None
        logger.warning("asked again soon", why=str(attempt.outcome.exception()), attempt=attempt.attempt_number)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StoreUnavailable),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(multiplier=0.25, max=16, jitter=0.5),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(function, *arguments)
    except StoreUnavailable as error:
        raise RunFailed(f"{error}, {ATTEMPTS} times in a row") from error


def read_bytes(url: str) -> bytes:
    """The whole content of ``url``. Raises :class:`UserError` where it cannot be read."""
    files, path = filesystem(url)
    with explained(url):
        return files.cat_file(path)


def stamp(url: str) -> tuple[int, str]:
    """Bytes of the file at ``url``, and what changes whenever it does; empty where the store does not say."""
    files, path = filesystem(url)
    with explained(url):
        files.invalidate_cache(path)
        found = files.info(path)
    marks = [str(found[name]) for name in ("ETag", "LastModified", "mtime", "updated", "created") if found.get(name)]
    return int(found.get("size") or 0), " ".join(marks)


def write_bytes(url: str, content: bytes) -> None:
    """Write ``content`` so that a reader sees the old file or the new one, never half of it.

    Local files are written beside and renamed; object stores make a put visible only when it is complete.
    """
    files, path = filesystem(url)
    with explained(url):
        if not is_local(url):
            files.pipe_file(path, content)
            return
        files.makedirs(posixpath.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            files.pipe_file(partial, content)
            files.mv(partial, path)
        finally:
            if files.exists(partial):
                files.rm_file(partial)


def remove(url: str) -> None:
    """Delete the file or the whole folder at ``url``; nothing happens where there is none.

    Objects are deleted one by one: the bulk request of S3 wants a checksum header that current clients no longer
    send and that some S3-compatible servers insist on.
    """
    files, path = filesystem(url)
    with explained(url):
        if is_local(url) and files.isdir(path):
            files.rm(path, recursive=True)
            return
        for found in files.find(path):
            files.rm_file(found)


def exists(url: str) -> bool:
    """Whether there is a file or a folder at ``url``; :class:`UserError` where that cannot be told."""
    files, path = filesystem(url)
    with explained(url):
        return files.exists(path)


def check_writable(url: str) -> None:
    """Prove that ``url`` (a folder to be) can be written to, before any work is done.

    Raises:
        UserError: wrong credentials, missing bucket, read-only place.
    """
    probe = join(url, f".write-check-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"")
    remove(probe)
