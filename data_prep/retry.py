"""Ask once more for what failed for a reason that may pass: in new shards beside the old ones, which stay as they are.

A round is planned from the latest attempt of every row: those that failed for one of the wanted causes get new
prepared lists, numbered after the last shard, in an order that spreads each host over the whole round. What is
gone (404, 410) is never asked for again, and hosts that keep failing rest longer each time.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import layout
from data_prep.causes import CAUSES
from data_prep.prepare import LIST_SCHEMA, Plan, as_parquet
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
    failed = _latest_failures(root_url, shard_count(plan, rounds), frozenset(causes))
    if not failed:
        return None
    first_shard = shard_count(plan, rounds)
    pieces = _pieces(_spread(failed), samples_per_shard)
    for shard, piece in enumerate(pieces, start=first_shard):
        table = pa.Table.from_pylist(piece, LIST_SCHEMA)
        layout.write_bytes(layout.list_url(root_url, shard), as_parquet(table))
    planned = Round(
        first_shard=first_shard,
        shards=-(-len(failed) // samples_per_shard),
        rows=len(failed),
        superseded=dict(Counter(row["cause"] for row in failed).most_common()),
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


def _latest_failures(root_url: str, shards: int, causes: frozenset[str]) -> list[dict[str, Any]]:
    """Rows whose last attempt failed for one of ``causes``, as they stand in their list, with that cause."""
    failed: dict[int, dict[str, Any]] = {}
    for shard in range(shards):
        url = storage.join(root_url, f"{layout.shard_name(shard)}.parquet")
        columns = [*LIST_SCHEMA.names, "cause"]
        for row in pq.read_table(BytesIO(layout.read_bytes(url)), columns=columns).to_pylist():
            if row["cause"] in causes:
                failed[row["id"]] = row
            else:
                failed.pop(row["id"], None)
    return list(failed.values())


def _spread(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, a host's next one only after one of every other host that still has some."""
    hosts: dict[str, deque[dict[str, Any]]] = {}
    for row in rows:
        hosts.setdefault(urlsplit(row["url"]).netloc, deque()).append(row)
    while hosts:
        for host in list(hosts):
            yield hosts[host].popleft()
            if not hosts[host]:
                del hosts[host]


def _pieces(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    rows = iter(rows)
    while piece := list(islice(rows, size)):
        yield piece
