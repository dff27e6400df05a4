"""Queue a training on a Slurm cluster: ``python -m pacl_scale.submit --nodes 8 --cluster FILE --config FILE ...``.

The batch script claims the run directory, starts one trainer per GPU, and queues its job again when the trainers ended
before their end: asked to stop (ahead of a time limit, at a preemption, by ``scancel --signal``) or because a rank or a
node was lost; not for a mistake in the settings, and not for ever. A job that is started again, by whomever, resumes.
``slurm/train.sh`` is the same by hand.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from pacl_scale import config, job
from pacl_scale.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError, run_command
from pacl_scale.nodes import CheckConfig
from pacl_scale.signals import STOPPING

PROG = "python -m pacl_scale.submit"
LOCAL = "local"


@dataclass
class SubmitConfig:
    """Queue a training on a Slurm cluster.

    ``--cluster FILE`` holds what is the same for every job of a cluster, in the keys below; ``--cluster local`` trains
    here and now. Every word that is not one of these keys, ``--config`` among them, is the training's. The same
    command resumes a run that has ended.
    """

    nodes: int = 1
    """Nodes of the job."""

    min_nodes: int | None = None
    """Start with as few nodes as these if `nodes` are not to be had, and go on with what is there after a loss; the
    global batch stays what it is, by accumulation. null insists on `nodes`."""

    gpus_per_node: int = 8
    """GPUs of each node; 0 trains on CPUs."""

    tasks_per_node: int | None = None
    """Ranks of each node; null is one per GPU, or one where there are no GPUs."""

    cpus_per_task: int | None = None
    """CPU cores of each rank; null leaves it to the cluster."""

    mem: str | None = None
    """Memory of each node as Slurm writes it, as in "500G"; "0" is all of it, null the cluster's default."""

    partition: str | None = None
    """Partition; null takes the cluster's default."""

    account: str | None = None
    """Account that is charged."""

    qos: str | None = None
    """Quality of service."""

    time: str | None = None
    """Time limit as Slurm writes it, as in "12:00:00" or "2-00:00:00"; null takes the partition's."""

    constraint: str | None = None
    """Features that nodes must have."""

    reservation: str | None = None
    """Reservation to run in."""

    exclude: str | None = None
    """Nodes not to use, as in "n[3-4]"."""

    signal_seconds: int = 180
    """How long before its time limit the training is asked to save; more than a step and a checkpoint take."""

    attempts: int = 3
    """How often in a row a job is queued again without a newer checkpoint before it is given up."""

    setup: list[str] = field(default_factory=list)
    """Lines of shell that the batch script runs first, such as loading modules."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, taken literally."""

    python: str | None = None
    """Command that starts Python on the nodes, for a container; null takes the Python that runs this command."""

    check: CheckConfig = field(default_factory=CheckConfig)
    """What a node must have before training starts on it."""

    follow: bool = False
    """Stay, show what rank 0 says until the job is over, and end as it did. Ctrl-C leaves the job alone."""

    dry_run: bool = False
    """Check everything, print the batch script, queue nothing."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0 or self.signal_seconds < 1 or self.attempts < 1:
            raise ValueError("nodes, signal_seconds and attempts must be at least 1, gpus_per_node at least 0")
        if min(self.tasks_per_node or 1, self.cpus_per_task or 1) < 1:
            raise ValueError("tasks_per_node and cpus_per_task must be at least 1, or null")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ValueError("min_nodes must be at least 1 and at most nodes")

    @property
    def tasks(self) -> int:
        """Ranks of each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, words = split_words(given)
    is_local = f"--cluster={LOCAL}" in own
    if is_local:
        own.remove(f"--cluster={LOCAL}")
    settings: SubmitConfig = config.parse(SubmitConfig, own, PROG, file_option="--cluster")
    if is_local:
        idle = [word for word in own if not word.startswith(("--nodes=", "--tasks_per_node=", "--dry_run="))]
        if idle:
            raise UserError(
                f"--cluster local takes no {idle[0].partition('=')[0].replace('_', '-')}: there is no queue"
            )
        return train_here(settings, words)
    run, number = submit(settings, words)
    if number:
        again = shlex.join(["python", "-m", "pacl_scale.submit", *given])
        log = run / "slurm" / f"{number}_0_log.err"
        print(f"job      {number}\nrun      {run}\nfollow   tail -F {log}\nsave     scancel --signal=USR2 {number}")
        print(f"cancel   scancel {number}\nresume   {again}", flush=True)
        if settings.follow:
            from pacl_scale.follow import follow

            return follow(number, [run / "slurm" / f"{number}_0_log.{kind}" for kind in ("err", "out")])
    return 0


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this command, each as ``--key=value``, and those of the training.

    Raises:
        UserError: a key of this command without a value.
    """
    names = {one.name for one in fields(SubmitConfig)} | {"cluster", "help", "print_config"}
    own, rest = [], []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        is_own = name.partition(".")[0] in names
        if word == "-h" or name in ("help", "print_config") and word.startswith("--"):
            own.append(word)
        elif not is_own or not (equals or word.startswith("--")):
            rest.append(word)
        elif name in ("dry_run", "follow") and not equals:
            own.append(f"--{name}=true")
        elif equals or left:
            own.append(f"--{name}={value if equals else left.pop(0)}")
        else:
            raise UserError(f"{word} needs a value ({PROG} --help lists every key)")
    return own, rest


def train_here(settings: SubmitConfig, words: list[str]) -> int:
    """Train on this machine, in the foreground; ``tasks_per_node`` ranks where given. Returns the exit status."""
    from pacl_scale import train

    if settings.nodes > 1:
        raise UserError(f"--cluster local is one machine, not {settings.nodes} nodes")
    ranks = [f"distributed.ranks={settings.tasks_per_node}"] if settings.tasks_per_node else []
    if settings.dry_run:
        print(shlex.join([sys.executable, "-m", train.MODULE, *words, *ranks]))
        return 0
    return train.main([*words, *ranks])


def submit(settings: SubmitConfig, words: list[str]) -> tuple[Path, str | None]:
    """Check and queue; returns the run directory and the number of the job, which a dry run does not have.

    Raises:
        UserError: settings that do not fit each other or the cluster, or a run that another job is training.
    """
    import submitit

    run = check_training(settings, words)
    check_partition(settings)
    note = job.read(run)
    if note:
        job.refuse_if_alive(run, note)
    with outside_of_jobs():
        executor = executor_for(settings, run, parsed(words).global_batch_size)
        if settings.dry_run:
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            return run, None
        try:
            number = executor.submit(Training(words, settings.check, settings.nodes * settings.tasks)).job_id
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error
    job.write(run, job.Note(number))
    return run, number


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


def check_training(settings: SubmitConfig, words: list[str]) -> Path:
    """Refuse what the training would refuse on its nodes; returns the run directory."""
    from pacl_scale import resume, train

    training = parsed(words)
    train.accumulation_of(training, settings.nodes * settings.tasks)
    if settings.min_nodes is not None:
        job.usable_nodes(settings.min_nodes, settings.tasks, training.global_batch_size)
    if training.distributed.device == "cpu" and settings.gpus_per_node:
        raise UserError(
            f"distributed.device is cpu, but {settings.gpus_per_node} GPUs per node are asked for; "
            "add --gpus-per-node 0 --tasks-per-node N"
        )
    if training.distributed.device == "cuda" and not settings.gpus_per_node:
        raise UserError("distributed.device is cuda, but no GPUs are asked for; add --gpus-per-node N")
    if settings.gpus_per_node and settings.tasks > settings.gpus_per_node:
        raise UserError(f"{settings.tasks} ranks per node need as many GPUs, not {settings.gpus_per_node}")
    resume.check_unchanged(training)
    return Path(training.run)


def check_partition(settings: SubmitConfig) -> None:
    """Refuse a job that its partition can never run; ``sinfo`` knows.

    Raises:
        UserError: no such partition, it is down, or it has too few nodes with so many GPUs.
    """
    lines = job.ask_slurm("sinfo", "--noheader", "--format", "%P|%a|%D|%G").splitlines()
    rows = [line.split("|") for line in lines]
    names = [row[0] for row in rows]
    wanted = settings.partition or next((name.rstrip("*") for name in names if name.endswith("*")), None)
    if wanted is None:
        raise UserError(f"the cluster has no default partition; choose one with --partition: {_listed(names)}")
    mine = [row for row in rows if row[0].rstrip("*") == wanted]
    if not mine:
        raise UserError(f"there is no partition {wanted}; the cluster has {_listed(names)}")
    if all(up != "up" for _, up, _, _ in mine):
        raise UserError(f"partition {wanted} is {mine[0][1]}")
    nodes = sum(int(count) for _, _, count, gres in mine if gpus_in(gres) >= settings.gpus_per_node)
    if nodes < (settings.min_nodes or settings.nodes):
        what = f" with {settings.gpus_per_node} GPUs" if settings.gpus_per_node else ""
        raise UserError(
            f"partition {wanted} has {nodes} nodes{what}, and {settings.min_nodes or settings.nodes} are asked for"
        )


def gpus_in(gres: str) -> int:
    """GPUs in Slurm's list of a node's generic resources, as in ``gpu:a100:8(S:0-1),shard:2``."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)(?=[(,]|$)", gres))


def executor_for(settings: SubmitConfig, run: Path, global_batch_size: int) -> Any:
    """submitit's executor, set up to write this job's batch script."""
    import submitit

    executor = submitit.SlurmExecutor(folder=run / "slurm", python=settings.python)
    command = f"{executor.python} -m pacl_scale.job"
    name = shlex.quote(str(run))
    claim = f"{command} claim {name} --attempts={settings.attempts}"
    claims = [f"{claim} || exit"]
    shared = cluster_parameters(settings)
    shared["additional_parameters"]["requeue"] = True
    cpus, tasks_per_node = settings.cpus_per_task, {"ntasks_per_node": settings.tasks}
    if settings.min_nodes is not None:
        # Told of tasks, Slurm gives as few nodes as hold them; so it is told of cores, and srun of tasks.
        cpus, tasks_per_node = cpus or 1, {}
        shared["cpus_per_task"] = settings.tasks * cpus
        shared["additional_parameters"]["nodes"] = f"{settings.min_nodes}-{settings.nodes}"
        shape = f"--tasks_per_node={settings.tasks} --global_batch_size={global_batch_size}"
        claims = [f"shape=$({claim} {shape}) || exit", 'eval "$shape"  # as many nodes as share the batch evenly']
    executor.update_parameters(
        job_name=f"pacl-{run.name}",
        nodes=settings.nodes,
        gpus_per_node=settings.gpus_per_node or None,
        signal_delay_s=settings.signal_seconds,
        # When a rank is gone the others say so and end; those that do not are ended.
        srun_args=["--wait=120", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        setup=[
            *shared.pop("setup"),
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            *claims,
            "trap : TERM  # the trainers end first, then this script looks at how they ended",
        ],
        teardown=[
            "status=$?",
            f"if [ $status != 0 ] && [ $status != {EXIT_USER_ERROR} ]; then",
            f"    {command} requeue {name} --attempts={settings.attempts} || status=$?",
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


def cluster_parameters(settings: SubmitConfig) -> dict[str, Any]:
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
        "additional_parameters": {key: value for key, value in extra.items() if value is not None},
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rstrip("*") for name in names))


if __name__ == "__main__":
    sys.exit(run_command(main))
