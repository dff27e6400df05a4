"""Every sample once an epoch, in an order that depends on nothing but seed and position."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pacl_scale.data.index import Shard
from pacl_scale.data.order import PATTERN_LENGTH, EndlessOrder, EpochOrder, Mixture, Picks, split

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)


def shards(sizes: list[int]) -> list[Shard]:
    return [Shard(f"{n}.tar", 0, size) for n, size in enumerate(sizes)]


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(sizes: list[int], seed: int, epoch: int, chunk: int, window: int) -> None:
    order = EpochOrder(shards(sizes), seed, epoch, chunk, window)
    samples = order.samples(0, len(order))
    assert sorted(samples) == list(range(sum(sizes)))


@settings(deadline=None)
@given(SIZES, st.integers(0, 100), st.integers(1, 9), st.integers(0, 5), st.data())
def test_any_stretch_is_a_part_of_the_whole(sizes: list[int], seed: int, chunk: int, window: int, data: st.DataObject):
    order, total = EndlessOrder(shards(sizes), seed, chunk, window), 3 * sum(sizes)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    whole, part = order.picks(0, 0, total), EndlessOrder(shards(sizes), seed, chunk, window).picks(0, start, stop)
    for name in ("epoch", "sample"):
        assert np.array_equal(getattr(whole, name)[start:stop], getattr(part, name))


def test_order_differs_between_epochs_and_seeds_and_is_sequential_without_window() -> None:
    def first(seed: int, epoch: int, window: int = 4) -> list[int]:
        return EpochOrder(shards([100, 100]), seed, epoch, 8, window).samples(0, 200).tolist()

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert first(0, 0, window=0) == list(range(200))


def test_order_is_the_same_in_every_release() -> None:
    """Resuming with a newer release must not change the order: these numbers may never change."""
    samples = EpochOrder(shards([7, 5]), seed=3, epoch=1, chunk_samples=2, window_chunks=3).samples(0, 12)
    assert samples.tolist() == [6, 10, 11, 9, 4, 5, 0, 8, 1, 7, 3, 2]


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(1, 30), st.integers(0, 500), st.data())
def test_ranks_share_a_batch_exactly(sets: list[list[int]], size: int, position: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sets), max_size=len(sets)))
    mixture = Mixture([EndlessOrder(shards(sizes), 0, 4, 3) for sizes in sets], weights)
    batch = mixture.global_batch(position, size)
    assert len(batch) == size

    def listed(picks: Picks) -> list[tuple[int, int, int]]:
        return list(zip(picks.source.tolist(), picks.epoch.tolist(), picks.sample.tolist(), strict=True))

    assert listed(split(batch, 1, 0)) == listed(batch)
    for world_size in range(1, 7):
        parts = [listed(split(batch, world_size, rank)) for rank in range(world_size)]
        assert sorted(pick for part in parts for pick in part) == sorted(listed(batch))
        assert all(part == [pick for pick in listed(batch) if pick in set(part)] for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.data())
def test_a_data_sets_share_is_its_part_of_the_split(
    sets: list[list[int]], sizes: list[int], data: st.DataObject
) -> None:
    """What is planned of one data set at a time is what is delivered of all at once."""
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sets), max_size=len(sets)))
    mixture = Mixture([EndlessOrder(shards(one), 0, 4, 3) for one in sets], weights)
    edges = data.draw(st.integers(0, 500)) + np.cumsum([0, *sizes])
    for world_size in (1, 2, 5):
        for rank in range(world_size):
            for source in range(len(sets)):
                picks, places, batch = mixture.share(source, edges, world_size, rank)
                assert (mixture.own_positions(edges)[source, batch] <= places).all()
                for number, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
                    part = split(mixture.global_batch(start, stop - start), world_size, rank)
                    part, found = part[part.source == source], picks[np.flatnonzero(batch == number)]
                    found = found[np.argsort(places[batch == number])]
                    assert found.sample.tolist() == part.sample.tolist()
                    assert found.epoch.tolist() == part.epoch.tolist()


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=6), st.integers(0, 10**9), st.integers(0, 5000))
def test_mixture_deals_in_proportion_and_without_a_gap(weights: list[float], position: int, size: int) -> None:
    mixture = Mixture([EndlessOrder(shards([10]), 0, 4, 3) for _ in weights], weights)
    before, after = mixture.own_positions(position), mixture.own_positions(position + size)
    assert before.sum() == position
    assert after.sum() == position + size
    assert (after >= before).all()
    expected = np.array(weights) / sum(weights) * size
    # Shares are honoured to one slot of the pattern, and never fall behind by more than the pattern's roughness.
    assert np.all(np.abs(after - before - expected) <= len(weights) * (2 + size / PATTERN_LENGTH))


def test_after_a_change_of_weights_each_data_set_goes_on_where_it_was() -> None:
    def orders() -> list[EndlessOrder]:
        return [EndlessOrder(shards([50]), 0, 4, 3), EndlessOrder(shards([30]), 0, 4, 3)]

    old = Mixture(orders(), [1, 1])
    own = old.own_positions(100)
    new = Mixture(orders(), [3, 1], 100, own.tolist())
    batch = new.global_batch(100, 40)
    assert new.own_positions(100).tolist() == own.tolist()
    for source in (0, 1):
        ours = batch[batch.source == source]
        wanted = orders()[source].picks(source, int(own[source]), int(own[source]) + len(ours))
        assert np.array_equal(ours.sample, wanted.sample)
    assert 28 <= (batch.source == 0).sum() <= 32


def test_thirty_million_samples_start_at_once() -> None:
    import time

    started = time.perf_counter()
    mixture = Mixture([EndlessOrder(shards([10_000] * 3000), 0, 32, 128)], [1.0])
    batch = mixture.global_batch(123_456_789, 4096)
    assert time.perf_counter() - started < 2
    assert len(np.unique(batch.sample)) == 4096


def test_samples_are_mixed_across_shards() -> None:
    """Neighbours in the order must not be neighbours in the tars."""
    order = EpochOrder(shards([1000] * 50), 0, 0, 32, 128)
    samples = order.samples(0, 50_000)
    correlation = np.corrcoef(samples[:-1], samples[1:])[0, 1]
    assert abs(correlation) < 0.1
    assert np.corrcoef(np.arange(49_999), np.arange(1, 50_000))[0, 1] > 0.99
