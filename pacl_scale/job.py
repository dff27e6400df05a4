"""What a batch script asks about its run: ``python -m pacl_scale.job claim|requeue RUN``, inside a Slurm job.

``claim`` comes before training: only one living job may train in a run directory. ``requeue`` comes after a training
that ended before its end and not by a user's mistake: it says whether the job should be queued again, and does so.
``<run>/job.json`` holds what is known of the run's job. Light to import: a batch script waits for it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pacl_scale import config
from pacl_scale.errors import RunFailed, UserError, run_command

PROG = "python -m pacl_scale.job"


@dataclass
class JobConfig:
    """Claim a run directory for this Slurm job, or queue this job again after its training was asked to stop."""

    attempts: int = 3
    """How often in a row a job is queued again without a newer checkpoint before it is given up."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts must be at least 1")


@dataclass
class Note:
    """``<run>/job.json``: the newest job of a run, and how it fares."""

    job: str
    """Slurm's number of the job."""
    step: int = 0
    """Newest checkpoint when the job was queued again last."""
    fruitless: int = 0
    """Times in a row that it was queued again without a newer one."""


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
        claim(run, job)
    else:
        requeue(run, job, settings.attempts)
    return 0


def claim(run: Path, job: str) -> None:
    """Note that ``job`` trains in ``run``.

    Raises:
        UserError: another job that trains there is queued or running.
    """
    note = read(run)
    if note and note.job != job:
        refuse_if_alive(run, note)
    if note is None or note.job != job:
        write(run, Note(job))


def refuse_if_alive(run: Path, note: Note) -> None:
    """Raise :class:`UserError` if the noted job is still queued or running."""
    state = state_of(note.job)
    if state:
        raise UserError(f"job {note.job} of run {run} is {state}; wait for it, or end it with: scancel {note.job}")


def requeue(run: Path, job: str, attempts: int) -> None:
    """Queue ``job`` again, unless it is being ended by somebody or goes in circles.

    Raises:
        RunFailed: it was queued again ``attempts`` times in a row and no checkpoint is newer than before.
    """
    from pacl_scale import checkpoint

    note = read(run)
    if note is None or note.job != job:
        note = Note(job)
    newest = max(checkpoint.steps_in(_checkpoints(run)), default=0)
    fruitless = 0 if newest > note.step else note.fruitless + 1
    if fruitless > attempts:
        raise RunFailed(
            f"run {run} is not queued again: its newest checkpoint is still that of step {newest} "
            f"after {attempts} more attempts"
        )
    write(run, Note(job, newest, fruitless))
    state = state_of(job)
    if state != "RUNNING":
        # Cancelled, or queued again by somebody else: not ours to decide.
        print(f"job {job} is {state or 'gone'} and is not queued again from here", flush=True)
        return
    print(f"job {job} is queued again; its newest checkpoint is that of step {newest}", flush=True)
    ask_slurm("scontrol", "requeue", job)


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


def _checkpoints(run: Path) -> str:
    saved = run / "config.yaml"
    settings = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    return settings.get("checkpoint", {}).get("folder") or str(run / "checkpoints")


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
