"""What a batch script asks: who has the run, and whether the job is queued again."""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pretended_slurm
import pytest
from pretended_slurm import saved

from pacl_scale import claims, controller, job, nodes
from pacl_scale.checkpoint import STATE
from pacl_scale.errors import RunFailed, UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pretended Slurm."""
    pretended_slurm.install(tmp_path, monkeypatch)
    return tmp_path


def test_of_many_that_claim_a_run_at_once_one_has_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "state_of", lambda job: "RUNNING")

    def enter(run: Path, number: int, together: threading.Barrier) -> str | None:
        together.wait()
        try:
            return claims.enter(run, str(number)).job
        except UserError as error:
            assert "is RUNNING; wait for it" in str(error)
            return None

    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            run, together = here / f"run-{turn}", threading.Barrier(8)
            found = pool.map(enter, [run] * 8, range(8), [together] * 8)
            (winner,) = [job for job in found if job]
            note = claims.read(run)
            assert note is not None and note.job == winner
            assert [file.name for file in (run / "jobs").iterdir()] == ["0001.json"]


def test_a_training_without_slurm_has_its_run_too(here: Path) -> None:
    run = here / "run"
    with claims.held_here(run), pytest.raises(UserError, match=f"run {run} is trained by process {os.getpid()} on"):
        claims.enter(run, "7")
    with claims.held_here(run):
        pass
    gone = subprocess.Popen(["true"])
    note = claims.read(run)
    assert note is not None and note.over
    claims.update(run, replace(note, over=False))
    with pytest.raises(UserError, match="is trained by process"):
        claims.enter(run, "7")
    gone.wait()
    host = os.uname().nodename
    for job_of_the_dead, is_alive in ((f"local:{host}:{gone.pid}:0", False), ("local:elsewhere:1:0", True)):
        (run / "jobs" / "0009.json").write_text(json.dumps({"job": job_of_the_dead}))
        found = claims.read(run)
        assert found is not None and bool(claims.state_of_note(found)) is is_alive
    with pytest.raises(UserError, match=f"on elsewhere; wait for it or end it, or delete {run / 'jobs'} if it is gone"):
        claims.enter(run, "7")


def test_a_silent_controller_is_asked_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "PAUSE_SECONDS", 0.01)
    (here / "state").write_text("RUNNING")
    (here / "silent").write_text("once\ntwice\n")
    job.claim(here / "run", "7", attempts=2)
    job.requeue(here / "run", "7", attempts=2)
    assert (here / "asked").read_text() == "requeue 7\n" and (here / "silent").read_text() == ""
    monkeypatch.setattr(controller, "PATIENCE_SECONDS", 0.05)
    (here / "silent").write_text("again\n" * 100)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        job.requeue(here / "run", "7", attempts=2)
    (here / "bin" / "scontrol").write_text("#!/bin/sh\necho x >> $HERE/asked\necho Access denied >&2\nexit 1\n")
    (here / "asked").unlink()
    with pytest.raises(UserError, match="Access denied"):
        job.requeue(here / "run", "7", attempts=2)
    assert (here / "asked").read_text() == "x\n", "a refusal is final"


def started(monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    """What Slurm tells a job that it has started so many times before."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))


def test_a_job_without_newer_checkpoints_is_given_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (here / "state").write_text("RUNNING")
    started(monkeypatch, 0)
    job.claim(run, "7", attempts=2)
    saved(run, 5)
    for attempt in range(1, 3):
        job.requeue(run, "7", attempts=2)
        started(monkeypatch, attempt)
        job.claim(run, "7", attempts=2)
        assert claims.read(run) == claims.Note("7", step=5, fruitless=attempt - 1, attempt=attempt)
    job.requeue(run, "7", attempts=2)
    started(monkeypatch, 3)
    job.claim(run, "7", attempts=2)
    with pytest.raises(RunFailed, match="still that of step 5 after 2 more attempts"):
        job.requeue(run, "7", attempts=2)
    assert (here / "asked").read_text() == 3 * "requeue 7\n"
    saved(run, 6)
    job.requeue(run, "7", attempts=2)
    started(monkeypatch, 4)
    job.claim(run, "7", attempts=2)
    assert claims.read(run) == claims.Note("7", step=6, fruitless=0, attempt=4)


def test_requeues_by_others_count_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    for attempt in range(3):
        started(monkeypatch, attempt)
        job.claim(run, "7", attempts=2)
    started(monkeypatch, 3)
    with pytest.raises(RunFailed, match="still that of step 0 after 2 more attempts"):
        job.claim(run, "7", attempts=2)
    job.claim(run, "8", attempts=2)
    assert claims.read(run) == claims.Note("8", attempt=3), "another job starts from naught"


def test_checkpoints_elsewhere_count(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text(f"checkpoint: {{folder: {here / 'elsewhere'}}}")
    (here / "elsewhere" / "00000009").mkdir(parents=True)
    (here / "elsewhere" / "00000009" / STATE).write_text("{}")
    job.claim(here / "run", "7", attempts=1)
    assert json.loads((here / "run" / "jobs" / "0001.json").read_text())["step"] == 9


def test_unfit_nodes_are_excluded_besides_those_that_were(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (run / "slurm").mkdir(parents=True)
    (here / "state").write_text("RUNNING")
    started(monkeypatch, 1)
    nodes.note_unfit(run, "7", {"n2": "too full", "n5": "too slow"})
    monkeypatch.setattr("signal.signal", lambda *of: None)
    job.requeue(run, "7", attempts=2)
    asked = (here / "asked").read_text().splitlines()
    look = "--oneliner show job 7"
    assert asked == [look, "requeue 7", look, "update JobId=7 ExcNodeList=n9,n2,n5"]
    started(monkeypatch, 2)
    assert nodes.unfit_nodes(run, "7") == {}, "another attempt looks anew"


def test_a_job_is_not_kept_off_so_many_nodes_that_it_never_starts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (here / "state").write_text("RUNNING")
    monkeypatch.setattr("signal.signal", lambda *of: None)
    nodes.note_unfit(run, "7", {"n2": "too full"})
    nodes.note_unfit(run, "7", {"n5": "too slow"})
    said = "without n9, n2, n5 partition gpu has 4 nodes that take jobs, and it needs 5; mend them and submit again"
    with pytest.raises(RunFailed, match=said):
        job.requeue(run, "7", attempts=2, min_nodes=5)
    assert "requeue 7" not in (here / "asked").read_text()
    job.requeue(run, "7", attempts=2, min_nodes=4)
    assert (here / "asked").read_text().splitlines()[-1] == "update JobId=7 ExcNodeList=n9,n2,n5"


@pytest.mark.parametrize(
    ("allocated", "tasks", "batch", "usable"), [(8, 8, 4096, 8), (7, 8, 4096, 4), (3, 1, 16, 2), (5, 2, 60, 5)]
)
def test_as_many_nodes_as_share_the_batch_evenly(allocated: int, tasks: int, batch: int, usable: int) -> None:
    assert job.usable_nodes(allocated, tasks, batch) == usable
    with pytest.raises(UserError, match="not a multiple"):
        job.usable_nodes(allocated, 7, 4096)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_a_job_that_somebody_ends_is_not_queued_again(here: Path, state: str) -> None:
    (here / "state").write_text(state)
    job.claim(here / "run", "7", attempts=1)
    job.requeue(here / "run", "7", attempts=1)
    assert not (here / "asked").exists()


def test_the_command_of_batch_scripts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_ID"):
        job.main(["claim", str(here / "run")])
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (here / "state").write_text("RUNNING")
    assert job.main(["claim", str(here / "run")]) == 0
    assert job.main(["claim", str(here / "run")]) == 0
    assert job.main(["requeue", str(here / "run")]) == 0
    assert (here / "asked").read_text() == "requeue 8\n"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with pytest.raises(UserError, match="job 8 of run"):
        job.main(["claim", str(here / "run")])


def test_a_damaged_note_and_an_absent_slurm_are_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run" / "jobs").mkdir(parents=True)
    (here / "run" / "jobs" / "0001.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        claims.read(here / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no Slurm here"):
        controller.state_of("7")
