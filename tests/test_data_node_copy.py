"""An index is fetched and unpacked once on a machine, whoever else wants it, and never taken for another."""

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from data_sets import sample, write_pairs, write_tar
from test_data_stream import config, take

from pacl_scale import storage
from pacl_scale.data import node_copy
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.errors import UserError

URL = "memory://node-copy"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small data set on disk, and a copy of it in fsspec's memory; small indexes are shared, too."""
    monkeypatch.setattr(node_copy, "SMALLEST", 0)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    write_pairs(tmp_path / "pairs", [5, 0, 7])
    put(tmp_path / "pairs")
    yield tmp_path / "pairs"
    fsspec.filesystem("memory").rm("/node-copy", recursive=True)


def put(root: Path) -> None:
    for path in root.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/node-copy/{path.name}", path.read_bytes())


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read from the store as a whole, slowly."""
    urls: list[str] = []
    original = storage.read_bytes

    def read(url: str) -> bytes:
        urls.append(url)
        time.sleep(0.2)
        return original(url)

    monkeypatch.setattr(storage, "read_bytes", read)
    return urls


def copies() -> list[Path]:
    return sorted(Path(tempfile.gettempdir()).glob(f"pacl-index-*/*{node_copy.ENDING}*"))


def same(a: SampleIndex, b: SampleIndex) -> bool:
    columns = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("offset", "length", "key"))
    return columns and (a.shards, a.kind, a.extra, a.identity) == (b.shards, b.kind, b.extra, b.identity)


def test_all_who_come_at_once_share_one_fetch(local: Path, fetched: list[str]) -> None:
    found: list[SampleIndex] = []
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait()
        found.append(SampleIndex.load(URL))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(copies()) == 1
    assert all(same(index, SampleIndex.load(str(local))) for index in found)
    # The columns are the file's own pages, not a copy of them.
    assert all(isinstance(column_owner(index.key), mmap.mmap) for index in found)
    assert take(config(URL), 6, 4) == take(config(local), 6, 4)
    assert os.stat(copies()[0].parent).st_mode & 0o077 == 0


def column_owner(column: np.ndarray) -> object:
    base = column.base
    return base.obj if isinstance(base, memoryview) else base


def test_an_index_written_anew_is_fetched_anew(local: Path, fetched: list[str]) -> None:
    SampleIndex.load(URL)
    (before,) = copies()
    write_tar(local / "00002.tar", [sample(n) for n in range(50, 53)])
    build_index(str(local))
    put(local)
    index = SampleIndex.load(URL)
    assert len(index) == 8
    assert len(fetched) == 2
    # The old version's copy is gone; those of other indexes go when nobody has opened them for a week.
    (after,) = copies()
    assert after != before
    recent, old = after.with_name("a-b.columns"), after.with_name("c-d.columns.12345678.part")
    recent.touch()
    old.touch()
    os.utime(old, (0, time.time() - node_copy.KEPT_S - 60))
    after.unlink()
    SampleIndex.load(URL)
    assert copies() == sorted([after, recent])


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty", "other"])
def test_a_damaged_copy_is_made_again(local: Path, fetched: list[str], damage: str) -> None:
    wanted = SampleIndex.load(URL)
    (path,) = copies()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1 if damage == "flipped" else 0
    ends = {"flipped": bytes(content), "cut short": bytes(content[:-9]), "empty": b"", "other": b"x" * 9999}
    replacement = path.with_name("replacement")
    replacement.write_bytes(ends[damage])
    replacement.replace(path)
    assert same(SampleIndex.load(URL), wanted)
    assert len(fetched) == 2
    SampleIndex.load(URL)
    assert len(fetched) == 2


def test_without_a_place_for_it_each_process_has_its_own(
    local: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.gettempdir()) / f"pacl-index-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert same(SampleIndex.load(URL), SampleIndex.load(str(local)))
    assert not copies()
    folder.chmod(0o700)

    def full(path: Path, unpacked: node_copy.Unpacked) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(node_copy, "_write", full)
        assert same(SampleIndex.load(URL), SampleIndex.load(str(local)))
    # What was fetched for a copy that could not be kept is used.
    assert len(fetched) == 2
    fsspec.filesystem("memory").pipe_file("/node-copy/index.parquet", b"no index")
    with pytest.raises(UserError, match="node-copy/index.parquet cannot be used as an index"):
        SampleIndex.load(URL)
    assert not copies()


def test_a_small_index_is_read_by_each(local: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert len(SampleIndex.load(URL)) == 12
    assert not copies()
