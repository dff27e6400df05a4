"""Where every sample of a folder of WebDataset tars lies: one parquet file beside the tars.

A sample is a run of consecutive members with the same WebDataset key (their path up to the first dot of the
base name). The tars stay as they are; ``index.parquet`` has one row a sample, in shard and tar order:

=========  ======  =======================================================================================
column     type    meaning
=========  ======  =======================================================================================
shard      uint32  number of the shard in the list kept in the file's metadata
offset     uint64  first byte of the sample's first header in the tar
length     uint32  bytes from there to the end of the padding of the sample's last member
key        uint64  BLAKE2b-8 of the key (:func:`hash_key`), so that a reader notices a shard that was replaced
=========  ======  =======================================================================================

The metadata under ``pacl_scale`` is JSON: ``version``, ``shards`` (name, size, samples), ``kind``, ``extra``,
``left_out`` (samples that cannot be trained on, by cause), ``sums`` (of the columns). The metadata's own CRC is under
``pacl_scale.crc``. Both tell a damaged file from a whole one; an index written before they were is read without.
"""

import io
import json
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pacl_scale import storage
from pacl_scale.data import node_copy
from pacl_scale.data.node_copy import Unpacked, sum_of
from pacl_scale.data.tar import READ_BYTES, TarSample, scan_tar
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

INDEX_NAME = "index.parquet"
VERSION = 1
METADATA_KEY = b"pacl_scale"
CRC_KEY = b"pacl_scale.crc"
COLUMNS = {"shard": np.uint32, "offset": np.uint64, "length": np.uint32, "key": np.uint64}
LOADED = ("offset", "length", "key")
"""The shard follows from the list of shards; reading it would only take time."""

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
CAPTION_EXTENSIONS = ("txt", "json")
PATCHES_EXTENSION = "patches"


SCAN_THREADS = 4


@dataclass(frozen=True)
class Shard:
    """A tar of the data set: its name in the folder, its size in bytes, its usable samples."""

    name: str
    size: int
    samples: int


@dataclass(frozen=True)
class SampleIndex:
    """The index in memory: ``offset``, ``length`` and ``key`` have one entry a sample; samples are numbered in shard
    and tar order."""

    root_url: str
    shards: list[Shard]
    offset: np.ndarray = field(repr=False)
    length: np.ndarray = field(repr=False)
    key: np.ndarray = field(repr=False)
    kind: str = "pictures"
    extra: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict, repr=False)
    """Of the columns as they were read, so that they need not be looked through again."""

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def shard(self) -> np.ndarray:
        """Number of each sample's shard, (samples,) uint32; made when first asked for."""
        counts = [shard.samples for shard in self.shards]
        return np.repeat(np.arange(len(counts), dtype=np.uint32), counts)

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Numbers of the shards of some samples."""
        return np.searchsorted(self._ends, samples, side="right")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.samples for shard in self.shards])

    @cached_property
    def identity(self) -> str:
        """Stands for the samples and their order: two indexes with the same one are read in the same order."""
        counts = [(shard.name, shard.samples) for shard in self.shards]
        key_sum = self.sums["key"] if self.sums else sum_of(self.key)
        content = json.dumps([counts, key_sum])
        return blake2b(content.encode(), digest_size=8).hexdigest()

    @classmethod
    def load(cls, root_url: str) -> "SampleIndex":
        """Read ``<root_url>/index.parquet``; a large one of a store once on each machine, see
        :mod:`pacl_scale.data.node_copy`.

        Raises:
            UserError: no index there, or a file that is not one of ours.
        """
        url = storage.join(root_url, INDEX_NAME)
        if not storage.exists(url):
            raise UserError(f"{root_url} has no {INDEX_NAME}; run the index step on its tars first")
        # A file of this machine is mapped, not read.
        unpacked = _unpack(url, storage.filesystem(url)[1]) if storage.is_local(url) else _unpack_remote(url)
        with _understood(url):
            meta = unpacked.meta
            index = cls(
                root_url=root_url,
                shards=[Shard(str(s["name"]), int(s["size"]), int(s["samples"])) for s in meta["shards"]],
                kind=meta["kind"],
                extra=meta["extra"],
                left_out=meta.get("left_out", {}),
                sums=dict(meta["sums"]),
                **unpacked.columns,
            )
            index._check()
        return index

    def save(self) -> None:
        """Write the index beside its tars; a reader sees the old one or the new one, never half of it."""
        meta = {
            "version": VERSION,
            "shards": [asdict(shard) for shard in self.shards],
            "kind": self.kind,
            "extra": self.extra,
            "left_out": self.left_out,
            "sums": {name: sum_of(getattr(self, name)) for name in LOADED},
        }
        written = json.dumps(meta).encode()
        table = pa.table({name: getattr(self, name) for name in COLUMNS})
        table = table.replace_schema_metadata({METADATA_KEY: written, CRC_KEY: str(zlib.crc32(written)).encode()})
        buffer = io.BytesIO()
        # Offsets and lengths are multiples of 512 with small high bytes: split by byte they compress to a quarter, and
        # LZ4 unpacks 30 million rows in 0.1 s where zstd takes 0.8 s. Keys are hashes: nothing compresses them.
        pq.write_table(
            table,
            buffer,
            # One group, so that a column is one array and is not copied together after reading.
            row_group_size=max(1, len(self)),
            compression={"shard": "zstd", "offset": "lz4", "length": "lz4", "key": "none"},
            use_dictionary=["shard"],
            column_encoding={"offset": "BYTE_STREAM_SPLIT", "length": "BYTE_STREAM_SPLIT", "key": "PLAIN"},
            write_statistics=False,
        )
        storage.write_bytes(storage.join(self.root_url, INDEX_NAME), buffer.getvalue())

    def _check(self) -> None:
        """Raise ValueError where the columns contradict the list of shards."""
        counts = np.array([shard.samples for shard in self.shards], np.int64)
        if counts.sum() != len(self) or np.any(counts < 0):
            raise ValueError(f"{len(self)} samples where its shards have {counts.sum()}")
        last = np.cumsum(counts)[counts > 0] - 1
        sizes = np.array([shard.size for shard in self.shards], np.uint64)[counts > 0]
        if np.any(self.offset[last] + self.length[last] > sizes):
            raise ValueError("a sample lies beyond the end of its shard")
        if self.kind not in ("pictures", "features"):
            raise ValueError(f"unknown kind {self.kind!r}")


def _unpack_remote(url: str) -> Unpacked:
    def read() -> Unpacked:
        return _unpack(url, pa.BufferReader(storage.read_bytes(url)))

    size, version = storage.stamp(url)
    if not version or size < node_copy.SMALLEST:
        return read()
    found = node_copy.shared(url, version, read)
    # Arrow keeps what it unpacked into for its next use, and there is none.
    pa.default_memory_pool().release_unused()
    return found


def _unpack(url: str, source: Any) -> Unpacked:
    """The columns and metadata of the index at ``url``, a path or something that Arrow can read."""
    with _understood(url):
        # ParquetFile, because read_table imports pandas first.
        with pq.ParquetFile(source, memory_map=True) as file:
            table = file.read(columns=list(LOADED)).combine_chunks()
        written = table.schema.metadata or {}
        if CRC_KEY in written and int(written[CRC_KEY]) != zlib.crc32(written[METADATA_KEY]):
            raise ValueError("its metadata is damaged")
        meta = json.loads(written[METADATA_KEY])
        if meta["version"] != VERSION:
            raise ValueError(f"version {meta['version']} where this program reads {VERSION}")
        columns = {name: _as_array(table[name], COLUMNS[name]) for name in LOADED}
        sums = {name: sum_of(column) for name, column in columns.items()}
        if meta.setdefault("sums", sums) != sums:
            raise ValueError("its columns are damaged")
        return Unpacked(columns, meta)


@contextmanager
def _understood(url: str) -> Iterator[None]:
    """Turn whatever a file that is no index of ours leads to into one sentence."""
    try:
        yield
    except (pa.ArrowException, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{url} cannot be used as an index ({reason}); run the index step again") from error


def _as_array(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    """The column's own memory; pyarrow's to_numpy would import pandas, which takes longer than reading."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if array.type != pa.from_numpy_dtype(dtype) or array.null_count:
        raise ValueError(f"a column of {array.type} where {np.dtype(dtype)} without gaps is expected")
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def hash_key(key: str) -> int:
    """The 64 bits that stand for a sample's key in the index."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def build_index(
    root_url: str,
    shards: Sequence[str] | None = None,
    kind: str = "pictures",
    extra: dict[str, Any] | None = None,
) -> SampleIndex:
    """Scan the tars at ``root_url``, write ``index.parquet`` beside them and return it.

    Args:
        root_url: folder of tars, a path or an fsspec URL.
        shards: names in that folder; by default every ``*.tar`` there, sorted.
        kind: ``"pictures"`` (a picture and a caption make a usable sample) or ``"features"`` (patch tokens
            and a caption do).
        extra: kept in the index's metadata.

    Raises:
        UserError: no tars, none readable, or a tar that holds members but no usable sample.
        DamagedTar: a tar is not complete.
    """
    names = list(shards) if shards is not None else list_shards(root_url)
    if not names:
        raise UserError(f"{root_url} holds no tars to index")
    with ThreadPoolExecutor(SCAN_THREADS) as threads:
        scans = list(threads.map(lambda name: _scan_shard(root_url, name, kind), names))
    left_out: Counter[str] = Counter()
    for scan in scans:
        left_out.update(scan.left_out)
    if not sum(len(scan.key) for scan in scans):
        raise UserError(f"{root_url} holds no usable sample: each of its {len(names)} tars is empty")
    index = SampleIndex(
        root_url=root_url,
        shards=[Shard(name, scan.size, len(scan.key)) for name, scan in zip(names, scans, strict=True)],
        offset=np.concatenate([scan.offset for scan in scans]),
        length=np.concatenate([scan.length for scan in scans]),
        key=np.concatenate([scan.key for scan in scans]),
        kind=kind,
        extra=extra or {},
        left_out=dict(left_out),
    )
    index.save()
    log.info("indexed", root=root_url, shards=len(names), samples=len(index), left_out=dict(left_out) or None)
    return index


def list_shards(root_url: str) -> list[str]:
    """Names of the tars in a folder, sorted. Raises :class:`UserError` where it cannot be listed."""
    files, path = storage.filesystem(root_url)
    with storage.explained(root_url):
        files.invalidate_cache(path)
        found = files.ls(path, detail=False)
    return sorted(posixpath.basename(entry) for entry in found if entry.endswith(".tar"))


@dataclass(frozen=True)
class _Scan:
    """What a shard holds: its usable samples as rows of the index (20 bytes each, where an object takes 500), and the
    others by cause."""

    size: int
    offset: np.ndarray
    length: np.ndarray
    key: np.ndarray
    left_out: Counter[str]


def _scan_shard(root_url: str, name: str, kind: str) -> _Scan:
    url = storage.join(root_url, name)
    files, path = storage.filesystem(url)
    with storage.explained(url), files.open(path, "rb", block_size=READ_BYTES) as stream:
        samples = scan_tar(stream, url)
        size = stream.tell()
    causes: Counter[str] = Counter()
    usable = []
    for sample in samples:
        cause = _why_unusable(sample, kind)
        causes.update([cause] if cause else [])
        usable.extend([] if cause else [sample])
    if samples and not usable:
        raise UserError(f"{url} holds no usable sample: {_listed(causes)}")
    if not samples:
        log.warning("empty shard", shard=url)
    return _Scan(
        size=size,
        offset=np.array([sample.offset for sample in usable], np.uint64),
        length=np.array([sample.length for sample in usable], np.uint32),
        key=np.array([hash_key(sample.key) for sample in usable], np.uint64),
        left_out=causes,
    )


def _why_unusable(sample: TarSample, kind: str) -> str | None:
    content = (PATCHES_EXTENSION,) if kind == "features" else PICTURE_EXTENSIONS
    if not any(extension in content for extension in sample.extensions):
        return "no patch tokens" if kind == "features" else "no picture"
    if not any(extension in CAPTION_EXTENSIONS for extension in sample.extensions):
        return "no caption"
    return None


def _listed(causes: Counter[str]) -> str:
    return ", ".join(f"{count} with {cause}" for cause, count in causes.most_common())
