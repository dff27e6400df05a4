"""Training on a real Slurm, two nodes of one task each: the curve of two ranks started by hand, whatever happens."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import Cluster, missing, slurm_cluster, until
from training import curve, settings_for

from pacl_scale import checkpoint, config, job, metrics, submit
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.errors import UserError
from pacl_scale.train import TrainConfig

why_not = missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(why_not is not None, reason=f"no Slurm cluster can be started here: {why_not}"),
]

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "train.sh"
STEPS = 120
GPUS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster(folder, nodes=2, gpus=GPUS) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield running


@pytest.fixture(scope="module")
def expected(features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of the recipe with two ranks on this machine, without Slurm."""
    run = tmp_path_factory.mktemp("by-hand") / "run"
    command = [sys.executable, "-m", "pacl_scale.train", *words_for(features, run), "distributed.ranks=2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    return curve(run)


def words_for(features: str, run: Path, **changes: Any) -> list[str]:
    """The words of the command that trains the recipe."""
    settings: TrainConfig = settings_for(
        features, run, **({"steps": STEPS, "checkpoint": CheckpointConfig(every_steps=1000)} | changes)
    )
    values = config.to_dict(settings)
    values["distributed"]["device"] = "cpu"
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["--config", str(file)]


def submitted(words: list[str]) -> str:
    """Number of the job that the command queues for two nodes."""
    assert submit.main(["--nodes", "2", "--gpus-per-node", "0", *words]) == 0
    settings = config.parse(TrainConfig, words, "test")
    note = job.read(Path(settings.run))
    assert note is not None
    return note.job


def wait_for_step(run: Path, step: int) -> None:
    file = run / "metrics.jsonl"
    until(lambda: file.exists() and len(metrics.read_metrics(file)) >= step, 120, lambda: said(run))


def said(run: Path) -> str:
    """The logs of a run's jobs."""
    files = [*sorted(run.glob("slurm/*_log.err")), *run.parent.glob("pacl-*.log")]
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)


def finished(cluster: Cluster, number: str, run: Path) -> None:
    assert cluster.wait(number) == "COMPLETED", said(run)


def test_submit_asks_saves_requeues_and_resumes(
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
    until(lambda: cluster.field(number, "Restarts") == "1", 120, lambda: said(run))
    (stopped,) = checkpoint.steps_in(str(run / "checkpoints"))
    assert 3 <= stopped < STEPS
    assert job.read(run) == job.Note(number, step=stopped)
    finished(cluster, number, run)
    assert curve(run) == expected
    assert f"step={stopped}" in (run / "train.1.log").read_text()


def test_a_plain_batch_script_survives_a_signal_and_an_administrator(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = words_for(features, run)
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1"]
    command += [f"--output={tmp_path}/pacl-%j.log", f"--export=ALL,PYTHON={sys.executable}", str(SCRIPT), str(run)]
    number = cluster.run(*command, *words).strip()
    wait_for_step(run, 3)
    with pytest.raises(UserError, match=f"job {number} of run"):
        submitted(words)
    cluster.run("scancel", "--signal=USR1", number)
    until(lambda: cluster.field(number, "Restarts") == "1", 120, lambda: said(run))
    until(lambda: (run / "train.1.log").exists(), 120, lambda: said(run))
    cluster.run("scontrol", "requeue", number)
    finished(cluster, number, run)
    assert cluster.field(number, "Restarts") == "2"
    assert curve(run) == expected


def test_a_killed_rank_is_no_end(cluster: Cluster, features: str, expected: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run, checkpoint=CheckpointConfig(every_steps=10)))
    wait_for_step(run, 12)
    cluster.kill_training("n2")
    until(lambda: cluster.field(number, "Restarts") == "1", 150, lambda: said(run))
    finished(cluster, number, run)
    assert "rank 0 lost another rank in step" in said(run)
    assert curve(run) == expected


def test_a_node_that_loses_power_is_no_end(
    cluster: Cluster, features: str, expected: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = submitted(words_for(features, run, checkpoint=CheckpointConfig(every_steps=10)))
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
    until(lambda: job.state_of(number) is None, 30)
    time.sleep(1)
    assert job.state_of(number) is None
    assert cluster.field(number, "Restarts") == "0"


def test_ranks_and_gpus_are_those_that_slurm_gives(cluster: Cluster) -> None:
    program = """
import os
from pacl_scale.distributed import slurm_ranks
found = slurm_ranks(os.environ)
print(*(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")),
      os.uname().nodename, os.environ["CUDA_VISIBLE_DEVICES"])
"""
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", f"--gpus-per-node={GPUS}", sys.executable, "-c", program]
    lines = sorted(cluster.run(*command).splitlines())
    assert lines == [
        "0 4 0 2 n1 n1 0,1",
        "1 4 1 2 n1 n1 0,1",
        "2 4 0 2 n1 n2 0,1",
        "3 4 1 2 n1 n2 0,1",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=3"], "partition main has 2 nodes with 2 GPUs, and 3 are asked for"),
        (["--gpus-per-node=8"], "partition main has 0 nodes with 8 GPUs"),
        (["--partition=fast"], "there is no partition fast; the cluster has main, urgent"),
    ],
)
def test_what_the_partition_cannot_run_is_refused(cluster: Cluster, words: list[str], said: str) -> None:
    settings = config.parse(submit.SubmitConfig, [f"--gpus_per_node={GPUS}", *submit.split_words(words)[0]], "test")
    with pytest.raises(UserError, match=said):
        submit.check_partition(settings)
