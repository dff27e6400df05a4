"""Which sample comes when: a pure function of (seed, position), whatever the number of ranks and threads.

The samples of a data set, in index order, are cut into chunks of consecutive samples of one shard. An epoch
is a random order of the chunks; each run of ``window_chunks`` chunks is a window, and the samples of a
window are mixed. So a window is read in a few large ranges, and samples of many shards meet in a batch.
Epochs are laid end to end on one endless line; the position on it is the number of samples consumed by all
ranks together.

Random numbers come from the raw output of Philox, which NumPy keeps the same in every release, and are
turned into an order by sorting. Nothing else is drawn, so the order can be computed at any position without
a look back.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pacl_scale.data.index import Shard

KEPT_WINDOWS = 4
PATTERN_LENGTH = 4096
"""Slots of the repeating pattern that mixes data sets; weights are honoured to one part in this."""


@dataclass(frozen=True)
class Picks:
    """Samples in some order: for each the data set's number, its epoch, the sample's number."""

    source: np.ndarray
    epoch: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, which: np.ndarray | slice) -> "Picks":
        return Picks(self.source[which], self.epoch[which], self.sample[which])


def concatenate(parts: Sequence[Picks]) -> Picks:
    """The parts one after another."""
    names = ("source", "epoch", "sample")
    return Picks(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def split(batch: Picks, world_size: int, rank: int) -> Picks:
    """The rank's part of a global batch, in the order of the batch.

    The loss is over all pairs of the global batch, so any partition gives the same loss. This one goes by where the
    samples lie, so that a rank reads few chunks, and whole. :meth:`Mixture.share` says the same of one data set.
    """
    by_place = np.lexsort((batch.epoch, batch.sample, batch.source))
    bounds = len(batch) * np.arange(world_size + 1) // world_size
    return batch[np.sort(by_place[bounds[rank] : bounds[rank + 1]])]


class EpochOrder:
    """The order of one data set in one epoch.

    Args:
        shards: the shards of the index; only their numbers of samples matter.
        seed: of the run.
        epoch: counts from 0.
        chunk_samples: consecutive samples of a shard that are read together.
        window_chunks: chunks whose samples are mixed; 0 keeps the order of the index.
    """

    def __init__(self, shards: Sequence[Shard], seed: int, epoch: int, chunk_samples: int, window_chunks: int) -> None:
        self.seed, self.epoch = seed, epoch
        first, size = chunk_table(shards, chunk_samples)
        self.shuffled = window_chunks > 0
        chunks = self._shuffle(len(first), 0) if self.shuffled else np.arange(len(first))
        self._first, self._size = first[chunks], size[chunks]
        self._window_chunks = window_chunks or 1
        window_sizes = np.add.reduceat(self._size, np.arange(0, len(size), self._window_chunks))
        self.window_starts = np.concatenate([[0], np.cumsum(window_sizes)])
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self.window_starts[-1])

    def samples(self, start: int, stop: int) -> np.ndarray:
        """The sample numbers at the places ``start`` to ``stop`` of the epoch, (n,) int64."""
        place, samples = start, [_EMPTY]
        while place < stop:
            number = self._window_at(place)
            begin, end = int(self.window_starts[number]), min(stop, int(self.window_starts[number + 1]))
            samples.append(self._window(number)[place - begin : end - begin])
            place = end
        return np.concatenate(samples)

    def window_end(self, place: int) -> int:
        """Where the window that holds ``place`` ends."""
        return int(self.window_starts[self._window_at(place) + 1])

    def _window_at(self, place: int) -> int:
        return int(np.searchsorted(self.window_starts, place, side="right")) - 1

    def _window(self, number: int) -> np.ndarray:
        if number not in self._windows:
            chunks = slice(number * self._window_chunks, (number + 1) * self._window_chunks)
            sizes = self._size[chunks]
            samples = np.repeat(self._first[chunks] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
            self._windows[number] = samples[self._shuffle(len(samples), number + 1)] if self.shuffled else samples
            if len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[number]

    def _shuffle(self, count: int, stream: int) -> np.ndarray:
        """A random order of ``count`` things; streams of one (seed, epoch) are independent."""
        key, counter = np.array([self.seed, self.epoch], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


class EndlessOrder:
    """One data set's epochs laid end to end: each of its samples once in every stretch of ``len`` places."""

    def __init__(self, shards: Sequence[Shard], seed: int, chunk_samples: int, window_chunks: int) -> None:
        self.shards, self.seed = shards, seed
        self.chunk_samples, self.window_chunks = chunk_samples, window_chunks
        self._count = sum(shard.samples for shard in shards)
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def picks(self, source: int, start: int, stop: int) -> Picks:
        """The samples at the places ``start`` to ``stop`` of the endless line."""
        place, parts = start, [Picks(_EMPTY, _EMPTY, _EMPTY)]
        while place < stop:
            epoch, begin = divmod(place, self._count)
            end = min(self._count, begin + stop - place)
            samples = self._epoch(epoch).samples(begin, end)
            parts.append(Picks(np.full(end - begin, source), np.full(end - begin, epoch), samples))
            place += end - begin
        return concatenate(parts)

    def window_end(self, place: int) -> int:
        """The place on the endless line after the last sample of the window that holds ``place``."""
        epoch, within = divmod(place, self._count)
        return epoch * self._count + self._epoch(epoch).window_end(within)

    def _epoch(self, epoch: int) -> EpochOrder:
        if epoch not in self._epochs:
            self._epochs[epoch] = EpochOrder(self.shards, self.seed, epoch, self.chunk_samples, self.window_chunks)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class Mixture:
    """Several data sets on one line of places, each consumed in its own order in proportion to its weight.

    The places are dealt out by a pattern of ``PATTERN_LENGTH`` slots in which every data set has its share,
    evenly spread. A data set that is dealt more than its samples starts its next epoch, by itself.

    Args:
        orders: the data sets' orders.
        weights: positive, one a data set; only their proportions matter.
        position: samples consumed before now, by all ranks together.
        own_positions: how many of them came from each data set; by default what the pattern dealt them. After a change
            of weights they differ from it, and each data set goes on where it was.
    """

    def __init__(
        self,
        orders: Sequence[EndlessOrder],
        weights: Sequence[float],
        position: int = 0,
        own_positions: Sequence[int] | None = None,
    ) -> None:
        self.orders = orders
        self._pattern = _pattern(weights)
        hits = self._pattern[None, :] == np.arange(len(orders))[:, None]
        self._before = np.concatenate([np.zeros((len(orders), 1), np.int64), np.cumsum(hits, axis=1)], axis=1)
        dealt = self._dealt(position)
        self._shift = np.zeros_like(dealt) if own_positions is None else np.array(own_positions) - dealt

    def own_positions(self, position: int | np.ndarray) -> np.ndarray:
        """Samples consumed of each data set when ``position`` were consumed in all: (sources,), or (sources, n) for n
        positions."""
        return (self._dealt(position).T + self._shift).T

    def global_batch(self, position: int, size: int) -> Picks:
        """The samples at the places ``position`` to ``position + size``, grouped by data set."""
        starts, stops = self.own_positions(position), self.own_positions(position + size)
        spans = zip(self.orders, starts, stops, strict=True)
        return concatenate([order.picks(number, int(a), int(b)) for number, (order, a, b) in enumerate(spans)])

    def share(self, source: int, edges: np.ndarray, world_size: int, rank: int) -> tuple[Picks, np.ndarray, np.ndarray]:
        """One data set's samples in the rank's parts of consecutive global batches, as :func:`split` has them.

        Only this data set is looked at, so that one with a small weight costs as little as it gives.

        Args:
            edges: (batches + 1,) positions between the batches.

        Returns:
            The samples, their places on the data set's own line, and the number of each one's batch, from 0.
        """
        own = self.own_positions(edges)
        places = np.arange(own[source, 0], own[source, -1])
        picks = self.orders[source].picks(source, int(own[source, 0]), int(own[source, -1]))
        batch = np.repeat(np.arange(len(edges) - 1), np.diff(own[source]))
        by_place = np.lexsort((picks.epoch, picks.sample, batch))
        # A batch is cut where data sets lie one after another, so those before this one come first.
        before = np.diff(own[:source].sum(axis=0)) if source else np.zeros(len(edges) - 1, np.int64)
        place_in_batch = places - own[source][batch] + before[batch]
        size = np.diff(edges)[batch]
        ours = (place_in_batch >= size * rank // world_size) & (place_in_batch < size * (rank + 1) // world_size)
        chosen = by_place[ours]
        return picks[chosen], places[chosen], batch[chosen]

    def _dealt(self, position: int | np.ndarray) -> np.ndarray:
        rounds, slot = np.divmod(position, PATTERN_LENGTH)
        return np.multiply.outer(self._before[:, -1], rounds) + self._before[:, slot]


def chunk_table(shards: Sequence[Shard], chunk_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """First sample and number of samples of every chunk, in index order, both (chunks,) int64."""
    counts = np.array([shard.samples for shard in shards], np.int64)
    chunks = -(-counts // chunk_samples)
    within = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    first = np.repeat(np.cumsum(counts) - counts, chunks) + within * chunk_samples
    size = np.minimum(chunk_samples, np.repeat(counts, chunks) - within * chunk_samples)
    return first, size


def _pattern(weights: Sequence[float]) -> np.ndarray:
    """Which data set each of ``PATTERN_LENGTH`` slots belongs to: largest remainders, evenly spread."""
    share = np.array(weights, float) / np.sum(weights) * PATTERN_LENGTH
    slots = np.maximum(np.floor(share).astype(int), 1)
    for number in np.argsort(slots - share, kind="stable")[: max(0, PATTERN_LENGTH - slots.sum())]:
        slots[number] += 1
    slots[np.argmax(slots)] -= slots.sum() - PATTERN_LENGTH
    wish = np.concatenate([(np.arange(count) + 0.5) / count for count in slots])
    owner = np.repeat(np.arange(len(slots)), slots)
    return owner[np.argsort(wish, kind="stable")]


_EMPTY = np.zeros(0, np.int64)
