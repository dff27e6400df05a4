"""Files of a data set wherever they lie: folders, URLs, and zip or tar archives as they were downloaded.

An address may lead into an archive: ``/data/ADEChallengeData2016.zip/ADEChallengeData2016/images`` or
``s3://bucket/voc.tar/VOCdevkit``. Archives are listed once and stay open; reads of one archive take turns. A
compressed tar is unpacked into a temporary file first, as it can only be read from its beginning.
"""

import contextlib
import functools
import gzip
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from typing import Literal

import fsspec
from fsspec import AbstractFileSystem

from pacl_scale import storage
from pacl_scale.errors import UserError

ARCHIVES = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar"}


def read(address: str) -> bytes:
    """The content of the file at ``address``. Raises :class:`UserError` where it cannot be read."""
    archive, inner = _split(address)
    if archive is None:
        return storage.read_bytes(address)
    files, lock = _opened(archive)
    with lock, storage.explained(address):
        return files.cat_file(inner)


def is_folder(address: str) -> bool:
    """Whether there is a folder (or an archive, which holds one) at ``address``."""
    archive, inner = _split(address)
    if archive is not None and not inner:
        # Opened at once, so that a damaged one is named here.
        return storage.exists(archive) and bool(_opened(archive))
    return _is(address, "isdir")


def is_file(address: str) -> bool:
    """Whether there is a file at ``address``."""
    return _is(address, "isfile")


def _is(address: str, what: Literal["isdir", "isfile"]) -> bool:
    archive, inner = _split(address)
    if archive is None:
        files, path = storage.filesystem(address)
        with storage.explained(address):
            return getattr(files, what)(path)
    if not storage.exists(archive):
        return False
    files, lock = _opened(archive)
    with lock, storage.explained(address):
        return getattr(files, what)(inner)


def names(folder: str) -> list[str]:
    """Paths of all files below ``folder``, relative to it, sorted; folders of folders are gone through."""
    archive, inner = _split(folder)
    if archive is None:
        files, path = storage.filesystem(folder)
        with storage.explained(folder):
            found = files.find(path)
    else:
        files, lock = _opened(archive)
        path = inner
        with lock, storage.explained(folder):
            found = files.find(path)
    start = len(path.strip("/")) + 1 if path.strip("/") else 0
    return sorted(name.strip("/")[start:] for name in found)


def _split(address: str) -> tuple[str | None, str]:
    """The archive that ``address`` leads into, if any, and the path inside it."""
    for suffix in ARCHIVES:
        head, found, inner = (address + "/").partition(f"{suffix}/")
        if found:
            archive = head + suffix
            files, path = storage.filesystem(archive)
            with storage.explained(archive):
                if not files.isdir(path):
                    return archive, inner.strip("/")
    return None, address


@contextlib.contextmanager
def _plain(archive: str) -> Iterator[str]:
    """Where the archive can be opened: of a compressed tar a temporary file, which whoever opened it may keep open."""
    if not archive.endswith("gz"):
        yield archive
        return
    files, path = storage.filesystem(archive)
    with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
        try:
            with files.open(path, "rb") as packed, gzip.open(packed) as content:
                shutil.copyfileobj(content, tar, 2**20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{archive} cannot be opened as an archive ({error}); download it again") from error
        tar.flush()
        yield tar.name


@functools.lru_cache(maxsize=8)
def _opened(archive: str) -> tuple[AbstractFileSystem, threading.Lock]:
    kind = next(kind for suffix, kind in ARCHIVES.items() if archive.endswith(suffix))
    try:
        with storage.explained(archive), _plain(archive) as opened:
            return fsspec.filesystem(kind, fo=opened, skip_instance_cache=True), threading.Lock()
    except UserError:
        raise
    except Exception as error:
        # zipfile and tarfile raise their own kinds for a damaged archive.
        raise UserError(f"{archive} cannot be opened as an archive ({error}); download it again") from error
