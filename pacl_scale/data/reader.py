"""Samples of a rank's batches, read ahead in large ranges by threads, within a bound of memory.

The order is known for all time, so the reader plans a window of a data set's order at once: which of its samples this
rank will deliver, and in which batch. Samples that lie close together come with one ranged read, and each is kept only
until its batch is taken. Of a data set that gives few samples a batch a window lasts long, so no more of it is planned
than is delivered within some windows of the whole mixture.
"""

import heapq
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from pacl_scale.data.order import Mixture, Picks, split
from pacl_scale.data.ranges import ShardReader
from pacl_scale.data.workers import Workers
from pacl_scale.distributed import World

LARGEST_READ = 8 << 20
LARGEST_GAP = 256 << 10
"""Bytes between two wanted samples that are read and thrown away rather than asked for around: a request costs about
as much as this many bytes."""

HORIZON_WINDOWS = 8
"""Windows' worth of places of the whole mixture that are planned ahead. A data set that gives less than an eighth of
the samples is read in more and smaller ranges, as few of a chunk's samples are needed soon; but what is held grows
neither with the number of data sets nor as a weight shrinks."""

CLOSING_S = 1.0
"""How long the end of a stream waits for reads that are under way; one that hangs is left behind."""


@dataclass
class ReadConfig:
    """How shards are read. The chunk and the window are part of the order: changing them changes it."""

    chunk_samples: int = 32
    """Consecutive samples of a shard that travel together: one ranged read of 1 to 4 MB for most data sets."""

    window_chunks: int = 128
    """Chunks, from all shards, whose samples are mixed. More mixes better and holds more bytes in memory: a window of
    each data set's order, of eight data sets at most, divided by the number of ranks, is kept while its batches are
    delivered."""

    read_ahead_mb: int = 256
    """Bytes of samples, in MiB, that each rank reads ahead of need."""

    fetch_threads: int = 8
    """Ranged reads at the same time, in each rank."""

    timeout_s: float = 30.0
    """Seconds without a further byte after which a read is tried again; as a whole it may take ten times as long."""

    retries: int = 8
    """Further tries of a read that failed with a fault that may pass; they take about 20 s with their waits."""

    disk_cache: str = ""
    """Folder on a local disk that keeps what was read of remote shards, for all processes of this machine and all
    epochs; empty keeps nothing."""

    disk_cache_gb: float = 100.0
    """Most bytes that disk_cache may take, in GB of 1,000,000,000; what was not read for the longest time goes
    first."""

    def __post_init__(self) -> None:
        for name in ("chunk_samples", "window_chunks", "read_ahead_mb", "fetch_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"read.{name} must be at least 1, not {getattr(self, name)}")
        if self.timeout_s <= 0 or self.retries < 0:
            raise ValueError("data.read.timeout_s must be above 0 and data.read.retries at least 0")
        if self.disk_cache_gb <= 0:
            raise ValueError(f"data.read.disk_cache_gb must be above 0, not {self.disk_cache_gb}")


@dataclass(frozen=True)
class Read:
    """One ranged read: bytes ``start`` to ``stop`` of a shard, and the samples in them; the first of those is needed in
    batch ``first_use``."""

    first_use: int
    source: int
    epoch: int
    shard: int
    start: int
    stop: int
    samples: np.ndarray


class ReadPlan:
    """The batches of one rank from ``position`` on, and the reads that bring their samples in time.

    Args:
        mixture: the order of everything.
        readers: one a data set of the mixture.
        world: which part of every global batch is ours.
        position: samples consumed by all ranks before the first batch.
        global_batch_size: samples of all ranks in a batch.
        end: position at which the stream ends, with a shorter batch if need be; None never ends.
    """

    def __init__(
        self,
        mixture: Mixture,
        readers: Sequence[ShardReader],
        world: World,
        position: int,
        global_batch_size: int,
        end: int | None = None,
    ) -> None:
        self._mixture, self._readers = mixture, readers
        self._world = world
        self._position, self._size, self._end = position, global_batch_size, end
        window = max(order.chunk_samples * max(order.window_chunks, 1) for order in mixture.orders)
        self._horizon = -(-HORIZON_WINDOWS * window // global_batch_size)
        """Batches that are planned ahead, at most."""

    def span(self, number: int) -> tuple[int, int]:
        """The positions of a batch; empty after the end."""
        start, stop = (self._position + (number + i) * self._size for i in (0, 1))
        return (start, stop) if self._end is None else (min(start, self._end), min(stop, self._end))

    def batch(self, number: int) -> Picks | None:
        """This rank's samples of batch ``number``, counted from 0; None after the end."""
        start, stop = self.span(number)
        if start == stop:
            return None
        return split(self._mixture.global_batch(start, stop - start), self._world.size, self._world.rank)

    def reads(self) -> Iterator[list[Read]]:
        """For each batch the reads whose first samples it needs."""
        waiting: list[tuple[int, int, int, int, int, Read]] = []
        planned = self._mixture.own_positions(self._position)
        number = 0
        while self.span(number)[0] < self.span(number)[1]:
            needed = self._mixture.own_positions(self.span(number)[1])
            for source in range(len(needed)):
                while planned[source] < needed[source]:
                    planned[source], reads = self._stretch(number, source, int(planned[source]))
                    for read in reads:
                        heapq.heappush(waiting, (read.first_use, source, read.epoch, read.shard, read.start, read))
            first_needed = []
            while waiting and waiting[0][0] <= number:
                first_needed.append(heapq.heappop(waiting)[-1])
            yield first_needed
            number += 1

    def _stretch(self, number: int, source: int, begin: int) -> tuple[int, list[Read]]:
        """The reads of our samples of a data set from place ``begin`` of its own line on, which batch ``number`` holds,
        to the end of the window there or to the horizon; and the place where that is."""
        edges = self._position + self._size * np.arange(number, number + self._horizon + 1)
        edges = edges if self._end is None else np.minimum(edges, self._end)
        own = self._mixture.own_positions(edges)[source]
        end = min(self._mixture.orders[source].window_end(begin), int(own[-1]))
        edges = edges[: int(np.searchsorted(own, end)) + 1]
        picks, places, batch = self._mixture.share(source, edges, self._world.size, self._world.rank)
        wanted = (places >= begin) & (places < end)
        samples, first_use = picks.sample[wanted], number + batch[wanted]
        order = np.argsort(samples)
        samples, first_use = samples[order], first_use[order]
        index = self._readers[source].index
        shards = index.shard_of(samples)
        reads = []
        for first, stop in _coalesce(shards, index.offset[samples], index.length[samples]):
            group, last = samples[first:stop], samples[stop - 1]
            read = Read(
                first_use=int(first_use[first:stop].min()),
                source=source,
                epoch=int(picks.epoch[wanted][0]),
                shard=int(shards[first]),
                start=int(index.offset[group[0]]),
                stop=int(index.offset[last]) + int(index.length[last]),
                samples=group,
            )
            reads.append(read)
        return end, reads


class ReadAhead:
    """Carries out a plan's reads in threads, ahead of need.

    Args:
        plan: whose reads.
        readers: one a data set.
        threads: reads at the same time.
        budget: bytes of samples that may be held or under way ahead of need. What the next batch needs is read
            whether it fits or not.
    """

    def __init__(self, plan: ReadPlan, readers: Sequence[ShardReader], threads: int, budget: int) -> None:
        self._readers, self._budget = readers, budget
        self._threads = Workers(threads, "fetch")
        self._reads = plan.reads()
        self._planned = 0
        """Batches whose reads are begun or waiting."""
        self._waiting: deque[Read] = deque()
        self._places: dict[tuple[int, int, int], tuple[Future[list[bytes | None]], int]] = {}
        self._lock = threading.Lock()
        self.held = 0

    def start(self, number: int, picks: Picks) -> list["Awaited"]:
        """Handles of the samples of the next batch, ``number``, in its order."""
        while self._planned <= number and self._plan_batch():
            pass
        while self._waiting and self._waiting[0].first_use <= number:
            self._begin(self._waiting.popleft())
        keys = [(int(s), int(e), int(n)) for s, e, n in zip(picks.source, picks.epoch, picks.sample, strict=True)]
        return [Awaited(self, *self._places.pop(key)) for key in keys]

    def read_on(self, most: int) -> None:
        """Begin up to ``most`` further reads within the budget."""
        for _ in range(most):
            if self.held >= self._budget or not (self._waiting or self._plan_batch()):
                return
            if self._waiting:
                self._begin(self._waiting.popleft())

    def close(self) -> None:
        """Give up what is under way. Whoever waits for a sample learns of it; a thread whose read hangs is left, and
        ends with its time-out."""
        for reader in self._readers:
            reader.close()
        self._threads.close(CLOSING_S)

    def release(self, size: int) -> None:
        """``size`` bytes are no longer held."""
        with self._lock:
            self.held -= size

    def _plan_batch(self) -> bool:
        """Plan one more batch; False after the last."""
        reads = next(self._reads, None)
        if reads is None:
            return False
        self._planned += 1
        self._waiting.extend(reads)
        return True

    def _begin(self, read: Read) -> None:
        index = self._readers[read.source].index
        with self._lock:
            self.held += int(index.length[read.samples].sum())
        future = self._threads.submit(self._carry_out, read)
        for place, sample in enumerate(read.samples):
            self._places[(read.source, read.epoch, int(sample))] = (future, place)

    def _carry_out(self, read: Read) -> list[bytes | None]:
        reader = self._readers[read.source]
        content = reader.read(read.shard, read.start, read.stop)
        starts = (reader.index.offset[read.samples].astype(np.int64) - read.start).tolist()
        lengths = reader.index.length[read.samples].tolist()
        # Copies, so that each sample's memory is free as soon as it is decoded, not when the last of them is.
        return [content[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@dataclass(frozen=True)
class Awaited:
    """A sample that is being read."""

    _ahead: ReadAhead
    _future: "Future[list[bytes | None]]"
    _place: int

    def result(self) -> bytes:
        """Its bytes, once; waits for them. Raises what the read raised."""
        contents = self._future.result()
        content, contents[self._place] = contents[self._place], None
        assert content is not None, "a sample is taken once"
        self._ahead.release(len(content))
        return content


def _coalesce(shard: np.ndarray, offset: np.ndarray, length: np.ndarray) -> list[tuple[int, int]]:
    """Runs of sorted samples that come with one read each, as bounds."""
    if len(shard) == 0:
        return []
    offset, ends = offset.astype(np.int64), offset.astype(np.int64) + length
    apart = (shard[1:] != shard[:-1]) | (offset[1:] - ends[:-1] > LARGEST_GAP)
    bounds, begin = [], 0
    for place in range(1, len(shard) + 1):
        if place == len(shard) or apart[place - 1] or ends[place] - offset[begin] > LARGEST_READ:
            bounds.append((begin, place))
            begin = place
    return bounds
