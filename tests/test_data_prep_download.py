"""URL list to verified, indexed tars: the real img2dataset against the loopback farm and the S3 gateway."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from tasks import misbehave
from web_farm import WebFarm
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep import layout, lock, retry, workers
from data_prep.download import main
from data_prep.lock import only_run
from data_prep.report import read_stats
from data_prep.stages import known_sound
from data_prep.verify import BadShard, check_shard, check_tar
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex
from pacl_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs/data/demo.yaml")

ODD = ["png", "webp", "gif", "cmyk", "rotated", "badexif", "trailing", "wrongtype"]
"""Sound pictures that not every decoder takes as they are."""

BAD = {
    "missing/1": "http_404",
    "missing/2": "http_404",
    "gone/1": "http_410",
    "error/1": "http_500",
    "cut/1": "truncated",
    "reset/1": "connection",
    "loop/1": "redirects",
    "hugejpeg/1": "too_many_pixels",
    "scans/1": "too_many_pixels",
    "shyredirect/1": "opt_out",
    "endless/1": "too_large",
    "slowbody/1": "timeout",
    "slowheaders/1": "timeout",
    "announced/1": "too_large",
    "text/1": "not_an_image",
    "noai/1": "opt_out",
    "bomb/1": "too_many_pixels",
    "toprivate/1": "private_address",
    "silent/1": "timeout",
}


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        running.warm_up()
        yield running


def write_list(path: Path, farm: WebFarm, good: int) -> Path:
    kinds = ["ok"] * (good - len(ODD)) + ODD
    rows = [f"a dog near a chair, number {n}\t{farm.url(f'{kind}/{n}.jpg')}" for n, kind in enumerate(kinds)]
    rows += [f"a cat that is not there\t{farm.url(bad)}" for bad in BAD]
    rows += [rows[0], "no http\tftp://127.0.0.1/x", "no tab"]
    path.write_text("\n".join(rows) + "\n")
    return path


def run(url_list: Path | str, output: str, *more: str) -> int:
    words = ["--config", DEMO, f"url_list={url_list}", f"output={output}", "prepare.samples_per_shard=12"]
    return main([*words, "fetch.silence_seconds=2", "fetch.request_seconds=3", *more])


def wds_samples(path: str | Path) -> list[dict]:
    """Samples of a local tar as webdataset itself reads them."""
    with open(path, "rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def everything_below(url: str) -> dict[str, tuple[int, object]]:
    files, path = storage.filesystem(url)
    files.invalidate_cache()
    found = files.find(path, detail=True)
    return {name: (info["size"], info.get("LastModified", info.get("mtime"))) for name, info in found.items()}


@pytest.fixture(scope="module")
def done(farm: WebFarm, store: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished download that several tests look at."""
    url_list = write_list(tmp_path_factory.mktemp("list") / "pairs.tsv", farm, good=20)
    output = f"{store.url}/done"  # type: ignore[attr-defined]
    assert run(url_list, output) == 0
    return url_list, output


@pytest.mark.s3
@pytest.mark.slow
def test_every_row_ends_in_exactly_one_state(done: tuple[Path, str]) -> None:
    _, output = done
    report = json.loads(storage.read_bytes(f"{output}/report.json"))
    assert report["list_rows"] == 42 and report["expected"] == 39 and report["got"] == 20
    assert report["left_out"] == {"duplicate URL": 1, "unusable URL": 1, "malformed row": 1}
    assert report["failures"] == dict(Counter(BAD.values()))
    assert report["samples"] == 20 and report["shards"] == 4
    states = []
    for shard in range(4):
        content = io.BytesIO(storage.read_bytes(f"{output}/{layout.shard_name(shard)}.parquet"))
        rows = pq.read_table(content).to_pylist()
        listed = pq.read_table(io.BytesIO(storage.read_bytes(layout.list_url(output, shard)))).to_pylist()
        assert [row["id"] for row in rows] == [row["id"] for row in listed]
        states += [(row["url"], row["status"] == "success", row["cause"]) for row in rows]
    assert len(states) == 39
    assert all((cause is None) == good for _, good, cause in states)
    wrong = {url.split("/", 3)[3]: cause for url, _, cause in states if cause}
    assert wrong == BAD


@pytest.mark.s3
@pytest.mark.slow
def test_samples_are_plain_webdataset(done: tuple[Path, str], tmp_path: Path) -> None:
    _, output = done
    files = fsspec.filesystem("s3")
    local = [str(tmp_path / f"{shard}.tar") for shard in range(4)]
    for shard, path in enumerate(local):
        files.get(f"{output}/{layout.shard_name(shard)}.tar", path)
    samples = [sample for path in local for sample in wds_samples(path)]
    assert len(samples) == 20
    meta = json.loads(samples[7]["json"])
    assert samples[7]["txt"] == b"a dog near a chair, number 7"
    assert meta["nouns"] == ["dog", "chair", "number"] or meta["nouns"] == ["dog", "chair"]
    assert meta["url"].endswith("/ok/7.jpg") and meta["key"] == samples[7]["__key__"]
    assert Image.open(io.BytesIO(samples[7]["jpg"])).size == (meta["width"], meta["height"])
    index = SampleIndex.load(output)
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("00000.tar", 12),
        ("00001.tar", 8),
        ("00002.tar", 0),
        ("00003.tar", 0),
    ]


@pytest.mark.s3
@pytest.mark.slow
def test_a_second_call_changes_nothing(done: tuple[Path, str], farm: WebFarm) -> None:
    url_list, output = done
    before, asked = everything_below(output), farm.requests.total()
    assert run(url_list, output) == 0
    assert everything_below(output) == before
    assert farm.requests.total() == asked


@pytest.mark.s3
@pytest.mark.slow
def test_nothing_but_the_data_set_is_left(done: tuple[Path, str]) -> None:
    _, output = done
    names = {name.split("done/")[1] for name in everything_below(output)}
    shards = {f"0000{n}{end}" for n in range(4) for end in (".tar", ".parquet", "_stats.json")}
    assert names == shards | {f"list/0000{n}.parquet" for n in range(4)} | {
        "list/plan.json",
        "list/pictures.json",
        "index.parquet",
        "report.json",
        "report.html",
    }


@pytest.mark.s3
@pytest.mark.slow
def test_the_same_list_makes_the_same_shards_and_damage_is_mended(done: tuple[Path, str], tmp_path: Path) -> None:
    url_list, remote = done
    local = tmp_path / "local"
    assert run(url_list, str(local), "fetch.threads=3", "fetch.processes=1") == 0
    names = ["00000.tar", "00001.tar", "00002.tar"]
    tars = {name: storage.read_bytes(f"{remote}/{name}") for name in names}
    assert tars == {name: (local / name).read_bytes() for name in names}
    # One tar is cut short. In the other, the size is right and a byte of a member's header is not.
    cut, flipped = tars["00000.tar"][:5000], bytearray(tars["00001.tar"])
    flipped[100] ^= 0xFF
    (local / "00000.tar").write_bytes(cut)
    (local / "00001.tar").write_bytes(flipped)
    assert run(url_list, str(local), "verify=all") == 0
    assert tars == {name: (local / name).read_bytes() for name in names}
    assert (local / "broken" / "00000.tar").read_bytes() == cut
    assert (local / "broken" / "00001.tar").read_bytes() == flipped


@pytest.mark.s3
@pytest.mark.slow
def test_a_shard_of_another_size_is_not_trusted(done: tuple[Path, str]) -> None:
    _, output = done
    verified = json.loads(storage.read_bytes(f"{output}/report.json"))["verified"]
    assert set(known_sound(output, range(4), verified)) == {0, 1, 2, 3}
    assert set(known_sound(output, range(3), {**verified, "00001.tar": "0" * 64})) == {0, 2}
    assert set(known_sound(output, range(3), {"00002.tar": verified["00002.tar"]})) == {2}
    sizes = layout.file_sizes(output, ".tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "file_sizes", lambda *_: {**sizes, "00000.tar": 5})
        assert set(known_sound(output, range(3), verified)) == {1, 2}


@pytest.mark.slow
def test_a_killed_run_continues(farm: WebFarm, tmp_path: Path) -> None:
    """kill -9 of the whole run after its first shard: the next call makes what is missing and nothing twice."""
    rows = [f"a dog, number {n}\t{farm.url(f'ok/{1000 + n}.jpg')}" for n in range(24)]
    rows += [f"a slow one\t{farm.url(f'silent/{n}')}" for n in range(24)]
    url_list = tmp_path / "pairs.tsv"
    url_list.write_text("\n".join(rows))
    output = tmp_path / "out"
    words = [f"url_list={url_list}", f"output={output}", "prepare.samples_per_shard=12", "prepare.nouns=false"]
    words += ["fetch.processes=1", "fetch.threads=4", "fetch.silence_seconds=1", "fetch.request_seconds=1"]
    command = [sys.executable, str(ROOT / "data_prep/download.py"), "--config", DEMO, *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (output / "00001_stats.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("0000[01]*")}
    time.sleep(1.5)  # an orphan would go on meanwhile
    assert not list(output.glob("*.part*"))
    assert len(list(output.glob("*_stats.json"))) < 4
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    report = json.loads((output / "report.json").read_text())
    assert (report["expected"], report["got"], report["failures"]) == (48, 24, {"timeout": 24})
    assert all(farm.requests[f"ok/{1000 + n}.jpg"] == 1 for n in range(24))


@pytest.mark.slow
def test_asking_again(farm: WebFarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what may pass is asked for again, in new tars beside the old; then all states add up as before."""
    paths = [f"ok/{n}.jpg" for n in range(300, 308)] + [f"heals/{n}.jpg" for n in range(3)]
    paths += ["error/77", "missing/77", "gone/77", "noai/77"]
    url_list, output = tmp_path / "pairs.tsv", tmp_path / "out"
    url_list.write_text("".join(f"a dog called {n}\t{farm.url(path)}\n" for n, path in enumerate(paths)))
    words = ["prepare.samples_per_shard=10", "prepare.nouns=false", "fetch.processes=1"]
    assert run(url_list, str(output), *words) == 0
    old = {path: path.read_bytes() for path in output.glob("0*.tar")}
    first = json.loads((output / "report.json").read_text())
    assert (first["expected"], first["got"], first["retried"]) == (15, 8, 0)
    assert first["failures"] == {"http_500": 4, "http_404": 1, "http_410": 1, "opt_out": 1}
    assert run(url_list, str(output), *words, "again=true", "retry.backoff_seconds=0.05") == 0
    second = json.loads((output / "report.json").read_text())
    assert (second["expected"], second["got"], second["retried"]) == (15, 11, 4)
    assert second["failures"] == {"http_500": 1, "http_404": 1, "http_410": 1, "opt_out": 1}
    assert {path: path.read_bytes() for path in old} == old
    index = SampleIndex.load(str(output))
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("00000.tar", 8),
        ("00001.tar", 0),
        ("00002.tar", 3),
    ]
    keys = [sample["__key__"] for path in sorted(output.glob("*.tar")) for sample in wds_samples(path)]
    assert len(keys) == len(set(keys)) == 11
    assert [farm.requests[f"{kind}/77"] for kind in ("missing", "gone", "noai", "error")] == [1, 1, 1, 2]
    # The list that the first round left is asked for in the second, and no longer what it got.
    asked = farm.requests.total()
    assert run(url_list, str(output), *words, "again=true", "retry.backoff_seconds=0.05") == 0
    assert farm.requests.total() == asked + 1 and farm.requests["error/77"] == 3
    assert run(url_list, str(output), *words, "again=true", "retry.causes=[timeout]") == 0
    assert farm.requests.total() == asked + 1
    assert run(url_list, str(output), *words, "retry.causes=[http_404]") == 2
    assert "is gone" in capsys.readouterr().err


def test_a_round_spreads_hosts() -> None:
    urls = [f"http://{host}/{n}" for host in "ab" for n in range(3)] + ["http://c/0"]
    order = [urls[at][7:] for at in retry._spread(pa.chunked_array([urls[:4], urls[4:]]))]
    assert order == ["a/0", "b/0", "c/0", "a/1", "b/1", "a/2", "b/2"]


# Bad input: one sentence, exit status 2, nothing half-written


def test_bad_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = {
        ("--config", "nowhere.yaml"): "nowhere.yaml",
        ("fetch.thread=3",): "fetch.thread",
        ("fetch.threads=many",): "fetch.threads",
        ("fetch.threads=0",): "fetch.threads must be positive",
        ("source=laion",): "choose one of",
        ("source=yfcc15m",): "needs yfcc100m_dataset",
        ("part=2", "parts=2"): "part between 0 and parts",
        ("again=true", "parts=2"): "planned for the whole list",
        ("expect.sha256=abc",): "64 hexadecimal digits",
        ("metadata=x",): "has no second file",
        ("fetch.allowed_networks=[10.0.0.300/8]",): "fetch.allowed_networks",
        ("prepare.samples_per_shard=0",): "prepare.samples_per_shard",
    }
    for words, expected in cases.items():
        assert main(["url_list=x.tsv", f"output={tmp_path / 'out'}", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.s3
def test_bad_stores(
    s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url_list = tmp_path / "list.tsv"
    url_list.write_text("a dog\thttp://127.0.0.1:1/x.jpg\n")
    assert run(url_list, "s3://no-such-bucket/x") == 2
    assert "the bucket does not exist" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fsspec.filesystem("s3").clear_instance_cache()
    assert run(url_list, s3_url) == 2
    error = capsys.readouterr().err
    assert "access was refused" in error and "wrong" not in error
    monkeypatch.undo()
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("no tab\n", "none of its 1 rows is usable"),
        ("a dog\thttp://127.0.0.1:1/x.jpg\na cat\thttp://127.0.0.1:1/y.jpg\n", "none of the 2 URLs"),
    ],
)
def test_lists_that_give_nothing(
    s3_url: str, tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url_list = tmp_path / "list.tsv"
    url_list.write_text(content)
    assert run(url_list, s3_url) == 2
    assert words in capsys.readouterr().err
    assert everything_below(s3_url) == {}


# Two runs at once


@pytest.mark.s3
@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_second_run_refuses(place: str, tmp_path: Path, s3_url: str) -> None:
    root = str(tmp_path / "set") if place == "local" else s3_url
    with only_run(root):
        with pytest.raises(UserError, match="another run is at work"), only_run(root):
            pass
        assert len(everything_below(root)) == 1
    assert everything_below(root) == {}
    with only_run(root):
        pass


@pytest.mark.s3
@pytest.mark.parametrize("place", ["local", "s3"])
def test_claims_of_the_dead_do_not_count(
    place: str, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "set") if place == "local" else s3_url
    claim = f"{root}/.claims/other.json"
    living = {"host": "elsewhere", "machine": "another machine", "pid": 1}
    dead = subprocess.Popen(["true"])
    dead.wait()
    storage.write_bytes(claim, json.dumps({**living, "machine": lock._machine(), "pid": dead.pid}).encode())
    with only_run(root):
        assert len(everything_below(root)) == 1
    storage.write_bytes(claim, json.dumps(living).encode())
    with pytest.raises(UserError, match="process 1 on elsewhere"), only_run(root):
        pass
    time.sleep(1.1)  # this store's clock ticks in whole seconds
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 0.5)
    with only_run(root):
        assert len(everything_below(root)) == 1


def test_a_claim_is_renewed_while_its_run_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    with only_run(str(tmp_path)):
        claim = next(tmp_path.glob(".claims/*.json"))
        first = claim.stat().st_mtime_ns
        time.sleep(0.3)
        assert claim.stat().st_mtime_ns > first


# Shards that are not what they claim


@pytest.fixture(scope="module")
def shard(done: tuple[Path, str]) -> tuple[bytes, bytes, dict]:
    _, output = done
    stats = read_stats(output, [0])[0]
    return storage.read_bytes(f"{output}/00000.tar"), storage.read_bytes(f"{output}/00000.parquet"), stats


def tar_of(**members: bytes) -> io.BytesIO:
    stream = io.BytesIO()
    with wds.TarWriter(stream, encoder=False) as tar:
        tar.write({"__key__": "000", **members})
    return stream


def jpeg(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"jpg": b"\0" * 200, "txt": b"a", "json": b'{"width": 4, "height": 2}'}, "no JPEG header"),
        ({"jpg": jpeg((4, 2)), "txt": b"a", "json": b'{"width": 4, "height": 3}'}, "its json member says"),
        ({"jpg": jpeg((4, 2)), "json": b'{"width": 4, "height": 2}'}, "consists of"),
        ({"jpg": jpeg((4, 2)), "txt": b"\xff", "json": b'{"width": 4, "height": 2}'}, "cannot be read"),
        ({"jpg": jpeg((4, 2)), "txt": b"a", "json": b"[]"}, "cannot be read"),
    ],
)
def test_samples_that_are_not_whole(members: dict[str, bytes], words: str) -> None:
    with pytest.raises(BadShard, match=words):
        check_tar(tar_of(**members), "x.tar")


@pytest.mark.s3
@pytest.mark.slow
def test_counts_that_contradict(shard: tuple[bytes, bytes, dict]) -> None:
    tar, parquet, stats = shard
    assert check_shard(io.BytesIO(tar), io.BytesIO(parquet), stats, "x.tar").samples == 12
    for key, value in {"count": 13, "successes": 11, "failed_to_download": 1, "tar_sha256": "0"}.items():
        with pytest.raises(BadShard, match="counts say"):
            check_shard(io.BytesIO(tar), io.BytesIO(parquet), {**stats, key: value}, "x.tar")
    with pytest.raises(BadShard, match="parquet file cannot be read"):
        check_shard(io.BytesIO(tar), io.BytesIO(parquet[:100]), stats, "x.tar")
    other = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://h/1"]}), other)
    with pytest.raises(BadShard, match="parquet file cannot be read"):
        check_shard(io.BytesIO(tar), other, stats, "x.tar")
    with pytest.raises(BadShard, match="damaged"):
        check_tar(io.BytesIO(tar.rstrip(b"\0")), "x.tar")


# Workers that die or hang


def test_workers_that_die_or_hang_are_replaced(tmp_path: Path) -> None:
    tasks = [(what, str(tmp_path / f"{what}{n}")) for n, what in enumerate(["dies", "works", "hangs", "raises"])]
    started = time.monotonic()
    outcomes = {outcome.task[0]: outcome.fault for outcome in workers.run_tasks(misbehave, tasks, 2, deadline_s=15)}
    assert outcomes == {"dies": None, "works": None, "hangs": None, "raises": "ValueError: never works"}
    assert time.monotonic() - started < 60


def test_nothing_to_do() -> None:
    assert list(workers.run_tasks(misbehave, [], 0, 1.0)) == []


def test_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    """Without the package installed: a copy of the two folders, in an interpreter that sees no other."""
    for folder in ("data_prep", "pacl_scale"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("download.py", "pack.py", "decontaminate.py"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "data_prep" / name), "--help"],
            capture_output=True,
            text=True,
            cwd="/",
        )
        assert done.returncode == 0 and "--output" in done.stdout
