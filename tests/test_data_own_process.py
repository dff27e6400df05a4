"""Data loaded in a process of its own: the same batches, the same errors, and no process that outlives its use."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from data_sets import sample, write_pairs, write_tar
from faulty_proxy import FaultyProxy
from test_data_stream import PREPROCESS, config, open_stream, rows_of, take

from pacl_scale import metrics
from pacl_scale.data.buffers import Buffers
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import build_index
from pacl_scale.data.loader import SharedBuffers, sendable
from pacl_scale.data.own_process import OwnProcessRun, ended
from pacl_scale.data.run import Run
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.quickstart.store import ObjectStore


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs in three shards, of which one is no picture."""
    root = tmp_path_factory.mktemp("own-process")
    numbers = iter(range(60))
    for shard, size in enumerate([23, 1, 36]):
        rows = [sample(n, **({"jpg": b"no picture"} if n == 30 else {})) for n, _ in zip(numbers, range(size))]  # noqa: B905
        write_tar(root / f"{shard:05d}.tar", rows)
    build_index(str(root))
    return root


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 samples of patch tokens, 128 KiB each."""
    root = tmp_path_factory.mktemp("own-process-tokens")
    format = FeatureFormat(256, 128, (16, 16), "int8", {})
    scale = np.ones(256, np.float16).tobytes()
    write_tar(root / "0.tar", [sample(n, jpg=None, patches=bytes([n]) * 256 * 128, scale=scale) for n in range(32)])
    build_index(str(root), kind="features", extra=format.to_dict())
    return root


def own(root: Path | str, **changes: Any) -> DataConfig:
    return config(root, own_process=True, **changes)


def loaders() -> list[psutil.Process]:
    """Processes that load data for this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "pacl_scale.data.loader" in " ".join(child.cmdline())]


def wait_for_none() -> None:
    until = time.monotonic() + 20
    while loaders() and time.monotonic() < until:
        time.sleep(0.05)
    assert loaders() == []


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (2, 12)])
def test_batches_are_those_of_threads_also_after_a_stop(pairs: Path, ranks: int, size: int) -> None:
    expected = take(config(pairs), size, 12, ranks)
    assert take(own(pairs), size, 5, ranks) == expected[:5]
    state = take.state  # type: ignore[attr-defined]
    assert take(own(pairs), size, 7, ranks, state=state) == expected[5:]
    assert loaders() == []


def test_tokens_texts_and_counts_arrive_whole(tokens: Path, pairs: Path) -> None:
    mixed = {"mix": {str(pairs): 2.0, str(pairs) + "/": 1.0}}
    for root, changes in ((tokens, {"patch_sample": 9}), (pairs, {}), ("", mixed)):
        whole, apart = (open_stream(make(root, **changes), 10) for make in (config, own))
        with whole, apart:
            for left, right, _ in zip(whole, apart, range(9), strict=False):
                assert pickle.dumps(everything(left)) == pickle.dumps(everything(right))
                assert whole.state_after(left) == apart.state_after(right)
            assert whole.skipped == apart.skipped
            assert (root is tokens) == (not apart.skipped)


def everything(batch: Any) -> dict[str, Any]:
    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def test_blocks_are_used_again_but_not_those_that_somebody_holds(tokens: Path) -> None:
    with open_stream(own(tokens), 8) as stream:
        iterator = iter(stream)
        kept = next(iterator)
        assert kept.patches is not None
        before, part = kept.patches.clone(), kept.patches[3:]
        del kept
        for _ in range(40):
            next(iterator)
        gc.collect()
        assert torch.equal(part, before[3:])
        run = stream._running
        assert isinstance(run, OwnProcessRun)
        # One kept here, two finished, one handed out and one not yet heard of; two and one in the making there.
        assert len(run._blocks) <= 8


def test_shared_memory_tells_its_own_tensors_from_others() -> None:
    buffers = SharedBuffers()
    first, second = buffers.empty(3, 4), buffers.empty(3, 4)
    places = [buffers.place(tensor) for tensor in (first, second, first[1:], first[:2], torch.zeros(3, 4))]
    assert [place and (place.block, place.shape) for place in places] == [(0, (3, 4)), (1, (3, 4)), None, None, None]
    buffers.take_back(0)
    assert buffers.empty(4, 3).data_ptr() == first.data_ptr()
    assert [number for number, _, _ in buffers.new] == [0, 1]
    for _, _, descriptor in buffers.new:
        os.close(descriptor)


def test_what_is_wrong_there_is_said_here(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [sample(n, jpg=b"no picture") for n in range(20)])
    build_index(str(tmp_path))
    with (
        open_stream(own(tmp_path), 4) as stream,
        pytest.raises(UserError, match="not one of the 4 samples") as caught,
    ):
        next(iter(stream))
    assert "in the process that loads data" in str(caught.value.__cause__)
    wait_for_none()


def test_an_error_that_cannot_be_sent_becomes_its_sentence() -> None:
    class Picky(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} and {second}")

    assert str(sendable(Picky("one", "two"))) == "Picky: one and two"
    assert isinstance(sendable(UserError("said")), UserError)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "was ended by SIGKILL, as when memory runs out"),
        (-7, "was ended by SIGBUS, as when memory runs out"),
        (-11, "was ended by SIGSEGV"),
        (3, "ended with status 3"),
    ],
)
def test_how_a_process_ended_is_said(status: int, words: str) -> None:
    assert ended(status) == words


def test_a_killed_process_is_an_end_and_not_a_hang(pairs: Path) -> None:
    with open_stream(own(pairs), 4) as stream:
        iterator = iter(stream)
        next(iterator)
        [child] = loaders()
        child.kill()
        with pytest.raises(RunFailed, match="the process that loads data was ended by SIGKILL, as when memory"):
            for _ in range(10):
                next(iterator)
    with open_stream(own(pairs), 4) as stream:
        assert len(next(iter(stream))) == 4
    assert loaders() == []


def test_signals_of_a_launcher_are_left_to_the_rank(pairs: Path) -> None:
    """Slurm sends them to every process of a step, at any moment: the loader may just be starting."""
    with open_stream(own(pairs), 4) as stream:
        iterator, stop = iter(stream), threading.Event()
        got: list[int] = []

        def pester() -> None:
            while not stop.is_set():
                for child in psutil.Process().children(recursive=True):
                    # Before the shell has become Python its name is another.
                    if "ignored" in ignored_signals(child):
                        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                            child.send_signal(number)
                            got.append(number)
                time.sleep(0.02)

        thread = threading.Thread(target=pester)
        thread.start()
        try:
            for _ in range(20):
                next(iterator)
        finally:
            stop.set()
            thread.join()
        assert len(got) > 20


def ignored_signals(child: psutil.Process) -> str:
    """Whether the shell's trap is in force, from the kernel's mask."""
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    except OSError:
        return ""
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigIgn")), 0)
    return "ignored" if mask >> (signal.SIGUSR1 - 1) & 1 else ""


def test_modules_are_found_where_the_rank_finds_them(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among installed packages lie some that are named as Python's own modules."""
    (tmp_path / "dataclasses.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with open_stream(own(pairs), 4) as stream:
        assert len(next(iter(stream))) == 4


GOING = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_data_own_process import own, open_stream, loaders
with open_stream(own(sys.argv[1]), 6) as stream:
    for _ in stream:
        # By then it has made all that it may, and waits to be asked for more.
        time.sleep(1.5)
        print(loaders()[0].pid, flush=True)
        if sys.argv[3] == "error":
            raise RuntimeError("on purpose")
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["error", "interrupt", "kill"])
def test_it_ends_with_the_program_that_it_loads_for(pairs: Path, how: str) -> None:
    words = [sys.executable, "-c", GOING, str(pairs), str(Path(__file__).parent), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout is not None
        number = int(program.stdout.readline())
        if how == "interrupt":
            program.send_signal(signal.SIGINT)
        elif how == "kill":
            program.kill()
        program.wait(30)
    until = time.monotonic() + 10
    while is_alive(number) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(number)


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.s3
def test_reads_that_were_tried_again_are_counted(
    pairs: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in pairs.iterdir():
        store.client().put_object(Bucket="tests", Key=f"again/{path.name}", Body=path.read_bytes())
    stream = open_stream(own("s3://tests/again"), 6)
    with FaultyProxy(store.endpoint, share=0.5, faults=("503",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with stream:
            found = [rows_of(batch) for batch, _ in zip(stream, range(12), strict=False)]
            assert stream.retried.total() > 0
    with open_stream(config(pairs), 6) as whole:
        assert found == [rows_of(batch) for batch, _ in zip(whole, range(12), strict=False)]


def test_for_a_gpu_batches_are_copied_and_blocks_are_free_at_once(tokens: Path) -> None:
    """Page-locked memory needs a GPU; ordinary memory stands in for it."""
    world = World(0, 1, 0, torch.device("cuda"))
    expected = take(config(tokens), 8, 6)
    with PairStream(config(tokens), 7, 8, world) as stream:
        stream.buffers = Buffers(pin=False)
        batches = [batch for batch, _ in zip(stream, range(6), strict=False)]
        run = stream._running
        assert isinstance(run, OwnProcessRun), "what is not said is decided by the device"
        assert [sorted(rows_of(batch)) for batch in batches] == expected
        assert len(run._blocks) <= 5, "all six are held, and hold none"


def test_threads_load_where_nothing_is_launched(pairs: Path) -> None:
    with open_stream(config(pairs), 4) as stream:
        run = stream.begin(0, 4)
        run.close()
        assert isinstance(run, Run)
    with PairStream(config(pairs, own_process=True), 7, 4, ordered=True) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        run = stream.begin(0, 4)
        run.close()
        assert isinstance(run, Run)


def test_its_memory_counts_as_the_ranks(pairs: Path) -> None:
    before = metrics.resident_mb()
    with open_stream(own(pairs), 4) as stream:
        next(iter(stream))
        [child] = loaders()
        extra = metrics.resident_mb() - before
        assert extra > 0.5 * child.memory_full_info().uss / 2**20 > 20


def test_it_is_iterated_anew_after_a_close_or_a_move(pairs: Path) -> None:
    with open_stream(config(pairs), 4) as whole:
        expected = [rows_of(batch) for batch, _ in zip(whole, range(5), strict=False)]
    with open_stream(own(pairs), 4) as stream:
        iterator = iter(stream)
        state = [stream.state_after(next(iterator)) for _ in range(2)][1]
        stream.load_state(state)
        with pytest.raises(RuntimeError, match="iterate it anew"):
            next(iterator)
        assert [rows_of(batch) for batch, _ in zip(stream, range(3), strict=False)] == expected[2:]


def test_a_small_data_set_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    write_pairs(tmp_path, [3])
    with pytest.raises(UserError, match="fewer than its part of a global batch"):
        open_stream(own(tmp_path), 8)
    assert loaders() == []
