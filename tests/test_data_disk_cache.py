"""Blocks on a local disk: the same bytes, fewer requests, and never more than the bound."""

import contextlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_stream import config, open_stream, rows_of

from pacl_scale.data import disk_cache
from pacl_scale.data.disk_cache import COUNT_NAME, CRC_BYTES, FOLDER_NAME, CachedClient, DiskCache
from pacl_scale.data.ranges import FsspecClient, Piece
from pacl_scale.data.reader import ReadConfig
from pacl_scale.errors import UserError

BLOCK = 100
BLOCKS = f"{FOLDER_NAME}/*/*"
SHARD = "0123456789abcdef" * 2
CONTENT = np.random.default_rng(0).bytes(1050)


class Store:
    """One shard in memory, and the ranges that were asked for."""

    def __init__(self, version: str = "v1") -> None:
        self.version, self.content, self.asked = version, CONTENT, list[tuple[int, int]]()
        self.short = False

    def get(self, name: str, start: int, stop: int) -> Piece:
        self.asked.append((start, stop))
        content = self.content[start : stop - 1 if self.short and stop > 1 else stop]
        return Piece(content, len(self.content), self.version)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "BLOCK_BYTES", BLOCK)


def client_of(store: Store, folder: Path, bound: int = 10_000) -> CachedClient:
    return CachedClient(store, DiskCache(str(folder), bound), "s3://b/x", {"0.tar": len(CONTENT)})


def used(folder: Path) -> int:
    total = 0
    for path in folder.glob(BLOCKS):
        with contextlib.suppress(FileNotFoundError):  # another process has just thrown it away
            total += path.stat().st_size
    return total


def test_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    store = Store()
    client = client_of(store, tmp_path)
    assert client.get("0.tar", 150, 420) == Piece(CONTENT[150:420], 1050, "v1")
    assert store.asked == [(0, 1), (100, 500)]
    assert client.get("0.tar", 199, 401).content == CONTENT[199:401]
    assert client.get("0.tar", 50, 650).content == CONTENT[50:650]
    assert store.asked[2:] == [(0, 100), (500, 700)]
    assert client.get("0.tar", 990, 1050).content == CONTENT[990:]
    assert store.asked[4:] == [(900, 1050)]
    again = Store()
    assert client_of(again, tmp_path).get("0.tar", 0, 700).content == CONTENT[:700]
    assert again.asked == [(0, 1)]
    assert used(tmp_path) == 8 * (BLOCK + CRC_BYTES) + 50 + CRC_BYTES


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 1049), st.integers(1, 400)), min_size=1, max_size=12),
    bound=st.integers(50, 1500),
)
def test_any_reads_give_the_bytes_within_any_bound(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]], bound: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    client = client_of(Store(), folder, bound)
    for start, length in ranges:
        stop = min(start + length, len(CONTENT))
        assert client.get("0.tar", start, stop).content == CONTENT[start:stop]
        assert used(folder) <= bound


def test_the_least_recently_read_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 5 * (BLOCK + CRC_BYTES))
    for number in range(5):
        cache.put(SHARD, number, bytes([number]) * BLOCK)
        os.utime(tmp_path / FOLDER_NAME / SHARD / str(number), (number + 1, number + 1))
    assert cache.get(SHARD, 0, BLOCK) == bytes(BLOCK)  # so 1 is the oldest now
    cache.put(SHARD, 5, bytes(BLOCK))
    assert sorted(path.name for path in tmp_path.glob(BLOCKS)) == ["0", "2", "3", "4", "5"]
    assert int((tmp_path / FOLDER_NAME / COUNT_NAME).read_text()) == used(tmp_path)


def test_files_of_others_are_never_thrown_away(tmp_path: Path) -> None:
    """A scratch disk that others use, and somebody's files even among the blocks."""
    theirs = [tmp_path / "alice" / "thesis.tex", tmp_path / FOLDER_NAME / "alice" / "7", tmp_path / "7"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(300))
        os.utime(path, (1, 1))
    cache = DiskCache(str(tmp_path), 3 * (BLOCK + CRC_BYTES))
    left_over = tmp_path / FOLDER_NAME / SHARD / "3.0123abcd.part"
    left_over.parent.mkdir()
    left_over.write_bytes(bytes(300))
    for number in range(5):
        cache.put(SHARD, number, bytes(BLOCK))
    assert all(path.exists() for path in theirs)
    assert not left_over.exists()
    assert cache.get(SHARD, 4, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("damage", ["short", "long", "changed", "empty"])
def test_a_damaged_block_is_read_again(tmp_path: Path, damage: str) -> None:
    client = client_of(Store(), tmp_path)
    client.get("0.tar", 0, 100)
    (path,) = tmp_path.glob(BLOCKS)
    whole = path.read_bytes()
    changed = {"short": whole[:-1], "long": whole + b"x", "changed": b"?" + whole[1:], "empty": b""}[damage]
    path.write_bytes(changed)
    store = Store()
    assert client_of(store, tmp_path).get("0.tar", 0, 100).content == CONTENT[:100]
    assert store.asked == [(0, 1), (0, 100)]
    assert path.read_bytes() == whole


def test_a_short_body_is_neither_kept_nor_passed_on(tmp_path: Path) -> None:
    store = Store()
    store.short = True
    assert client_of(store, tmp_path).get("0.tar", 0, 200).content == b""
    assert used(tmp_path) == 0


def test_blocks_of_a_shard_that_was_replaced_are_not_found(tmp_path: Path) -> None:
    client_of(Store(), tmp_path).get("0.tar", 0, 1050)
    store = Store("v2")
    store.content = CONTENT[::-1]
    assert client_of(store, tmp_path).get("0.tar", 0, 1050) == Piece(CONTENT[::-1], 1050, "v2")
    client = client_of(store, tmp_path)
    client.get("0.tar", 0, 10)
    store.content, store.version = CONTENT + CONTENT, "v3"
    assert client_of(store, tmp_path).get("0.tar", 0, 100) == Piece(b"", 2100, "v3")


def fill(folder: Path, seed: int) -> None:
    disk_cache.BLOCK_BYTES = BLOCK
    client = client_of(Store(), folder, 600)
    for start in np.random.default_rng(seed).integers(0, 1000, 150).tolist():
        assert client.get("0.tar", start, start + 50).content == CONTENT[start : start + 50]


def test_processes_share_a_folder_and_its_bound(tmp_path: Path) -> None:
    children = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, n)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert 0 < used(tmp_path) <= 600
    assert int((tmp_path / FOLDER_NAME / COUNT_NAME).read_text()) == used(tmp_path)
    assert not list(tmp_path.glob(f"{BLOCKS}.part"))


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    client = client_of(Store(), tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert client.get("0.tar", 0, 1050).content == CONTENT
    assert used(tmp_path) == 0


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"read\.disk_cache: .*file/x cannot be written to \(Not a directory\)"):
        DiskCache(str(tmp_path / "file" / "x"), 1)
    with pytest.raises(ValueError, match="disk_cache_gb must be above 0"):
        ReadConfig(disk_cache_gb=0)


def test_a_second_epoch_comes_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream with its cache: the same batches, and no shard is read twice."""
    import fsspec

    write_pairs(tmp_path / "pairs", [20, 30])
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "pairs").iterdir():
        memory.pipe_file(f"/cached/{path.name}", path.read_bytes())
    options = {"chunk_samples": 4, "window_chunks": 3, "read_ahead_mb": 1, "fetch_threads": 2}
    cached = ReadConfig(**options, disk_cache=str(tmp_path / "cache"))
    asked: list[int] = []
    get = FsspecClient.get

    def count(self: FsspecClient, name: str, start: int, stop: int) -> Piece:
        asked.append(stop - start)
        return get(self, name, start, stop)

    monkeypatch.setattr(FsspecClient, "get", count)
    found = []
    for root, read in ((tmp_path / "pairs", ReadConfig(**options)), ("memory://cached", cached)):
        with open_stream(config(root, read=read), 10) as stream:
            found.append([row for _, batch in zip(range(10), stream, strict=False) for row in rows_of(batch)])
    assert found[0] == found[1]
    assert max(asked) > BLOCK
    # Another process, or another start: only the byte that tells a shard's version.
    asked.clear()
    with open_stream(config("memory://cached", read=cached), 10) as stream:
        again = [row for _, batch in zip(range(10), stream, strict=False) for row in rows_of(batch)]
    assert again == found[1]
    assert set(asked) == {1}
    sizes = sum(path.stat().st_size for path in (tmp_path / "pairs").glob("*.tar"))
    assert 0.9 * sizes < used(tmp_path / "cache") < 1.1 * sizes
    memory.rm("/cached", recursive=True)


def test_a_disk_cache_of_local_tars_is_said_to_be_of_no_use(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "pairs", [4])
    read = ReadConfig(disk_cache=str(tmp_path / "cache"))
    open_stream(config(tmp_path / "pairs", read=read), 4).close()
    captured = capfd.readouterr()
    assert "read.disk_cache is of no use" in captured.out + captured.err
