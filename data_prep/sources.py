"""The lists that pictures come from, as data: where each is found, how its rows read, how many there should be."""

import csv
import gzip
import hashlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
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
    """

    name: str
    columns: tuple[str, ...]
    page: str = ""
    file: str = ""
    rows: int | None = None
    licence: str = ""
    quirks: str = ""


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
}


@dataclass(frozen=True)
class Row:
    """One row of a list as it stands there; ``None`` where the row has no such field."""

    url: str | None
    caption: str | None


def get(name: str) -> Source:
    """The source called ``name``. Raises ValueError for an unknown one."""
    if name not in SOURCES:
        raise ValueError(f"source: there is no {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def read_rows(url: str, source: Source) -> Iterator[Row]:
    """Stream the rows of a list; memory does not grow with its length.

    The end of the file's name tells its format: ``.tsv``/``.txt`` (no quoting, no header), ``.csv`` (quoted;
    a first line that names ``url`` and ``caption`` is a header) or ``.parquet`` (columns ``url`` and
    ``caption``); the first two also as ``.gz``.

    Raises:
        UserError: no such file, no such format, not the format that its name says.
    """
    name = url.removesuffix(".gz").lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(url)
        elif name.endswith(".csv"):
            yield from _csv_rows(url, source)
        elif name.endswith((".tsv", ".txt")):
            yield from _tsv_rows(url, source)
        else:
            raise UserError(f"{url}: the list must be a .tsv, .csv or .parquet file (.tsv.gz, .csv.gz)")
    except (pa.ArrowInvalid, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise UserError(f"{url} cannot be read as what its name says: {error}") from error


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
    stream = _open(url, compression="gzip" if url.endswith(".gz") else None)
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n")


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


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
