"""An iteration in a process of its own, so that loading data never holds up the launching of GPU work.

Threads of one process share Python's lock. Loading a picture holds it for a quarter of a millisecond, in small pieces;
a training step launches thousands of kernels, lets go of the lock at each, and waits for its turn again. So a rank on a
GPU has its pictures loaded next door. Pixels come through memory that both processes map; the rest is small.

Only the two ends of one socket speak to each other. Whichever process ends, the other learns of it by that.
"""

import json
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pacl_scale.data.batch import PairBatch
from pacl_scale.data.run import Handed, take_next
from pacl_scale.errors import RunFailed

if TYPE_CHECKING:
    from pacl_scale.data.stream import DataConfig, PairStream

IGNORED = "HUP INT TERM USR1 USR2"
"""Signals that launchers send to every process of a job; only the rank itself answers them."""

BEGIN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pacl_scale.data.loader import main
main(int(sys.argv[2]))
"""
"""Modules are looked for where the rank finds them, in that order: PYTHONPATH would come before Python's own."""

CLOSING_S = 1.0
"""Seconds for the process to end by itself."""


@dataclass(frozen=True)
class Iteration:
    """Which iteration the process carries out."""

    config: "DataConfig"
    seed: int
    global_batch_size: int
    rank: int
    size: int
    ordered: bool
    state: dict[str, Any]
    preprocess: Any
    undecoded: bool
    start: int
    stop: int | None


@dataclass(frozen=True)
class Place:
    """Where a tensor of a batch lies."""

    block: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """What the process says: a batch, or None after the last one."""

    batch: PairBatch | None
    places: dict[str, Place]
    """Of those tensors of the batch that lie in shared memory, by field."""
    new: list[tuple[int, int]]
    """Blocks that the rank does not know yet, and their bytes; file descriptors of them follow."""
    retried: Counter[str]


@dataclass(frozen=True)
class Failure:
    """What ended the iteration."""

    error: BaseException
    trace: str


class OwnProcessRun:
    """An iteration of ``stream`` in a process of its own; takes the place of a :class:`~pacl_scale.data.run.Run`."""

    def __init__(self, stream: "PairStream", state: dict[str, Any], start: int, stop: int | None) -> None:
        config = stream.config
        alone = replace(
            config,
            own_process=False,
            prefetch_batches=1,
            decode_threads=config.decode_threads or torch.get_num_threads(),
        )
        world = stream.world
        iteration = Iteration(
            alone, stream.seed, stream.global_batch_size, world.rank, world.size, stream.ordered, state,
            stream.preprocess, stream.undecoded, start, stop,
        )  # fmt: skip
        self._buffers = stream.buffers if world.device.type == "cuda" else None
        """Page-locked memory that batches are copied to, where they go to a GPU."""
        self.retried: Counter[str] = Counter()
        """Reads that were tried again, by cause."""
        self._process = os.getpid()
        self._blocks: dict[int, mmap.mmap] = {}
        self._unused: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[Handed] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._child = _start(theirs.fileno())
        self._link = Connection(os.dup(self._socket.fileno()))
        self._send((iteration, config.prefetch_batches))
        self._thread = threading.Thread(target=self._receive, name="batches", daemon=True)
        self._thread.start()

    def next(self) -> PairBatch | None:
        """See :meth:`pacl_scale.data.run.Run.next`.

        Raises:
            RunFailed: the process ended.
        """
        batch = take_next(self._batches, self._closing, self._process)
        unused = []
        with suppress(queue.Empty):
            while True:
                unused.append(self._unused.get_nowait())
        # It may have ended after its last batch.
        with suppress(OSError):
            self._send(unused)
        return batch

    def close(self) -> None:
        """End the process, and wait for it."""
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._child.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._thread.join()
        self._link.close()
        self._socket.close()
        # Whoever waits for a batch in another thread waits no longer.
        self._batches.put(None)

    @property
    def is_of_this_process(self) -> bool:
        """See :attr:`pacl_scale.data.run.Run.is_of_this_process`."""
        return self._process == os.getpid()

    def _send(self, said: Any) -> None:
        self._link.send_bytes(pickle.dumps(said))

    def _receive(self) -> None:
        try:
            while True:
                said = pickle.loads(self._link.recv_bytes())  # noqa: S301  # our own process wrote it
                if isinstance(said, Failure):
                    said.error.__cause__ = RuntimeError(f"in the process that loads data:\n{said.trace}")
                    self._batches.put(said.error)
                    return
                self._batches.put(self._take(said))
                if said.batch is None:
                    return
        except (EOFError, OSError):
            if not self._closing.is_set():
                self._batches.put(RunFailed(f"the process that loads data {ended(self._child.wait())}"))
        except BaseException as error:
            # Whatever it is, the consumer has to learn of it rather than wait for ever.
            self._batches.put(error)

    def _take(self, said: Message) -> PairBatch | None:
        self.retried = said.retried
        if said.new:
            _, descriptors, _, _ = socket.recv_fds(self._socket, 1, len(said.new))
            for descriptor, (block, size) in zip(descriptors, said.new, strict=True):
                self._blocks[block] = mmap.mmap(descriptor, size)
                os.close(descriptor)
        if said.batch is None:
            return None
        tensors: dict[str, Any] = {name: self._tensor(place) for name, place in said.places.items()}
        return replace(said.batch, **tensors)

    def _tensor(self, place: Place) -> Tensor:
        count = int(np.prod(place.shape))
        view = np.frombuffer(self._blocks[place.block], np.float32, count).reshape(place.shape)
        if self._buffers is not None:
            pinned = self._buffers.empty(*place.shape)
            pinned.copy_(torch.from_numpy(view))
            self._unused.put(place.block)
            return pinned
        # The tensor holds the view; the block can be used again when the last tensor on it is gone.
        weakref.finalize(view, self._unused.put, place.block).atexit = False
        return torch.from_numpy(view)


def _start(descriptor: int) -> "subprocess.Popen[bytes]":
    """Start the process; it finds its end of the socket under ``descriptor``."""
    words = [sys.executable, "-c", BEGIN, json.dumps(sys.path), str(descriptor)]
    # Signals are to be ignored from its first moment on, and that is what survives exec.
    words = ["sh", "-c", f'trap "" {IGNORED}; exec "$@"', "sh", *words]
    # It has no business on a GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=environment)


def ended(status: int) -> str:
    """How a process ended, as the end of a sentence."""
    if status >= 0:
        return f"ended with status {status}"
    # Shared memory that cannot be had, for the container allows no more, shows as a bus error.
    hint = ", as when memory runs out" if -status in (signal.SIGKILL, signal.SIGBUS) else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"
