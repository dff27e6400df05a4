"""Work that misbehaves, for the test of supervised workers; light to import, because every worker does."""

import os
import signal
import time
from pathlib import Path


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
