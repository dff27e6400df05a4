"""Queue a training on a Slurm cluster: ``python -m pacl_scale.submit --nodes 8 --cluster FILE --config FILE ...``.

The batch script claims the run directory, starts one trainer per GPU, and queues its job again when the trainers ended
before their end: asked to stop (ahead of a time limit, at a preemption, by ``scancel --signal``) or because a rank or a
node was lost; not for a mistake in the settings, and not for ever. A job that is started again, by whomever, resumes.
``slurm/train.sh`` is the same by hand.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pacl_scale import claims, config, job
from pacl_scale.batch import Training, executor_for, outside_of_jobs, parsed
from pacl_scale.controller import ask_slurm
from pacl_scale.errors import UserError, run_command
from pacl_scale.nodes import CheckConfig
from pacl_scale.partition import Ask, check
from pacl_scale.secrecy import is_secret_name

PROG = "python -m pacl_scale.submit"
LOCAL_KEYS = ("nodes", "gpus_per_node", "tasks_per_node", "follow", "dry_run")
LOCAL = "local"
SHELL_HABITS = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "time": "SBATCH_TIMELIMIT",
    "constraint": "SBATCH_CONSTRAINT",
    "reservation": "SBATCH_RESERVATION",
}
"""Variables of sbatch that stand in where neither a word nor the cluster's file says anything."""
OWN_OPTIONS = {
    *("nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gpus-per-task", "gres", "cpus-per-task", "mem"),
    *("partition", "account", "qos", "time", "constraint", "reservation", "exclude", "job-name", "output", "error"),
    *("open-mode", "requeue", "no-requeue", "signal", "array", "wrap"),
}
"""Options of sbatch that have a key of their own or that resuming depends on."""


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

    gpus_per_node: int | str = 8
    """GPUs of each node, as a number or with their type as in "a100:8"; 0 trains on CPUs."""

    tasks_per_node: int | None = None
    """Ranks of each node; null is one per GPU, or one where there are no GPUs."""

    cpus_per_task: int | None = None
    """CPU cores of each rank; null leaves it to the cluster."""

    mem: str | None = None
    """Memory of each node as Slurm writes it, as in "500G"; "0" is all of it, null the cluster's default."""

    partition: str | None = None
    """Partition, or several with commas; null takes the cluster's default."""

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

    sbatch: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch by their long names, as in `{mail-type: END, exclusive: true}`."""

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
        if min(self.nodes, self.signal_seconds, self.attempts) < 1:
            raise ValueError("nodes, signal_seconds and attempts must be at least 1")
        kind, colon, count = str(self.gpus_per_node).rpartition(":")
        if not count.isdecimal() or bool(colon) != bool(kind):
            raise ValueError(f'gpus_per_node is a number or a type and a number ("a100:8"), not {self.gpus_per_node!r}')
        if taken := sorted({name.replace("_", "-") for name in self.sbatch} & OWN_OPTIONS):
            raise ValueError(
                f"sbatch.{taken[0]} is not for you to set: there is a key for it, or this command needs it"
            )
        if secret := next(filter(is_secret_name, self.environment), None):
            raise ValueError(f"environment.{secret} would be written into the batch script; export it where you submit")
        if min(self.tasks_per_node or 1, self.cpus_per_task or 1) < 1:
            raise ValueError("tasks_per_node and cpus_per_task must be at least 1, or null")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ValueError("min_nodes must be at least 1 and at most nodes")

    @property
    def gpus(self) -> int:
        """Number of GPUs of each node."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def gpu_type(self) -> str:
        """Type of these GPUs; empty where any will do."""
        return str(self.gpus_per_node).rpartition(":")[0]

    @property
    def tasks(self) -> int:
        """Ranks of each node."""
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def ask(self) -> Ask:
        """What the job asks its partition for."""
        return Ask(
            nodes=self.min_nodes or self.nodes,
            tasks=self.tasks,
            gpus=self.gpus,
            gpu_type=self.gpu_type,
            cpus_per_task=self.cpus_per_task,
            mem=self.mem,
            time=self.time,
            partition=self.partition,
            constraint=self.constraint,
            exclude=self.exclude,
        )

    @property
    def shape(self) -> str:
        """The job in words."""
        nodes = f"{self.min_nodes}-{self.nodes}" if self.min_nodes else str(self.nodes)
        parts = [f"{nodes} nodes x {self.tasks} ranks", f"{self.gpus_per_node} GPUs a node" if self.gpus else "no GPUs"]
        parts += [f"{self.cpus_per_task} cores a rank"] if self.cpus_per_task else []
        parts.append(f"partition {self.partition or '(the default)'}, time {self.time or '(as the partition has it)'}")
        shown = ("mem", "account", "qos", "constraint", "reservation", "exclude")
        parts += [f"{name} {getattr(self, name)}" for name in shown if getattr(self, name) is not None]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.sbatch.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, words = split_words(given)
    is_local = f"--cluster={LOCAL}" in own
    if is_local:
        own.remove(f"--cluster={LOCAL}")
    settings: SubmitConfig = config.parse(SubmitConfig, own, PROG, file_option="--cluster")
    if is_local:
        idle = [word for word in own if not word.startswith(tuple(f"--{name}=" for name in LOCAL_KEYS))]
        if idle:
            raise UserError(
                f"--cluster local takes no {idle[0].partition('=')[0].replace('_', '-')}: there is no queue"
            )
        is_sized = any(word.startswith(("--gpus_per_node=", "--tasks_per_node=")) for word in own)
        return train_here(settings, words, settings.tasks if is_sized else None)
    settings = with_shell_habits(settings)
    run, number = submit(settings, words)
    if number:
        again = shlex.join(["python", "-m", "pacl_scale.submit", *given])
        log = shlex.quote(str(run / "slurm" / f"{number}_0_log.err"))
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


def train_here(settings: SubmitConfig, words: list[str], ranks: int | None) -> int:
    """Train on this machine, in the foreground, with so many ranks where a number is given; returns the exit status.

    Raises:
        UserError: several nodes are asked for, or another training works in the run directory.
    """
    from pacl_scale import train

    if settings.nodes > 1:
        raise UserError(f"--cluster local is one machine, not {settings.nodes} nodes")
    words = [*words, *([f"distributed.ranks={ranks}"] if ranks else [])]
    run = Path(parsed(words).run)
    if settings.dry_run:
        print(shlex.join([sys.executable, "-m", train.MODULE, *words]))
        return 0
    with claims.held_here(run):
        return train.main(words)


def with_shell_habits(settings: SubmitConfig) -> SubmitConfig:
    """The settings with what the user's ``SBATCH_*`` variables say where they themselves say nothing."""
    said: dict[str, Any] = {key: os.environ[name] for key, name in SHELL_HABITS.items() if os.environ.get(name)}
    return replace(settings, **{key: value for key, value in said.items() if getattr(settings, key) is None})


def submit(settings: SubmitConfig, words: list[str]) -> tuple[Path, str | None]:
    """Check and queue; returns the run directory and the number of the job, which a dry run does not have.

    Raises:
        UserError: settings that do not fit each other or the cluster, or a run that another job is training.
    """
    import submitit

    run = check_training(settings, words)
    for warning in check_partition(settings):
        print(f"note     {warning}")
    if note := claims.read(run):
        claims.refuse_if_alive(run, note)
    with outside_of_jobs():
        executor = executor_for(settings, run, parsed(words).global_batch_size)
        if settings.dry_run:
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            return run, None
        print(f"asks     {settings.shape}", flush=True)
        try:
            number = executor.submit(Training(words, settings.check, settings.nodes * settings.tasks)).job_id
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise UserError(
                f"the run directory {run} cannot be written ({error.strerror}); nothing was queued"
            ) from error
    try:
        claims.enter(run, number)
    except UserError:
        # Another call was quicker, or there is no room: the job would say so when it starts, hours later.
        ask_slurm("scancel", number)
        raise
    return run, number


def check_training(settings: SubmitConfig, words: list[str]) -> Path:
    """Refuse what the training would refuse on its nodes; returns the run directory."""
    from pacl_scale import resume, train

    training = parsed(words)
    train.accumulation_of(training, settings.nodes * settings.tasks)
    if settings.min_nodes is not None:
        job.usable_nodes(settings.min_nodes, settings.tasks, training.global_batch_size)
    if training.distributed.device == "cpu" and settings.gpus:
        raise UserError(
            f"distributed.device is cpu, but {settings.gpus} GPUs per node are asked for; "
            "add --gpus-per-node 0 --tasks-per-node N"
        )
    if training.distributed.device == "cuda" and not settings.gpus:
        raise UserError("distributed.device is cuda, but no GPUs are asked for; add --gpus-per-node N")
    if settings.gpus and settings.tasks > settings.gpus:
        raise UserError(f"{settings.tasks} ranks per node need as many GPUs, not {settings.gpus}")
    resume.check_unchanged(training)
    return Path(training.run)


def check_partition(settings: SubmitConfig) -> list[str]:
    """Refuse a job that its partition can never run; returns what it will have to wait for, in sentences.

    Raises:
        UserError: no such partition, it is down, or it has too little time or too few such nodes.
    """
    return check(settings.ask)


if __name__ == "__main__":
    sys.exit(run_command(main))
