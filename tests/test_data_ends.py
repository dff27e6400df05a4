"""How a stream ends: closed while the store hangs, forked or sent elsewhere in mid-iteration, interrupted, gone through
ten times. Nothing waits, and nothing is left."""

import multiprocessing
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_sets import sample, write_pairs, write_tar
from test_data_stream import config, open_stream, rows_of, take

from pacl_scale.data import ranges
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import build_index
from pacl_scale.data.reader import ReadConfig
from pacl_scale.quickstart.store import ObjectStore


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs in three shards."""
    root = tmp_path_factory.mktemp("ends")
    write_pairs(root, [23, 1, 36])
    return root


@pytest.fixture(scope="module")
def bucket(local: Path, store: ObjectStore) -> str:
    """The same on the store."""
    for path in local.iterdir():
        store.client().put_object(Bucket="tests", Key=f"ends/{path.name}", Body=path.read_bytes())
    return "s3://tests/ends"


@pytest.fixture
def opened_clients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What clients of a store were opened with in this process."""
    opened: list[Any] = []
    original = ranges.open_client
    monkeypatch.setattr(ranges, "open_client", lambda *words: opened.append(words) or original(*words))
    return opened


class Silence:
    """A server that takes connections and requests and says nothing; a context manager."""

    def __enter__(self) -> "Silence":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self.asked = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()
        return self

    def _take(self) -> None:
        while True:
            try:
                self._connections.append(self._listener.accept()[0])
            except OSError:
                return
            self.asked.set()

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake the thread that waits for a connection.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.close()


def our_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("fetch", "decode", "batches"))]


@pytest.mark.s3
@pytest.mark.parametrize("own_process", [False, True])
def test_closing_does_not_wait_for_a_store_that_hangs(
    bucket: str, own_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = ReadConfig(chunk_samples=4, window_chunks=5, read_ahead_mb=1, fetch_threads=2, timeout_s=4.0)
    stream = open_stream(config(bucket, read=hanging, own_process=own_process), 6)
    with Silence() as silence:
        monkeypatch.setenv("AWS_ENDPOINT_URL", silence.endpoint)
        failures: list[BaseException] = []

        def consume() -> None:
            try:
                next(iter(stream))
            except RuntimeError as error:
                failures.append(error)

        consumer = threading.Thread(target=consume)
        consumer.start()
        assert silence.asked.wait(60)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 3
        consumer.join(30)
        assert ["iterate it anew" in str(error) for error in failures] == [True]
    # What was left behind ends when its connection does, and does not try again.
    until = time.monotonic() + 30
    while our_threads() and time.monotonic() < until:
        time.sleep(0.05)
    assert our_threads() == []


HANGING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[2])
from test_data_stream import READ, config, open_stream
def hang(*_):
    # In one piece: several threads come by.
    os.write(1, b"going\\n")
    time.sleep(600)
with open_stream(config(sys.argv[1]), 6) as stream:
    for _ in stream:
        if sys.argv[3] == "error":
            os.write(1, b"going\\n")
            raise RuntimeError("on purpose")
        stream._running._readers[0]._client.get = hang
"""


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("error", 1), ("hang", -signal.SIGINT)])
def test_nothing_is_left_of_a_program_that_reads_from_a_store(bucket: str, how: str, status: int) -> None:
    """After an exception, and after Ctrl-C while the store hangs: it ends soon, and alone."""
    words = [sys.executable, "-c", HANGING, bucket, str(Path(__file__).parent), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "going\n"
            family = psutil.Process(child.pid).children(recursive=True)
            if how != "error":
                child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == status
    assert ("on purpose" if how == "error" else "KeyboardInterrupt") in errors
    assert family == []


def use_after_fork(stream: Any, iterator: Iterator[Any], opened: list[Any], results: Any) -> None:
    before = len(opened)
    try:
        next(iterator)
        results.put("went on")
    except RuntimeError as error:
        results.put(str(error))
    try:
        with stream:
            results.put([rows_of(batch) for batch, _ in zip(stream, range(3), strict=False)])
            results.put(len(opened) - before)
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.s3
def test_a_process_forked_in_mid_iteration_says_so_and_can_begin_anew(bucket: str, opened_clients: list[Any]) -> None:
    """While threads of this one are reading, decoding and putting together; several times, as it is a race."""
    context = multiprocessing.get_context("fork")
    settings = config(bucket, read=ReadConfig(chunk_samples=1, window_chunks=9, read_ahead_mb=1, fetch_threads=4))
    with open_stream(settings, 6) as whole:
        expected = [rows_of(batch) for batch, _ in zip(whole, range(12), strict=False)]
    with open_stream(settings, 6) as stream:
        iterator = iter(stream)
        for number in range(5):
            assert rows_of(next(iterator)) == expected[number]
            results = context.SimpleQueue()
            child = context.Process(target=use_after_fork, args=(stream, iterator, opened_clients, results))
            child.start()
            child.join(60)
            try:
                assert child.exitcode == 0
                assert results.get() == "the stream was being iterated when this process was forked; iterate it anew"
                # It goes on after the batch that was handed out before the fork.
                assert results.get() == expected[number + 1 : number + 4]
                # With connections of its own: two processes that read from one connection get each other's bytes.
                assert results.get() == 1
            finally:
                child.kill()
                child.join()
        assert rows_of(next(iterator)) == expected[5]


def read_state(root: str, state: Any, results: Any) -> None:
    results.put(take(config(root), 6, 2, state=state))


@pytest.mark.s3
def test_a_spawned_process_goes_on_from_a_state_but_is_sent_no_stream(bucket: str) -> None:
    expected = take(config(bucket), 6, 4)
    with open_stream(config(bucket), 6) as stream:
        iterator = iter(stream)
        state = [stream.state_after(next(iterator)) for _ in range(2)][1]
        with pytest.raises(TypeError, match="cannot be sent to another process; send its config and state_after"):
            pickle.dumps(stream)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        child = context.Process(target=read_state, args=(bucket, state, results))
        child.start()
        assert results.get(timeout=120) == expected[2:]
        child.join(60)
        assert child.exitcode == 0
        assert sorted(rows_of(next(iterator))) == expected[2]


@pytest.mark.s3
def test_spans_share_their_connections(bucket: str, opened_clients: list[Any]) -> None:
    """As the cache reads, shard after shard: one client."""
    with open_stream(config(bucket), 6, ordered=True) as stream:
        keys = [key for start in range(0, 60, 20) for batch in stream.span(start, start + 20) for key in batch.keys]
        stream.close()
        assert [key for batch in stream.span(0, 6) for key in batch.keys] == keys[:6]
    assert [int(key) for key in keys] == list(range(60))
    assert len(opened_clients) == 1


GROWTH = """
import gc, sys
sys.path.insert(0, sys.argv[2])
import psutil
from test_data_ends import MEMORY_READ
from test_data_stream import config, open_stream
process, resident = psutil.Process(), []
with open_stream(config(sys.argv[1], read=MEMORY_READ), 16) as stream:
    for number, batch in enumerate(stream):
        if number % 8 == 7:
            gc.collect()
            resident.append(process.memory_info().rss / 2**20)
        if len(resident) == 10:
            break
print(resident[-1] - resident[2])
"""
MEMORY_READ = ReadConfig(chunk_samples=4, window_chunks=8, read_ahead_mb=4, fetch_threads=2)


def test_memory_is_flat_over_ten_epochs(tmp_path: Path) -> None:
    """128 samples of 128 KiB: 16 MiB an epoch, of which a tenth must not stay."""
    tokens, width = 256, 512
    format = FeatureFormat(tokens, width, (16, 16), "int8", {})
    scale = np.ones(tokens, np.float16).tobytes()
    rows = [sample(n, jpg=None, patches=bytes([n]) * (tokens * width), scale=scale) for n in range(128)]
    write_tar(tmp_path / "0.tar", rows)
    build_index(str(tmp_path), kind="features", extra=format.to_dict())
    words = [sys.executable, "-c", GROWTH, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # From the third epoch to the tenth.
    assert float(done.stdout) < 0.1 * 7 * 16
