"""Where a sweep's packs run: as arrays of Slurm jobs through submitit, or one process after another on this machine.

Slurm is asked which of its jobs live, once in a while and for all at once; how cells fare is read from their files.
"""

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pacl_scale import job, submit
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

    def submit(self, packs: Sequence[Pack], minutes: int) -> list[str]:
        """Queue packs whose jobs may take so long; returns the job of each."""
        ...

    def alive(self, soon: bool) -> set[str] | None:
        """Jobs that are queued or running; ``None`` where nothing new is known. ``soon``: it matters now."""
        ...

    def close(self) -> None:
        """Leave nothing of this process behind. Slurm's jobs go on."""
        ...


class LocalQueue:
    """Up to ``throttle`` packs at once, each a process on this machine."""

    def __init__(self, throttle: int) -> None:
        self.throttle = throttle
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[str, Pack]] = []
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, packs: Sequence[Pack], minutes: int) -> list[str]:
        """Queue packs; they start as others end, whenever :meth:`alive` is asked."""
        named = [(f"local-{next(self._numbers)}", pack) for pack in packs]
        for _, pack in named:
            write_pack(pack)
        self._waiting += named
        self.alive(soon=True)
        return [name for name, _ in named]

    def alive(self, soon: bool) -> set[str]:
        """Packs that wait or run; starts those for which there is room."""
        self._running = {name: process for name, process in self._running.items() if process.poll() is None}
        while self._waiting and len(self._running) < self.throttle:
            name, pack = self._waiting.pop(0)
            with open(Path(pack.file).with_suffix(".log"), "ab") as output:
                command = [sys.executable, "-m", "pacl_scale.sweep.worker", pack.file]
                self._running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return {*self._running, *(name for name, _ in self._waiting)}

    def close(self) -> None:
        """End what runs."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class SlurmQueue:
    """Arrays of at most the cluster's ``MaxArraySize`` jobs, so many of them at once."""

    def __init__(self, folder: Path, cluster: SubmitConfig, gpus: int, throttle: int, ask_seconds: float) -> None:
        self.folder, self.cluster, self.gpus = folder, cluster, gpus
        self.throttle, self.ask_seconds = throttle, ask_seconds
        self.array_size = max_array_size()
        self._asked = 0.0

    def submit(self, packs: Sequence[Pack], minutes: int) -> list[str]:
        """Queue packs as one array, or as several that wait for each other, so that the throttle holds.

        Raises:
            UserError: Slurm refuses them.
        """
        import submitit

        jobs: list[str] = []
        for pack in packs:
            write_pack(pack)
        with submit.outside_of_jobs():
            for start in range(0, len(packs), self.array_size):
                executor = self.executor(minutes, after=jobs[-1].partition("_")[0] if jobs else None)
                try:
                    with executor.batch():
                        queued = [executor.submit(pack) for pack in packs[start : start + self.array_size]]
                except submitit.core.utils.FailedJobError as error:
                    raise UserError(f"sbatch refuses the sweep's jobs: {' '.join(str(error).split())}") from error
                jobs += [one.job_id for one in queued]
        self._asked = 0.0
        return jobs

    def executor(self, minutes: int, after: str | None) -> Any:
        """submitit's executor for one array."""
        import submitit

        executor = submitit.SlurmExecutor(self.folder / "slurm", max_num_timeout=REQUEUES, python=self.cluster.python)
        shared = submit.cluster_parameters(replace(self.cluster, time=None))
        shared["additional_parameters"]["requeue"] = True
        cpus = [f"--cpus-per-task={self.cluster.cpus_per_task}"] if self.cluster.cpus_per_task else None
        executor.update_parameters(
            job_name=f"sweep-{self.folder.name}",
            time=minutes,
            nodes=1,
            ntasks_per_node=1,
            gpus_per_node=self.gpus or None,
            array_parallelism=self.throttle,
            signal_delay_s=self.cluster.signal_seconds,
            dependency=f"afterany:{after}" if after else None,
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
            return set(job.ask_slurm("squeue", "--noheader", "--array", "--me", "--format", "%i").split())
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
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", job.ask_slurm("scontrol", "show", "config"), re.MULTILINE)
    if found is None:
        raise UserError("scontrol show config names no MaxArraySize")
    # 0 means that the cluster takes no arrays.
    return max(1, int(found[1]))
