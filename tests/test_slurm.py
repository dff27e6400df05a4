"""Training on a real Slurm: whatever happens to job, nodes and daemons, the curve is that of torchrun."""

import os
import re
import shutil
import signal
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
    said,
    submitted,
    wait_for_restart,
    wait_for_step,
    words_for,
)
from training import curve

from pacl_scale import checkpoint, claims, controller
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.errors import UserError

# Some drills start several times; alone each takes a minute at most.
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

OFTEN = CheckpointConfig(every_steps=10)


@pytest.fixture(scope="module")
def expected(features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of two ranks."""
    return by_torchrun(features, tmp_path_factory.mktemp("by-hand") / "run", ranks=2)


@pytest.fixture(scope="module")
def expected_of_four(features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of four ranks."""
    return by_torchrun(features, tmp_path_factory.mktemp("by-hand-of-four") / "run", ranks=4)


@dataclass
class Limited:
    """A job that stands still until Slurm wakes it, with the signal ahead of its time limit."""

    number: str
    run: Path


@pytest.fixture(scope="module")
def limited(started_cluster: Cluster, features: str, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    """Started by the first test and looked at by a later one, as Slurm counts in whole minutes."""
    run = tmp_path_factory.mktemp("limited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started_cluster.environment["SLURM_CONF"])
        more = ["--tasks-per-node=2", "--exclude=n1,n2,n4", "--time=3", "--signal-seconds=60"]
        number = submitted(words_for(features, run), 1, *more)
    wait_for_step(run, 3)
    for trainer in started_cluster.training("n3"):
        trainer.suspend()
    return Limited(number, run)


@pytest.fixture(autouse=True)
def _started_early(limited: Limited) -> None:
    """Let the time of that job run beside all other drills."""


SHORT = 12
"""Steps of trainings that nobody disturbs."""


@pytest.fixture(scope="module")
def undisturbed(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """Short curves by number of ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        ranks: by_torchrun(quick_features, folder / str(ranks) / "run", ranks=ranks, steps=SHORT) for ranks in (2, 4)
    }


@pytest.mark.parametrize(("door", "nodes"), [("submit", 1), ("submit", 2), ("submit", 4), ("sbatch", 2), ("sbatch", 4)])
def test_both_doors_train_to_the_end(
    cluster: Cluster, quick_features: str, undisturbed: dict[int, list[float]], tmp_path: Path, door: str, nodes: int
) -> None:
    run = tmp_path / "run"
    words = words_for(quick_features, run, steps=SHORT)
    number = submitted(words, nodes) if door == "submit" else by_sbatch(cluster, run, words, nodes)
    finished(cluster, number, run)
    assert (cluster.field(number, "NumNodes"), cluster.field(number, "Restarts")) == (str(nodes), "0")
    # A single rank adds up in another order.
    assert curve(run) == (undisturbed[nodes] if nodes > 1 else pytest.approx(undisturbed[2], rel=2e-5))


def test_submit_survives_a_signal_and_an_administrator(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = words_for(features, run)
    number = submitted(words)
    assert f"job      {number}\nrun      {run}\n" in capsys.readouterr().out
    wait_for_step(run, 3)
    with pytest.raises(UserError, match=f"job {number} of run .* is RUNNING"):
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


def test_a_plain_batch_script_survives_a_signal_and_the_loss_of_its_own_node(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = words_for(features, run, checkpoint=OFTEN)
    # The job that waits for its time limit is on n3.
    both = [by_sbatch(cluster, run, words, 2, "--exclude=n3") for _ in range(2)]
    until(lambda: "FAILED" in map(cluster.state, both), 120, lambda: said(run))
    (number,) = [one for one in both if cluster.state(one) != "FAILED"]
    assert f"error: job {number} of run {run} is RUNNING" in said(run), "of two at once one trains"
    wait_for_step(run, 3)
    with pytest.raises(UserError, match=f"job {number} of run"):
        submitted(words)
    cluster.run("scancel", "--signal=USR1", number)
    wait_for_restart(cluster, number, run)
    until(lambda: (run / "train.1.log").exists(), 120, lambda: said(run))
    batch = cluster.field(number, "BatchHost")
    # What a slurmd leaves behind when it is started anew belongs to the node too.
    cluster.restart_daemon(batch)
    wait_for_step(run, 30)
    cluster.power_off(batch)
    try:
        until(lambda: cluster.field(number, "Restarts") == "2", 240, lambda: said(run))
    finally:
        cluster.power_on(batch)
    finished(cluster, number, run)
    assert curve(run) == expected


def test_a_job_that_crashes_in_circles_is_given_up(cluster: Cluster, features: str, tmp_path: Path) -> None:
    run, python = tmp_path / "run", tmp_path / "python"
    # A trainer that is killed before it begins, and batch scripts whose questions are answered.
    python.write_text(f'#!/bin/sh\ncase "$*" in *submitit*) kill -9 $$;; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    number = submitted(words_for(features, run), 1, "--attempts=1", f"--python={python}")
    assert cluster.wait(number) == "FAILED"
    assert cluster.field(number, "Restarts") == "1"
    assert "error: run " in said(run)
    assert "is not queued again: its newest checkpoint is still that of step 0 after 1 more attempts" in said(run)


def test_a_killed_rank_is_no_end(cluster: Cluster, features: str, expected: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run, checkpoint=OFTEN))
    wait_for_step(run, 12)
    cluster.kill_training("n2")
    wait_for_restart(cluster, number, run)
    finished(cluster, number, run)
    assert "rank 0 lost another rank in step" in said(run)
    assert curve(run) == expected


def test_a_time_limit_is_no_end(cluster: Cluster, limited: Limited, expected: list[float]) -> None:
    # Limits of whole minutes, looked at every half a minute; then it saves.
    wait_for_restart(cluster, limited.number, limited.run)
    finished(cluster, limited.number, limited.run)
    stopped = re.search(r"stopped why=SIGUSR2 step=(\d+)", (limited.run / "train.0.log").read_text())
    assert stopped and 3 <= int(stopped[1]) < STEPS
    assert curve(limited.run) == expected


def test_of_two_submissions_at_once_one_trains(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pacl_scale.submit", "--nodes=2", "--gpus-per-node=0", "--follow"]
    command += words_for(features, run)
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


def test_daemons_may_restart_under_a_job(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run))
    wait_for_step(run, 3)
    cluster.kill_controller()
    try:
        cluster.restart_daemon("n1")
        cluster.start_controller()
        until(cluster.answers, 30)
        at = len(curve(run))
        wait_for_step(run, at + 3)
        assert cluster.field(number, "Restarts") == "0", "the job goes on"
        # Asked to stop while there is nobody to queue it again.
        cluster.kill_controller()
        for trainer in cluster.training("n2"):
            trainer.send_signal(signal.SIGUSR2)
        until(lambda: "; asked again" in said(run), 120, lambda: said(run))
    finally:
        cluster.start_controller()
    until(cluster.answers, 30)
    wait_for_restart(cluster, number, run)
    finished(cluster, number, run)
    assert curve(run) == expected


def test_a_job_that_is_preempted_comes_back(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run))
    wait_for_step(run, 3)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    number_of_urgent = cluster.run(*urgent, "--wrap=sleep 1").strip()
    wait_for_restart(cluster, number, run)
    assert cluster.wait(number_of_urgent) == "COMPLETED"
    finished(cluster, number, run)
    assert curve(run) == expected


def test_fewer_nodes_go_on_with_the_same_batch(
    cluster: Cluster, features: str, expected_of_four: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run, checkpoint=OFTEN), 4, "--min-nodes=2")
    wait_for_step(run, 12)
    assert curve(run)[:12] == expected_of_four[:12], "four nodes by this door too"
    cluster.power_off("n4")
    try:
        wait_for_restart(cluster, number, run)
        until(lambda: (run / "train.1.log").exists(), 120, lambda: said(run))
        assert cluster.field(number, "NumNodes") == "3"
    finally:
        cluster.power_on("n4")
    finished(cluster, number, run)
    assert "micro_batch_size: 4" in (run / "config.yaml").read_text()
    assert curve(run) == pytest.approx(expected_of_four, rel=2e-5)


def test_a_node_that_does_not_fit_is_left_out(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run, scratch = tmp_path / "run", cluster.folder / "scratch"
    scratch.mkdir()
    cluster.fill("n1", scratch)
    words = words_for(features, run)
    number = submitted(words, 2, f'--environment={{"TMPDIR": "{scratch}"}}')
    wait_for_restart(cluster, number, run)
    until(lambda: cluster.field(number, "ExcNodeList") == "n1", 20, lambda: said(run))
    finished(cluster, number, run)
    assert "node n1 does not fit: 0.00 GB left for temporary files" in said(run)
    assert f"job {number} is queued again, without n1" in said(run)
    assert curve(run) == expected


def test_a_full_disk_is_one_sentence(cluster: Cluster, features: str, expected: list[float], tmp_path: Path) -> None:
    run = cluster.small_disk / "run"
    words = words_for(features, run)
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    wait_for_step(run, 3)
    ballast = cluster.small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(cluster.small_disk).free - 300_000))
    assert cluster.wait(number) == "FAILED", "no waiting makes room"
    assert cluster.field(number, "Restarts") == "0"
    assert "No space left on device" in said(run) and "Traceback" not in said(run)
    until(lambda: controller.state_of(number) is None, 30)
    # Room for a submission, and not for a training.
    os.truncate(ballast, ballast.stat().st_size - 500_000)
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    assert cluster.wait(number) == "FAILED", "and an attempt without room does not begin"
    assert "GB left, less than check.min_disk_gb=0.001; make room and submit again" in said(run)
    ballast.unlink()
    until(lambda: controller.state_of(number) is None, 30)
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    finished(cluster, number, run)
    assert curve(run) == expected


def test_a_cancelled_job_is_not_queued_again(cluster: Cluster, features: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = words_for(features, run, seed=1)
    number = submitted(words)
    wait_for_step(run, 1)
    cluster.run("scancel", number)
    assert cluster.wait(number) == "CANCELLED"
    until(lambda: controller.state_of(number) is None, 30)
    time.sleep(1)
    assert controller.state_of(number) is None
    assert cluster.field(number, "Restarts") == "0"
