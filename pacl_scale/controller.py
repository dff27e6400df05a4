"""Questions to Slurm's controller, through its own commands."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from pacl_scale.errors import UserError

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 900.0
"""How long a batch script waits for a controller that is down: its job and its nodes depend on the answer."""

PAUSE_SECONDS = 5.0

SILENCE = re.compile(
    "contact slurm controller|timed out|Zero Bytes were transmitted|Connection refused|Connection reset|"
    "Transport endpoint|backup mode|standby mode|Unable to establish controller"
)
"""What Slurm's commands say when nobody answers them, as against a refusal."""


class Unanswered(UserError):
    """The controller did not answer; it may when asked again."""


def ask_slurm(*words: str) -> str:
    """What a command of Slurm prints.

    Raises:
        Unanswered: the controller is down or out of reach.
        UserError: the command is absent, or Slurm refuses.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise UserError(f"there is no Slurm here ({words[0]} is not found); go to a login node") from error
    except subprocess.TimeoutExpired as error:
        raise Unanswered(f"{' '.join(words)}: Slurm did not answer within two minutes") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise (Unanswered if SILENCE.search(said) else UserError)(f"{' '.join(words)}: {said}")
    return done.stdout


def patiently(question: Callable[[], Answer]) -> Answer:
    """The answer to ``question``, asked again for :data:`PATIENCE_SECONDS` while the controller is silent.

    Raises:
        Unanswered: it stayed silent.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return question()
        except Unanswered as error:
            if time.monotonic() > deadline:
                raise
            # What a batch script's question prints to stdout may be read as its answer.
            print(f"{error}; asked again", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)


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


def hostnames(text: str) -> list[str]:
    """The names in Slurm's short form, as in ``n[3-4,7]``."""
    return ask_slurm("scontrol", "show", "hostnames", text).split()
