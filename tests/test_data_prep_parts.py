"""One list shared out over several runs: what each takes, who prepares, who brings the data set to its end."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web_farm import WebFarm

from data_prep import download, lock, stages
from data_prep.lock import only_run
from data_prep.parts import Part, note_verified, read_verified, remove_notes
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex
from pacl_scale.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        yield running


parts = st.integers(1, 12).flatmap(lambda of: st.builds(Part, st.integers(0, of - 1), st.just(of)))


@given(parts, parts)
def test_parts_overlap_where_they_share_a_shard(one: Part, other: Part) -> None:
    many = one.of * other.of
    assert one.overlaps(other) == bool(set(one.shards(many)) & set(other.shards(many)))


@given(st.integers(1, 12), st.integers(0, 40))
def test_parts_share_out_all_shards(of: int, count: int) -> None:
    taken = [shard for number in range(of) for shard in Part(number, of).shards(count)]
    assert sorted(taken) == list(range(count))


def test_runs_on_different_parts_do_not_mind_each_other(tmp_path: Path) -> None:
    root = str(tmp_path)
    with only_run(root, Part(0, 2)), only_run(root, Part(1, 2)):
        for taken in (Part(1, 2), Part(3, 4), Part(0, 3), Part()):
            with pytest.raises(lock.Busy, match="on its part"), only_run(root, taken):
                pass
    with only_run(root), pytest.raises(lock.Busy, match="at work there"), only_run(root, Part(0, 2)):
        pass


def test_a_part_waits_for_who_prepared_the_list_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, leave, inside = str(tmp_path), threading.Event(), threading.Event()

    def prepare() -> None:
        with only_run(root):
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=prepare)
    other.start()
    assert inside.wait(30)
    with ExitStack() as claims:
        monkeypatch.setattr(download, "LEAVE_SECONDS", 0.0)
        with pytest.raises(lock.Busy, match="at work there"):
            download._claim_part(claims, root, Part(0, 2))
        monkeypatch.setattr(download, "LEAVE_SECONDS", 60.0)
        threading.Timer(0.3, leave.set).start()
        download._claim_part(claims, root, Part(0, 2))
        with ExitStack() as more, pytest.raises(lock.Busy, match="on its part"):
            download._claim_part(more, root, Part(0, 2))
    other.join()


def test_an_earlier_attempt_of_the_same_job_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    claim = {"host": "n1", "machine": "another machine", "pid": 1, "part": 0, "parts": 2, "job": " 77", "attempt": 0}
    storage.write_bytes(f"{tmp_path}/.claims/other.json", json.dumps(claim).encode())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(lock.Busy), only_run(str(tmp_path), Part(0, 2)):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with only_run(str(tmp_path), Part(0, 2)):
        assert len(list(tmp_path.glob(".claims/*.json"))) == 1


def test_a_run_whose_claim_was_taken_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for dead, as after a long outage, and another one has removed its claim."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    never = threading.Event()
    with pytest.raises(RunFailed, match="has taken over"), only_run(str(tmp_path)):
        for _ in range(300):
            for claim in tmp_path.glob(".claims/*.json"):
                claim.unlink(missing_ok=True)  # again: it may have been in the middle of a renewal
            never.wait(0.1)
        pytest.fail("it was not interrupted")


def test_an_outage_costs_renewals_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    real, calls, renewed = storage.write_bytes, [], threading.Event()

    def write(url: str, content: bytes) -> None:
        calls.append(url)
        if len(calls) == 2:
            raise ZeroDivisionError("of a kind that nobody expects")
        if len(calls) > 3:
            renewed.set()
        real(url, content)

    monkeypatch.setattr(storage, "write_bytes", write)
    with only_run(str(tmp_path)):
        assert renewed.wait(30)


def test_notes_of_parts_come_together(tmp_path: Path) -> None:
    root = str(tmp_path)
    note_verified(root, Part(0, 2), {"00000.tar": "a"})
    note_verified(root, Part(1, 2), {"00001.tar": "b"})
    assert read_verified(root) == {"00000.tar": "a", "00001.tar": "b"}
    remove_notes(root)
    assert read_verified(root) == {} and not list(tmp_path.glob("list/*"))


@pytest.mark.slow
def test_three_parts_at_once_make_one_data_set(farm: WebFarm, tmp_path: Path) -> None:
    """Three processes on one output: one prepares while others wait, one indexes, nothing is asked for twice."""
    rows = [f"a dog, number {n}\t{farm.url(f'ok/{n}.jpg')}" for n in range(40)]
    url_list, output = tmp_path / "pairs.tsv", tmp_path / "out"
    url_list.write_text("\n".join(rows))
    words = ["--config", str(ROOT / "configs/data/demo.yaml"), f"url_list={url_list}", f"output={output}"]
    words += ["prepare.samples_per_shard=8", "prepare.nouns=false", "fetch.processes=1", "fetch.threads=4"]
    command = [sys.executable, str(ROOT / "data_prep/download.py"), *words, "parts=3"]
    runs = [
        subprocess.Popen([*command, f"part={n}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for n in range(3)
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum("5 shards," in text and "40 samples indexed" in text for text in said) == 1
    assert [f"part {n} of 3: {shards} shards" in said[n] for n, shards in enumerate((2, 2, 1))] == [True] * 3
    assert all(farm.requests[f"ok/{n}.jpg"] == 1 for n in range(40))
    assert len(SampleIndex.load(str(output))) == 40
    report = json.loads((output / "report.json").read_text())
    assert (report["expected"], report["got"], report["pending"]) == (40, 40, 0)
    assert not list(output.glob("list/verified-*")) and not (output / ".claims").exists()


def test_other_settings_are_refused_without_the_list(tmp_path: Path) -> None:
    from data_prep.config import DownloadConfig
    from data_prep.prepare import PrepareConfig, prepare
    from data_prep.sources import SOURCES

    (tmp_path / "list.tsv").write_text("a dog\thttp://h/1\n")
    own = PrepareConfig(samples_per_shard=4, nouns=False)
    prepare(str(tmp_path / "list.tsv"), SOURCES["pairs"], str(tmp_path / "out"), own)
    (tmp_path / "list.tsv").unlink()
    config = DownloadConfig(output=str(tmp_path / "out"), prepare=own, parts=2)
    work = stages.resume_part(config)
    assert work is not None and work.plan.rows == 1
    config.prepare = PrepareConfig(samples_per_shard=5, nouns=False)
    with pytest.raises(UserError, match="other prepare"):
        stages.resume_part(config)


def test_who_finds_the_report_done_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs that end together one waits for the other and finds all done."""
    from data_prep import download

    events: list[str] = []

    class Done:
        root = str(tmp_path)
        finished = False

        def unfinished(self) -> list[int]:
            return []

    monkeypatch.setattr(stages, "PAUSE_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(stages, "is_complete", lambda work: work.finished)
    monkeypatch.setattr(download, "_complete", lambda work: events.append("completed"))
    work, entered, leave = Done(), threading.Event(), threading.Event()

    def other() -> None:
        with only_run(str(tmp_path)):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    end = threading.Thread(target=download.complete_if_last, args=(str(tmp_path), work))
    end.start()
    end.join(0.4)
    assert end.is_alive() and not events
    work.finished = True
    leave.set()
    thread.join()
    end.join(10)
    assert not end.is_alive() and not events
