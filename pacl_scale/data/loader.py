"""The process that loads a rank's data, see :mod:`pacl_scale.data.own_process`."""

import itertools
import mmap
import os
import pickle
import socket
import threading
import traceback
from collections import Counter
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacl_scale import log
from pacl_scale.data.batch import PairBatch
from pacl_scale.data.own_process import Failure, Iteration, Message, Place
from pacl_scale.data.run import Run
from pacl_scale.data.stream import PairStream
from pacl_scale.distributed import World


class SharedBuffers:
    """Memory that another process maps as well; takes the place of :class:`~pacl_scale.data.buffers.Buffers`.

    A block is used again when :meth:`take_back` says so, not before.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._blocks: dict[int, tuple[int, int]] = {}
        """Number and bytes of each block, by address."""
        self._memory: dict[int, np.ndarray] = {}
        self._free: dict[int, list[int]] = {}
        """Numbers of unused blocks, by bytes."""
        self._lock = threading.Lock()
        self.new: list[tuple[int, int, int]] = []
        """Number, bytes and file descriptor of the blocks made since somebody emptied this."""

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor with any content."""
        size = 4 * int(np.prod(shape))
        with self._lock:
            free = self._free.setdefault(size, [])
            number = free.pop() if free else self._make(size)
        return torch.from_numpy(self._memory[number].reshape(shape))

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor lies; None if that is not here, or in the midst of a block."""
        number, size = self._blocks.get(tensor.data_ptr(), (0, -1))
        return Place(number, tuple(tensor.shape)) if size == 4 * tensor.numel() else None

    def take_back(self, number: int) -> None:
        """The other process does not need this block any more."""
        with self._lock:
            self._free[self._memory[number].nbytes].append(number)

    def _make(self, size: int) -> int:
        number = next(self._numbers)
        descriptor = os.memfd_create("pacl-batch")
        os.ftruncate(descriptor, size)
        memory = np.frombuffer(mmap.mmap(descriptor, size), np.float32)
        self._memory[number] = memory
        self._blocks[memory.ctypes.data] = number, size
        self.new.append((number, size, descriptor))
        return number


class Loader:
    """The other end: iterates, and sends a batch for each one that is asked for."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._link = Connection(os.dup(descriptor))
        self._buffers = SharedBuffers()
        self._wanted = threading.Semaphore(0)

    def work(self) -> None:
        """Carry out the iteration that is sent, until its end or until nobody listens."""
        try:
            iteration, ahead = self._listen()
            for _ in range(ahead):
                self._wanted.release()
            threading.Thread(target=self._obey, daemon=True).start()
            self._iterate(iteration)
        except BaseException as error:
            self._say(Failure(sendable(error), traceback.format_exc()))
        # The other end says when it has read everything.
        threading.Event().wait()

    def _iterate(self, iteration: Iteration) -> None:
        log.configure(iteration.rank)
        world = World(iteration.rank, iteration.size, 0, torch.device("cpu"))
        stream = PairStream(
            iteration.config, iteration.seed, iteration.global_batch_size, world, ordered=iteration.ordered
        )
        stream.load_state(iteration.state)
        stream.undecoded = iteration.undecoded
        if iteration.preprocess is not None:
            stream.prepare_pictures_for(iteration.preprocess)
        stream.buffers = self._buffers
        run = stream.begin(iteration.start, iteration.stop)
        assert isinstance(run, Run)
        while True:
            self._wanted.acquire()
            batch = run.next()
            self._say_batch(batch, run.retried)
            if batch is None:
                return

    def _say_batch(self, batch: PairBatch | None, retried: Counter[str]) -> None:
        places: dict[str, Place] = {}
        for field in fields(batch) if batch is not None else ():
            value = getattr(batch, field.name)
            if isinstance(value, Tensor) and (place := self._buffers.place(value)) is not None:
                places[field.name] = place
        if batch is not None:
            elsewhere: dict[str, Any] = dict.fromkeys(places)
            batch = replace(batch, **elsewhere)
        new, self._buffers.new = self._buffers.new, []
        self._say(Message(batch, places, [(number, size) for number, size, _ in new], retried))
        if new:
            socket.send_fds(self._socket, [b"\0"], [descriptor for _, _, descriptor in new])
            for _, _, descriptor in new:
                os.close(descriptor)

    def _say(self, said: Message | Failure) -> None:
        self._link.send_bytes(pickle.dumps(said))

    def _listen(self) -> Any:
        return pickle.loads(self._link.recv_bytes())  # noqa: S301  # the rank wrote it

    def _obey(self) -> None:
        """Hear which blocks are free and that one more batch is wanted, until the other end is gone."""
        try:
            while True:
                for block in self._listen():
                    self._buffers.take_back(block)
                self._wanted.release()
        except (EOFError, OSError):
            # Not by way of the main thread, which may wait for a store that hangs.
            os._exit(0)


def sendable(error: BaseException) -> BaseException:
    """``error``, or its sentence where it cannot be sent to another process."""
    try:
        return pickle.loads(pickle.dumps(error))  # noqa: S301  # pickled just here
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def main(descriptor: int) -> None:
    """The process's life; its end of the socket is ``descriptor``."""
    Loader(descriptor).work()
