"""What a list gave, in figures: success by host, and how large, how wide and how long captioned the pictures are.

Read from the parquet files of the shards, a shard at a time, so that memory does not grow with the list.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep import layout
from pacl_scale import storage

THREADS = 4
MOST_HOSTS = 1000
"""Hosts and domains that the report's JSON names: those that most rows ask."""

COLUMNS = ["id", "url", "caption", "cause", "original_width", "original_height"]

SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Bounds in pixels between the bins of the shorter side, as downloaded."""
ASPECTS = (0.33, 0.5, 0.67, 0.75, 0.9, 1.1, 1.34, 1.51, 2.0, 3.0)
"""Bounds between the bins of width over height; 4:3 and 3:2 lie below a bound."""
CAPTIONS = (10, 20, 40, 60, 80, 100, 150, 200, 300)
"""Bounds in characters between the bins of captions."""


@dataclass
class Survey:
    """Sums over shards."""

    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDES) + 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECTS) + 1, np.int64))
    captions: np.ndarray = field(default_factory=lambda: np.zeros(len(CAPTIONS) + 1, np.int64))
    rows_of_host: Counter[str] = field(default_factory=Counter)
    got_of_host: Counter[str] = field(default_factory=Counter)
    causes_of_host: dict[str, Counter[str]] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)

    def add_samples(self, widths: np.ndarray, heights: np.ndarray, caption_lengths: np.ndarray) -> None:
        """Count samples by the size of their picture in pixels and the characters of their caption."""
        self.sides += _histogram(np.minimum(widths, heights), SIDES)
        self.aspects += _histogram(widths / np.maximum(heights, 1), ASPECTS)
        self.captions += _histogram(caption_lengths, CAPTIONS)

    def add_hosts(self, hosts: pa.Array, causes: pa.Array) -> None:
        """Count rows by host and cause of failure (null: a sample)."""
        counts = pa.table({"host": hosts, "cause": causes}).group_by(["host", "cause"]).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            host, cause, count = row["host"], row["cause"], row["count_all"]
            self.rows_of_host[host] += count
            if cause is None:
                self.got_of_host[host] += count
            else:
                self.causes_of_host.setdefault(host, Counter())[cause] += count
                self.causes[cause] += count

    def as_dict(self) -> dict[str, Any]:
        """What goes into the report."""
        rows_of_domain, got_of_domain = Counter[str](), Counter[str]()
        causes_of_domain: dict[str, Counter[str]] = {}
        for host, rows in self.rows_of_host.items():
            domain = domain_of(host)
            rows_of_domain[domain] += rows
            got_of_domain[domain] += self.got_of_host[host]
            causes_of_domain.setdefault(domain, Counter()).update(self.causes_of_host.get(host, Counter()))
        return {
            "failures": dict(self.causes.most_common()),
            "hosts": len(self.rows_of_host),
            "hosts_without_success": sum(1 for host in self.rows_of_host if not self.got_of_host[host]),
            "by_host": _rates("host", self.rows_of_host, self.got_of_host, self.causes_of_host),
            "domains": len(rows_of_domain),
            "by_domain": _rates("domain", rows_of_domain, got_of_domain, causes_of_domain),
            "shorter_side": {"bounds": list(SIDES), "counts": self.sides.tolist()},
            "aspect": {"bounds": list(ASPECTS), "counts": self.aspects.tolist()},
            "caption_length": {"bounds": list(CAPTIONS), "counts": self.captions.tolist()},
        }


def _rates(
    kind: str, rows_of: Counter[str], got_of: Counter[str], causes_of: dict[str, Counter[str]]
) -> list[dict[str, Any]]:
    ordered = sorted(rows_of.items(), key=lambda item: (-item[1], item[0]))[:MOST_HOSTS]
    return [
        {kind: name, "rows": rows, "got": got_of[name], "causes": dict(causes_of.get(name, Counter()).most_common(3))}
        for name, rows in ordered
    ]


def domain_of(host: str) -> str:
    """What somebody has registered, of a host with or without a port: ``example.co.uk`` for ``a.example.co.uk:80``.

    A rule of thumb instead of the list of all suffixes: two labels, three below a short one of a country (``co.uk``).
    """
    name = host if host.startswith("[") else host.partition(":")[0]
    labels = name.split(".")
    if name.startswith("[") or labels[-1].isdigit():
        return name
    below_country = len(labels) > 2 and len(labels[-1]) == 2 and len(labels[-2]) <= 3
    return ".".join(labels[-3:] if below_country else labels[-2:])


def survey_shards(root_url: str, shards: Sequence[int], first_retry: int) -> dict[str, Any]:
    """Count the last attempt of every row of finished shards.

    Args:
        first_retry: number of the first shard of retries; rows in those have earlier attempts in others.
    """
    survey = Survey()
    # The last attempts come first: an id that was seen in a retry stands for its earlier attempts too.
    retried = np.empty(0, np.uint64)
    for shard, table in read_tables(root_url, [shard for shard in reversed(shards) if shard >= first_retry], COLUMNS):
        del shard
        retried = np.union1d(retried, _count(survey, table, retried))
    for _, table in read_tables(root_url, [shard for shard in shards if shard < first_retry], COLUMNS):
        _count(survey, table, retried)
    return survey.as_dict()


def _count(survey: Survey, table: pa.Table, superseded: np.ndarray) -> np.ndarray:
    """Count a shard's rows but the superseded ones; returns the ids of all its rows."""
    ids = table["id"].to_numpy()
    table = table.filter(pa.array(~np.isin(ids, superseded)))
    survey.add_hosts(_hosts(table["url"]), table["cause"])
    samples = table.filter(pc.is_null(table["cause"]))
    widths, heights = (samples[name].to_numpy() for name in ("original_width", "original_height"))
    survey.add_samples(widths, heights, pc.utf8_length(samples["caption"]).to_numpy())
    return ids


def _hosts(urls: pa.ChunkedArray) -> pa.Array:
    """Host and port of normalised URLs, without a leading ``www.``."""
    found = pc.extract_regex(urls, r"^https?://(?:www\.)?(?P<host>[^/?#]*)")
    return pc.struct_field(found, "host")


def read_tables(root_url: str, shards: Sequence[int], columns: Sequence[str]) -> Iterable[tuple[int, pa.Table]]:
    """Number and some columns of each finished shard's parquet file, in the order of ``shards``; a few are read ahead.

    Raises:
        UserError, RunFailed: one cannot be read.
    """

    def read(shard: int) -> pa.Table:
        content = layout.read_bytes(storage.join(root_url, f"{layout.shard_name(shard)}.parquet"))
        return pq.read_table(pa.BufferReader(content), columns=list(columns))

    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(shards), 2 * THREADS):
            some = shards[start : start + 2 * THREADS]
            yield from zip(some, threads.map(read, some), strict=True)


def _histogram(values: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    return np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1)
