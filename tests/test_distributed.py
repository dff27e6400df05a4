"""Starting ranks, agreeing, and coming back with the right exit status."""

import os
import sys
from pathlib import Path

import pytest
import torch

from pacl_scale import distributed
from pacl_scale.distributed import DistributedConfig
from pacl_scale.errors import EXIT_USER_ERROR, UserError

RANK_PROGRAM = """
import os, sys
from pathlib import Path
import torch
from pacl_scale import distributed
from pacl_scale.distributed import DistributedConfig

with distributed.joined(DistributedConfig(device="cpu")) as world:
    Path(sys.argv[1], f"{world.rank}-of-{world.size}").touch()
    # One that left while the other was still connecting to it would fail that one.
    torch.distributed.barrier()
    if len(sys.argv) > 2 and world.rank == 1:
        os._exit(int(sys.argv[2]))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module that joins, leaves a file, and may end with a status."""
    (tmp_path / "rank_program.py").write_text(RANK_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "rank_program"


@pytest.mark.distributed
def test_launch_starts_every_rank(module: str, tmp_path: Path) -> None:
    assert distributed.launch(DistributedConfig(ranks=2), module, [str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*-of-2")) == ["0-of-2", "1-of-2"]


@pytest.mark.distributed
def test_launch_returns_the_status_of_the_rank_that_failed(module: str, tmp_path: Path) -> None:
    words = [str(tmp_path), str(EXIT_USER_ERROR)]
    assert distributed.launch(DistributedConfig(ranks=2), module, words) == EXIT_USER_ERROR


def test_a_launcher_around_us_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.needs_launch(DistributedConfig(ranks=2))
    assert not distributed.needs_launch(DistributedConfig(ranks=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not distributed.needs_launch(DistributedConfig(ranks=2))


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "42",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "MASTER_ADDR": "n1",
}


def test_a_task_of_srun_is_a_rank() -> None:
    found = distributed.slurm_ranks(STEP)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert 20000 <= int(port) < 30000
    assert distributed.slurm_ranks(STEP | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != port
    assert "MASTER_PORT" not in distributed.slurm_ranks(STEP | {"MASTER_PORT": "5"})


def test_a_batch_script_and_a_single_task_are_no_ranks() -> None:
    assert distributed.slurm_ranks({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}) == {}
    assert distributed.slurm_ranks(STEP | {"SLURM_NTASKS": "1"}) == {}


def test_another_launcher_inside_a_job_step_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"WORLD_SIZE": "2", "RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    distributed.adopt_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "2")


def test_the_first_host_of_a_step_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {name: value for name, value in STEP.items() if name != "MASTER_ADDR"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        distributed.slurm_ranks(step)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\necho n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert distributed.slurm_ranks(step)["MASTER_ADDR"] == "n1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no usable CUDA GPU"), distributed.joined(DistributedConfig(device="cuda")):
        pass


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"device": "tpu"}, {"timeout_minutes": 0}])
def test_impossible_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="distributed"):
        DistributedConfig(**wrong)
