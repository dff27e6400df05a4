"""Reads over a bad line: nothing lost, nothing doubled, and what cannot be helped is said."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import PREPROCESS, write_pairs, write_tar
from faulty_proxy import FAULTS, FaultyProxy
from test_data_stream import config, open_stream, rows_of

from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.data.ranges import Closed, FileClient, PassingFault, Piece, ShardReader
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.quickstart.store import ObjectStore

# One request in few must be spoiled, and a spoiled one be tried again soon.
READ = ReadConfig(chunk_samples=3, window_chunks=4, read_ahead_mb=1, fetch_threads=4, timeout_s=0.5, retries=8)


@pytest.fixture(scope="module")
def bucket(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A data set on the store, and the same one on disk."""
    local = tmp_path_factory.mktemp("pairs")
    write_pairs(local, [40, 50, 30])
    for path in local.iterdir():
        store.client().put_object(Bucket="tests", Key=f"faults/{path.name}", Body=path.read_bytes())
    return "s3://tests/faults", local


def epoch(stream: PairStream) -> list[object]:
    with stream:
        return [row for _, batch in zip(range(12), stream, strict=False) for row in rows_of(batch)]


@pytest.mark.s3
def test_store_and_disk_give_the_same(bucket: tuple[str, Path]) -> None:
    url, local = bucket
    assert epoch(open_stream(config(url), 10)) == epoch(open_stream(config(local), 10))


@pytest.mark.s3
def test_an_index_can_be_built_on_the_store(bucket: tuple[str, Path]) -> None:
    url, local = bucket
    built, wanted = build_index(url), SampleIndex.load(str(local))
    assert built.shards == wanted.shards
    assert (built.offset == wanted.offset).all()
    assert (SampleIndex.load(url).key == wanted.key).all()


@pytest.mark.s3
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_outlived(
    bucket: tuple[str, Path], store: ObjectStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    url, local = bucket
    # The samples are small: without this, a whole shard would come with one request.
    monkeypatch.setattr("pacl_scale.data.reader.LARGEST_READ", 20_000)
    with FaultyProxy(store.endpoint, share=0.25, faults=(fault,)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        stream = open_stream(config(url, read=READ), 10)
        rows, retried = [], 0
        with stream:
            for _, batch in zip(range(12), stream, strict=False):
                rows += rows_of(batch)
                retried = stream.retried.total()
        assert proxy.spoiled[fault] > 3
        assert retried >= 1
    assert rows == epoch(open_stream(config(local, read=READ), 10))


@pytest.mark.s3
@pytest.mark.slow
def test_ten_thousand_samples_over_a_bad_line(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault at once, two ranks, a whole epoch: each sample once, with its bytes, in the order of the disk."""
    format = FeatureFormat(2, 8, (1, 2), "int8", {})
    shards = [2500, 1, 4000, 3499]
    first = 0
    for number, samples in enumerate(shards):
        rows = []
        for sample in range(first, first + samples):
            scale = np.full(2, sample % 2048, np.float16).tobytes()
            text = f"caption {sample}".encode()
            rows.append({"__key__": f"{sample:07d}", "patches": bytes([1] * 16), "scale": scale, "txt": text})
        write_tar(tmp_path / f"{number:05d}.tar", rows)
        first += samples
    build_index(str(tmp_path), kind="features", extra=format.to_dict())
    for path in tmp_path.iterdir():
        store.client().put_object(Bucket="tests", Key=f"many/{path.name}", Body=path.read_bytes())
    monkeypatch.setattr("pacl_scale.data.reader.LARGEST_READ", 80_000)
    read = ReadConfig(chunk_samples=8, window_chunks=100, fetch_threads=12, timeout_s=0.3, retries=12)

    def epoch_of(root: str, rank: int, share: float = 0) -> tuple[list[str], int]:
        keys = []
        with open_stream(config(root, read=read), 400, rank, 2) as stream:
            proxy.share = share
            for _, batch in zip(range(25), stream, strict=False):
                assert batch.patches is not None
                wanted = np.array([int(key) % 2048 for key in batch.keys]).astype(np.float32)
                assert (batch.patches.numpy() == wanted[:, None, None]).all()
                assert batch.texts == [f"caption {int(key)}" for key in batch.keys]
                assert batch.skipped == {}
                keys += batch.keys
                retried = stream.retried.total()
        return keys, retried

    # The index is not read range by range but by s3fs, so the faults begin when it is there.
    with FaultyProxy(store.endpoint, share=0, stall_s=0.4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        found = []
        for rank in range(2):
            found.append(epoch_of("s3://tests/many", rank, share=0.1))
            proxy.share = 0
        assert all(proxy.spoiled[fault] > 2 for fault in FAULTS)
    assert sorted(key for keys, _ in found for key in keys) == [f"{n:07d}" for n in range(10_000)]
    assert all(retried > 10 for _, retried in found)
    assert [keys for keys, _ in found] == [epoch_of(str(tmp_path), rank)[0] for rank in range(2)]


@pytest.mark.s3
def test_a_store_that_drips_is_given_up(
    bucket: tuple[str, Path], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte begins the time-out anew, so the whole of a range has one too."""
    index = SampleIndex.load(bucket[0])
    monkeypatch.setattr("pacl_scale.data.ranges.BODY_BYTES", 64)
    monkeypatch.setattr("pacl_scale.data.ranges.LONGEST_READ", 0)
    reader = ShardReader(index, 1, 5.0, retries=0)
    with pytest.raises(RunFailed, match=r"after 1 tries \(slow body\)"):
        reader.read(0, 0, 512)


@pytest.mark.s3
def test_a_store_that_stays_broken_ends_the_run(
    bucket: tuple[str, Path], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SampleIndex.load(bucket[0])
    with FaultyProxy(store.endpoint, share=1.0, faults=("503",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        reader = ShardReader(index, 1, 1.0, retries=2)
        with pytest.raises(RunFailed, match=r"00000\.tar: the store still fails after 3 tries \(503 SlowDown\)"):
            reader.read(0, 0, 512)
        assert proxy.requests == 3


@pytest.mark.s3
def test_a_body_that_botocore_finds_incomplete_is_asked_for_again(
    bucket: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import IncompleteReadError
    from botocore.response import StreamingBody

    whole, failures = StreamingBody.read, [IncompleteReadError(actual_bytes=1, expected_bytes=2)]

    def read(self: StreamingBody, amt: int | None = None) -> bytes:
        if failures:
            raise failures.pop()
        return whole(self, amt)

    index = SampleIndex.load(bucket[0])
    monkeypatch.setattr(StreamingBody, "read", read)
    reader = ShardReader(index, 1, 5.0, retries=1)
    assert reader.read(0, 0, 512) == (bucket[1] / "00000.tar").read_bytes()[:512]
    assert reader.retried == {"IncompleteReadError": 1}


@pytest.mark.s3
def test_shards_gone_or_grown_on_the_store(store: ObjectStore, tmp_path: Path) -> None:
    write_pairs(tmp_path, [4, 4, 4])
    client = store.client()
    for path in tmp_path.iterdir():
        client.put_object(Bucket="tests", Key=f"changes/{path.name}", Body=path.read_bytes())
    reader = ShardReader(SampleIndex.load("s3://tests/changes"), 1, 5.0, 0)
    first = reader.read(0, 0, 1024)
    # Replaced by as many bytes: only the ETag tells.
    body = (tmp_path / "00000.tar").read_bytes()
    client.put_object(Bucket="tests", Key="changes/00000.tar", Body=body[:-1] + b"\1")
    with pytest.raises(UserError, match=r"s3://tests/changes/00000\.tar was replaced while it was being read"):
        reader.read(0, 0, 1024)
    client.put_object(Bucket="tests", Key="changes/00001.tar", Body=body + bytes(512))
    with pytest.raises(UserError, match=r"00001\.tar has [\d,]+ bytes, but [\d,]+ when it was indexed"):
        reader.read(1, 0, 1024)
    client.delete_object(Bucket="tests", Key="changes/00002.tar")
    with pytest.raises(UserError, match=r"00002\.tar was indexed but is gone"):
        reader.read(2, 0, 1024)
    assert first == body[:1024]


@pytest.mark.s3
def test_wrong_secret_is_refused_in_a_sentence(bucket: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index = SampleIndex.load(bucket[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="access was refused"):
        ShardReader(index, 1, 5.0, 3).read(0, 0, 512)


def test_other_protocols_go_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    write_pairs(tmp_path, [4, 4])
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe_file(f"/other/{path.name}", path.read_bytes())
    reader = ShardReader(SampleIndex.load("memory://other"), 1, 5.0, 0)
    assert reader.read(1, 512, 1024) == (tmp_path / "00001.tar").read_bytes()[512:1024]
    memory.pipe_file("/other/00001.tar", b"")
    reader = ShardReader(SampleIndex.load("memory://other"), 1, 5.0, 0)
    with pytest.raises(UserError, match=r"00001\.tar has 0 bytes"):
        reader.read(1, 512, 1024)
    memory.rm("/other", recursive=True)


class FileServer(http.server.BaseHTTPRequestHandler):
    """Files of a folder over HTTP/1.1, as a whole or, where ``ranges`` is true, in the part that is asked for."""

    folder, ranges, stalls = Path(), True, False

    def do_HEAD(self) -> None:
        self.answer(b"", len((self.folder / self.path.lstrip("/")).read_bytes()), 200)

    def do_GET(self) -> None:
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.stalls and asked:
            self.server.stop.wait(30)  # type: ignore[attr-defined]
        if asked and self.ranges:
            part = content[int(asked[1]) : int(asked[2]) + 1]
            self.answer(part, len(part), 206)
        else:
            self.answer(content, len(content), 200)

    def answer(self, body: bytes, length: int, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[str]:
    handler = type("Handler", (FileServer,), {"folder": folder, **options})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.stop = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stop.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        thread.join()


def test_tars_behind_a_web_server(tmp_path: Path) -> None:
    write_pairs(tmp_path, [4, 4])
    with served(tmp_path) as url, PairStream(DataConfig(root=url), 0, 8, ordered=True) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        (batch,) = list(stream)
        assert batch.keys == [f"{number:07d}" for number in range(8)]
    with served(tmp_path, ranges=False) as url:
        reader = ShardReader(SampleIndex.load(url), 1, 5.0, 0)
        with pytest.raises(UserError, match="whole files where ranges are asked for"):
            reader.read(1, 512, 1024)
    with served(tmp_path, stalls=True) as url:
        reader = ShardReader(SampleIndex.load(url), 1, 0.2, 0)
        began = time.monotonic()
        with pytest.raises(RunFailed, match="still fails after 1 tries"):
            reader.read(1, 512, 1024)
        assert time.monotonic() - began < 10


def test_waits_grow_and_end_when_the_stream_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, [2])
    index = SampleIndex.load(str(tmp_path))
    tries: list[float] = []

    def fail(self: FileClient, name: str, start: int, stop: int) -> Piece:
        tries.append(time.monotonic())
        raise PassingFault("EIO")

    monkeypatch.setattr(FileClient, "get", fail)
    reader = ShardReader(index, 1, 1.0, retries=3)
    with pytest.raises(RunFailed, match=r"after 4 tries \(EIO\)"):
        reader.read(0, 0, 512)
    waits = [b - a for a, b in zip(tries, tries[1:], strict=False)]
    assert len(waits) == 3
    assert all(0.05 * 2**n <= wait < 0.1 * 2**n + 0.2 for n, wait in enumerate(waits))
    assert reader.retried == {"EIO": 4}

    def fail_otherwise(self: FileClient, name: str, start: int, stop: int) -> Piece:
        raise ConnectionAbortedError("no reason")

    # An error that no client names as passing is given the same patience.
    monkeypatch.setattr(FileClient, "get", fail_otherwise)
    other = ShardReader(index, 1, 1.0, retries=1)
    with pytest.raises(RunFailed, match=r"after 2 tries \(ConnectionAbortedError\)"):
        other.read(0, 0, 512)
    reader.close()
    with pytest.raises(Closed):
        reader.read(0, 0, 512)


def test_memory_is_bounded_by_the_read_ahead(tmp_path: Path) -> None:
    """However slow the consumer, no more than the budget is read ahead of it, beside the window in use."""
    write_pairs(tmp_path, [400])
    read = ReadConfig(chunk_samples=2, window_chunks=2, read_ahead_mb=1, fetch_threads=2)
    with open_stream(config(tmp_path, read=read), 4, world_size=1) as stream:
        iterator = iter(stream)
        for _ in range(20):
            next(iterator)
            assert stream._running is not None
            assert stream._running._ahead.held <= (1 << 20) + 4 * 4096
