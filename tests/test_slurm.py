"""Training on a real Slurm: whatever happens to job, nodes and daemons, the curve is that of torchrun."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_runs import (
    SCRIPT,
    STEPS,
    by_torchrun,
    finished,
    said,
    submitted,
    wait_for_restart,
    wait_for_step,
    words_for,
)
from training import curve

from pacl_scale import checkpoint, claims, config, controller, submit
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.errors import UserError

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.weights, pytest.mark.slow]

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


def test_a_plain_batch_script_on_four_nodes_saves_requeues_and_resumes(
    cluster: Cluster, features: str, expected_of_four: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = words_for(features, run)
    command = ["sbatch", "--parsable", "--nodes=4", "--gpus-per-node=0", "--ntasks-per-node=1"]
    command += [f"--output={tmp_path}/pacl-%j.log", f"--export=ALL,PYTHON={sys.executable}", str(SCRIPT), str(run)]
    number = cluster.run(*command, *words).strip()
    wait_for_step(run, 3)
    with pytest.raises(UserError, match=f"job {number} of run"):
        submitted(words)
    cluster.run("scancel", "--signal=USR1", number)
    wait_for_restart(cluster, number, run)
    finished(cluster, number, run)
    assert curve(run) == expected_of_four


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
    numbers = [out.split()[1] for out, _ in outputs if out]
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
    cluster.restart_daemon("n1")
    cluster.start_controller()
    until(cluster.answers, 30)
    finished(cluster, number, run)
    assert cluster.field(number, "Restarts") == "0"
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
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    assert cluster.wait(number) == "FAILED", "and an attempt without room does not begin"
    assert "GB left, less than check.min_disk_gb=0.001; make room and submit again" in said(run)
    ballast.unlink()
    until(lambda: controller.state_of(number) is None, 30)
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    finished(cluster, number, run)
    assert curve(run) == expected


def test_a_node_that_loses_power_is_no_end(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run, checkpoint=OFTEN))
    wait_for_step(run, 12)
    cluster.power_off("n2")
    try:
        until(lambda: cluster.field(number, "Restarts") != "0", 150, lambda: said(run))
    finally:
        cluster.power_on("n2")
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


def test_ranks_and_gpus_are_those_that_slurm_gives(cluster: Cluster) -> None:
    program = """
import os
from pacl_scale.distributed import slurm_ranks
found = slurm_ranks(os.environ)
print(*(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")),
      os.uname().nodename, os.environ["CUDA_VISIBLE_DEVICES"])
"""
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", sys.executable, "-c", program]
    lines = sorted(cluster.run(*command).splitlines())
    assert lines == [
        "0 4 0 2 n1 n1 0,1",
        "1 4 1 2 n1 n1 0,1",
        "2 4 0 2 n1 n2 0,1",
        "3 4 1 2 n1 n2 0,1",
    ]


def test_gpus_reach_slurm_as_they_are_asked_for(cluster: Cluster, features: str, tmp_path: Path) -> None:
    words = [*words_for(features, tmp_path / "run"), "distributed.device=auto"]
    assert submit.main(["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2", *words]) == 0
    note = claims.read(tmp_path / "run")
    assert note is not None
    asked = {name: cluster.field(note.job, name) for name in ("NumTasks", "CPUs/Task", "TresPerNode")}
    cluster.run("scancel", note.job)
    assert asked == {"NumTasks": "4", "CPUs/Task": "2", "TresPerNode": "gres:gpu:2"}
    until(lambda: controller.state_of(note.job) is None, 60)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=5"], "partition main has 4 nodes with 2 GPUs, and 5 are asked for"),
        (["--gpus-per-node=8"], "partition main has 0 nodes with 8 GPUs"),
        (["--partition=fast"], "there is no partition fast; the cluster has main, urgent"),
    ],
)
def test_what_the_partition_cannot_run_is_refused(cluster: Cluster, words: list[str], said: str) -> None:
    settings = config.parse(submit.SubmitConfig, ["--gpus_per_node=2", *submit.split_words(words)[0]], "test")
    with pytest.raises(UserError, match=said):
        submit.check_partition(settings)
