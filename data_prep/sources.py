"""The lists that pictures come from, as data: where each is found, how its rows read, how many there should be."""

import csv
import hashlib
import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO
from urllib.parse import unquote_plus

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pacl_scale import storage
from pacl_scale.errors import UserError

HASH_CHUNK_BYTES = 1 << 22
PARQUET_BATCH_ROWS = 10_000

LONGEST_FIELD = 1 << 20
"""Characters; a longer field is a damaged list (an unclosed quote that swallows the rest of a file)."""


@dataclass(frozen=True)
class Source:
    """A kind of list.

    Attributes:
        columns: names of the columns in their order, for lists without a header line; among them ``url`` and
            ``caption``.
        page: where to get the list (its file name in ``file``); terms are accepted there, not by this program.
        rows: how many rows the published list has, ``None`` where there is no published one.
        licence: who may do what with it.
        quirks: what surprises people.
        metadata_file: name of the second file, where the list only names pictures.
    """

    name: str
    columns: tuple[str, ...]
    page: str = ""
    file: str = ""
    rows: int | None = None
    licence: str = ""
    quirks: str = ""
    metadata_file: str = ""

    @property
    def needs_metadata(self) -> bool:
        """Whether the list only names pictures, whose URLs and captions are in a second file."""
        return bool(self.metadata_file)


SOURCES = {
    "pairs": Source(
        name="pairs",
        columns=("caption", "url"),
        quirks="any list of your own, in CC3M's layout unless it is a parquet file or says its columns itself",
    ),
    "cc3m": Source(
        name="cc3m",
        columns=("caption", "url"),
        page="https://ai.google.com/research/ConceptualCaptions/download",
        file="Train_GCC-training.tsv",
        rows=3_318_333,
        licence="free to use for any purpose with acknowledgement of Google LLC; pictures belong to their owners",
        quirks="caption first, no header; captions are lower case, tokenised, names replaced by hypernyms",
    ),
    "cc12m": Source(
        name="cc12m",
        columns=("url", "caption"),
        page="https://github.com/google-research-datasets/conceptual-12m",
        file="cc12m.tsv",
        rows=12_423_374,
        licence="free to use for any purpose with acknowledgement of Google LLC; pictures belong to their owners",
        quirks="URL first (the other way round than CC3M), no header; names of people read <PERSON>",
    ),
    "yfcc15m": Source(
        name="yfcc15m",
        columns=("line", "photo", "hash"),
        page="https://github.com/openai/CLIP/blob/main/data/yfcc100m.md",
        file="yfcc100m_subset_data.tsv.bz2",
        metadata_file="yfcc100m_dataset.bz2",
        rows=14_829_396,
        licence="each picture under the Creative Commons licence that its Flickr page names",
        quirks=(
            "the list holds line numbers, photo ids and hashes only; title and description come from YFCC100M's "
            "metadata (a request at its own page) and are cleaned into a caption here; other lists of about 15 "
            "million YFCC pictures exist and overlap only partly"
        ),
    ),
}


MIRROR = "mirror"
"""Instead of a source: tars that somebody made, so there is no list."""

SOURCES[MIRROR] = Source(
    name=MIRROR,
    columns=(),
    quirks="WebDataset tars at the output itself; nothing is downloaded, and a damaged tar can only be left out",
)


@dataclass(frozen=True)
class Row:
    """One row of a list as it stands there; ``None`` where the row has no such field, and why in ``fault``."""

    url: str | None
    caption: str | None
    fault: str = "malformed row"


def get(name: str) -> Source:
    """The source called ``name``. Raises ValueError for an unknown one."""
    if name not in SOURCES:
        raise ValueError(f"source: there is no {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def require_file(url: str, source: Source) -> None:
    """Raise UserError if a list, or its metadata, is not there; it says where such a file is published."""
    if storage.exists(url):
        return
    where = f"; {source.name} comes from {source.page} ({source.licence}): {source.quirks}" if source.page else ""
    raise UserError(f"{url}: there is no such file{where}")


def count_rows(url: str, source: Source) -> int:
    """Rows of a list, as many as :func:`read_rows` gives; the metadata of a source that has some is not read.

    Raises:
        UserError: as :func:`read_rows`.
    """
    if source.needs_metadata:
        with _as_its_name_says(url):
            return len(_photo_ids(url))
    return sum(1 for _ in read_rows(url, source))


def stamp_of(url: str) -> str:
    """What changes when a file does, without reading it: its size, and its time or the store's tag.

    Raises:
        UserError: there is no such file.
    """
    files, path = storage.filesystem(url)
    with storage.explained(url):
        info = files.info(path)
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "mtime", "LastModified", "updated"))


def read_rows(url: str, source: Source, metadata_url: str | None = None) -> Iterator[Row]:
    """Stream the rows of a list; memory does not grow with its length.

    The end of the file's name tells its format: ``.tsv``/``.txt`` (no quoting, no header), ``.csv`` (quoted;
    a first line that names ``url`` and ``caption`` is a header) or ``.parquet`` (columns ``url`` and
    ``caption``); the first two also as ``.gz`` and ``.bz2``.

    Args:
        metadata_url: the second file of a source that ``needs_metadata``.

    Raises:
        UserError: no such file, no such format, not the format that its name says.
    """
    name = url.lower().removesuffix(".gz").removesuffix(".bz2")
    with _as_its_name_says(url):
        if source.needs_metadata:
            yield from _yfcc_rows(url, str(metadata_url))
        elif name.endswith(".parquet"):
            yield from _parquet_rows(url)
        elif name.endswith(".csv"):
            yield from _csv_rows(url, source)
        elif name.endswith((".tsv", ".txt")):
            yield from _tsv_rows(url, source)
        else:
            raise UserError(f"{url}: the list must be a .tsv, .csv or .parquet file (.tsv.gz, .csv.bz2)")


@contextmanager
def _as_its_name_says(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{url} cannot be read to its end as what its name says: {error}") from error


def sha256_of(url: str) -> str:
    """SHA-256 of a file, hexadecimal: which list was it?

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage.explained(url), _open(url) as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _open(url: str, compression: str | None = None) -> BinaryIO:
    storage.filesystem(url)  # an unknown protocol gets its sentence here
    with storage.explained(url):
        return fsspec.open(url, "rb", compression=compression).open()


def _text(url: str) -> io.TextIOWrapper:
    # Only "\n" ends a row: captions hold stray "\r", "\x85" and broken UTF-8, and none of them is fatal.
    compressions = {".gz": "gzip", ".bz2": "bz2"}
    stream = _open(url, compressions.get(url[url.rfind(".") :].lower()))
    # utf-8-sig: a spreadsheet's CSV begins with a byte order mark.
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="\n")


def _tsv_rows(url: str, source: Source) -> Iterator[Row]:
    url_at, caption_at = source.columns.index("url"), source.columns.index("caption")
    width = len(source.columns)
    with _text(url) as lines:
        for line in lines:
            fields = line.rstrip("\r\n").split("\t")
            if fields == [""]:
                continue
            if len(fields) != width:
                yield Row(None, None)
                continue
            yield Row(fields[url_at], fields[caption_at])


def _csv_rows(url: str, source: Source) -> Iterator[Row]:
    csv.field_size_limit(min(LONGEST_FIELD, sys.maxsize))
    columns = source.columns
    with _text(url) as lines:
        for number, fields in enumerate(csv.reader(lines)):
            if number == 0 and {"url", "caption"} <= set(fields):
                columns = tuple(fields)
                continue
            if not fields:
                continue
            if len(fields) != len(columns):
                yield Row(None, None)
                continue
            yield Row(fields[columns.index("url")], fields[columns.index("caption")])


def _parquet_rows(url: str) -> Iterator[Row]:
    with _open(url) as stream:
        file = pq.ParquetFile(stream)
        missing = {"url", "caption"} - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"{url} has no column {' or '.join(sorted(missing))}")
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=["url", "caption"]):
            values: dict[str, list[Any]] = batch.to_pydict()
            for address, caption in zip(values["url"], values["caption"], strict=True):
                yield Row(_as_text(address), _as_text(caption))


# YFCC15M: columns of yfcc100m_dataset, tab separated, 25 in all, no header.
YFCC_COLUMNS = 25
YFCC_PHOTO, YFCC_TITLE, YFCC_DESCRIPTION, YFCC_URL, YFCC_MARKER = 1, 8, 9, 16, 24
YFCC_CHUNK_LINES = 20_000

LONGEST_DESCRIPTION = 200
"""Characters of a Flickr description that go into a caption: what follows is mostly about cameras and rights."""

_PHOTO_ID = re.compile(r"[0-9]{1,18}")
_TAG = re.compile(r"<[^<>]*>")
_CAMERA_NAME = re.compile(
    r"(img|dsc|dscn|dscf|dcp|pict|photo|image|cimg|p|_?mg|sam|hpim)?[\s_-]*\d+[\s\d_().-]*(jpe?g)?", re.I
)


def _yfcc_rows(url: str, metadata_url: str) -> Iterator[Row]:
    """Join the list of photo ids with YFCC100M's metadata, which is streamed; 9 bytes of memory a listed photo."""
    wanted = _photo_ids(url)
    found = np.zeros(len(wanted), np.bool_)
    with _text(metadata_url) as lines:
        while chunk := list(islice(lines, YFCC_CHUNK_LINES)):
            rows = [line.rstrip("\r\n").split("\t") for line in chunk]
            rows = [row for row in rows if len(row) == YFCC_COLUMNS and _PHOTO_ID.fullmatch(row[YFCC_PHOTO])]
            if not rows or not len(wanted):
                continue
            photos = np.array([int(row[YFCC_PHOTO]) for row in rows], np.int64)
            at = np.minimum(np.searchsorted(wanted, photos), len(wanted) - 1)
            for place in np.flatnonzero(wanted[at] == photos):
                if not found[at[place]]:
                    found[at[place]] = True
                    yield _yfcc_row(rows[place])
    for _ in range(int((~found).sum())):
        yield Row(None, None, "not in the metadata")


def _photo_ids(url: str) -> np.ndarray:
    """Sorted photo ids of a list of line number, photo id, hash."""
    blocks: list[np.ndarray] = []
    with _text(url) as lines:
        while chunk := list(islice(lines, YFCC_CHUNK_LINES)):
            fields = [line.split("\t") for line in chunk]
            ids = [int(field[1]) for field in fields if len(field) == 3 and _PHOTO_ID.fullmatch(field[1])]
            if len(ids) < sum(1 for line in chunk if line.strip()):
                raise UserError(f"{url} is not a list of line number, photo id and hash in three columns")
            blocks.append(np.array(ids, np.int64))
    return np.unique(np.concatenate(blocks)) if blocks else np.empty(0, np.int64)


def _yfcc_row(fields: list[str]) -> Row:
    if fields[YFCC_MARKER].strip() != "0":
        return Row(None, None, "a video")
    title, description = (_flickr_text(fields[at]) for at in (YFCC_TITLE, YFCC_DESCRIPTION))
    if _CAMERA_NAME.fullmatch(title):
        title = ""
    if len(description) > LONGEST_DESCRIPTION:
        description = description[: description.rfind(" ", 0, LONGEST_DESCRIPTION + 1)].rstrip(" ,;:-")
    joint = " " if title.endswith((".", "!", "?")) else ". "
    return Row(fields[YFCC_URL], joint.join(part for part in (title, description) if part))


def _flickr_text(raw: str) -> str:
    """What the owner of a photo typed: URL-decoded, without HTML tags, on one line."""
    return " ".join(_TAG.sub(" ", unquote_plus(raw)).split())


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
