"""Proof that a shard is what it claims: read to its end, every picture's header, every count."""

import hashlib
import io
import json
import posixpath
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from data_prep import layout
from pacl_scale import storage
from pacl_scale.data.tar import DamagedTar, TarMember, read_members, split_name
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger, progress

log = get_logger(__name__)

PICTURE_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Extensions of picture members, and what Pillow calls the format."""

COPY_BYTES = 1 << 22
MEMORY_BYTES = 1 << 26
"""A shard above this is checked in a temporary file, not in memory."""

THREADS = 8


class BadShard(Exception):
    """A shard that is not what it claims; the message says why."""


@dataclass(frozen=True)
class TarFacts:
    """What a tar was found to hold."""

    name: str
    samples: int
    bytes: int
    sha256: str


def check_tar(tar: BinaryIO, name: str) -> TarFacts:
    """Read a tar (seekable) to its end and look at every member.

    Every sample must have one picture whose header names the format of its extension and the size that its json
    member tells, a caption that is UTF-8, and a json member that is an object.

    Raises:
        BadShard: the first thing that is wrong, with the sample's key.
    """
    sha256, size = sha256_of_stream(tar)
    try:
        members = list(read_members(tar, name))
    except DamagedTar as error:
        raise BadShard(str(error)) from error
    samples: dict[str, dict[str, TarMember]] = {}
    for member in members:
        key, extension = split_name(member.name)
        if extension in samples.setdefault(key, {}):
            raise BadShard(f"{name}: sample {key} has two .{extension} members")
        samples[key][extension] = member
    for key, parts in samples.items():
        _check_sample(tar, f"{name}: sample {key}", parts)
    return TarFacts(posixpath.basename(name), len(samples), size, sha256)


def sha256_of_stream(tar: BinaryIO) -> tuple[str, int]:
    """SHA-256 and size of a seekable stream, which is at its start afterwards."""
    digest = hashlib.sha256()
    tar.seek(0)
    while chunk := tar.read(COPY_BYTES):
        digest.update(chunk)
    size = tar.tell()
    tar.seek(0)
    return digest.hexdigest(), size


def check_shard(tar: BinaryIO, parquet: BinaryIO, stats: Mapping[str, Any], name: str) -> TarFacts:
    """Check a downloaded shard: its tar, and that tar, parquet file and counts agree.

    Raises:
        BadShard: as :func:`check_tar`; or the counts contradict each other, or the tar is not the one whose
            checksum was recorded.
    """
    facts = check_tar(tar, name)
    try:
        status = pq.read_table(parquet, columns=["status"])["status"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BadShard(f"{name}: its parquet file cannot be read ({error})") from error
    counts = {key: status.count(key) for key in ("success", "failed_to_download", "failed_to_resize")}
    claims = {
        "rows": (len(status), stats.get("count")),
        "rows with a state": (sum(counts.values()), stats.get("count")),
        "successes": (counts["success"], stats.get("successes")),
        "failures to download": (counts["failed_to_download"], stats.get("failed_to_download")),
        "failures to decode": (counts["failed_to_resize"], stats.get("failed_to_resize")),
        "samples": (facts.samples, stats.get("successes")),
        "checksum": (facts.sha256, stats.get("tar_sha256", facts.sha256)),
    }
    for what, (found, claimed) in claims.items():
        if found != claimed:
            raise BadShard(f"{name}: {what} are {found} where its counts say {claimed}")
    return facts


def verify(root_url: str, shards: Iterable[int]) -> tuple[dict[int, TarFacts], dict[int, str]]:
    """Read finished shards back from where they lie and check each.

    Returns:
        What the sound ones hold, and what is wrong with the others, both by shard number.

    Raises:
        UserError: the store does not answer.
    """
    shards = list(shards)
    sound: dict[int, TarFacts] = {}
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        results = threads.map(lambda shard: _verify_one(root_url, shard), shards)
        checked = progress(zip(shards, results, strict=True), "verify", total=len(shards), unit="shard")
        for shard, result in checked:
            if isinstance(result, TarFacts):
                sound[shard] = result
            else:
                broken[shard] = result
    return sound, broken


def _verify_one(root_url: str, shard: int) -> TarFacts | str:
    base = storage.join(root_url, layout.shard_name(shard))
    stats_url, parquet_url, tar_url = base + layout.STATS_SUFFIX, f"{base}.parquet", f"{base}.tar"
    try:
        missing = [posixpath.basename(url) for url in (tar_url, parquet_url) if not layout.exists(url)]
        if missing:
            raise BadShard(f"{base}: {' and '.join(missing)} is missing")
        stats = json.loads(layout.read_bytes(stats_url))
        if not isinstance(stats, dict):
            raise ValueError("not an object")
        parquet = io.BytesIO(layout.read_bytes(parquet_url))
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as local:
            fetch_tar(tar_url, local)  # type: ignore[arg-type]
            return check_shard(local, parquet, stats, tar_url)  # type: ignore[arg-type]
    except BadShard as error:
        return str(error)
    except ValueError as error:
        return f"{stats_url} is damaged ({error})"


def fetch_tar(url: str, local: BinaryIO) -> None:
    """Copy a remote tar into a local file, a few megabytes at a time.

    Raises:
        UserError, RunFailed: it cannot be read.
    """
    storage.patiently(_fetch_tar, url, local)


def _fetch_tar(url: str, local: BinaryIO) -> None:
    local.seek(0)
    local.truncate()
    files, path = storage.filesystem(url)
    with storage.explained(url), files.open(path, "rb", block_size=COPY_BYTES) as remote:
        while chunk := remote.read(COPY_BYTES):
            local.write(chunk)


def _check_sample(tar: BinaryIO, where: str, parts: Mapping[str, TarMember]) -> None:
    pictures = [extension for extension in parts if extension in PICTURE_FORMATS]
    if len(pictures) != 1 or set(parts) != {pictures[0], "txt", "json"}:
        raise BadShard(f"{where} consists of {', '.join(sorted(parts))}, not of a picture, txt and json")
    try:
        _content(tar, parts["txt"]).decode()
        meta = json.loads(_content(tar, parts["json"]))
        size = (meta["width"], meta["height"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadShard(f"{where}: its txt or json member cannot be read ({error})") from error
    content = _content(tar, parts[pictures[0]])
    try:
        with Image.open(io.BytesIO(content), formats=[PICTURE_FORMATS[pictures[0]]]) as picture:
            found = picture.size
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadShard(f"{where}: its picture has no {PICTURE_FORMATS[pictures[0]]} header") from error
    if found != size:
        raise BadShard(f"{where}: its picture is {found}, its json member says {size}")


def _content(tar: BinaryIO, member: TarMember) -> bytes:
    tar.seek(member.data)
    return tar.read(member.size)


def require_sound(broken: Mapping[int, str]) -> None:
    """Raise UserError naming the first of the ``broken`` shards, if there are any."""
    if broken:
        first = broken[min(broken)]
        raise UserError(f"{len(broken)} shards are damaged, the first: {first}")
