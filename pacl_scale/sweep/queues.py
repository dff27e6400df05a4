"""Where a sweep's packs run: as arrays of Slurm jobs through submitit, or one process after another on this machine.

Slurm is asked which of its jobs live, once in a while and for all at once; how cells fare is read from their files.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pacl_scale import batch, partition
from pacl_scale.controller import ask_slurm
from pacl_scale.cores import usable_cores
from pacl_scale.errors import UserError
from pacl_scale.log import get_logger
from pacl_scale.submit import SubmitConfig
from pacl_scale.sweep.worker import Pack, write_pack

REQUEUES = 10
"""How often a job that ran out of its time goes on in another; submitit counts."""

SOON_SECONDS = 5.0

log = get_logger("pacl_scale.sweep")


class Queue(Protocol):
    """Runs packs."""

    def submit(self, packs: Sequence[Pack], minutes: int, others: Sequence[str]) -> Iterator[list[str]]:
        """Queue packs whose jobs may take so long, besides ``others`` that live; yields the jobs as they are queued."""
        ...

    def has_room(self, jobs: int) -> bool:
        """Whether jobs that are queued now could start now, where so many live."""
        ...

    def alive(self, soon: bool) -> set[str] | None:
        """Jobs that are queued or running; ``None`` where nothing new is known. ``soon``: it matters now."""
        ...

    def close(self) -> None:
        """Leave nothing of this process behind. Slurm's jobs go on."""
        ...


class LocalQueue:
    """Up to ``throttle`` packs at once, each a process on this machine with GPUs of its own.

    Args:
        gpus: GPUs of each pack.
        devices: names of the GPUs that there are; without any, packs share the cores, one pack a core at most.
    """

    def __init__(self, throttle: int, gpus: int = 0, devices: Sequence[str] = ()) -> None:
        if gpus and devices and len(devices) < gpus:
            raise UserError(f"{gpus} GPUs a job are asked for, and this machine has {len(devices)}")
        starts = range(0, len(devices) - gpus + 1, gpus) if gpus and devices else ()
        self._free = [",".join(devices[start : start + gpus]) for start in starts][:throttle]
        self._free = self._free or [""] * min(throttle, usable_cores())
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[str, Pack]] = []
        self._running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}

    def submit(self, packs: Sequence[Pack], minutes: int, others: Sequence[str]) -> Iterator[list[str]]:
        """Queue packs; they start as others end, whenever :meth:`alive` is asked."""
        named = [(f"local-{next(self._numbers)}", pack) for pack in packs]
        for _, pack in named:
            write_pack(pack)
        self._waiting += named
        self.alive(soon=True)
        yield [name for name, _ in named]

    def has_room(self, jobs: int) -> bool:
        """Always: what is queued here waits here."""
        return True

    def alive(self, soon: bool) -> set[str]:
        """Packs that wait or run; starts those for which there is room."""
        for name, (process, place) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                self._free.append(place)
        while self._waiting and self._free:
            (name, pack), place = self._waiting.pop(0), self._free.pop(0)
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place else {})
            with open(Path(pack.file).with_suffix(".log"), "ab") as output:
                command = [sys.executable, "-m", "pacl_scale.sweep.worker", pack.file]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
                )
            self._running[name] = process, place
        return {*self._running, *(name for name, _ in self._waiting)}

    def close(self) -> None:
        """End what runs."""
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class SlurmQueue:
    """Arrays of at most the cluster's ``MaxArraySize`` jobs, so many of them at once.

    Raises:
        UserError: the partition can never run such jobs.
    """

    def __init__(self, folder: Path, cluster: SubmitConfig, gpus: int, throttle: int, ask_seconds: float) -> None:
        self.folder, self.cluster = folder, of_one_task(cluster, gpus)
        self.throttle, self.ask_seconds = throttle, ask_seconds
        for warning in partition.check(self.cluster.ask):
            log.warning(warning)
        self.limit_minutes = partition.limit_of(self.cluster.partition)
        """Time limit of the partition."""
        self.array_size = max_array_size()
        self._asked = 0.0

    def submit(self, packs: Sequence[Pack], minutes: int, others: Sequence[str]) -> Iterator[list[str]]:
        """Queue packs as arrays that wait for each other, and for ``others``, so that the throttle holds.

        Raises:
            UserError: Slurm refuses them; those that were yielded before are queued.
        """
        import submitit

        for pack in packs:
            write_pack(pack)
        room = self.throttle - len(others)
        after = [] if room > 0 else sorted({name.partition("_")[0] for name in others})
        for start in range(0, len(packs), self.array_size):
            with batch.outside_of_jobs():
                executor = self.executor(minutes, room if room > 0 else self.throttle, after)
                try:
                    with executor.batch():
                        queued = [executor.submit(pack) for pack in packs[start : start + self.array_size]]
                except submitit.core.utils.FailedJobError as error:
                    raise UserError(f"sbatch refuses the sweep's jobs: {' '.join(str(error).split())}") from error
            self._asked = 0.0
            after = [queued[0].job_id.partition("_")[0]]
            yield [one.job_id for one in queued]

    def has_room(self, jobs: int) -> bool:
        """Whether fewer jobs live than may run at once."""
        return jobs < self.throttle

    def executor(self, minutes: int, at_once: int, after: Sequence[str]) -> Any:
        """submitit's executor for one array, of which so many jobs run at once when the jobs ``after`` are over."""
        import submitit

        executor = submitit.SlurmExecutor(self.folder / "slurm", max_num_timeout=REQUEUES, python=self.cluster.python)
        shared = batch.cluster_parameters(self.cluster)
        shared["additional_parameters"]["requeue"] = True
        cpus = [f"--cpus-per-task={self.cluster.cpus_per_task}"] if self.cluster.cpus_per_task else None
        executor.update_parameters(
            job_name=f"sweep-{self.folder.name}",
            time=math.floor(min(minutes, self.limit_minutes)),
            nodes=1,
            ntasks_per_node=1,
            gpus_per_node=self.cluster.gpus_per_node if self.cluster.gpus else None,
            array_parallelism=at_once,
            signal_delay_s=self.cluster.signal_seconds,
            dependency=":".join(["afterany", *after]) if after else None,
            srun_args=cpus,
            **shared,
        )
        return executor

    def alive(self, soon: bool) -> set[str] | None:
        """See :class:`Queue`; asks Slurm at most every ``ask_seconds``, or every :data:`SOON_SECONDS`."""
        pause = min(SOON_SECONDS, self.ask_seconds) if soon else self.ask_seconds
        if self._asked and time.monotonic() - self._asked < pause:
            return None
        self._asked = time.monotonic()
        try:
            return set(ask_slurm("squeue", "--noheader", "--array", "--me", "--format", "%i").split())
        except UserError as error:
            log.warning("Slurm does not answer", why=str(error))
            return None

    def close(self) -> None:
        """Nothing: the jobs go on."""


def max_array_size() -> int:
    """Jobs that the cluster takes as one array: its indices are below ``MaxArraySize``.

    Raises:
        UserError: Slurm does not say.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask_slurm("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise UserError("scontrol show config names no MaxArraySize")
    # 0 means that the cluster takes no arrays.
    return max(1, int(found[1]))


def of_one_task(cluster: SubmitConfig, gpus: int) -> SubmitConfig:
    """A cluster's habits, which are written for trainings on whole nodes, for jobs of one task with so many GPUs.

    The time limit is the sweep's own affair, and the memory is the share that the GPUs (or cores) are of a node.
    """
    asked = f"{cluster.gpu_type}:{gpus}" if gpus and cluster.gpu_type else gpus
    one = replace(
        cluster, nodes=1, min_nodes=None, tasks_per_node=1, gpus_per_node=asked, time=None, mem=None, follow=False
    )
    if cluster.mem is None:
        return one
    found = partition.read()
    names = partition.wanted(found, cluster.partition)
    smallest = min(
        partition.fit([node for node in found if node.partition in names], one.ask),
        key=lambda node: node.memory_mb,
        default=None,
    )
    whole = partition.megabytes_in(cluster.mem) or (smallest.memory_mb if smallest else 0.0)
    # Slurm takes a node that nobody described for one of a megabyte.
    if smallest is None or whole <= 1:
        return one
    if gpus:
        share = gpus / partition.gpus_in(smallest.gres, cluster.gpu_type)
    else:
        share = (cluster.cpus_per_task or 1) / smallest.cores
    return replace(one, mem=f"{max(1, math.floor(whole * share))}M")


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
