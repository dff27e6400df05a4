"""A Python process beside this one, at the end of a pipe, also where multiprocessing allows none.

Its own children may have none: a worker that is one of them starts what it needs here.
"""

import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
IS_INSTALLED = CHECKOUT.name in ("site-packages", "dist-packages")
"""Whether that is where Python looks anyway. In front of Python's own modules it must not be: other packages there are
named as some of those are (``dataclasses``)."""


def start(module: str, function: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start ``module.function(pipe)`` in a new process; returns it and this end of the pipe.

    The pipe's other end is closed when the process ends, and the other way round.
    """
    ours, theirs = Pipe()
    script = (
        "import sys; from multiprocessing.connection import Connection\n"
        f"from {module} import {function}\n"
        f"with Connection(int(sys.argv[1])) as pipe: {function}(pipe)"
    )
    command = [sys.executable, "-c", script, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment())
    theirs.close()
    return process, ours


def environment() -> dict[str, str]:
    """This process's, in which Python finds what it finds here."""
    places = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path, str(CHECKOUT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, places)))}
