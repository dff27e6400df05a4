"""Names of the files of a data set, and how a finished file gets to its place.

====================  ==========================================================================================
``list/00000.parquet``  what shard 00000 is to hold: ``id``, ``url``, ``caption``, ``nouns``, one row a picture
``list/plan.json``      which list that was made from and how; written when the last of them is complete
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
import shutil
import uuid
from typing import Any

from pacl_scale import storage
from pacl_scale.errors import UserError

LIST_FOLDER = "list"
BROKEN_FOLDER = "broken"
PLAN = "list/plan.json"
PICTURES = "list/pictures.json"
REPORT = "report.json"
PAGE = "report.html"
STATS_SUFFIX = "_stats.json"

SHARD_DIGITS = 5


def shard_name(shard: int) -> str:
    """``00012`` for shard 12, as img2dataset names them."""
    return f"{shard:0{SHARD_DIGITS}d}"


def list_url(root_url: str, shard: int) -> str:
    """Where the prepared list of ``shard`` lies."""
    return storage.join(root_url, LIST_FOLDER, f"{shard_name(shard)}.parquet")


def file_sizes(folder_url: str, suffix: str = "") -> dict[str, int]:
    """Sizes in bytes of the files in a folder that end with ``suffix``, by name; empty where there is no folder.

    Raises:
        UserError: the store cannot be listed.
    """
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
    return [int(name[: -len(STATS_SUFFIX)]) for name in file_sizes(root_url, STATS_SUFFIX)]


def read_json(url: str) -> dict[str, Any] | None:
    """The object in a JSON file, ``None`` if there is no such file.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    if not storage.exists(url):
        return None
    try:
        value = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{url} is damaged: it is not a JSON object")
    return value


def write_json(url: str, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON; a reader sees the old file or the new one."""
    storage.write_bytes(url, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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


def remove_shard(root_url: str, shard: int) -> None:
    """Delete a shard; its counts first, so that it is unfinished before it is incomplete."""
    base = storage.join(root_url, shard_name(shard))
    for suffix in (STATS_SUFFIX, ".parquet", ".tar"):
        storage.remove(base + suffix)


def set_aside(root_url: str, shard: int) -> None:
    """Keep a damaged tar as ``broken/<name>.tar`` for whoever wants to know, and delete the shard."""
    name = f"{shard_name(shard)}.tar"
    files, path = storage.filesystem(storage.join(root_url, name))
    target = storage.join(root_url, BROKEN_FOLDER, name)
    with storage.explained(target):
        if files.exists(path):
            files.makedirs(posixpath.dirname(storage.filesystem(target)[1]), exist_ok=True)
            files.cp_file(path, storage.filesystem(target)[1])
    remove_shard(root_url, shard)
