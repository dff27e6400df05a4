"""The embedded object store: real signatures, real buckets, no process left behind."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.quickstart.store import STOP_SECONDS, ObjectStore, find_server

pytestmark = pytest.mark.s3


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.02)


def test_what_is_written_is_read_back_in_ranges(s3_url: str) -> None:
    storage.write_bytes(f"{s3_url}/a/b.bin", bytes(range(100)))
    assert storage.read_bytes(f"{s3_url}/a/b.bin") == bytes(range(100))
    files, path = storage.filesystem(f"{s3_url}/a/b.bin")
    assert files.cat_file(path, start=10, end=13) == bytes([10, 11, 12])
    assert [name.rsplit("/", 1)[-1] for name in files.ls(path.rsplit("/", 1)[0])] == ["b.bin"]


def test_large_object_goes_up_in_parts(s3_url: str) -> None:
    content = os.urandom(11 << 20)
    files, path = storage.filesystem(f"{s3_url}/large")
    with files.open(path, "wb", block_size=5 << 20) as file:
        for start in range(0, len(content), 1 << 20):
            file.write(content[start : start + (1 << 20)])
    assert files.info(path)["ETag"].strip('"').endswith(("-2", "-3")), "not a multipart upload"
    assert files.cat_file(path) == content


def test_wrong_secret_is_refused(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_url}/x", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(UserError, match="access was refused"):
            storage.read_bytes(f"{s3_url}/x")
        with pytest.raises(UserError, match="access was refused"):
            storage.check_writable(s3_url)
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_missing_bucket_is_named(s3_url: str) -> None:
    with pytest.raises(UserError, match="s3://no-such-bucket/x: the bucket does not exist"):
        storage.write_bytes("s3://no-such-bucket/x", b"1")
    with pytest.raises(UserError, match="s3://no-such-bucket/x: the bucket does not exist"):
        storage.read_bytes("s3://no-such-bucket/x")


def test_environment_wins_over_the_users_own_account(store: ObjectStore, s3_url: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_url}/x", b"hello")
    aws = tmp_path / ".aws"
    aws.mkdir()
    (aws / "config").write_text("[default]\nendpoint_url = http://127.0.0.1:9\nregion = eu-north-1\n")
    (aws / "credentials").write_text("[default]\naws_access_key_id = A\naws_secret_access_key = B\n")
    mine = {
        "HOME": str(tmp_path),
        "AWS_PROFILE": "work",
        "AWS_SESSION_TOKEN": "mine",
        "http_proxy": "http://127.0.0.1:9",
    }
    code = f"import fsspec; print(fsspec.open({s3_url + '/x'!r}).open().read())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **mine, **store.environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "b'hello'", done.stderr


def test_process_ends_after_an_exception_and_objects_stay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ObjectStore(tmp_path / "s") as store:
        pid = store.pid
        assert pid is not None and is_alive(pid)
        store.client().put_object(Bucket="demo", Key="k", Body=b"v")
        raise RuntimeError
    assert not is_alive(pid)
    with ObjectStore(tmp_path / "s", buckets=("demo", "second")) as store:
        assert store.client().get_object(Bucket="demo", Key="k")["Body"].read() == b"v"
        assert {bucket["Name"] for bucket in store.client().list_buckets()["Buckets"]} == {"demo", "second"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pacl_scale.quickstart.store import ObjectStore\n"
        "with ObjectStore(sys.argv[1]) as store:\n"
        "    print(store.pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    with parent:
        assert parent.stderr is not None
        pid = int(parent.stderr.readline())
        parent.kill()
    wait_until(lambda: not is_alive(pid))


def test_pause_kill_and_restart(tmp_path: Path) -> None:
    with ObjectStore(tmp_path) as store:
        client, pid = store.client(), store.pid
        client.put_object(Bucket="demo", Key="k", Body=b"v")
        store.pause()
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
        store.resume()
        assert client.get_object(Bucket="demo", Key="k")["Body"].read() == b"v"
        store.kill()
        assert store.pid is None
        endpoint = store.endpoint
        store.restart()
        assert store.endpoint == endpoint
        assert client.get_object(Bucket="demo", Key="k")["Body"].read() == b"v"
        store.pause()
        paused, started = store.pid, time.monotonic()
    assert paused is not None and not is_alive(paused)
    assert time.monotonic() - started < STOP_SECONDS, "it had to be killed"


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken"):
            ObjectStore(tmp_path, port=port).__enter__()


def test_directory_that_cannot_hold_a_store(tmp_path: Path) -> None:
    (tmp_path / "meta.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(UserError, match="no object store can be made here"):
        ObjectStore(tmp_path).__enter__()


def test_bucket_name_that_the_server_refuses(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, buckets=("Not A Name",))
    with pytest.raises(UserError, match="'Not A Name' cannot be created"):
        store.__enter__()
    assert store.pid is None


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"pip install 'pacl-scale\[demo\]'"):
        find_server()


def test_server_is_found_without_an_active_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert os.access(find_server(), os.X_OK)


def test_only_loopback_is_open(store: ObjectStore) -> None:
    assert store.pid is not None
    inodes = set()
    for link in Path(f"/proc/{store.pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].rsplit(":", 1)[0])
    assert listening and set(listening) == {"0100007F"}
