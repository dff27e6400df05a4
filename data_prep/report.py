"""What was expected, what was got, and why the rest is missing: one JSON file and one table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pyarrow.parquet as pq

from data_prep import layout
from data_prep.prepare import Plan
from data_prep.retry import Round
from data_prep.survey import survey_shards
from data_prep.verify import TarFacts
from pacl_scale import storage

THREADS = 16


@dataclass(frozen=True)
class Report:
    """The account of a data set.

    ``list_rows`` = ``left_out`` + ``expected``, and ``expected`` = ``got`` + ``failures`` + ``pending``.

    Attributes:
        source: name of the kind of list.
        list_url, list_sha256, metadata_sha256: which list it was.
        published_rows: how many rows the published list of this kind has, if there is one.
        list_rows: rows of the list.
        left_out: rows that were not asked for, by cause.
        expected: rows that were asked for.
        got: samples in the shards.
        failures: rows that were asked for and gave no sample, by the cause of the last attempt.
        pending: rows of shards that are not made yet.
        retried: rows that were asked for again, summed over all rounds.
        shards: number of tars.
        bytes: their size.
        samples: samples that the index knows.
        verified: SHA-256 of each tar that was read to its end, by name.
        left_aside: what is wrong with tars that are not in the index, by name.
        survey: success by host; sizes, aspects and caption lengths (:mod:`data_prep.survey`).
        seconds: of each stage in the run that wrote this.
    """

    source: str
    list_url: str
    list_sha256: str
    metadata_sha256: str | None
    published_rows: int | None
    list_rows: int
    left_out: dict[str, int]
    expected: int
    got: int
    failures: dict[str, int]
    pending: int
    retried: int
    shards: int
    bytes: int
    samples: int
    verified: dict[str, str] = field(default_factory=dict)
    left_aside: dict[str, str] = field(default_factory=dict)
    survey: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def adds_up(self) -> bool:
        """Whether every row is in exactly one state."""
        asked = self.got + sum(self.failures.values()) + self.pending
        return self.list_rows == sum(self.left_out.values()) + self.expected and self.expected == asked


def read_stats(root_url: str, shards: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The counts of each finished shard, by number."""
    shards = list(shards)

    def read(shard: int) -> dict[str, Any]:
        return layout.read_json(storage.join(root_url, layout.shard_name(shard) + layout.STATS_SUFFIX)) or {}

    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(shards, threads.map(read, shards), strict=True))


def count_failures(stats: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
    """Failed attempts by cause, the most frequent first."""
    causes: Counter[str] = Counter()
    for shard in stats.values():
        causes.update(shard.get("causes", {}))
    return dict(causes.most_common())


def make_report(
    root_url: str,
    plan: Plan,
    rounds: Sequence[Round],
    published_rows: int | None,
    sound: Mapping[int, TarFacts],
    samples: int,
    seconds: Mapping[str, float],
    before: Mapping[str, Any],
) -> Report:
    """Put together what the stages found.

    Args:
        published_rows: of the list of this kind, if there is one.
        sound: the finished shards that were read to their end.
        samples: that the index knows.
        before: the report that is there; what cannot have changed since is taken from it.
    """
    stats = read_stats(root_url, sound)
    verified = {facts.name: facts.sha256 for facts in sound.values()}
    survey = before.get("survey") if before.get("verified") == verified else None
    survey = survey or survey_shards(root_url, sorted(sound), plan.shards)
    return Report(
        source=plan.source,
        list_url=plan.list_url,
        list_sha256=plan.list_sha256,
        metadata_sha256=plan.metadata_sha256,
        published_rows=published_rows,
        list_rows=plan.list_rows,
        left_out=plan.left_out,
        expected=plan.rows,
        got=sum(shard.get("successes", 0) for shard in stats.values()),
        failures=survey["failures"],
        pending=_count_pending(root_url, plan, rounds, sound),
        retried=sum(round.rows for round in rounds),
        shards=len(sound),
        bytes=sum(facts.bytes for facts in sound.values()),
        samples=samples,
        verified=verified,
        survey=survey,
        seconds={stage: round(value, 1) for stage, value in seconds.items()},
    )


def _count_pending(root_url: str, plan: Plan, rounds: Sequence[Round], sound: Mapping[int, TarFacts]) -> int:
    """Rows of prepared lists whose shard is not made (or not read to its end) yet."""
    planned = plan.shards + sum(round.shards for round in rounds)

    def rows_of(shard: int) -> int:
        return pq.read_metadata(BytesIO(layout.read_bytes(layout.list_url(root_url, shard)))).num_rows

    with ThreadPoolExecutor(THREADS) as threads:
        return sum(threads.map(rows_of, sorted(set(range(planned)) - set(sound))))


def as_table(report: Report, root_url: str) -> str:
    """The report for a terminal."""
    lines = [("rows in the list", report.list_rows, _of_published(report))]
    lines += [(f"  left out: {cause}", count, "") for cause, count in report.left_out.items()]
    lines += [("expected", report.expected, ""), ("got", report.got, _share(report.got, report.expected))]
    lines += [(f"  failed: {cause}", count, "") for cause, count in report.failures.items()]
    lines += [("  not asked yet", report.pending, "")] if report.pending else []
    lines += [("asked for again", report.retried, "")] if report.retried else []
    width = max(len(what) for what, _, _ in lines)
    table = [f"{what:<{width}}  {count:>12,}  {note}".rstrip() for what, count, note in lines]
    size = f"{report.bytes / 1e6:,.1f} MB"
    return "\n".join([*table, f"{report.shards} shards, {size}, {report.samples:,} samples indexed: {root_url}"])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _of_published(report: Report) -> str:
    if report.published_rows is None or report.published_rows == report.list_rows:
        return ""
    return f"the published list has {report.published_rows:,}"
