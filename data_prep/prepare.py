"""A list of URLs and captions becomes the plan of a data set: clean rows, each once, cut into shards.

Every row of the list ends in exactly one place: in a shard, or in one of the counts of :class:`Plan`. The plan is a
pure function of the list and the settings, so a run that was killed makes the same shards when it is repeated.
"""

import html
import json
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b, sha256
from itertools import islice
from multiprocessing import get_context
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import layout, nouns, sources
from data_prep.sources import Row, Source
from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger, progress

log = get_logger(__name__)

VERSION = 1
"""Goes into the fingerprint of a plan: raise it when the same list would give other shards."""

LIST_SCHEMA = pa.schema(
    [("id", pa.uint64()), ("url", pa.string()), ("caption", pa.string()), ("nouns", pa.list_(pa.string()))]
)

LONGEST_URL = 4096

DEDUPLICATION_CHUNK_ROWS = 50_000


@dataclass
class PrepareConfig:
    """How a list becomes shards."""

    samples_per_shard: int = 10_000
    """Rows of the list a shard; the shard holds as many samples as of these can be downloaded."""
    nouns: bool = True
    """Name the things of each caption (spaCy) in a column `nouns`, for the noun prompts of training."""
    noun_processes: int = 1
    """Processes that look for nouns; one does about 900 captions a second."""
    shortest_caption: int = 3
    """Characters; rows with a shorter caption are left out."""
    longest_caption: int = 1000
    """Characters; rows with a longer caption are left out."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.noun_processes < 1:
            raise ValueError("prepare.samples_per_shard and prepare.noun_processes must be at least 1")
        if not 0 < self.shortest_caption <= self.longest_caption:
            raise ValueError("prepare.shortest_caption must be positive and not above prepare.longest_caption")


@dataclass
class ExpectConfig:
    """What a list must be. null is unknown, and then not checked; the report says which list it was in any case."""

    rows: int | None = None
    """Rows of the list (of a mirror: samples); another number is an error."""
    sha256: str | None = None
    """SHA-256 of the list file, hexadecimal."""
    metadata_sha256: str | None = None
    """SHA-256 of the second file of a source that has one."""

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ValueError("expect.rows must be at least 1")
        for name in ("sha256", "metadata_sha256"):
            digest = getattr(self, name)
            if digest is not None and not re.fullmatch("[0-9a-fA-F]{64}", digest):
                raise ValueError(f"expect.{name} must be 64 hexadecimal digits")

    def check_file(self, url: str, sha256: str, expected: str | None) -> None:
        """Raise UserError if a file has another checksum than the ``expected`` one."""
        if expected is not None and sha256 != expected.lower():
            raise UserError(f"{url} is not the expected file: its SHA-256 is {sha256}, not {expected.lower()}")

    def check_rows(self, url: str, rows: int) -> None:
        """Raise UserError if a list has another number of rows."""
        if self.rows is not None and rows != self.rows:
            raise UserError(
                f"{url} has {rows:,} rows where expect.rows is {self.rows:,}: it is cut short or another list; "
                "expect.rows=null takes it as it is"
            )


NOTHING_EXPECTED = ExpectConfig()


@dataclass(frozen=True)
class Plan:
    """What a list came to.

    Attributes:
        fingerprint: SHA-256 over the list's own and every setting that shapes the shards.
        list_sha256: of the list file, to say which list was used.
        metadata_sha256: of the second file of a source that has one.
        list_rows: rows of the list; the sum of ``rows`` and ``left_out``.
        rows: rows that go to a shard.
        left_out: rows that do not, by cause.
        shards: number of shards.
        samples_per_shard: rows of each but the last.
        stamps: of the list and its second file; while they are the same, neither is read again.
    """

    fingerprint: str
    source: str
    list_url: str
    list_sha256: str
    metadata_sha256: str | None
    list_rows: int
    rows: int
    shards: int
    samples_per_shard: int
    left_out: dict[str, int] = field(default_factory=dict)
    stamps: list[str] = field(default_factory=list)


def prepare(
    list_url: str,
    source: Source,
    root_url: str,
    config: PrepareConfig,
    metadata_url: str | None = None,
    expect: ExpectConfig = NOTHING_EXPECTED,
) -> Plan:
    """Write the prepared lists below ``root_url`` and return the plan.

    A finished one is only read; of one that was killed, the lists that are there stay.

    Raises:
        UserError: the list is missing, empty, not the expected one, or none of its rows is usable (then nothing is
            written); or ``root_url`` holds the data set of another list or other settings.
    """
    sources.require_file(list_url, source)
    stamps = [sources.stamp_of(list_url)]
    if metadata_url:
        sources.require_file(metadata_url, source)
        stamps.append(sources.stamp_of(metadata_url))
    before = layout.read_json(storage.join(root_url, layout.PLAN))
    if before is not None and before.get("stamps") == stamps:
        known = _as_plan(before, root_url)
        list_sha256, metadata_sha256 = known.list_sha256, known.metadata_sha256
    else:
        list_sha256 = sources.sha256_of(list_url)
        metadata_sha256 = sources.sha256_of(metadata_url) if metadata_url else None
    expect.check_file(list_url, list_sha256, expect.sha256)
    if metadata_url and metadata_sha256:
        expect.check_file(metadata_url, metadata_sha256, expect.metadata_sha256)
    fingerprint = _fingerprint(f"{list_sha256} {metadata_sha256}", source, config)
    if before is not None:
        return _same_plan(before, fingerprint, root_url)
    if layout.file_sizes(root_url, ".tar"):
        raise UserError(f"{root_url} holds tars that this command did not make; choose another output")
    if expect.rows is not None:
        expect.check_rows(list_url, sources.count_rows(list_url, source))
    there = _prepared_before(root_url, fingerprint)
    left_out: Counter[str] = Counter()
    rows_of_list = sources.read_rows(list_url, source, metadata_url)
    clean = _without_duplicates(_clean_rows(rows_of_list, config, left_out), left_out)
    rows = shards = 0
    made = _with_nouns(_cut(clean, config.samples_per_shard), config, there)
    for count, table in progress(made, "prepare", unit="shard"):
        if table is not None:
            if not shards:
                layout.write_json(storage.join(root_url, layout.PREPARING), {"fingerprint": fingerprint})
            layout.write_bytes(layout.list_url(root_url, shards), as_parquet(table))
        rows, shards = rows + count, shards + 1
    if not rows:
        raise UserError(_why_nothing(list_url, left_out))
    plan = Plan(
        fingerprint=fingerprint,
        source=source.name,
        list_url=list_url,
        list_sha256=list_sha256,
        metadata_sha256=metadata_sha256,
        list_rows=rows + left_out.total(),
        rows=rows,
        shards=shards,
        samples_per_shard=config.samples_per_shard,
        left_out=dict(left_out.most_common()),
        stamps=stamps,
    )
    layout.write_json(storage.join(root_url, layout.PLAN), asdict(plan))
    layout.remove(storage.join(root_url, layout.PREPARING))
    log.info("prepared", rows=rows, shards=shards, left_out=plan.left_out or None)
    return plan


def _prepared_before(root_url: str, fingerprint: str) -> frozenset[int]:
    """Shards whose lists a run that was killed has written from the same list; what others have written is removed."""
    folder = storage.join(root_url, layout.LIST_FOLDER)
    before = layout.read_json(storage.join(root_url, layout.PREPARING))
    if before is None or before.get("fingerprint") != fingerprint:
        layout.remove(folder)
        return frozenset()
    names = layout.file_sizes(folder, ".parquet")
    return frozenset(int(name.partition(".")[0]) for name in names if name.partition(".")[0].isdigit())


def read_plan(root_url: str) -> Plan:
    """The plan of the data set at ``root_url``. Raises UserError where there is none."""
    before = layout.read_json(storage.join(root_url, layout.PLAN))
    if before is None:
        raise UserError(f"{root_url} holds no data set of this command: there is no {layout.PLAN}")
    return _as_plan(before, root_url)


def fitting_plan(root_url: str, source: Source, config: PrepareConfig) -> Plan | None:
    """The plan at ``root_url`` if it was made with these settings; ``None`` if there is none. The list is not read.

    Raises:
        UserError: it was made with others.
    """
    before = layout.read_json(storage.join(root_url, layout.PLAN))
    if before is None:
        return None
    plan = _as_plan(before, root_url)
    return _same_plan(before, _fingerprint(f"{plan.list_sha256} {plan.metadata_sha256}", source, config), root_url)


def normalise_url(raw: str) -> str | None:
    """The URL as it is asked for: encoded as HTTP demands, without the parts a server never sees.

    ``None`` for what must not be asked for: a scheme other than http and https, no host, a user name in it,
    control characters, or more than 4,096 characters.
    """
    address = raw.strip()
    if _PLAIN_URL.fullmatch(address) and len(address) <= LONGEST_URL:
        return address
    address = f"http:{address}" if address.startswith("//") else address
    if any(unicodedata.category(letter) == "Cc" for letter in address):
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        if parts.scheme.lower() not in ("http", "https") or not host or parts.username is not None:
            return None
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError:
        return None
    if not _HOST.fullmatch(host):
        return None
    scheme = parts.scheme.lower()
    default_port = 443 if scheme == "https" else 80
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port is not None and port != default_port else ""
    path = quote(parts.path or "/", safe=_SAFE)
    clean = urlunsplit((scheme, place, path, quote(parts.query, safe=_SAFE + "?"), ""))
    return clean if len(clean) <= LONGEST_URL else None


def normalise_caption(raw: str) -> str:
    """One line of composed Unicode: entities decoded, control characters and runs of space become one space."""
    text = unicodedata.normalize("NFC", html.unescape(raw)).replace("<PERSON>", "person")
    return " ".join(_CONTROL.sub(" ", text).split())


def stable_id(url: str) -> int:
    """64 bits that stand for a normalised URL in any list, any order and any run (BLAKE2b)."""
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "little")


_SAFE = "/%:@!$&'()*+,;=~-._"
_PLAIN_URL = re.compile(r"https?://[a-z0-9][a-z0-9.-]*/[A-Za-z0-9/%:@!$&'()*+,;=~._?-]*")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+(%[a-z0-9]+)?")
# Cc, bidirectional overrides and zero-width marks: they hide text from a reader and mean nothing to a tower.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def _fingerprint(content: str, source: Source, config: PrepareConfig) -> str:
    shaping = {key: value for key, value in asdict(config).items() if key != "noun_processes"}
    text = json.dumps([VERSION, content, source.columns, shaping])
    return sha256(text.encode()).hexdigest()


def _as_plan(before: dict[str, Any], root_url: str) -> Plan:
    try:
        return Plan(**before)
    except TypeError as error:
        raise UserError(f"{root_url}: {layout.PLAN} is damaged ({error})") from error


def _same_plan(before: dict[str, Any], fingerprint: str, root_url: str) -> Plan:
    plan = _as_plan(before, root_url)
    if plan.fingerprint != fingerprint:
        raise UserError(
            f"{root_url} holds the data set of another list or of other prepare.* settings "
            f"({plan.list_url}, {plan.rows:,} rows); choose another output"
        )
    return plan


def _clean_rows(rows: Iterable[Row], config: PrepareConfig, left_out: Counter[str]) -> Iterator[tuple[int, str, str]]:
    """Normalised (id, url, caption) of each usable row; the others are counted in ``left_out``."""
    for row in rows:
        if row.url is None or row.caption is None:
            left_out[row.fault] += 1
            continue
        url = normalise_url(row.url)
        if url is None:
            left_out["unusable URL"] += 1
            continue
        caption = normalise_caption(row.caption)
        if len(caption) < config.shortest_caption:
            left_out["caption too short"] += 1
        elif len(caption) > config.longest_caption:
            left_out["caption too long"] += 1
        else:
            yield stable_id(url), url, caption


def _without_duplicates(rows: Iterable[tuple[int, str, str]], left_out: Counter[str]) -> Iterator[tuple[int, str, str]]:
    """Drop rows whose URL came before, remembering 8 bytes a row.

    The ids seen are one sorted array that each chunk is merged into. Of 30 million URLs two share an id with a
    probability of 2.4e-5.
    """
    seen = np.empty(0, np.uint64)
    rows = iter(rows)
    while chunk := list(islice(rows, DEDUPLICATION_CHUNK_ROWS)):
        ids = np.array([row[0] for row in chunk], np.uint64)
        fresh, first_at = np.unique(ids, return_index=True)
        if len(seen):
            at = np.minimum(np.searchsorted(seen, fresh), len(seen) - 1)
            is_new = seen[at] != fresh
            fresh, first_at = fresh[is_new], first_at[is_new]
        if len(fresh) < len(chunk):
            left_out["duplicate URL"] += len(chunk) - len(fresh)
        # A stable sort of two sorted runs is one merge.
        seen = np.sort(np.concatenate([seen, fresh]), kind="stable")
        for position in np.sort(first_at):
            yield chunk[position]


def _cut(rows: Iterable[tuple[int, str, str]], size: int) -> Iterator[list[tuple[int, str, str]]]:
    rows = iter(rows)
    while piece := list(islice(rows, size)):
        yield piece


def _with_nouns(
    pieces: Iterable[list[tuple[int, str, str]]], config: PrepareConfig, there: frozenset[int] = frozenset()
) -> Iterator[tuple[int, pa.Table | None]]:
    """Rows and table of each piece, in order; no table for those that are ``there``.

    With several processes a few pieces are worked on at a time.
    """
    numbered = enumerate(pieces)
    if not config.nouns or config.noun_processes == 1:
        for number, piece in numbered:
            yield len(piece), None if number in there else _table(piece, config.nouns)
        return
    with ProcessPoolExecutor(config.noun_processes, mp_context=get_context("spawn")) as processes:

        def begin(number: int, piece: list[tuple[int, str, str]]) -> tuple[int, Future[pa.Table] | None]:
            return len(piece), None if number in there else processes.submit(_table, piece, True)

        waiting = deque(begin(*piece) for piece in islice(numbered, 2 * config.noun_processes))
        while waiting:
            count, tagged = waiting.popleft()
            yield count, None if tagged is None else tagged.result()
            waiting.extend(begin(*piece) for piece in islice(numbered, 1))


def _table(piece: Sequence[tuple[int, str, str]], with_nouns: bool) -> pa.Table:
    ids, urls, captions = zip(*piece, strict=True)
    found = list(nouns.extract_nouns(captions)) if with_nouns else [[] for _ in piece]
    return pa.table([pa.array(ids, pa.uint64()), urls, captions, found], schema=LIST_SCHEMA)


def as_parquet(table: pa.Table) -> bytes:
    """A prepared list as the bytes of its file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _why_nothing(list_url: str, left_out: Counter[str]) -> str:
    if not left_out.total():
        return f"{list_url} is empty: there is no URL to download"
    causes = ", ".join(f"{count} {cause}" for cause, count in left_out.most_common())
    return f"{list_url}: none of its {left_out.total()} rows is usable ({causes})"
