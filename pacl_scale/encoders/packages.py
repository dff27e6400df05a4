"""Files that ship inside installed packages: found by name, checked, and unpacked once into a cache folder."""

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pacl_scale.errors import UserError


def packaged_file(distribution: str, relative: str) -> Path:
    """The path of a file of an installed distribution, without importing its code.

    Raises:
        UserError: the distribution is not installed, or does not hold the file.
    """
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(relative)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the package {distribution} is not installed; run: pip install 'pacl-scale[demo]'") from error
    if not path.is_file():
        raise UserError(f"the installed {distribution} holds no {relative}; run: pip install 'pacl-scale[demo]'")
    return path


def check_sha256(content: bytes, expected: str, name: str) -> None:
    """Raise :class:`UserError` unless ``content`` has the SHA-256 sum that is known for it."""
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{name} is not the file that is known: its SHA-256 does not begin with {expected[:12]}")


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the user's cache, made by ``fill`` the first time.

    It appears whole or not at all: ``fill`` works in a folder beside it, which is then renamed. Of several
    processes that do so at once the first one wins, and the others drop theirs. The name should say the version
    of its content, since an existing folder is taken as it is.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written; set XDG_CACHE_HOME to a folder that can") from error
    try:
        fill(work)
        os.rename(work, folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/pacl-scale``, or ``~/.cache/pacl-scale`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pacl-scale"
