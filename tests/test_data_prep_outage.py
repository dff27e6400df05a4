"""A store or a name server that is away: what is finished is kept, and a dead network is not the list's fault."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import fetch, layout
from data_prep.workers import Outcome
from pacl_scale import storage
from pacl_scale.errors import RunFailed
from pacl_scale.quickstart.store import ObjectStore, find_server


@pytest.mark.s3
def test_a_finished_shard_waits_for_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is gone when the shard is to be brought to its place, for longer than one round of patience."""
    try:
        find_server()
    except Exception as error:
        pytest.skip(str(error))
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    (tmp_path / "00000.tar").write_bytes(b"a tar")
    with ObjectStore(tmp_path / "store", buckets=("outage",)) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        url = "s3://outage/set/00000.tar"
        real, gave_up = storage.patiently, threading.Event()

        def patiently(*arguments: object) -> object:
            try:
                return real(*arguments)
            except RunFailed:
                gave_up.set()
                raise

        monkeypatch.setattr(storage, "patiently", patiently)
        store.kill()
        upload = threading.Thread(target=layout.upload_patiently, args=(str(tmp_path / "00000.tar"), url))
        upload.start()
        assert gave_up.wait(60)
        store.restart()
        upload.join(60)
        assert not upload.is_alive() and layout.read_bytes(url) == b"a tar"
    fsspec.filesystem("s3").clear_instance_cache()


def outcomes(*causes: dict[str, int]) -> Iterator[Outcome]:
    for shard, own in enumerate(causes):
        yield Outcome(shard, None, (10, 10 - sum(own.values()), own))


def test_a_dead_network_stops_the_run_before_it_spoils_the_list(tmp_path: Path) -> None:
    for shard in range(6):
        layout.write_json(f"{tmp_path}/{layout.shard_name(shard)}{layout.STATS_SUFFIX}", {})
    blind, well = {"dns": 9, "timeout": 1}, {"http_404": 1}
    seen = []
    with pytest.raises(RunFailed, match="no URL of 3 shards in a row .*dns 9, timeout 1.*name server"):
        for outcome in fetch._while_seeing(str(tmp_path), outcomes(blind, well, blind, blind, blind, well), 6):
            seen.append(outcome.task)
    assert seen == [0, 1, 2, 3, 4]
    # Those that told nothing but that are made again; the one before them stands.
    assert layout.finished_shards(str(tmp_path)) == [0, 1, 5]


def test_hosts_that_are_gone_are_no_dead_network(tmp_path: Path) -> None:
    gone = {"dns": 9, "http_404": 1}
    assert len(list(fetch._while_seeing(str(tmp_path), outcomes(*[gone] * 9), 9))) == 9
    # A list that is at its end is told as it is.
    assert len(list(fetch._while_seeing(str(tmp_path), outcomes(*[{"dns": 10}] * 3), 3))) == 3


def test_speed_and_causes_are_reported_to_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, as W&B's own file: img2dataset's names are in it."""
    from data_prep.tracking import reported

    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    stats = {"count": 10, "successes": 9, "failed_to_download": 1, "failed_to_resize": 0}
    stats |= {"start_time": 1.0, "end_time": 2.0, "status_dict": {"success": 9, "http_404: Not Found": 1}}
    layout.write_json(f"{tmp_path}/00000{layout.STATS_SUFFIX}", stats)
    told = list(outcomes({"http_404": 1}))
    config = fetch.FetchConfig()
    assert list(reported(iter(told), str(tmp_path), config)) == told and not list(tmp_path.glob("wandb*"))
    config.wandb_project = "downloads"
    assert list(reported(iter(told), str(tmp_path), config)) == told
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = io.BytesIO(run.read_bytes()).getvalue()
    assert b"total/img_per_sec" in content and b"total/success" in content
