"""What a batch script asks about its run: ``python -m pacl_scale.job claim|requeue RUN``, inside a Slurm job.

``claim`` comes before training: only one living job may train in a run directory, and one that was started again and
again, by whomever, without a newer checkpoint is given up. ``requeue`` comes after a training that ended before its
end and not by a user's mistake: it says whether the job should be queued again, and does so, without the nodes that
the training found unfit. What is known of the run's jobs is noted in ``<run>/jobs/`` (:mod:`pacl_scale.claims`). Light
to import: a batch script waits for it.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacl_scale import claims, config
from pacl_scale.claims import Note
from pacl_scale.controller import ask_slurm, patiently, state_of
from pacl_scale.errors import RunFailed, UserError, run_command

PROG = "python -m pacl_scale.job"


@dataclass
class JobConfig:
    """Claim a run directory for this Slurm job, or queue this job again after its training was asked to stop."""

    attempts: int = 3
    """How often in a row a job is started again without a newer checkpoint before it is given up."""

    tasks_per_node: int | None = None
    """For a job of a range of nodes: ranks of each node. `claim` then prints what `srun` has to be told."""

    global_batch_size: int | None = None
    """For a job of a range of nodes: what its ranks have to share evenly."""

    min_nodes: int | None = None
    """Fewest nodes that the job starts with; null is as many as it has now. `requeue` keeps it off no more nodes than
    leave that many."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts must be at least 1")
        if (self.tasks_per_node is None) != (self.global_batch_size is None):
            raise ValueError("tasks_per_node and global_batch_size belong together")


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
        patiently(lambda: claim(run, job, settings.attempts))
        if settings.tasks_per_node and settings.global_batch_size:
            allocated = int(os.environ["SLURM_JOB_NUM_NODES"])
            nodes = usable_nodes(allocated, settings.tasks_per_node, settings.global_batch_size)
            ranks = nodes * settings.tasks_per_node
            print(f"export SLURM_NNODES={nodes} SLURM_JOB_NUM_NODES={nodes} SLURM_NTASKS={ranks} SLURM_NPROCS={ranks}")
            print(f"export SLURM_NTASKS_PER_NODE={settings.tasks_per_node}; unset SLURM_TASKS_PER_NODE")
    else:
        requeue(run, job, settings.attempts, settings.min_nodes)
    return 0


def claim(run: Path, job: str, attempts: int) -> None:
    """Note that ``job`` trains in ``run``, and from where.

    Raises:
        UserError: another job that trains there is queued or running, or there is no room for the note.
        RunFailed: the job was started again ``attempts`` times in a row and no checkpoint is newer than before.
    """
    before = claims.read(run)
    note = claims.enter(run, job)
    newest, attempt = claims.newest_step(run), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if before is None or before.job != job or attempt == 0:
        claims.update(run, Note(job, newest, attempt=attempt))
    elif note.attempt != attempt:
        fruitless = fruitless_of(note, newest)
        refuse_circles(run, newest, fruitless, attempts)
        claims.update(run, Note(job, newest, fruitless, attempt))


def usable_nodes(allocated: int, tasks_per_node: int, global_batch_size: int) -> int:
    """The most of ``allocated`` nodes whose ranks share the global batch evenly.

    Raises:
        UserError: not even one node's do.
    """
    for nodes in range(allocated, 0, -1):
        if global_batch_size % (nodes * tasks_per_node) == 0:
            return nodes
    raise UserError(f"global_batch_size {global_batch_size} is not a multiple of {tasks_per_node} ranks")


def requeue(run: Path, job: str, attempts: int, min_nodes: int | None = None) -> None:
    """Queue ``job`` again, unless it is being ended by somebody or goes in circles; waits for a silent controller.

    Raises:
        RunFailed: this attempt and ``attempts`` before it left no newer checkpoint, or without the nodes that do not
            fit there are too few.
    """
    from pacl_scale import nodes

    note = claims.read(run)
    newest = claims.newest_step(run)
    unfit = nodes.unfit_nodes(run, job)
    if note and note.job == job:
        refuse_circles(run, newest, fruitless_of(note, newest), attempts)
    state = patiently(lambda: state_of(job))
    if state != "RUNNING":
        # Cancelled, or queued again by somebody else: not ours to decide.
        print(f"job {job} is {state or 'gone'} and is not queued again from here", flush=True)
        return
    if unfit:
        patiently(lambda: refuse_too_few(job, unfit, min_nodes or int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))))
    without = f", without {', '.join(unfit)}" if unfit else ""
    print(f"job {job} is queued again{without}; its newest checkpoint is that of step {newest}", flush=True)
    if unfit:
        # Slurm ends this process with its job, but only a queued job's nodes can be chosen anew.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    patiently(lambda: ask_slurm("scontrol", "requeue", job))
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


def refuse_too_few(job: str, unfit: Collection[str], wanted: int) -> None:
    """Raise :class:`RunFailed` if a job would wait for ever without its unfit nodes."""
    from pacl_scale import partition
    from pacl_scale.controller import hostnames

    shown = fields_of(job)
    before = hostnames(shown["ExcNodeList"]) if shown.get("ExcNodeList", "(null)") != "(null)" else []
    gres = re.sub(r"gres[:/]", "", shown.get("TresPerNode", ""))
    left = partition.left(shown["Partition"], {*before, *unfit}, partition.gpus_in(gres))
    if len(left) < wanted:
        raise RunFailed(
            f"job {job} is not queued again: without {', '.join([*before, *unfit])} partition {shown['Partition']} has "
            f"{len(left)} nodes that take jobs, and it needs {wanted}; mend them and submit again"
        )


def fields_of(job: str) -> dict[str, str]:
    """What ``scontrol`` says of a job, by name."""
    words = ask_slurm("scontrol", "--oneliner", "show", "job", job).split()
    return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}


def exclude(job: str, unfit: list[str]) -> None:
    """Keep a queued job off some nodes, besides those that it is kept off already.

    Raises:
        UserError: Slurm does not let us.
    """
    refused: UserError | None = None
    for _ in range(20):
        try:
            before = fields_of(job).get("ExcNodeList", "(null)")
            nodes = [*([before] if before != "(null)" else []), *unfit]
            ask_slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
            return
        except UserError as error:
            # It may not be queued yet.
            refused = error
            time.sleep(0.2)
    raise UserError(f"job {job} could not be kept off {', '.join(unfit)} ({refused})")


if __name__ == "__main__":
    sys.exit(run_command(main))
