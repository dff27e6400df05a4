"""A download as jobs of a Slurm cluster: one that prepares the list, then an array of one job a part.

``slurm/download.sh`` is the same by hand. A job that Slurm asks to stop (ahead of a time limit, at a preemption) leaves
with status 75 and is queued again by its batch script; what its shards had reached stays.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep.beside import CHECKOUT, IS_INSTALLED
from pacl_scale import storage
from pacl_scale.errors import EXIT_REQUEUE, UserError
from pacl_scale.submit import SubmitConfig, check_partition

FIND_CHECKOUT = f" PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}"


@dataclass
class SlurmConfig:
    """The jobs that ``--slurm`` queues."""

    parts: int = 8
    """Jobs that download at the same time, each a part of the shards."""
    cpus_per_task: int | None = None
    """CPU cores of each job; null leaves it to the cluster. About one for every fetch.processes."""
    mem: str | None = None
    """Memory of each job as Slurm writes it, as in "64G"; about 1.5 GB for every fetch.processes."""
    partition: str | None = None
    """Partition; null takes the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit of each job as Slurm writes it, as in "12:00:00"; null takes the partition's."""
    constraint: str | None = None
    """Features that nodes must have."""
    folder: str = "slurm-download"
    """Folder of logs and of what submitit keeps; all nodes must see it."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the batch script runs first, such as loading modules."""
    python: str | None = None
    """Command that starts Python on the nodes; null takes the Python that runs this command."""
    attempts: int = 20
    """How often a job that was asked to stop is queued again."""
    dry_run: bool = False
    """Check everything, print the batch script of a part, queue nothing."""

    def __post_init__(self) -> None:
        if min(self.parts, self.attempts, self.cpus_per_task or 1) < 1:
            raise ValueError("slurm.parts, slurm.attempts and slurm.cpus_per_task must be at least 1")


class Part:
    """What submitit starts: the command on one part, or its preparation."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def __call__(self) -> None:
        """Run the command; ends the process with its exit status unless that is 0."""
        # submitit's own handlers would start the job again as often as they like.
        end_when_asked()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        from data_prep.download import main

        status = main(self.words)
        if status:
            sys.stdout.flush()
            sys.exit(status)


def end_when_asked() -> None:
    """In a Slurm job: SIGUSR2 and SIGTERM end this run in good order, to be queued again or not."""
    if "SLURM_JOB_ID" in os.environ:
        signal.signal(signal.SIGUSR2, _leave)
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # As an exception, so that workers are ended and the claim is withdrawn on the way out.
    sys.exit(EXIT_REQUEUE if number == signal.SIGUSR2 else 128 + number)


def submit(settings: SlurmConfig, output: str, words: Sequence[str], again: bool) -> None:
    """Queue the preparation and, after it, the parts; prints what was queued and how to go on.

    Args:
        words: of the command, without verb and ``--slurm``.
        again: plan a round of retries in the first job.

    Raises:
        UserError: no Slurm, no such partition, an output that cannot be written, or a job that is refused.
    """
    import submitit

    check_partition(SubmitConfig(nodes=1, gpus_per_node=0, partition=settings.partition))
    storage.check_writable(output)
    first = Part(["prepare", *words, f"again={str(again).lower()}"])
    parts = [Part([*words, "again=false", f"part={n}", f"parts={settings.parts}"]) for n in range(settings.parts)]
    # Variables of a job around this command are not the new jobs'; where Slurm is, is.
    where = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ |= where
        executor = executor_for(settings, "prepare")
        if settings.dry_run:
            executor = executor_for(settings, "download")
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            return
        try:
            preparing = executor.submit(first).job_id
            array = executor_for(settings, "download", after=preparing)
            jobs = array.map_array(_call, parts)
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error
    number = jobs[0].job_id.partition("_")[0]
    logs = Path(settings.folder).absolute()
    print(f"prepare  {preparing}\nparts    {number} ({settings.parts} jobs)\noutput   {output}")
    print(f"follow   tail -F {logs}/{number}_*_log.err\ncancel   scancel {preparing} {number}")
    print("resume   the same command; finished shards stay")


def _call(part: Part) -> None:
    part()


def executor_for(settings: SlurmConfig, what: str, after: str | None = None) -> Any:
    """submitit's executor, set up to write the batch script of one kind of job.

    Args:
        what: goes into the job's name.
        after: number of a job that must have succeeded before.
    """
    import submitit

    try:
        executor = submitit.SlurmExecutor(folder=Path(settings.folder), python=settings.python)
    except RuntimeError as error:
        raise UserError("there is no Slurm here (srun is not found); go to a login node") from error
    extra = {"requeue": True, "time": settings.time, "mem": settings.mem}
    if after is not None:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    optional = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "cpus_per_task": settings.cpus_per_task,
    }
    executor.update_parameters(
        job_name=f"pacl-{what}",
        nodes=1,
        ntasks_per_node=1,
        signal_delay_s=120,
        array_parallelism=settings.parts,
        additional_parameters={key: value for key, value in extra.items() if value is not None},
        srun_args=[f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else [],
        setup=[
            *settings.setup,
            f"export PYTHONUNBUFFERED=1{'' if IS_INSTALLED else FIND_CHECKOUT}",
        ],
        teardown=[
            "status=$?",
            f"if [ $status = {EXIT_REQUEUE} ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {settings.attempts} ]; then",
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $status",
        ],
        **{key: value for key, value in optional.items() if value is not None},
    )
    if settings.time is None:
        # submitit's default of five minutes is nobody's; Slurm takes the partition's.
        executor.parameters["time"] = None
    return executor
