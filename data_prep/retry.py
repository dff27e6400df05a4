"""Ask once more for what failed for a reason that may pass: in new shards beside the old ones, which stay as they are.

A round is planned from the latest attempt of every row: those that failed for one of the wanted causes get new
prepared lists, numbered after the last shard, in an order that spreads each host over the whole round. What is
gone (404, 410) is never asked for again, and hosts that keep failing rest longer each time.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import layout
from data_prep.causes import CAUSES
from data_prep.prepare import LIST_SCHEMA, Plan, as_parquet
from data_prep.survey import read_tables
from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger

log = get_logger(__name__)

ROUND_PREFIX = "retry-"

PASSING_CAUSES = [
    "backoff",
    "connection",
    "dns",
    "empty",
    "http_408",
    "http_429",
    "http_500",
    "http_502",
    "http_503",
    "http_504",
    "protocol",
    "timeout",
    "truncated",
]
"""Failures that may be gone the next day."""

GONE = ("http_404", "http_410")


@dataclass
class RetryConfig:
    """How failed URLs are asked for again."""

    causes: list[str] = field(default_factory=lambda: list(PASSING_CAUSES))
    """Causes of failure that are tried again."""
    backoff_seconds: float = 1.0
    """Rest of a host after a failure that is its own (busy, silent, refusing); doubled with each in a row."""

    def __post_init__(self) -> None:
        gone = [cause for cause in self.causes if cause in GONE]
        if gone:
            raise ValueError(f"retry.causes: {gone[0]} means that the picture is gone; it is not asked for again")
        wrong = [cause for cause in self.causes if cause not in CAUSES and not cause.startswith("http_")]
        if wrong:
            known = ", ".join([*CAUSES, "http_<status>"])
            raise ValueError(f"retry.causes: there is no {wrong[0]!r}; choose among {known}")
        if self.backoff_seconds < 0:
            raise ValueError("retry.backoff_seconds must not be negative")


@dataclass(frozen=True)
class Round:
    """One round of retries: its shards follow each other from ``first_shard``.

    ``superseded`` counts, by cause, the failures that its rows had before.
    """

    first_shard: int
    shards: int
    rows: int
    superseded: dict[str, int]


def read_rounds(root_url: str) -> list[Round]:
    """The rounds planned so far, in order.

    Raises:
        UserError: one of them is damaged.
    """
    folder = storage.join(root_url, layout.LIST_FOLDER)
    rounds = []
    for name in layout.file_sizes(folder, ".json"):
        if name.startswith(ROUND_PREFIX):
            try:
                rounds.append(Round(**(layout.read_json(storage.join(folder, name)) or {})))
            except TypeError as error:
                raise UserError(f"{folder}/{name} is damaged ({error})") from error
    return rounds


def shard_count(plan: Plan, rounds: Sequence[Round]) -> int:
    """Number of shards planned, retries included."""
    return plan.shards + sum(round.shards for round in rounds)


def plan_round(
    root_url: str, plan: Plan, rounds: Sequence[Round], samples_per_shard: int, causes: Iterable[str]
) -> Round | None:
    """Write the prepared lists of the next round; ``None`` if there is nothing to ask for again.

    All shards planned before must be finished.
    """
    failed = _latest_failures(root_url, shard_count(plan, rounds), plan.shards, frozenset(causes))
    if not failed.num_rows:
        return None
    first_shard = shard_count(plan, rounds)
    order = _spread(failed["url"])
    starts = range(0, failed.num_rows, samples_per_shard)
    for shard, start in enumerate(starts, start=first_shard):
        piece = failed.take(order[start : start + samples_per_shard]).select(LIST_SCHEMA.names).cast(LIST_SCHEMA)
        layout.write_bytes(layout.list_url(root_url, shard), as_parquet(piece))
    counts = Counter({count["values"]: count["counts"] for count in pc.value_counts(failed["cause"]).to_pylist()})
    planned = Round(
        first_shard=first_shard, shards=len(starts), rows=failed.num_rows, superseded=dict(counts.most_common())
    )
    # The lists count from the moment this is written.
    name = f"{ROUND_PREFIX}{len(rounds) + 1:05d}.json"
    layout.write_json(storage.join(root_url, layout.LIST_FOLDER, name), asdict(planned))
    log.info("retry", rows=planned.rows, shards=planned.shards, causes=planned.superseded)
    return planned


def retried_later(root_url: str, plan: Plan, rounds: Sequence[Round], shard: int) -> frozenset[int]:
    """Ids that later rounds than the one of ``shard`` ask for: they must not be asked for again in ``shard``.

    Otherwise a picture that failed once and then came in a retry would be there twice after its first shard was
    damaged and made again.
    """
    later = [number for round in rounds for number in range(round.first_shard, round.first_shard + round.shards)]
    own = next((r.first_shard + r.shards for r in rounds if r.first_shard <= shard < r.first_shard + r.shards), 0)
    ids: set[int] = set()
    for number in later:
        if number >= max(own, plan.shards):
            content = pa.BufferReader(layout.read_bytes(layout.list_url(root_url, number)))
            ids.update(pq.read_table(content, columns=["id"])["id"].to_pylist())
    return frozenset(ids)


def _latest_failures(root_url: str, shards: int, first_retry: int, causes: frozenset[str]) -> pa.Table:
    """Rows whose last attempt failed for one of ``causes``, as they stand in their list, with that cause.

    They stay in Arrow's columns: as Python's objects the failures of CC12M would take gigabytes.
    """
    columns = [*LIST_SCHEMA.names, "cause"]
    wanted = pa.array(sorted(causes), pa.string())
    found: list[tuple[int, pa.Table]] = []
    # The last attempts come first: an id that was seen in a retry has its earlier attempts behind it.
    retried = np.empty(0, np.uint64)
    for shard, table in read_tables(root_url, list(reversed(range(shards))), columns):
        ids = table["id"].to_numpy()
        is_last = pa.array(~np.isin(ids, retried))
        if shard >= first_retry:
            retried = np.union1d(retried, ids)
        found.append((shard, table.filter(pc.and_(is_last, pc.is_in(table["cause"], wanted)))))
    tables = [table for _, table in sorted(found, key=lambda pair: pair[0])]
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns})


def _spread(urls: pa.ChunkedArray) -> np.ndarray:
    """Order in which a host's next row comes only after one of every other host that still has some."""
    hosts = pc.struct_field(pc.extract_regex(urls, r"^https?://(?P<host>[^/?#]*)"), "host")
    numbers = hosts.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    by_host = np.argsort(numbers, kind="stable")
    sizes = np.bincount(numbers)
    turn = np.empty(len(numbers), np.int64)
    turn[by_host] = np.arange(len(numbers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.lexsort((numbers, turn))
