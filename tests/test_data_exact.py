"""The stream's promise, on random data sets, worlds and stops: every sample once an epoch, in one order, to the bit."""

import functools
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_sets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_stream import open_stream, rows_of

from pacl_scale.data.decode import PictureConfig
from pacl_scale.data.order import PATTERN_LENGTH
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig

SHARD_SIZES = st.lists(st.sampled_from([0, 1, 1, 2, 5, 9, 14]), min_size=1, max_size=5).filter(sum)
WEIGHTS = st.sampled_from([0.02, 0.2, 1.0, 1.0, 3.0])
NUMBERS = 1000
"""Keys of a data set begin at a multiple of this."""


@pytest.fixture(autouse=True, scope="module")
def pictures_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_sets, "picture", functools.cache(data_sets.picture))
        yield


@dataclass(frozen=True)
class Attempt:
    """How a run goes on until it is stopped."""

    batches: int
    world_size: int
    fetch_threads: int
    decode_threads: int
    prefetch: int
    read_mb: int


ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        batches=st.integers(1, 6),
        world_size=st.integers(1, 5),
        fetch_threads=st.integers(1, 4),
        decode_threads=st.integers(1, 3),
        prefetch=st.integers(1, 3),
        read_mb=st.integers(1, 2),
    ),
    min_size=1,
    max_size=3,
)


@dataclass(frozen=True)
class Case:
    """Data sets with their weights, and how they are read."""

    sets: list[tuple[list[int], float]]
    chunk: int
    window: int
    augment: bool
    size_share: float

    @property
    def batch_size(self) -> int:
        """A global batch that no data set is too small for."""
        total = sum(weight for _, weight in self.sets)
        return 1 + int(self.size_share * (min(12, *(sum(sizes) * total / weight for sizes, weight in self.sets)) - 1))


CASES = st.builds(
    Case,
    sets=st.lists(st.tuples(SHARD_SIZES, WEIGHTS), min_size=1, max_size=3),
    chunk=st.integers(1, 5),
    window=st.integers(1, 4),
    augment=st.booleans(),
    size_share=st.floats(0, 1),
)


class Written:
    """A case's data sets on disk."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.mix = {}
        for number, (sizes, weight) in enumerate(case.sets):
            root = folder / f"set{number}"
            data_sets.write_pairs(root, sizes, first=number * NUMBERS)
            self.mix[str(root)] = weight

    def config(self, attempt: Attempt, mix: dict[str, float] | None = None) -> DataConfig:
        case = self.case
        read = ReadConfig(case.chunk, case.window, attempt.read_mb, attempt.fetch_threads)
        picture = PictureConfig(crop_share=0.5, flip=True) if case.augment else PictureConfig()
        return DataConfig(
            mix=mix or self.mix,
            read=read,
            picture=picture,
            decode_threads=attempt.decode_threads,
            prefetch_batches=attempt.prefetch,
        )

    def run(self, attempt: Attempt, size: int, state: Any = None, mix: dict[str, float] | None = None) -> "Run":
        streams = [
            open_stream(self.config(attempt, mix), size, r, attempt.world_size) for r in range(attempt.world_size)
        ]
        batches = []
        try:
            for stream in streams:
                if state is not None:
                    stream.load_state(state)
            iterators = [iter(stream) for stream in streams]
            for _ in range(attempt.batches):
                parts = [next(iterator) for iterator in iterators]
                batches.append([rows_of(part) for part in parts])
            states = [stream.state_after(part) for stream, part in zip(streams, parts, strict=True)]
            assert all(one == states[0] for one in states)
            return Run(batches, json.loads(json.dumps(states[0])))
        finally:
            for stream in streams:
                stream.close()


@dataclass(frozen=True)
class Run:
    """Of each batch, each rank's rows: key, text, what it says, seed of the patches, pixels."""

    batches: list[list[list[Any]]]
    state: dict[str, Any]


ONE = Attempt(1, 1, 2, 1, 1, 1)


@settings(max_examples=10, deadline=None)
@given(case=CASES, attempts=ATTEMPTS)
def test_stopped_and_resumed_in_any_world_is_uninterrupted(case: Case, attempts: list[Attempt]) -> None:
    """Each rank has its part in the order of the whole, the parts make up the whole, and the states agree."""
    with tempfile.TemporaryDirectory() as folder:
        written, size = Written(case, Path(folder)), case.batch_size
        whole = written.run(replaced(ONE, sum(attempt.batches for attempt in attempts)), size)
        state, found = None, []
        for attempt in attempts:
            run = written.run(attempt, size, state)
            state = run.state
            found += run.batches
    assert state == whole.state
    for parts, (wanted,) in zip(found, whole.batches, strict=True):
        assert sum(map(len, parts)) == len(wanted) == size
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert Counter(itertools.chain(*parts)) == Counter(wanted)
        assert all(is_part_in_order(part, wanted) for part in parts)
    check_epochs(case, [row[0] for (rows,) in whole.batches for row in rows])


@settings(max_examples=12, deadline=None)
@given(case=CASES, attempts=ATTEMPTS, data=st.data())
def test_other_sizes_and_weights_go_on_with_what_was_not_seen(
    case: Case, attempts: list[Attempt], data: st.DataObject
) -> None:
    """A global batch of another size, and other weights, at every resume: each data set's own order has no gap, and
    without new weights the line of all samples is the same."""
    weigh_anew = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        written = Written(case, Path(folder))
        state, keys = None, []
        for attempt in attempts:
            mix = {root: data.draw(WEIGHTS) for root in written.mix} if weigh_anew else written.mix
            now = Case(
                [(s, mix[r]) for (s, _), r in zip(case.sets, mix, strict=True)], 1, 1, False, data.draw(st.floats(0, 1))
            )
            run = written.run(attempt, now.batch_size, state, mix)
            state = run.state
            # Within a batch the ranks' parts say no order between them; a data set's is that of its own line.
            keys += [sorted(row[0] for part in parts for row in part) for parts in run.batches]
        total = sum(map(len, keys))
        assert state is not None
        assert sum(state["own_positions"].values()) == state["position"] == total
        for number, (root, (sizes, _)) in enumerate(zip(written.mix, case.sets, strict=True)):
            alone = DataConfig(root=root, read=written.config(ONE).read, decode_threads=1)
            own = [[key for key in batch if int(key) // NUMBERS == number] for batch in keys]
            with open_stream(alone, 1) as stream:
                line = [batch.keys[0] for batch, _ in zip(stream, range(state["own_positions"][root]), strict=False)]
            ends = list(itertools.accumulate(map(len, own), initial=0))
            assert [sorted(line[a:b]) for a, b in itertools.pairwise(ends)] == own
            assert len(line) == ends[-1]
            check_line(line, sum(sizes))


@settings(max_examples=10, deadline=None)
@given(sizes=SHARD_SIZES, world_size=st.integers(1, 5), size=st.integers(1, 40), threads=st.integers(1, 3))
def test_evaluation_holds_every_sample_once_in_the_order_of_the_tars(
    sizes: list[int], world_size: int, size: int, threads: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_sets.write_pairs(Path(folder), sizes)
        config = DataConfig(root=folder, read=ReadConfig(3, 2, 1, threads), decode_threads=threads)
        parts = []
        for rank in range(world_size):
            with open_stream(config, min(size, sum(sizes)), rank, world_size, ordered=True) as stream:
                parts.append([batch.keys for batch in stream])
    keys = [key for batch in zip(*parts, strict=True) for part in batch for key in part]
    assert [int(key) for key in keys] == list(range(sum(sizes)))


def replaced(attempt: Attempt, batches: int) -> Attempt:
    return Attempt(batches, *list(vars(attempt).values())[1:])


def is_part_in_order(part: list[Any], whole: list[Any]) -> bool:
    rest: Iterator[Any] = iter(whole)
    return all(row in rest for row in part)


def check_epochs(case: Case, keys: list[str]) -> None:
    """Each data set's keys, in the order in which they came, are whole epochs and the beginning of one; and as many as
    its weight says, to what the pattern of places rounds."""
    total = sum(weight for _, weight in case.sets)
    for number, (sizes, weight) in enumerate(case.sets):
        own = [key for key in keys if int(key) // NUMBERS == number]
        check_line(own, sum(sizes))
        share = max(weight / total, 1 / PATTERN_LENGTH)
        assert abs(len(own) - share * len(keys)) <= len(case.sets) * (2 + len(keys) / PATTERN_LENGTH)


def check_line(keys: list[str], samples: int) -> None:
    for begin in range(0, len(keys), samples):
        epoch = keys[begin : begin + samples]
        assert len(set(epoch)) == len(epoch)
        assert max(int(key) % NUMBERS for key in epoch) < samples
