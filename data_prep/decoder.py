"""Pictures that take their process with them: a shard that died while decoding is decoded next door the next time.

A decoder written in C can crash, take all memory or never return, on the same picture at every attempt. A note on the
local disk tells the next attempt that the last one ended within a decoder. That attempt hands each picture to a process
of its own; the one that does not come back gets the cause ``decoder``, and the shard has an end.
"""

import io
import os
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from data_prep import beside

DECODE_SECONDS = 60.0
"""For one picture in a process of its own, beside a few seconds for its start."""

Resize = Callable[..., tuple[Any, ...]]


class WatchedResizer:
    """A resizer that leaves a note while it is at work, and is careful if it finds one.

    Args:
        make: makes the resizer; picklable, a process next door makes its own.
        note: local file, the same for each attempt at a shard.
        done: is told the bytes of each picture that was dealt with.
    """

    def __init__(self, make: Callable[[], Resize], note: str, done: Callable[[int], None]) -> None:
        self._note = os.open(note, os.O_RDWR | os.O_CREAT, 0o600)
        self._done = done
        self.is_careful = os.pread(self._note, 1, 0) == b"1"
        self._neighbour = Neighbour(make) if self.is_careful else None
        self._resize: Resize = self._neighbour or make()

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """As img2dataset's Resizer."""
        os.pwrite(self._note, b"1", 0)
        try:
            return self._resize(img_stream, blurring_bbox_list)
        finally:
            self._done(img_stream.getbuffer().nbytes)
            if not self.is_careful:
                os.pwrite(self._note, b"0", 0)

    def close(self) -> None:
        """End the process next door, if there is one."""
        os.close(self._note)
        if self._neighbour is not None:
            self._neighbour.end()


class Neighbour:
    """A resizer in a process of its own, which is started again when a picture has killed it."""

    def __init__(self, make: Callable[[], Resize], seconds: float = DECODE_SECONDS) -> None:
        self._make = make
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
        """As img2dataset's Resizer, with an error for a picture that does not come back."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._pipe is not None
        try:
            self._pipe.send_bytes(img_stream.getvalue())
            if self._pipe.poll(self._seconds):
                answer: tuple[Any, ...] = self._pipe.recv()
                return answer
            fault = f"not decoded in {self._seconds:g} s"
        except (EOFError, OSError):
            fault = f"its process ended with status {self._process.wait()}"
        self.end()
        return None, None, None, None, None, f"decoder: {fault}"

    def end(self) -> None:
        """Kill the process."""
        if self._process is None or self._pipe is None:
            return
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        self._process, self._pipe = beside.start("data_prep.decoder", "serve")
        self._pipe.send(self._make)
        try:
            self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the decoder's process did not start ({self._process.wait()})") from error


def serve(pipe: Connection) -> None:
    """Life of the process next door: pictures in, answers out, until its parent is gone."""
    resize = pipe.recv()()
    pipe.send("ready")
    while True:
        try:
            content = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send(resize(io.BytesIO(content)))
