"""Samples of a rank's batches, read ahead in large ranges by threads, within a bound of memory.

The order is known for all time, so the reader plans a window of the order at once: which of its samples this rank will
deliver, and in which batch. Samples that lie close together come with one ranged read, and each is kept only until its
batch is taken.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pacl_scale.data.order import Mixture, Picks, concatenate, split
from pacl_scale.data.ranges import ShardReader
from pacl_scale.distributed import World

LARGEST_READ = 8 << 20
LARGEST_GAP = 256 << 10
"""Bytes between two wanted samples that are read and thrown away rather than asked for around: a request costs about
as much as this many bytes."""

KEPT_BATCHES = 256


@dataclass
class ReadConfig:
    """How shards are read. The chunk and the window are part of the order: changing them changes it."""

    chunk_samples: int = 32
    """Consecutive samples of a shard that travel together: one ranged read of 1 to 4 MB for most data sets."""

    window_chunks: int = 128
    """Chunks, from all shards, whose samples are mixed. More mixes better and holds more bytes in memory: a window of
    the order, divided by the number of ranks, is kept while its batches are delivered."""

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
            raise ValueError("read.timeout_s must be above 0 and read.retries at least 0")
        if self.disk_cache_gb <= 0:
            raise ValueError(f"read.disk_cache_gb must be above 0, not {self.disk_cache_gb}")


@dataclass(frozen=True)
class Read:
    """One ranged read: bytes ``start`` to ``stop`` of a shard, and the samples in them."""

    source: int
    epoch: int
    shard: int
    start: int
    stop: int
    samples: np.ndarray


class Plan:
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
        self._batches: OrderedDict[int, Picks] = OrderedDict()

    def span(self, number: int) -> tuple[int, int]:
        """The positions of a batch; empty after the end."""
        start, stop = (self._position + (number + i) * self._size for i in (0, 1))
        return (start, stop) if self._end is None else (min(start, self._end), min(stop, self._end))

    def batch(self, number: int) -> Picks | None:
        """This rank's samples of batch ``number``, counted from 0; None after the end."""
        start, stop = self.span(number)
        if start == stop:
            return None
        if number not in self._batches:
            whole = self._mixture.global_batch(start, stop - start)
            self._batches[number] = split(whole, self._world.size, self._world.rank)
            if len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        return self._batches[number]

    def reads(self) -> Iterator[Read]:
        """All reads, in the order in which their first samples are needed."""
        planned: dict[int, tuple[int, int]] = {}
        number = 0
        while (picks := self.batch(number)) is not None:
            for source, epoch, window in _windows(picks):
                if planned.get(source, (-1, -1)) < (epoch, window):
                    planned[source] = (epoch, window)
                    yield from self._window_reads(number, source, epoch, window)
            number += 1

    def _window_reads(self, number: int, source: int, epoch: int, window: int) -> list[Read]:
        """The reads of our part of a window whose first sample is in batch ``number``."""
        end = self._mixture.orders[source].window_end(epoch, window)
        parts, batches = [], []
        while (picks := self.batch(number)) is not None:
            ours = picks[(picks.source == source) & (picks.epoch == epoch) & (picks.window == window)]
            parts.append(ours)
            batches.append(np.full(len(ours), number))
            if self._mixture.own_positions(self.span(number)[1])[source] >= end:
                break
            number += 1
        samples, first_use = concatenate(parts).sample, np.concatenate(batches)
        order = np.argsort(samples)
        samples, first_use = samples[order], first_use[order]
        index = self._readers[source].index
        shards = index.shard_of(samples)
        bounds = _coalesce(shards, index.offset[samples], index.length[samples])
        reads = []
        for begin, stop in bounds:
            group, last = samples[begin:stop], samples[stop - 1]
            read = Read(
                source=source,
                epoch=epoch,
                shard=int(shards[begin]),
                start=int(index.offset[group[0]]),
                stop=int(index.offset[last]) + int(index.length[last]),
                samples=group,
            )
            reads.append((int(first_use[begin:stop].min()), read))
        return [read for _, read in sorted(reads, key=lambda pair: pair[0])]


class ReadAhead:
    """Carries out a plan's reads in threads, ahead of need.

    Args:
        plan: whose reads.
        readers: one a data set.
        threads: reads at the same time.
        budget: bytes of samples that may be held or under way ahead of need. What the next batch needs is read
            whether it fits or not.
    """

    def __init__(self, plan: Plan, readers: Sequence[ShardReader], threads: int, budget: int) -> None:
        self._readers, self._budget = readers, budget
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._reads = plan.reads()
        self._places: dict[tuple[int, int, int], tuple[Future[list[bytes | None]], int]] = {}
        self._lock = threading.Lock()
        self.held = 0
        self._finished = False

    def start(self, picks: Picks) -> list["Awaited"]:
        """Handles of the samples of the next batch, in its order."""
        keys = [(int(s), int(e), int(n)) for s, e, n in zip(picks.source, picks.epoch, picks.sample, strict=True)]
        for key in keys:
            while key not in self._places:
                self._begin_next()
        return [Awaited(self, *self._places.pop(key)) for key in keys]

    def read_on(self, most: int) -> None:
        """Begin up to ``most`` further reads within the budget."""
        for _ in range(most):
            if self.held >= self._budget or self._finished:
                return
            self._begin_next()

    def close(self) -> None:
        """Give up what is under way and wait for the threads to end."""
        for reader in self._readers:
            reader.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def release(self, size: int) -> None:
        """``size`` bytes are no longer held."""
        with self._lock:
            self.held -= size

    def _begin_next(self) -> None:
        read = next(self._reads, None)
        if read is None:
            self._finished = True
            return
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


def _windows(picks: Picks) -> list[tuple[int, int, int]]:
    """(source, epoch, window) of every window in the picks, in order."""
    keys = np.stack([picks.source, picks.epoch, picks.window], axis=1)
    return [(int(s), int(e), int(w)) for s, e, w in np.unique(keys, axis=0)]


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
