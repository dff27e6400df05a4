"""Processes: who am I, how do we start several of us here, and the few collectives that more than one room needs.

A command runs as one process per GPU (or per CPU rank). Under a launcher such as torchrun the usual ``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` are set and obeyed. Started by Slurm's ``srun`` as
several tasks, they are read from Slurm's own variables. Started by hand with ``ranks > 1``, a command starts that
many copies of itself on this machine.
"""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pacl_scale import signals
from pacl_scale.cores import usable_cores
from pacl_scale.errors import UserError


@dataclass
class DistributedConfig:
    """Processes and devices."""

    ranks: int = 1
    """Processes to start on this machine when no launcher (torchrun, Slurm) started this one."""

    device: str = "auto"
    """"auto" (CUDA where there is a GPU, else CPU), "cpu" or "cuda"."""

    threads: int = 0
    """CPU threads of torch in each rank; 0 shares the cores of this machine evenly between its ranks."""

    timeout_minutes: float = 30.0
    """How long a collective may take before the run is given up, until the first step is done."""

    step_timeout_minutes: float = 10.0
    """The same from the first step on, when nothing is loaded or compiled any more."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"distributed.ranks must be at least 1, not {self.ranks}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"distributed.device is auto, cpu or cuda, not {self.device!r}")
        if min(self.timeout_minutes, self.step_timeout_minutes) <= 0:
            raise ValueError("distributed.timeout_minutes and step_timeout_minutes must be positive")


@dataclass(frozen=True)
class World:
    """One process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0


def needs_launch(config: DistributedConfig) -> bool:
    """Whether this process should start ``config.ranks`` copies of itself instead of working."""
    adopt_slurm()
    return config.ranks > 1 and "WORLD_SIZE" not in os.environ


def adopt_slurm() -> None:
    """Set the launcher's variables from Slurm's, where ``srun`` started this process as one of several tasks.

    Does nothing outside a job step, in a step of one task, or where a launcher has set them already.
    """
    if "WORLD_SIZE" not in os.environ:
        os.environ |= slurm_ranks(os.environ)


def slurm_ranks(variables: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables for one task of a Slurm job step; empty where there is no step or one task.

    A batch script has no step, so what it starts without ``srun`` is one process among none.

    Raises:
        UserError: the first host of the step cannot be found out, or the variables are no numbers, or some are missing.
    """
    try:
        return _ranks(variables)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"Slurm's variables make no sense here ({type(error).__name__}: {error})") from error


def _ranks(variables: Mapping[str, str]) -> dict[str, str]:
    tasks = int(variables.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" not in variables or "SLURM_PROCID" not in variables or tasks < 2:
        return {}
    per_node = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE") or variables["SLURM_TASKS_PER_NODE"])
    found = {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(variables.get("SLURM_NODEID", "0"))]),
    }
    if "MASTER_ADDR" not in variables:
        found["MASTER_ADDR"] = _first_host(variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"])
    if "MASTER_PORT" not in variables:
        # All tasks of a step agree on it, and another step, job or attempt on the same host takes another one.
        numbers = [int(variables.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
        found["MASTER_PORT"] = str(
            20000 + sum(n * stride for n, stride in zip(numbers, (31, 7, 1), strict=True)) % 10000
        )
    return found


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of a list of numbers, as in ``4(x2),3``, written out."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{part!r} is no number of tasks")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _first_host(hosts: str) -> str:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the first host of {hosts} is not known ({error}); set MASTER_ADDR to it") from error
    if done.returncode or not done.stdout.split():
        raise UserError(f"the first host of {hosts} is not known ({done.stderr.strip()}); set MASTER_ADDR to it")
    return done.stdout.split()[0]


def launch(config: DistributedConfig, module: str, argv: Sequence[str]) -> int:
    """Run ``python -m module *argv`` as ``config.ranks`` processes on this machine; returns their exit status.

    torch's elastic agent starts them and ends all of them when one fails. The status is that of the rank that
    failed by itself, so a user's mistake in a rank is still exit status 2.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The rank that failed says why in one sentence; the agent would bury it under a page about processes.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(config, config.ranks)))
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.ranks,
        run_id=f"pacl-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        # The agent would kill what has not ended half a minute after a SIGTERM: too soon for a large save.
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        with signals.passed_on():
            elastic_launch(launch_config, sys.executable)("-m", module, *argv)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # Ranks that the agent ended in turn come back as minus a signal; the guilty one has a status, if it is one.
        return next((code for code in codes if code > 0), 128 - min(codes))
    except SignalException as error:
        return 128 + error.sigval
    return 0


@contextmanager
def joined(config: DistributedConfig) -> Iterator[World]:
    """Join the process group for the length of a ``with`` block.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    adopt_slurm()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(config, local_rank)
    torch.set_num_threads(_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))))
    if size == 1 and "MASTER_PORT" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=config.timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, device=device)
    finally:
        dist.destroy_process_group()


def _device(config: DistributedConfig, local_rank: int) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("distributed.device is cuda, but this machine has no usable CUDA GPU")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _threads(config: DistributedConfig, local_size: int) -> int:
    return config.threads or max(1, usable_cores() // local_size)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
