"""How much of strangers' bytes one process holds at a time."""

import threading
import time


class ByteBudget:
    """Bytes that bodies under way and waiting for the decoder may take together.

    A body of announced length takes all of it before its first byte is read. One without takes a little first and the
    most that a body may have once that is used up; so whoever holds more than a little can always come to its end, and
    nobody waits for ever.

    Args:
        total: in bytes; at least ``first`` for every thread and the largest body beside.
    """

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    def take(self, count: int, ends: float) -> None:
        """Take ``count`` bytes. Raises TimeoutError if they are not free at ``ends`` (monotonic clock)."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= count, max(ends - time.monotonic(), 0.0)):
                raise TimeoutError("too many large bodies at once")
            self._free -= count

    def give_back(self, count: int) -> None:
        """``count`` bytes are free again."""
        with self._changed:
            self._free += count
            self._changed.notify_all()

    @property
    def free(self) -> int:
        """Bytes that can be taken now."""
        return self._free
