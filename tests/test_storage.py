"""Files anywhere, and a sentence for each fault of a store."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pacl_scale import storage
from pacl_scale.errors import RunFailed, UserError


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("a/", "b"), "a/b"),
        (("s3://b", "c", "d"), "s3://b/c/d"),
        (("/", "a"), "/a"),
        (("s3://b/c/", "d"), "s3://b/c/d"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(*parts) == joined


def test_local_round_trip_leaves_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path / "new" / "file.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.bin"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    url, versions = str(tmp_path / "file"), [bytes([n]) * 300_000 for n in range(2)]
    storage.write_bytes(url, versions[0])
    done = threading.Event()

    def write() -> None:
        for n in range(40):
            storage.write_bytes(url, versions[n % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert storage.read_bytes(url) in versions
    writer.join()


def test_missing_file_and_unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        storage.read_bytes(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot be opened"):
        storage.read_bytes("gopher://x/y")


@pytest.mark.s3
def test_s3_round_trip(s3_url: str) -> None:
    url = storage.join(s3_url, "a/b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"content")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"content"
    storage.check_writable(s3_url)


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """fsspec keeps one client per process; a changed environment needs a new one, and so does its return."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def test_remove_takes_files_and_folders(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a" / "b"), b"")
    storage.remove(str(tmp_path / "a"))
    storage.remove(str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
def test_wrong_secret_is_one_sentence_without_the_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(UserError, match="access was refused") as caught:
        storage.check_writable(s3_url)
    assert "not-the-secret" not in str(caught.value)


@pytest.mark.s3
def test_missing_bucket_is_named(s3_url: str) -> None:
    with pytest.raises(UserError, match="bucket does not exist"):
        storage.check_writable("s3://no-such-bucket-here/x")


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
def test_unreachable_store_is_one_sentence(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="s3://"):
        storage.read_bytes(storage.join(s3_url, "x"))


def test_patience_waits_for_a_store_that_comes_back_and_names_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage.tenacity.nap.time, "sleep", lambda seconds: None)
    asked = []

    def answer(after: int) -> str:
        asked.append(after)
        if len(asked) <= after:
            raise storage.StoreUnavailable("s3://b/x: the store did not answer")
        return "here"

    assert storage.patiently(answer, storage.ATTEMPTS - 1) == "here"
    assert len(asked) == storage.ATTEMPTS
    asked.clear()
    with pytest.raises(RunFailed, match="did not answer, 7 times in a row"):
        storage.patiently(answer, 100)

    def refuse() -> None:
        asked.append(0)
        raise UserError("no access")

    asked.clear()
    with pytest.raises(UserError, match="no access"):
        storage.patiently(refuse)
    assert len(asked) == 1


def test_a_full_disk_is_not_waited_for() -> None:
    with pytest.raises(UserError, match="cannot be written .*No space left") as raised, storage.explained("/run/x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not isinstance(raised.value, storage.StoreUnavailable)
