"""The stream: exact, elastic, resumable to the bit, and clear about what it cannot use."""

import dataclasses
import json
import multiprocessing
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import PREPROCESS, picture, sample, write_pairs, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pacl_scale.data.batch import PairBatch
from pacl_scale.data.captions import TextConfig, text_id
from pacl_scale.data.decode import PictureConfig, decode, normalise
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.distributed import World
from pacl_scale.errors import UserError

READ = ReadConfig(chunk_samples=4, window_chunks=5, read_ahead_mb=1, fetch_threads=2)
CPU = torch.device("cpu")


def config(root: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(**({"root": str(root), "read": READ, "decode_threads": 2} | changes))


def open_stream(settings: DataConfig, size: int, rank: int = 0, world_size: int = 1, **options: Any) -> PairStream:
    stream = PairStream(settings, 7, size, World(rank, world_size, rank, CPU), **options)
    if stream.features is None:
        stream.prepare_pictures_for(PREPROCESS)
    return stream


def take(settings: DataConfig, size: int, batches: int, world_size: int = 1, state: Any = None) -> list[list[Any]]:
    """Global batches, each a list of everything that decides what a sample is, and the state after the last."""
    streams = [open_stream(settings, size, rank, world_size) for rank in range(world_size)]
    result: list[list[Any]] = []
    try:
        for stream in streams:
            if state is not None:
                stream.load_state(state)
        iterators = [iter(stream) for stream in streams]
        for _ in range(batches):
            parts = [next(iterator) for iterator in iterators]
            assert len({part.position_after for part in parts}) == 1
            # Which rank has which sample is of no consequence; what is in the batch has to be the same.
            result.append(sorted(row for part in parts for row in rows_of(part)))
        take.state = streams[0].state_after(parts[0]) if batches else state  # type: ignore[attr-defined]
    finally:
        for stream in streams:
            stream.close()
    return result


def rows_of(batch: PairBatch) -> list[Any]:
    pixels = batch.images if batch.images is not None else batch.patches
    assert pixels is not None
    sums = [bytes(row.numpy().tobytes()) for row in pixels]
    return list(zip(batch.keys, batch.texts, batch.text_ids.tolist(), batch.patch_seeds, sums, strict=True))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs in shards of very different sizes, one of them empty."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, [23, 1, 0, 36])
    return root


def test_a_batch_holds_what_the_tars_hold(pairs: Path) -> None:
    with open_stream(config(pairs, text=TextConfig(noun_prompt_share=0)), 30) as stream:
        batch = next(iter(stream))
    assert batch.images is not None
    assert batch.images.shape == (30, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    for row, key in enumerate(batch.keys):
        number = int(key)
        wanted = np.empty((3, 16, 16), np.float32)
        normalise(decode(picture(number), PREPROCESS, PictureConfig(), None), PREPROCESS, wanted)
        assert np.array_equal(batch.images[row].numpy(), wanted)
        assert batch.captions[row] == [f"caption {number}", f"another {number}"]
        assert batch.nouns[row] == [f"noun{number % 3}"]
        assert batch.texts[row] in batch.captions[row]
        assert batch.text_ids[row] == text_id(batch.texts[row])
        true = [text_id(text) for text in (*batch.captions[row], *batch.nouns[row])]
        assert batch.image_text_ids[row].tolist() == true
    assert {text.split()[0] for text in batch.texts} == {"caption", "another"}
    assert batch.position_after == 30
    assert batch.skipped == {}
    assert (batch.patches, batch.patch_ids, batch.grid) == (None, None, None)


def test_every_sample_once_an_epoch_and_a_batch_across_the_end(pairs: Path) -> None:
    keys = [row[0] for batch in take(config(pairs), 25, 12) for row in batch]
    # Whole epochs are compared over whole batches: 12 x 25 = 5 x 60.
    assert sorted(map(int, keys)) == sorted(list(range(60)) * 5)
    straddling = keys[50:75]
    assert len(set(keys[:50])) == 50
    assert set(keys[:50]) | set(straddling) >= {f"{n:07d}" for n in range(60)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    size=st.sampled_from([5, 12, 24]),
)
def test_stops_and_other_worlds_change_nothing(pairs: Path, stops: list[tuple[int, int, int]], size: int) -> None:
    """(batches, ranks, threads) of each attempt, against one uninterrupted run on one rank."""
    whole = take(config(pairs), size, sum(batches for batches, _, _ in stops))
    parts, state = [], None
    for batches, world_size, threads in stops:
        read = ReadConfig(chunk_samples=4, window_chunks=5, read_ahead_mb=threads, fetch_threads=threads)
        parts += take(config(pairs, decode_threads=threads, read=read), size, batches, world_size, state)
        state = take.state  # type: ignore[attr-defined]
    assert parts == whole


def test_another_batch_size_goes_on_with_the_samples_not_yet_seen(pairs: Path) -> None:
    first = take(config(pairs), 8, 3)
    second = take(config(pairs), 12, 3, state=take.state)  # type: ignore[attr-defined]
    keys = [row[0] for batch in first + second for row in batch]
    assert sorted(map(int, keys)) == list(range(60))


def test_a_state_of_another_seed_is_refused(pairs: Path) -> None:
    with open_stream(config(pairs), 4) as stream, pytest.raises(UserError, match="ordered by seed 8, not 7"):
        stream.load_state({"seed": 8, "position": 0, "own_positions": {}})


def test_a_state_of_another_chunk_or_window_is_refused(pairs: Path) -> None:
    take(config(pairs), 8, 1)
    for name in ("chunk_samples", "window_chunks"):
        read = dataclasses.replace(READ, **{name: 9})
        with (
            open_stream(config(pairs, read=read), 4) as stream,
            pytest.raises(UserError, match=rf"ordered with data\.read\.{name} \d, not 9"),
        ):
            stream.load_state(take.state)  # type: ignore[attr-defined]


def test_a_data_set_is_known_by_its_samples_wherever_it_lies(tmp_path: Path) -> None:
    """Moved, or named with a slash at its end, it goes on; with other samples in its index it does not."""
    write_pairs(tmp_path / "a", [20, 20])
    keys = [row[0] for batch in take(config(f"{tmp_path}/a/"), 8, 2) for row in batch]
    state = json.loads(json.dumps(take.state))  # type: ignore[attr-defined]
    (tmp_path / "a").rename(tmp_path / "moved")
    keys += [row[0] for batch in take(config(tmp_path / "moved"), 8, 3, state=state) for row in batch]
    assert sorted(map(int, keys)) == list(range(40))
    # In a mixture it goes on as well, and what is new begins at its start.
    write_pairs(tmp_path / "new", [30], first=100)
    mixed = config("", mix={str(tmp_path / "moved"): 1.0, str(tmp_path / "new"): 1.0})
    later = [int(row[0]) for batch in take(mixed, 8, 6, state=state) for row in batch]
    assert {f"{n:07d}" for n in later if n < 100} == set(keys[16:])
    # As many samples in as many shards, but one is another; and a data set of which the state knows nothing.
    write_pairs(tmp_path / "a", [20, 19])
    write_tar(tmp_path / "a" / "00001.tar", [sample(n) for n in range(21, 41)])
    build_index(str(tmp_path / "a"))
    for root, message in ((f"{tmp_path}/a/", "was indexed anew and holds"), (tmp_path / "new", "holds other samples")):
        with open_stream(config(root), 8) as stream, pytest.raises(UserError, match=message):
            stream.load_state(state)


def test_ordered_mode_holds_every_sample_once_with_its_first_caption(pairs: Path) -> None:
    parts: list[list[PairBatch]] = []
    for rank in range(3):
        with open_stream(config(pairs), 25, rank, 3, ordered=True) as stream:
            parts.append(list(stream))
    assert [len(part) for part in parts] == [3, 3, 3]
    keys = [key for batch in zip(*parts, strict=True) for part in batch for key in part.keys]
    assert keys == [f"{n:07d}" for n in range(60)]
    assert [text for batch in parts[1] for text in batch.texts] == [c[0] for b in parts[1] for c in b.captions]
    exact = np.empty((3, 16, 16), np.float32)
    normalise(decode(picture(0), PREPROCESS, PictureConfig(exact=True), None), PREPROCESS, exact)
    assert parts[0][0].images is not None
    assert np.array_equal(parts[0][0].images[0].numpy(), exact)
    assert [sum(len(part) for part in batch) for batch in zip(*parts, strict=True)] == [25, 25, 10]


def test_mixture_keeps_its_shares_and_every_data_sets_own_epochs(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a", [10, 10])
    write_pairs(tmp_path / "b", [40], first=100)
    mixed = config("", mix={str(tmp_path / "b"): 1.0, str(tmp_path / "a"): 3.0})
    batches = take(mixed, 10, 8, world_size=2)
    from_a = [int(row[0]) for batch in batches for row in batch if int(row[0]) < 100]
    from_b = [int(row[0]) for batch in batches for row in batch if int(row[0]) >= 100]
    assert len(from_a) == 60
    assert sorted(from_a) == sorted(list(range(20)) * 3)
    assert len(from_b) == len(set(from_b)) == 20
    assert take.state["own_positions"] == {str(tmp_path / "a"): 60, str(tmp_path / "b"): 20}  # type: ignore[attr-defined]
    # A small part of a batch may come from a data set that is smaller than the batch.
    write_pairs(tmp_path / "c", [5], first=200)
    small = config("", mix={str(tmp_path / "b"): 3.0, str(tmp_path / "c"): 1.0})
    with open_stream(small, 20) as stream:
        assert len(next(iter(stream))) == 20
    with pytest.raises(UserError, match="/c has 5 samples, fewer than its part of a global batch, 6 of 24"):
        open_stream(small, 24)
    # Other weights from here on: b goes on with the half of it that was not seen yet.
    other = config("", mix={str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0})
    later = take(other, 10, 4, state=take.state)  # type: ignore[attr-defined]
    from_b += [int(row[0]) for batch in later for row in batch if int(row[0]) >= 100]
    assert sorted(from_b) == list(range(100, 140))


def test_augmentation_is_drawn_from_seed_epoch_and_key(pairs: Path) -> None:
    augmented = config(pairs, picture=PictureConfig(crop_share=0.3, flip=True))
    twice = take(augmented, 30, 4)
    assert twice == take(augmented, 30, 4, world_size=3)
    plain = {row[0]: row[4] for batch in take(config(pairs), 30, 2) for row in batch}
    first = {row[0]: row[4] for batch in twice[:2] for row in batch}
    second = {row[0]: row[4] for batch in twice[2:] for row in batch}
    assert sum(plain[key] == first[key] for key in plain) < 3
    assert sum(first[key] == second[key] for key in plain) < 3


def test_a_bad_sample_is_counted_and_a_neighbour_takes_its_place(tmp_path: Path) -> None:
    bad = {3: sample(3, jpg=b"<html>"), 8: sample(8, jpg=picture(8)[:99]), 11: sample(11, txt=None, json=b"{")}
    write_tar(tmp_path / "0.tar", [bad.get(n) or sample(n) for n in range(20)])
    build_index(str(tmp_path))
    with open_stream(config(tmp_path), 20) as stream:
        batch = next(iter(stream))
        assert stream.skipped == batch.skipped == {"not a picture": 1, "damaged picture": 1, "no caption": 1}
    with open_stream(config(tmp_path), 20) as stream:
        order = stream._mixture.global_batch(0, 20).sample.tolist()
    around = order + order
    wanted = [next(n for n in around[place:] if n not in bad) for place in range(20)]
    assert [int(key) for key in batch.keys] == wanted
    assert batch.images is not None
    for place in range(20):
        assert torch.equal(batch.images[place], batch.images[wanted.index(wanted[place])])
    assert len(batch.texts) == len(batch.text_ids) == len(batch.image_text_ids) == len(batch.images) == 20
    with open_stream(config(tmp_path), 20, ordered=True) as stream:
        (batch,) = list(stream)
    assert [int(key) for key in batch.keys] == [n for n in range(20) if n not in bad]
    assert batch.images is not None
    assert len(batch.images) == 17


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(n, jpg=b"x" if n % 10 == 0 else picture(n)) for n in range(150)])
    build_index(str(tmp_path))
    with (
        open_stream(config(tmp_path), 50) as stream,
        pytest.raises(UserError, match=r"of \d+ samples cannot be used \(\d+ not a picture\), more than .* = 5%"),
    ):
        for _ in zip(range(6), stream, strict=False):
            pass
    with open_stream(config(tmp_path, max_skip_share=0.2), 50) as stream:
        for _ in zip(range(6), stream, strict=False):
            pass
    assert sum(stream.skipped.values()) > 20


def test_nothing_usable_in_a_batch_stops_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(n, jpg=b"x") for n in range(4)])
    build_index(str(tmp_path))
    with open_stream(config(tmp_path), 2) as stream, pytest.raises(UserError, match="not one of the 2 samples"):
        next(iter(stream))


def test_shard_that_changed_since_the_index_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, [8, 8])
    path = tmp_path / "00001.tar"
    content = path.read_bytes()
    # Grown, swapped for another of the same size, gone.
    path.write_bytes(content + bytes(512))
    with open_stream(config(tmp_path), 16) as stream, pytest.raises(UserError, match=r"00001\.tar has .* bytes, but"):
        next(iter(stream))
    write_tar(path, [sample(n, jpg=picture(n)) for n in range(108, 116)])
    path.write_bytes(path.read_bytes()[: len(content)].ljust(len(content), b"\0"))
    with open_stream(config(tmp_path), 16) as stream, pytest.raises(UserError, match="run the index step again"):
        next(iter(stream))
    # Samples that begin elsewhere, and bytes that are no tar at all.
    write_tar(path, [sample(n, txt=b"z" * 700 * (n % 3)) for n in range(8, 16)])
    for other in (path.read_bytes()[: len(content)].ljust(len(content), b"\0"), b"x" * len(content)):
        path.write_bytes(other)
        with open_stream(config(tmp_path), 16) as stream, pytest.raises(UserError, match="other samples than were"):
            next(iter(stream))
    path.unlink()
    with open_stream(config(tmp_path), 16) as stream, pytest.raises(UserError, match="was indexed but is gone"):
        next(iter(stream))


def test_shard_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    write_pairs(tmp_path, [40])
    read = ReadConfig(chunk_samples=2, window_chunks=1, read_ahead_mb=1)
    path = tmp_path / "00000.tar"
    from pacl_scale.data.ranges import ShardReader

    reader = ShardReader(SampleIndex.load(str(tmp_path)), 1, 1.0, 0)
    reader.read(0, 0, 512)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(UserError, match="was replaced while it was being read"):
        reader.read(0, 0, 512)
    with open_stream(config(tmp_path, read=read), 2) as stream:
        assert len(next(iter(stream))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "a", "mix": {"b": 1.0}}, "two ways to say the same"),
        ({"mix": {"b": 0.0}}, "must be above 0"),
        ({"patch_sample": -1}, "patch_sample"),
        ({"max_skip_share": 1.0}, "max_skip_share"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)
    with pytest.raises(ValueError, match="at least 1"):
        ReadConfig(chunk_samples=0)


def test_what_cannot_be_streamed_is_said_in_a_sentence(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set data.root"):
        open_stream(config(""), 4)
    with pytest.raises(UserError, match="run the index step"):
        open_stream(config(tmp_path), 4)
    with pytest.raises(UserError, match="has 60 samples, fewer than its part of a global batch, 61 of 61"):
        open_stream(config(pairs), 61)


def test_threads_end_with_the_stream_and_errors_come_through(pairs: Path) -> None:
    before = threading.active_count()
    stream = open_stream(config(pairs), 6)
    iterator = iter(stream)
    next(iterator)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="by the user"), open_stream(config(pairs), 6) as stream:
        for _ in stream:
            raise RuntimeError("by the user")
    assert threading.active_count() == before


def test_an_iterator_ends_when_the_stream_is_closed_or_goes_elsewhere(pairs: Path) -> None:
    """And does not hand out what was made before, nor wait for ever."""
    with open_stream(config(pairs), 6) as stream:
        state = stream.state_after(next(iter(stream)))
        for leave in (stream.close, lambda: stream.load_state(state), lambda: next(iter(stream))):
            old = iter(stream)
            next(old)
            leave()
            before = stream.position
            with pytest.raises(RuntimeError, match="iterate it anew"):
                next(old)
            assert stream.position == before
        old = iter(stream)
        next(old)
        waiting, found = threading.Event(), []
        run = stream._running
        assert run is not None
        run._batches.get = lambda: (waiting.set(), queue.Queue.get(run._batches))[1]  # type: ignore[method-assign]

        def consume() -> None:
            try:
                for _ in old:
                    pass
            except RuntimeError as error:
                found.append(str(error))

        consumer = threading.Thread(target=consume)
        consumer.start()
        assert waiting.wait(30)
        stream.close()
        consumer.join(30)
        assert found == ["the stream was closed or moved while it was iterated; iterate it anew"]


def send_keys(root: Path, queue: Any) -> None:
    queue.put([row[0] for row in take(config(root), 6, 2)[1]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_can_stream_after_this_one_has(pairs: Path, method: str) -> None:
    expected = [row[0] for row in take(config(pairs), 6, 2)[1]]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=send_keys, args=(pairs, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(30)
    assert child.exitcode == 0


INTERRUPTED = """
import signal, sys, threading
# A shell's background job is started with Ctrl-C ignored, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[2])
from test_data_stream import config, open_stream
with open_stream(config(sys.argv[1]), 6) as stream:
    for _ in stream:
        print("going", flush=True)
        if sys.argv[3] == "error":
            raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("how", "status"), [("SIGINT", -signal.SIGINT), ("error", 1)])
def test_nothing_is_left_after_ctrl_c_or_an_error(pairs: Path, how: str, status: int) -> None:
    words = [sys.executable, "-c", INTERRUPTED, str(pairs), str(Path(__file__).parent), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "going\n"
        if how == "SIGINT":
            child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=90)
    assert child.returncode == status
    assert ("KeyboardInterrupt" if how == "SIGINT" else "on purpose") in errors


# --- data sets of features ---------------------------------------------------------------------------------------

TOKENS, WIDTH = 6, 5


def tokens_of(number: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(number))


def write_features(root: Path, count: int, dtype: str, vision: str = "tower") -> FeatureFormat:
    root.mkdir(parents=True, exist_ok=True)
    format = FeatureFormat(TOKENS, WIDTH, (2, 3), dtype, {"source": vision})
    packed = format.pack(torch.stack([tokens_of(n) for n in range(count)]))
    write_tar(root / "0.tar", [sample(n, jpg=None, **members) for n, members in enumerate(packed)])
    build_index(str(root), kind="features", extra=format.to_dict())
    return format


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 1 / 127 / 2 * 1.01), ("bfloat16", 2**-8), ("float32", 0)])
def test_features_come_back(tmp_path: Path, dtype: str, tolerance: float) -> None:
    format = write_features(tmp_path, 20, dtype)
    with open_stream(config(tmp_path), 20) as stream:
        assert stream.features == format
        assert stream.width == WIDTH
        batch = next(iter(stream))
    assert batch.patches is not None
    assert (batch.images, batch.patch_ids, batch.grid) == (None, None, (2, 3))
    for key, patches in zip(batch.keys, batch.patches, strict=True):
        original = tokens_of(int(key))
        assert ((patches - original).abs() <= tolerance * original.abs().amax(dim=1, keepdim=True)).all()
        if dtype == "bfloat16":
            assert torch.equal(patches, original.bfloat16().float())


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_a_random_sample_of_patches_per_picture_and_epoch(tmp_path: Path, dtype: str) -> None:
    write_features(tmp_path, 20, dtype)
    seen = []
    with open_stream(config(tmp_path, patch_sample=4), 20) as stream, open_stream(config(tmp_path), 20) as all_patches:
        for _, batch, other in zip(range(3), stream, all_patches, strict=False):
            whole = other.patches
            assert batch.patches is not None
            assert batch.patch_ids is not None
            assert whole is not None
            assert batch.patches.shape == (20, 4, WIDTH)
            assert (batch.patch_ids.diff(dim=1) > 0).all()
            assert torch.equal(batch.patches, torch.take_along_dim(whole, batch.patch_ids[:, :, None], dim=1))
            # Pictures' tokens would be sampled the same.
            for rows in (slice(None), slice(5, 9)):
                chosen = batch.chosen(whole.shape[1], rows)
                assert chosen is not None
                assert torch.equal(torch.take_along_dim(whole[rows], chosen[:, :, None], 1), batch.patches[rows])
            seen.append(batch.patch_ids)
    assert not torch.equal(seen[0], seen[1])
    counts = torch.bincount(torch.cat(seen).flatten(), minlength=TOKENS)
    assert counts.min() > 20  # 40 each are expected
    with open_stream(config(tmp_path, patch_sample=TOKENS + 3), 20) as stream:
        assert next(iter(stream)).patch_ids is None


def test_features_of_another_encoder_and_bad_ones(tmp_path: Path) -> None:
    format = write_features(tmp_path / "a", 4, "int8")
    write_features(tmp_path / "b", 4, "int8", vision="other")
    format.check_encoder({"source": "tower"})
    with pytest.raises(
        UserError, match="the data set holds patch tokens of another tower than vision names: source is"
    ):
        format.check_encoder({"source": "other"})
    with pytest.raises(UserError, match="must all hold pictures, or all patch tokens of one encoder"):
        open_stream(config("", mix={str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}), 2)
    with pytest.raises(UserError, match="cannot be cropped or flipped"):
        open_stream(config(tmp_path / "a", picture=PictureConfig(flip=True)), 2)
    build_index(str(tmp_path / "b"), kind="features", extra=format.to_dict() | {"tokens": 7})
    with pytest.raises(UserError, match="unknown format"):
        open_stream(config(tmp_path / "b"), 2)
    build_index(str(tmp_path / "b"), kind="features", extra=format.to_dict() | {"tokens": 8, "grid": [2, 4]})
    with (
        open_stream(config(tmp_path / "b"), 2) as stream,
        pytest.raises(UserError, match="2 patch tokens of the wrong"),
    ):
        next(iter(stream))


def test_int8_tokens_point_the_same_way(tmp_path: Path) -> None:
    """The loss sees directions only: the cosine of a 384-wide token before and after."""
    tokens = torch.randn(1, 256, 384, generator=torch.Generator().manual_seed(0)) * 3
    tokens[0, :, 7] *= 30  # as vision transformers have them: a few channels far larger than the rest
    format = FeatureFormat(256, 384, (16, 16), "int8", {})
    members = format.pack(tokens)[0]
    out = torch.empty(256, 384)
    format.read(members, None, out)
    cosine = torch.nn.functional.cosine_similarity(out, tokens[0], dim=1)
    assert cosine.min() > 0.999
    format.read(members, np.array([3, 200]), out[:2])
    assert torch.nn.functional.cosine_similarity(out[:2], tokens[0, [3, 200]], dim=1).min() > 0.999
    zero = format.pack(torch.zeros(1, 256, 384))[0]
    format.read(zero, None, out)
    assert out.abs().max() == 0
