"""Small trainings on a real Slurm, and what they say: what more than one file of drills needs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from slurm_cluster import Cluster, until
from training import curve, settings_for

from pacl_scale import claims, config, metrics, submit
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.train import TrainConfig

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "train.sh"
STEPS = 100


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


def by_torchrun(features: str, run: Path, ranks: int, **changes: Any) -> list[float]:
    """The curve of the recipe under torchrun on this machine, without Slurm."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "pacl_scale.train", *words_for(features, run, **changes)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    return curve(run)


def submitted(words: list[str], nodes: int = 2, *more: str) -> str:
    """Number of the job that the command queues."""
    assert submit.main(["--nodes", str(nodes), "--gpus-per-node", "0", *more, *words]) == 0
    settings = config.parse(TrainConfig, words, "test")
    note = claims.read(Path(settings.run))
    assert note is not None
    return note.job


def by_sbatch(cluster: Cluster, run: Path, words: list[str], nodes: int, *more: str) -> str:
    """Number of the job of the plain batch script."""
    command = ["sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", "--ntasks-per-node=1"]
    command += [*more, f"--output={run.parent}/pacl-%j.log", f"--export=ALL,PYTHON={sys.executable}"]
    return cluster.run(*command, str(SCRIPT), str(run), *words).strip()


@contextmanager
def held(cluster: Cluster, number: str) -> Iterator[None]:
    """Let a job's trainers stand still, so that something can happen to it that takes a while."""
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.field(number, "NodeList")).split()
    trainers = [process for node in nodes for process in cluster.training(node)]
    assert trainers, "nobody trains there"
    for process in trainers:
        process.suspend()
    try:
        yield
    finally:
        for process in trainers:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def wait_for_step(run: Path, step: int) -> None:
    """Until a run has logged a step."""
    file = run / "metrics.jsonl"
    until(lambda: file.exists() and len(metrics.read_metrics(file)) >= step, 120, lambda: said(run))


def wait_for_restart(cluster: Cluster, number: str, run: Path, seconds: float = 240) -> None:
    """Until Slurm has queued a job again."""
    until(lambda: cluster.field(number, "Restarts") != "0", seconds, lambda: said(run))


def said(run: Path) -> str:
    """The logs of a run's jobs."""
    files = [*sorted(run.glob("slurm/*_log.*")), *run.parent.glob("pacl-*.log")]
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)


def finished(cluster: Cluster, number: str, run: Path) -> None:
    """Wait for a job's good end."""
    assert cluster.wait(number) == "COMPLETED", said(run)
