"""Threads for what may hang: they can be left behind.

The threads of ThreadPoolExecutor are waited for when it is shut down, and once more when the program ends. A read of a
store or of a network file system may hang until its time-out, and nothing in Python interrupts it.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pacl_scale.data.ranges import Closed

Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Workers:
    """Daemon threads that carry out tasks in the order in which they come.

    Args:
        count: of threads.
        name: of each thread, before its number.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Have ``function(*arguments)`` carried out. After :meth:`close`, and if that comes first, the future's result
        is :class:`~pacl_scale.data.ranges.Closed`."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(Closed())
                return future
            self._open.add(future)
        self._tasks.put((future, function, arguments))
        return future

    def close(self, wait_s: float) -> None:
        """Take no more tasks and give up all that are not done; wait so many seconds for the threads to end."""
        with self._lock:
            self._closed = True
            for future in self._open:
                future.set_exception(Closed())
            self._open.clear()
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        # A name for the task would keep its result until the next one comes.
        while self._carry_out(self._tasks.get()):
            pass

    def _carry_out(self, task: Task | None) -> bool:
        if task is None:
            return False
        future, function, arguments = task
        result, failure = None, None
        if not future.done():
            try:
                result = function(*arguments)
            except BaseException as error:
                failure = error
        with self._lock:
            if future in self._open:
                self._open.remove(future)
                if failure is None:
                    future.set_result(result)
                else:
                    future.set_exception(failure)
        return True
