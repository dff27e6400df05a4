"""Worker processes that may die or hang without taking the run with them.

The pool of the standard library loses a task whose process is killed, and then waits for it for ever: the hang at
the end that users of img2dataset know. Here the parent knows which process has which task.
"""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from os import _exit
from time import monotonic
from typing import Any

TASKS_PER_PROCESS = 5
"""Then a process is replaced: decoders and resolvers leak."""

ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """How a task ended: ``fault`` is ``None`` or one line about the last attempt; ``value`` is what it gave."""

    task: Any
    fault: str | None
    value: Any = None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Any
    task: Any = None
    ends: float = field(default=float("inf"))
    done: int = 0

    @property
    def is_free(self) -> bool:
        return self.task is None


def run_tasks(work: Callable[[Any], Any], tasks: Iterable[Any], processes: int, deadline_s: float) -> Iterator[Outcome]:
    """Do ``work(task)`` for each task in ``processes`` spawned processes; yield outcomes as they come.

    A task that raises, outlives ``deadline_s`` seconds (its process is killed) or whose process dies is done
    again, three times in all. Workers end by themselves when this process dies.

    Args:
        work: called in a worker; must be picklable.
        tasks: hashable and picklable; taken one at a time, as workers become free.
    """
    fresh = iter(tasks)
    again: deque[Any] = deque()
    faults: dict[Any, int] = {}
    workers: list[_Worker] = []
    try:
        while True:
            _hand_out(workers, fresh, again, work, processes, deadline_s)
            busy = [worker for worker in workers if not worker.is_free]
            if not busy:
                return
            for worker, fault, value in _wait(busy):
                task, worker.task = worker.task, None
                if not worker.process.is_alive() or worker.done >= TASKS_PER_PROCESS:
                    _end(worker)
                    workers.remove(worker)
                if fault is not None:
                    faults[task] = faults.get(task, 0) + 1
                    if faults[task] < ATTEMPTS:
                        again.append(task)
                        continue
                yield Outcome(task, fault, value)
    finally:
        for worker in workers:
            _end(worker)


def _hand_out(
    workers: list[_Worker],
    fresh: Iterator[Any],
    again: deque[Any],
    work: Callable[[Any], Any],
    processes: int,
    deadline_s: float,
) -> None:
    """Give every free worker a task, starting workers up to ``processes`` as long as there are tasks."""
    while True:
        free = next((worker for worker in workers if worker.is_free), None)
        if free is None and len(workers) >= processes:
            return
        task = again.popleft() if again else next(fresh, None)
        if task is None:
            return
        if free is None:
            free = _start(work)
            workers.append(free)
        free.task, free.ends = task, monotonic() + deadline_s
        with contextlib.suppress(OSError):  # it died meanwhile: the next wait sees that
            free.pipe.send(task)


def _wait(busy: list[_Worker]) -> list[tuple[_Worker, str | None, Any]]:
    """The workers that are through with their task, each with fault and value; waits for at least one."""
    patience = max(0.0, min(worker.ends for worker in busy) - monotonic())
    handles = [handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)]
    ready = set(connection.wait(handles, timeout=None if patience == float("inf") else patience))
    through: list[tuple[_Worker, str | None, Any]] = []
    for worker in busy:
        if worker.pipe in ready or worker.process.sentinel in ready:
            through.append((worker, *_answer(worker)))
        elif monotonic() >= worker.ends:
            worker.process.kill()
            worker.process.join()
            through.append((worker, "it was not done at its deadline", None))
    return through


def _answer(worker: _Worker) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = worker.pipe.recv()
        worker.done += 1
        return answer
    except (EOFError, OSError):
        worker.process.join()
        return f"its process died ({worker.process.exitcode})", None


def _start(work: Callable[[Any], Any]) -> _Worker:
    # Spawned, not forked: s3fs and the tagger have threads that do not survive a fork.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    if worker.task is None:
        worker.process.join(5)
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join()
    worker.process.close()


def _serve(pipe: Any, work: Callable[[Any], Any]) -> None:
    """A worker's life: tasks in, faults out, until the pipe closes."""
    # Ctrl-C reaches the whole group; the parent is the one that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        value = fault = None
        try:
            value = work(task)
        except Exception as error:
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        pipe.send((fault, value))


def die_with_parent() -> None:
    """End this process when its parent has died: an orphan would go on to write into a data set of others."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        _exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
