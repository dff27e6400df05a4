"""What a batch script asks about its run: ``python -m pacl_scale.job claim|requeue RUN``, inside a Slurm job.

``claim`` comes before training: only one living job may train in a run directory, and one that was started again and
again, by whomever, without a newer checkpoint is given up. ``requeue`` comes after a training that ended before its
end and not by a user's mistake: it says whether the job should be queued again, and does so, without the nodes that
the training found unfit. ``<run>/job.json`` holds what is known of the run's job. Light to import: a batch script
waits for it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pacl_scale import config
from pacl_scale.errors import RunFailed, UserError, run_command

PROG = "python -m pacl_scale.job"
ALIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
)
"""States of jobs that are not over."""


@dataclass
class JobConfig:
    """Claim a run directory for this Slurm job, or queue this job again after its training was asked to stop."""

    attempts: int = 3
    """How often in a row a job is started again without a newer checkpoint before it is given up."""

    tasks_per_node: int | None = None
    """For a job of a range of nodes: ranks of each node. `claim` then prints what `srun` has to be told."""

    global_batch_size: int | None = None
    """For a job of a range of nodes: what its ranks have to share evenly."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts must be at least 1")
        if (self.tasks_per_node is None) != (self.global_batch_size is None):
            raise ValueError("tasks_per_node and global_batch_size belong together")


@dataclass
class Note:
    """``<run>/job.json``: the newest job of a run, and how it fares."""

    job: str
    """Slurm's number of the job."""
    step: int = 0
    """Newest checkpoint when this attempt started."""
    fruitless: int = 0
    """Attempts in a row before this one that left no newer one."""
    attempt: int = 0
    """Times that Slurm had started the job before."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command of batch scripts; returns 0, or raises :class:`UserError` or :class:`RunFailed`."""
    positionals: list[tuple[str, dict[str, Any]]] = [
        ("verb", {"choices": ["claim", "requeue"]}),
        ("run", {"help": "Run directory."}),
    ]
    settings, given = config.parse(JobConfig, argv, PROG, positionals)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("there is no SLURM_JOB_ID: this command is for batch scripts of Slurm jobs")
    run = Path(given["run"])
    if given["verb"] == "claim":
        claim(run, job, settings.attempts)
        if settings.tasks_per_node and settings.global_batch_size:
            allocated = int(os.environ["SLURM_JOB_NUM_NODES"])
            nodes = usable_nodes(allocated, settings.tasks_per_node, settings.global_batch_size)
            ranks = nodes * settings.tasks_per_node
            print(f"export SLURM_NNODES={nodes} SLURM_JOB_NUM_NODES={nodes} SLURM_NTASKS={ranks} SLURM_NPROCS={ranks}")
            print(f"export SLURM_NTASKS_PER_NODE={settings.tasks_per_node}; unset SLURM_TASKS_PER_NODE")
    else:
        requeue(run, job, settings.attempts)
    return 0


def claim(run: Path, job: str, attempts: int) -> None:
    """Note that ``job`` trains in ``run``, and from where.

    Raises:
        UserError: another job that trains there is queued or running.
        RunFailed: the job was started again ``attempts`` times in a row and no checkpoint is newer than before.
    """
    note = read(run)
    if note and note.job != job:
        refuse_if_alive(run, note)
    newest, attempt = _newest(run), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if note is None or note.job != job or attempt == 0:
        write(run, Note(job, newest))
    elif note.attempt != attempt:
        fruitless = fruitless_of(note, newest)
        refuse_circles(run, newest, fruitless, attempts)
        write(run, Note(job, newest, fruitless, attempt))


def usable_nodes(allocated: int, tasks_per_node: int, global_batch_size: int) -> int:
    """The most of ``allocated`` nodes whose ranks share the global batch evenly.

    Raises:
        UserError: not even one node's do.
    """
    for nodes in range(allocated, 0, -1):
        if global_batch_size % (nodes * tasks_per_node) == 0:
            return nodes
    raise UserError(f"global_batch_size {global_batch_size} is not a multiple of {tasks_per_node} ranks")


def refuse_if_alive(run: Path, note: Note) -> None:
    """Raise :class:`UserError` if the noted job is still queued or running."""
    state = state_of(note.job)
    if state:
        raise UserError(f"job {note.job} of run {run} is {state}; wait for it, or end it with: scancel {note.job}")


def requeue(run: Path, job: str, attempts: int) -> None:
    """Queue ``job`` again, unless it is being ended by somebody or goes in circles.

    Raises:
        RunFailed: this attempt and ``attempts`` before it left no newer checkpoint.
    """
    from pacl_scale import nodes

    note = read(run)
    newest = _newest(run)
    unfit = nodes.unfit_nodes(run, job)
    if note and note.job == job:
        refuse_circles(run, newest, fruitless_of(note, newest), attempts)
    state = state_of(job)
    if state != "RUNNING":
        # Cancelled, or queued again by somebody else: not ours to decide.
        print(f"job {job} is {state or 'gone'} and is not queued again from here", flush=True)
        return
    without = f", without {', '.join(unfit)}" if unfit else ""
    print(f"job {job} is queued again{without}; its newest checkpoint is that of step {newest}", flush=True)
    if unfit:
        # Slurm ends this process with its job, but only a queued job's nodes can be chosen anew.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ask_slurm("scontrol", "requeue", job)
    if unfit:
        exclude(job, list(unfit))


def fruitless_of(note: Note, newest: int) -> int:
    """Attempts in a row that left no newer checkpoint, the noted one among them."""
    return 0 if newest > note.step else note.fruitless + 1


def refuse_circles(run: Path, newest: int, fruitless: int, attempts: int) -> None:
    """Raise :class:`RunFailed` if a run has been tried often enough."""
    if fruitless > attempts:
        raise RunFailed(
            f"run {run} is not queued again: its newest checkpoint is still that of step {newest} "
            f"after {attempts} more attempts"
        )


def exclude(job: str, unfit: list[str]) -> None:
    """Keep a queued job off some nodes, besides those that it is kept off already.

    Raises:
        UserError: Slurm does not let us.
    """
    refused: UserError | None = None
    for _ in range(20):
        try:
            shown = ask_slurm("scontrol", "--oneliner", "show", "job", job).split()
            before = next((word.partition("=")[2] for word in shown if word.startswith("ExcNodeList=")), "(null)")
            nodes = [*([before] if before != "(null)" else []), *unfit]
            ask_slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
            return
        except UserError as error:
            # It may not be queued yet.
            refused = error
            time.sleep(0.2)
    raise UserError(f"job {job} could not be kept off {', '.join(unfit)} ({refused})")


def state_of(job: str) -> str | None:
    """State of a job that is queued, running or ending, as in ``RUNNING``; ``None`` if it is over or unknown.

    Raises:
        UserError: Slurm does not answer.
    """
    try:
        return ask_slurm("squeue", "--noheader", "--jobs", job, "--format", "%T").strip() or None
    except UserError as error:
        # Slurm forgets a job some minutes after its end.
        if "Invalid job id" in str(error):
            return None
        raise


def read(run: Path) -> Note | None:
    """The note of a run, if there is one."""
    try:
        return Note(**json.loads((run / "job.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / 'job.json'} cannot be read; look whether a job of it runs, then delete it") from error


def write(run: Path, note: Note) -> None:
    """Replace the note of a run."""
    run.mkdir(parents=True, exist_ok=True)
    partial = run / "job.json.part"
    partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
    partial.replace(run / "job.json")


def _newest(run: Path) -> int:
    """Step of the newest checkpoint of a run; 0 without one."""
    saved = run / "config.yaml"
    settings = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    folder = settings.get("checkpoint", {}).get("folder") or str(run / "checkpoints")
    if not settings and not os.path.isdir(folder):
        return 0
    from pacl_scale import checkpoint

    return max(checkpoint.steps_in(folder), default=0)


def ask_slurm(*words: str) -> str:
    """What a command of Slurm prints; :class:`UserError` where it is absent or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise UserError(f"there is no Slurm here ({words[0]} is not found); go to a login node") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(words)}: Slurm did not answer within two minutes") from error
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run_command(main))
