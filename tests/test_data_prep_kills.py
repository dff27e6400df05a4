"""kill -9 of the downloader, of a worker and of the store, twenty times at moments drawn by a seed, over one list."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from web_farm import WebFarm

from data_prep.verify import check_tar
from pacl_scale.errors import UserError
from pacl_scale.quickstart.store import ObjectStore, find_server

ROOT = Path(__file__).resolve().parents[1]
KINDS = ["downloader"] * 5 + ["worker"] * 11 + ["store"] * 4
ROWS, ROWS_PER_SHARD = 168, 8
BUCKET, PREFIX = "drill", "set"


class Drill:
    """One data set in the making, and what is done to it."""

    def __init__(self, store: ObjectStore, farm: WebFarm, folder: Path) -> None:
        self.store, self.farm, self.client = store, farm, store.client()
        self.sound: dict[str, str] = {}
        self.hit: Counter[str] = Counter()
        self.log = (folder / "log").open("ab")
        kinds = ["missing" if n % 12 == 5 else "slow" for n in range(ROWS)]
        self.urls = [farm.url(f"{kind}/{n}.jpg") for n, kind in enumerate(kinds)]
        (folder / "pairs.tsv").write_text("".join(f"a dog {n}\t{url}\n" for n, url in enumerate(self.urls)))
        words = [f"url_list={folder / 'pairs.tsv'}", f"output=s3://{BUCKET}/{PREFIX}", f"fetch.scratch={folder}"]
        words += [f"prepare.samples_per_shard={ROWS_PER_SHARD}", "prepare.nouns=false", "fetch.threads=4"]
        script = str(ROOT / "data_prep/download.py")
        self.command = [sys.executable, script, "--config", str(ROOT / "configs/data/demo.yaml"), *words]
        self.run: subprocess.Popen[bytes] | None = None

    def running(self) -> subprocess.Popen[bytes]:
        """The downloader; started again if it has ended."""
        if self.run is None or self.run.poll() is not None:
            environment = os.environ | self.store.environment
            self.run = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, env=environment)
        return self.run

    def wait_for_a_moment(self, chance: random.Random) -> None:
        """Any moment of a run in one of three cases, else one while pictures come in."""
        run, asked = self.running(), self.farm.requests.total()
        if chance.random() < 1 / 3:
            time.sleep(chance.uniform(0, 2))
            return
        until = time.monotonic() + 30
        while run.poll() is None and self.farm.requests.total() == asked and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1))

    def kill(self, kind: str, chance: random.Random) -> None:
        run = self.running()
        if kind == "store":
            self.store.kill()
            time.sleep(chance.uniform(0, 0.3))
            self.store.restart()
        elif kind == "downloader":
            run.kill()
            run.wait()
        else:
            workers = psutil.Process(run.pid).children()
            workers = [worker for worker in workers if "spawn_main" in " ".join(worker.cmdline())]
            if not workers:
                return
            chance.choice(workers).kill()
        self.hit[kind] += 1

    def check_what_is_visible(self) -> None:
        """Every tar that can be seen is whole, and one that was finished before is the same."""
        names = set(self.names())
        for name in names - set(self.sound):
            if name.endswith(".tar"):
                facts = check_tar(io.BytesIO(self.read(name)), name)
                counts = f"{name.removesuffix('.tar')}_stats.json"
                if counts in names:
                    assert json.loads(self.read(counts))["tar_sha256"] == facts.sha256
                    assert self.sound.setdefault(name, facts.sha256) == facts.sha256

    def names(self) -> list[str]:
        pages = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{PREFIX}/")
        assert not pages.get("IsTruncated")
        return [entry["Key"].removeprefix(f"{PREFIX}/") for entry in pages.get("Contents", [])]

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}")["Body"].read()


@pytest.mark.s3
@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    try:
        find_server()
    except UserError as error:
        pytest.skip(str(error))
    chance = random.Random(20)
    kinds = chance.sample(KINDS, len(KINDS))
    with ObjectStore(tmp_path / "store", buckets=(BUCKET,)) as store, WebFarm() as farm:
        drill = Drill(store, farm, tmp_path)
        try:
            while kinds:
                assert drill.run is None or drill.run.poll() != 0, "done before the last kill: make the list longer"
                drill.wait_for_a_moment(chance)
                before = drill.hit.total()
                drill.kill(kinds[0], chance)
                if drill.hit.total() > before:
                    kinds.pop(0)
                    drill.check_what_is_visible()
            made_under_fire = len(drill.sound)
            while drill.running().wait(100) != 0:
                assert drill.hit.total() == len(KINDS)
            # Shards of this size are uploaded in one piece: what a larger one would leave behind is put there, and the
            # next run finds it.
            store.client().create_multipart_upload(Bucket=BUCKET, Key=f"{PREFIX}/00001.tar")
            assert drill.running().wait(100) == 0
        finally:
            if drill.run is not None and drill.run.poll() is None:
                drill.run.kill()
                drill.run.wait()
            drill.log.close()
        assert drill.hit == Counter(KINDS)
        assert made_under_fire > 3
        drill.check_what_is_visible()
        _check_account(drill)


def _check_account(drill: Drill) -> None:
    report = json.loads(drill.read("report.json"))
    failed = sum(1 for url in drill.urls if "missing" in url)
    assert (report["expected"], report["got"], report["failures"]) == (ROWS, ROWS - failed, {"http_404": failed})
    assert report["samples"] == ROWS - failed and set(report["verified"]) == set(drill.sound)
    states: Counter[str] = Counter()
    for shard in range(ROWS // ROWS_PER_SHARD):
        for row in pq.read_table(io.BytesIO(drill.read(f"{shard:05d}.parquet")), columns=["url", "cause"]).to_pylist():
            states[row["url"]] += 1
            assert (row["cause"] == "http_404") == ("missing" in row["url"])
    assert states == Counter(drill.urls)
    tars = [name for name in drill.names() if name.endswith(".tar")]
    members = [name for tar in tars for name in _samples_of(drill.read(tar))]
    assert len(members) == len(set(members)) == ROWS - failed
    allowed = ("tar", "parquet", "json", "html")
    assert all(name.rpartition(".")[2] in allowed and ".claims" not in name for name in drill.names()), drill.names()
    assert not drill.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def _samples_of(tar: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [name for name in opened.getnames() if name.endswith(".jpg")]
