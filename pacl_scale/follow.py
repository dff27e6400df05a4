"""Show a job's log while it runs: what ``--follow`` does. Files are read; Slurm is asked now and then."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pacl_scale.controller import ask_slurm
from pacl_scale.errors import EXIT_FAILED, UserError

READ_SECONDS = 0.5
ASK_SECONDS = 15.0
OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "GONE",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
"""States of jobs that are over; in any other one, SIGNALING and STAGE_OUT among them, a job has something to do."""


def follow(number: str, logs: Sequence[Path], output: TextIO | None = None, ask_seconds: float = ASK_SECONDS) -> int:
    """Print what is added to ``logs`` until the job is over; returns 0 if it completed.

    Ctrl-C ends the showing, not the job.
    """
    output = output or sys.stdout
    read = dict.fromkeys(logs, 0)
    state, asked = "", 0.0
    try:
        while True:
            over = False
            if time.monotonic() - asked >= ask_seconds or not asked:
                asked = time.monotonic()
                try:
                    now = final_or_current(number)
                except UserError as error:
                    # A controller that restarts answers again soon.
                    now = state
                    print(f"-- {error}", file=output)
                over = now in OVER
                if now != state:
                    state = now
                    print(f"-- job {number} is {state}", file=output)
            for log in logs:
                read[log] = show(log, read[log], output)
            output.flush()
            if over:
                return 0 if state == "COMPLETED" else EXIT_FAILED
            time.sleep(READ_SECONDS)
    except KeyboardInterrupt:
        print(f"-- job {number} goes on; cancel it with: scancel {number}", file=output)
        return 0


def final_or_current(number: str) -> str:
    """State of a job, also some minutes after its end; GONE when Slurm has forgotten it."""
    try:
        words = ask_slurm("squeue", "--noheader", "--states=all", "--jobs", number, "--format", "%T").split()
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        words = []
    return words[0] if words else "GONE"


def show(log: Path, start: int, output: TextIO) -> int:
    """Print a file from a position on; returns the position after it."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            text = file.read()
    except OSError:
        return start
    output.write(text.decode("utf-8", errors="replace"))
    return start + len(text)
