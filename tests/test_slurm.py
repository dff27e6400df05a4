"""Training on a real Slurm: whatever happens to job, nodes and daemons, the curve is that of torchrun."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_runs import (
    STEPS,
    by_sbatch,
    by_torchrun,
    finished,
    held,
    said,
    submitted,
    wait_for_restart,
    wait_for_step,
    words_for,
)
from training import curve

from pacl_scale import checkpoint, claims, controller
from pacl_scale.errors import UserError

# Some drills start several times; alone each takes a minute at most.
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def expected(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of two ranks."""
    return by_torchrun(quick_features, tmp_path_factory.mktemp("by-hand") / "run", ranks=2)


@dataclass
class Limited:
    """A job that stands still until Slurm wakes it, with the signal ahead of its time limit."""

    number: str
    run: Path


@pytest.fixture(scope="module")
def limited(started_cluster: Cluster, quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    """Started by the first test and looked at by a later one, as Slurm counts in whole minutes."""
    run = tmp_path_factory.mktemp("limited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started_cluster.environment["SLURM_CONF"])
        more = ["--tasks-per-node=2", "--exclude=n1,n2,n4", "--time=3", "--signal-seconds=60"]
        number = submitted(words_for(quick_features, run), 1, *more)
    wait_for_step(run, 3)
    for trainer in started_cluster.training("n3"):
        trainer.suspend()
    return Limited(number, run)


@pytest.fixture(autouse=True)
def _started_early(limited: Limited) -> None:
    """Let the time of that job run beside all other drills."""


@pytest.fixture(scope="module")
def expected_of_four(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of four ranks."""
    return by_torchrun(quick_features, tmp_path_factory.mktemp("by-hand-of-four") / "run", ranks=4)


@pytest.mark.parametrize(("door", "nodes"), [("submit", 1), ("submit", 2), ("submit", 4), ("sbatch", 2), ("sbatch", 4)])
def test_both_doors_train_to_the_end(
    cluster: Cluster,
    quick_features: str,
    expected: list[float],
    expected_of_four: list[float],
    tmp_path: Path,
    door: str,
    nodes: int,
) -> None:
    run = tmp_path / "run"
    words = words_for(quick_features, run)
    number = submitted(words, nodes) if door == "submit" else by_sbatch(cluster, run, words, nodes)
    finished(cluster, number, run)
    assert (cluster.field(number, "NumNodes"), cluster.field(number, "Restarts")) == (str(nodes), "0")
    # A single rank adds up in another order.
    alike = {1: pytest.approx(expected, rel=2e-5), 2: expected, 4: expected_of_four}
    assert curve(run) == alike[nodes]


def test_submit_survives_a_signal_and_an_administrator(
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = words_for(quick_features, run)
    number = submitted(words)
    assert f"job      {number}\nrun      {run}\n" in capsys.readouterr().out
    wait_for_step(run, 3)
    with held(cluster, number), pytest.raises(UserError, match=f"job {number} of run .* is RUNNING"):
        submitted(words)

    cluster.run("scancel", "--signal=USR2", number)
    wait_for_restart(cluster, number, run)
    (stopped,) = checkpoint.steps_in(str(run / "checkpoints"))
    assert 3 <= stopped < STEPS
    until(lambda: (run / "train.1.log").exists(), 120, lambda: said(run))
    cluster.run("scontrol", "requeue", number)
    finished(cluster, number, run)
    assert cluster.field(number, "Restarts") == "2"
    note = claims.read(run)
    assert note is not None and (note.job, note.attempt) == (number, 2) and note.step >= stopped
    assert curve(run) == expected
    assert f"step={note.step}" in (run / "train.2.log").read_text(), "it says what it resumed"


def test_a_job_that_crashes_in_circles_is_given_up(cluster: Cluster, quick_features: str, tmp_path: Path) -> None:
    run, python = tmp_path / "run", tmp_path / "python"
    # A trainer that is killed before it begins, and batch scripts whose questions are answered.
    python.write_text(f'#!/bin/sh\ncase "$*" in *submitit*) kill -9 $$;; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    number = submitted(words_for(quick_features, run), 1, "--attempts=1", f"--python={python}")
    assert cluster.wait(number) == "FAILED"
    assert cluster.field(number, "Restarts") == "1"
    assert "error: run " in said(run)
    assert "is not queued again: its newest checkpoint is still that of step 0 after 1 more attempts" in said(run)


def test_of_two_submissions_at_once_one_trains(
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pacl_scale.submit", "--nodes=2", "--gpus-per-node=0", "--follow"]
    command += words_for(quick_features, run)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [one.communicate(timeout=200) for one in both]
    assert sorted(one.returncode == 0 for one in both) == [False, True], "one followed its job to a good end"
    followed = outputs[[one.returncode for one in both].index(0)][0]
    assert f"step={STEPS}" in followed and "is COMPLETED" in followed
    numbers = [number for out, _ in outputs for number in re.findall(r"^job +(\d+)$", out, re.MULTILINE)]
    assert numbers, outputs
    states = sorted(cluster.wait(number) for number in numbers)
    sentences = said(run) + "".join(said for _, said in outputs)
    assert "COMPLETED" in states and states.count("COMPLETED") == 1, sentences
    assert len(numbers) == 1 or states == ["COMPLETED", "FAILED"]
    assert re.search(rf"error: job \d+ of run {run} is \w+; wait for it, or end it with: scancel \d+", sentences)
    assert curve(run) == expected


def test_a_cancelled_job_is_not_queued_again(cluster: Cluster, quick_features: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = words_for(quick_features, run, seed=1)
    number = submitted(words)
    wait_for_step(run, 1)
    cluster.run("scancel", number)
    assert cluster.wait(number) == "CANCELLED"
    until(lambda: controller.state_of(number) is None, 30)
    time.sleep(1)
    assert controller.state_of(number) is None
    assert cluster.field(number, "Restarts") == "0"


def test_a_time_limit_is_no_end(cluster: Cluster, limited: Limited, expected: list[float]) -> None:
    # Limits of whole minutes, looked at every half a minute; then it saves.
    wait_for_restart(cluster, limited.number, limited.run)
    finished(cluster, limited.number, limited.run)
    stopped = re.search(r"stopped why=SIGUSR2 step=(\d+)", (limited.run / "train.0.log").read_text())
    assert stopped and 3 <= int(stopped[1]) < STEPS
    assert curve(limited.run) == expected


def test_a_job_that_is_preempted_comes_back(
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(quick_features, run))
    wait_for_step(run, 3)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    with held(cluster, number):
        number_of_urgent = cluster.run(*urgent, "--wrap=sleep 1").strip()
        # Slurm wakes whom it asks to stop.
        wait_for_restart(cluster, number, run)
    assert cluster.wait(number_of_urgent) == "COMPLETED"
    finished(cluster, number, run)
    assert curve(run) == expected
