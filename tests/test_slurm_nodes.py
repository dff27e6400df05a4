"""Training on a real Slurm whose nodes, disks and daemons fail: the curve is that of torchrun."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_runs import (
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

from pacl_scale import controller
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.errors import UserError

# Some drills start several times; alone each takes a minute at most.
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

OFTEN = CheckpointConfig(every_steps=10)


@pytest.fixture(scope="module")
def expected(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of two ranks."""
    return by_torchrun(quick_features, tmp_path_factory.mktemp("by-hand") / "run", ranks=2)


@pytest.fixture(scope="module")
def expected_of_four(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of four ranks."""
    return by_torchrun(quick_features, tmp_path_factory.mktemp("by-hand-of-four") / "run", ranks=4)


def test_a_plain_batch_script_survives_a_signal_and_the_loss_of_its_own_node(
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = words_for(quick_features, run, checkpoint=OFTEN)
    both = [by_sbatch(cluster, run, words, 2) for _ in range(2)]
    until(lambda: "FAILED" in map(cluster.state, both), 120, lambda: said(run))
    (number,) = [one for one in both if cluster.state(one) != "FAILED"]
    assert f"error: job {number} of run {run} is RUNNING" in said(run), "of two at once one trains"
    wait_for_step(run, 3)
    with held(cluster, number), pytest.raises(UserError, match=f"job {number} of run"):
        submitted(words)
    cluster.run("scancel", "--signal=USR1", number)
    wait_for_restart(cluster, number, run)
    until(lambda: (run / "train.1.log").exists(), 120, lambda: said(run))
    batch = cluster.field(number, "BatchHost")
    # What a slurmd leaves behind when it is started anew belongs to the node too.
    cluster.restart_daemon(batch)
    wait_for_step(run, len(curve(run)) + 10)
    cluster.power_off(batch)
    try:
        until(lambda: cluster.field(number, "Restarts") == "2", 240, lambda: said(run))
    finally:
        cluster.power_on(batch)
    finished(cluster, number, run)
    assert curve(run) == expected


def test_a_killed_rank_is_no_end(cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(quick_features, run, checkpoint=OFTEN))
    wait_for_step(run, 12)
    cluster.kill_training("n2")
    wait_for_restart(cluster, number, run)
    finished(cluster, number, run)
    assert "rank 0 lost another rank in step" in said(run)
    assert curve(run) == expected


def test_daemons_may_restart_under_a_job(
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(quick_features, run))
    wait_for_step(run, 3)
    try:
        with held(cluster, number):
            cluster.kill_controller()
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


def test_fewer_nodes_go_on_with_the_same_batch(
    cluster: Cluster, quick_features: str, expected_of_four: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(quick_features, run, checkpoint=OFTEN), 4, "--min-nodes=2")
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
    cluster: Cluster, quick_features: str, expected: list[float], tmp_path: Path
) -> None:
    run, scratch = tmp_path / "run", cluster.folder / "scratch"
    scratch.mkdir()
    cluster.fill("n1", scratch)
    words = words_for(quick_features, run)
    number = submitted(words, 2, f'--environment={{"TMPDIR": "{scratch}"}}')
    wait_for_restart(cluster, number, run)
    until(lambda: cluster.field(number, "ExcNodeList") == "n1", 20, lambda: said(run))
    finished(cluster, number, run)
    assert "node n1 does not fit: 0.00 GB left for temporary files" in said(run)
    assert f"job {number} is queued again, without n1" in said(run)
    assert curve(run) == expected


@pytest.mark.weights
def test_a_full_disk_is_one_sentence(cluster: Cluster, features: str, tmp_path: Path) -> None:
    run, steps = cluster.small_disk / "run", 12
    # With a text tower: what is saved is larger then.
    words = words_for(features, run, steps=steps)
    number = submitted(words, 2, "--check.min-disk-gb=0.001")
    wait_for_step(run, 3)
    ballast = cluster.small_disk / "ballast"
    with held(cluster, number):
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
    assert curve(run) == by_torchrun(features, tmp_path / "by-hand" / "run", ranks=2, steps=steps)
