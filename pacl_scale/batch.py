"""The batch script of a training, and what it starts in every task; submitit writes the one and calls the other."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pacl_scale import config
from pacl_scale.errors import EXIT_REQUEUE, EXIT_USER_ERROR, run_command
from pacl_scale.nodes import CheckConfig
from pacl_scale.signals import STOPPING

if TYPE_CHECKING:
    from pacl_scale.submit import SubmitConfig


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job or a launcher around this command: they are not the new job's.

    Where Slurm is to be found stays.
    """
    import submitit

    where = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ |= where
        yield


def executor_for(settings: "SubmitConfig", run: Path, global_batch_size: int) -> Any:
    """submitit's executor, set up to write this job's batch script."""
    import submitit

    executor = submitit.SlurmExecutor(folder=run / "slurm", python=settings.python)
    command = f"{executor.python} -m pacl_scale.job"
    name = shlex.quote(str(run))
    claim = f"{command} claim {name} --attempts={settings.attempts}"
    claiming, fewest = [f"{claim} || exit"], ""
    shared = cluster_parameters(settings)
    shared["additional_parameters"]["requeue"] = True
    cpus, tasks_per_node = settings.cpus_per_task, {"ntasks_per_node": settings.tasks}
    if settings.min_nodes is not None:
        # Told of tasks, Slurm gives as few nodes as hold them; so it is told of cores, and srun of tasks.
        cpus, tasks_per_node = cpus or 1, {}
        shared["cpus_per_task"] = settings.tasks * cpus
        shared["additional_parameters"]["nodes"] = f"{settings.min_nodes}-{settings.nodes}"
        shape = f"--tasks_per_node={settings.tasks} --global_batch_size={global_batch_size}"
        fewest = f"--min_nodes={settings.min_nodes} "
        claiming = [f"shape=$({claim} {shape}) || exit", 'eval "$shape"  # as many nodes as share the batch evenly']
    executor.update_parameters(
        job_name=f"pacl-{run.name}",
        nodes=settings.nodes,
        gpus_per_node=settings.gpus_per_node if settings.gpus else None,
        signal_delay_s=settings.signal_seconds,
        # When a rank is gone the others say so and end; those that do not are ended.
        srun_args=["--wait=120", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        setup=[
            *shared.pop("setup"),
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            *claiming,
            "trap : TERM  # the trainers end first, then this script looks at how they ended",
        ],
        teardown=[
            "status=$?",
            f"if [ $status != 0 ] && [ $status != {EXIT_USER_ERROR} ]; then",
            f"    {command} requeue {name} --attempts={settings.attempts} {fewest}|| status=$?",
            "fi",
            "exit $status",
        ],
        **tasks_per_node,
        **shared,
    )
    if settings.time is None:
        # submitit's default of five minutes is nobody's; Slurm takes the partition's.
        executor.parameters["time"] = None
    return executor


def cluster_parameters(settings: "SubmitConfig") -> dict[str, Any]:
    """What is the same for every kind of job of a cluster, as submitit's parameters."""
    extra = {"time": settings.time, "mem": settings.mem, "reservation": settings.reservation}
    optional = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "cpus_per_task": settings.cpus_per_task,
    }
    exports = {**settings.environment, "PYTHONUNBUFFERED": "1"}
    return {key: value for key, value in optional.items() if value is not None} | {
        "additional_parameters": {key: value for key, value in extra.items() if value is not None}
        | {name: value for name, value in settings.sbatch.items() if value is not False},
        "setup": [*settings.setup, *(f"export {key}={shlex.quote(str(value))}" for key, value in exports.items())],
    }


class Training:
    """What submitit starts in every task: the training, in the task's own process."""

    def __init__(self, words: Sequence[str], check: CheckConfig, ranks: int) -> None:
        self.words = list(words)
        self.check = check
        self.ranks = ranks

    def __call__(self) -> None:
        """Train; ends the process with the training's exit status unless it is 0."""
        # submitit would queue the job again at once, without a checkpoint.
        for number in STOPPING:
            signal.signal(number, leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        from pacl_scale import nodes

        status = run_command(lambda: nodes.start(self.check, self.sized()))
        if status:
            sys.stdout.flush()
            sys.exit(status)

    def sized(self) -> list[str]:
        """The words, with micro-batches that fit in memory where this attempt has fewer ranks than asked for."""
        ranks = int(os.environ.get("SLURM_NTASKS", self.ranks))
        if ranks == self.ranks:
            return self.words
        training = parsed(self.words)
        share, most = training.global_batch_size // ranks, training.micro_batch_size
        most = most or training.global_batch_size // self.ranks
        return [*self.words, f"micro_batch_size={max(n for n in range(1, most + 1) if share % n == 0)}"]


def parsed(words: Sequence[str]) -> Any:
    """The training's configuration of its words."""
    from pacl_scale import train

    return config.parse(train.TrainConfig, words, "python -m pacl_scale.train")


def leave(number: int, frame: FrameType | None) -> None:
    """End: before training listens to signals there is nothing to save, and after it nothing is left to."""
    os._exit(EXIT_REQUEUE)
