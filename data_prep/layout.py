"""Names of the files of a data set, and how a finished file gets to its place.

====================  ==========================================================================================
``list/00000.parquet``  what shard 00000 is to hold: ``id``, ``url``, ``caption``, ``nouns``, one row a picture
``list/plan.json``      which list that was made from and how; written when the last of them is complete
``list/preparing.json`` which list the prepared ones so far were made from; gone when the plan is there
``list/pictures.json``  how its pictures are made: size, resizing, quality
``00000.tar``           the samples: ``<key>.jpg``, ``<key>.txt``, ``<key>.json``
``00000.parquet``       every row of the list with what became of it
``00000_stats.json``    img2dataset's counts and the tar's checksum; written last: a shard with one is finished
``index.parquet``       where every sample lies (:mod:`pacl_scale.data.index`)
``broken/00000.tar``    a tar that was found damaged; the shard was made again
``report.json``         what was expected, what was got, and why the rest is missing; ``report.html`` for reading
====================  ==========================================================================================
"""

import json
import os
import posixpath
import re
import shutil
import uuid
from typing import Any

from pacl_scale import storage
from pacl_scale.errors import RunFailed, UserError

LIST_FOLDER = "list"
BROKEN_FOLDER = "broken"
PLAN = "list/plan.json"
PICTURES = "list/pictures.json"
PREPARING = "list/preparing.json"
REPORT = "report.json"
PAGE = "report.html"
STATS_SUFFIX = "_stats.json"

SHARD_DIGITS = 5
_STATS = re.compile(rf"\d{{{SHARD_DIGITS},}}{STATS_SUFFIX}")

UPLOAD_ROUNDS = 20
"""How often :func:`storage.patiently` tries to bring a finished shard to its place: ten minutes, then it is lost."""


def shard_name(shard: int) -> str:
    """``00012`` for shard 12, as img2dataset names them."""
    return f"{shard:0{SHARD_DIGITS}d}"


def list_url(root_url: str, shard: int) -> str:
    """Where the prepared list of ``shard`` lies."""
    return storage.join(root_url, LIST_FOLDER, f"{shard_name(shard)}.parquet")


def file_sizes(folder_url: str, suffix: str = "") -> dict[str, int]:
    """Sizes in bytes of the files in a folder that end with ``suffix``, by name; empty where there is no folder.

    Raises:
        UserError, RunFailed: the store cannot be listed.
    """
    return storage.patiently(_file_sizes, folder_url, suffix)


def _file_sizes(folder_url: str, suffix: str) -> dict[str, int]:
    files, path = storage.filesystem(folder_url)
    with storage.explained(folder_url):
        # Other processes write here: a listing remembered from before would lie.
        files.invalidate_cache()
        try:
            entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    sizes = {posixpath.basename(entry["name"]): entry["size"] for entry in entries if entry["type"] == "file"}
    return {name: sizes[name] for name in sorted(sizes) if name.endswith(suffix)}


def finished_shards(root_url: str) -> list[int]:
    """Numbers of the shards that are complete: their counts are written after everything else."""
    names = file_sizes(root_url, STATS_SUFFIX)
    return [int(name[: -len(STATS_SUFFIX)]) for name in names if _STATS.fullmatch(name)]


def read_bytes(url: str) -> bytes:
    """As :func:`storage.read_bytes`, with patience: whatever is read here is read in the middle of a run."""
    return storage.patiently(storage.read_bytes, url)


def write_bytes(url: str, content: bytes) -> None:
    """As :func:`storage.write_bytes`, with patience."""
    storage.patiently(storage.write_bytes, url, content)


def exists(url: str) -> bool:
    """As :func:`storage.exists`, with patience."""
    return storage.patiently(storage.exists, url)


def remove(url: str) -> None:
    """As :func:`storage.remove`, with patience."""
    storage.patiently(storage.remove, url)


def read_json(url: str) -> dict[str, Any] | None:
    """The object in a JSON file, ``None`` if there is no such file.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    if not exists(url):
        return None
    try:
        value = json.loads(read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{url} is damaged: it is not a JSON object")
    return value


def write_json(url: str, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON; a reader sees the old file or the new one."""
    write_bytes(url, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def upload(path: str, url: str) -> None:
    """Bring a finished local file to ``url``; it appears there whole or not at all.

    Raises:
        UserError: the store does not take it.
    """
    files, target = storage.filesystem(url)
    with storage.explained(url):
        if not storage.is_local(url):
            files.put_file(path, target)
            return
        os.makedirs(posixpath.dirname(target), exist_ok=True)
        partial = f"{target}.{uuid.uuid4().hex[:8]}.part"
        try:
            shutil.copyfile(path, partial)
            os.replace(partial, target)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)


def upload_patiently(path: str, url: str) -> None:
    """As :func:`upload`, through an outage of some minutes: what would be lost took longer to make.

    Raises:
        UserError, RunFailed: the store does not take it.
    """
    for attempt in range(1, UPLOAD_ROUNDS + 1):
        try:
            return storage.patiently(upload, path, url)
        except RunFailed:
            if attempt == UPLOAD_ROUNDS:
                raise


def remove_shard(root_url: str, shard: int) -> None:
    """Delete a shard; its counts first, so that it is unfinished before it is incomplete."""
    base = storage.join(root_url, shard_name(shard))
    for suffix in (STATS_SUFFIX, ".parquet", ".tar"):
        remove(base + suffix)


def set_aside(root_url: str, shard: int) -> None:
    """Keep a damaged tar as ``broken/<name>.tar`` for whoever wants to know, and delete the shard."""
    name = f"{shard_name(shard)}.tar"
    storage.patiently(_copy, storage.join(root_url, name), storage.join(root_url, BROKEN_FOLDER, name))
    remove_shard(root_url, shard)


def _copy(url: str, target_url: str) -> None:
    files, path = storage.filesystem(url)
    _, target = storage.filesystem(target_url)
    with storage.explained(target_url):
        if files.exists(path):
            files.makedirs(posixpath.dirname(target), exist_ok=True)
            files.cp_file(path, target)
