"""Work that misbehaves, for the test of supervised workers; light to import, because every worker does."""

import os
import signal
import time
from pathlib import Path

import psutil


def make_badly(folder: str, what: dict[int, str], shard: int) -> None:
    """Make the file of a shard, at a second attempt if it is to misbehave."""
    marker = Path(folder, f"{shard}.tried")
    first_time = not marker.exists()
    marker.touch()
    if what[shard] == "kills its pool" and first_time:
        # Of the process of img2dataset's pool, that is: its supervisor's parent.
        os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)
        time.sleep(600)
    if what[shard] == "hangs" and first_time:
        time.sleep(600)
    Path(folder, f"{shard}.made").touch()


def misbehave(task: tuple[str, str]) -> None:
    """Do what the first word says, most of it only until the marker file (second word) is there."""
    what, marker = task
    first_time = not os.path.exists(marker)
    Path(marker).touch()
    if what == "dies" and first_time:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hangs" and first_time:
        time.sleep(600)
    if what == "raises":
        raise ValueError("never\nworks")
