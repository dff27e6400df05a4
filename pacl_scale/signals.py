"""Being asked to stop: signals set a flag that the training loop looks at between steps.

Slurm sends a chosen signal (``--signal=USR1@120``) ahead of a time limit and SIGTERM at preemption; submitit uses
SIGUSR2. The ranks that hear of it tell the others (:func:`pacl_scale.health.agree`), save together, and end with
:data:`pacl_scale.errors.EXIT_REQUEUE`, which asks whoever started them to start them again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """Whether a signal asked this process to stop, and which."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


@contextmanager
def heard() -> Iterator[StopRequest]:
    """For the length of a ``with`` block, a stopping signal sets the yielded request instead of ending the process."""
    request = StopRequest()
    with _handlers(request._hear):
        yield request


@contextmanager
def passed_on() -> Iterator[None]:
    """For the length of a ``with`` block, hand stopping signals to the processes that this one started."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    with _handlers(pass_on):
        yield


@contextmanager
def _handlers(handler: object) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOPPING}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
