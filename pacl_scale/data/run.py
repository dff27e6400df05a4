"""The threads behind one iteration of a stream."""

import os
import queue
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from pacl_scale.data.assemble import PendingBatch
from pacl_scale.data.batch import PairBatch
from pacl_scale.data.order import Mixture, Picks
from pacl_scale.data.ranges import ShardReader
from pacl_scale.data.reader import ReadAhead, ReadPlan

if TYPE_CHECKING:
    from pacl_scale.data.stream import PairStream

SAMPLES_A_TASK = 8
"""Samples that a decode thread takes at a time: enough that handing them out costs nothing."""

Handed = PairBatch | BaseException | None
"""What threads hand to whoever iterates: a batch, what went wrong, or the end."""

FORKED = "the stream was being iterated when this process was forked; iterate it anew"
CLOSED = "the stream was closed or moved while it was iterated; iterate it anew"


def take_next(
    batches: "queue.Queue[Handed] | queue.SimpleQueue[Handed]", closing: threading.Event, process: int
) -> PairBatch | None:
    """What an iteration that began in ``process`` hands out next; None after the last batch.

    Raises:
        RuntimeError: it was closed, or this is another process. What went wrong in the iteration is raised as it is.
    """
    if process != os.getpid():
        raise RuntimeError(FORKED)
    item = batches.get()
    if closing.is_set():
        raise RuntimeError(CLOSED)
    if isinstance(item, BaseException):
        raise item
    return item


class Run:
    """The threads behind one iteration: reads ahead, decode threads, and one that puts batches together."""

    def __init__(
        self, stream: "PairStream", mixture: Mixture, readers: list[ShardReader], start: int, stop: int | None
    ) -> None:
        config = stream.config
        self._stream, self._readers = stream, readers
        self._plan = ReadPlan(mixture, self._readers, stream.world, start, stream.global_batch_size, stop)
        budget = config.read.read_ahead_mb << 20
        self._ahead = ReadAhead(self._plan, self._readers, config.read.fetch_threads, budget)
        threads = config.decode_threads or torch.get_num_threads()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._process = os.getpid()
        self._batches: queue.Queue[Handed] = queue.Queue(config.prefetch_batches)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._thread.start()

    def next(self) -> PairBatch | None:
        """The next batch; None after the last. Raises what went wrong in a thread, RuntimeError after the end."""
        return take_next(self._batches, self._closing, self._process)

    def close(self) -> None:
        """Stop and wait for the threads to end, but not for reads that hang."""
        self._closing.set()
        self._ahead.close()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._thread.join()
        # Whoever waits for a batch in another thread waits no longer.
        with suppress(queue.Full):
            self._batches.put_nowait(None)

    @property
    def is_of_this_process(self) -> bool:
        """Whether its threads run here, and not in the process that forked this one."""
        return self._process == os.getpid()

    @property
    def retried(self) -> Counter[str]:
        """Reads that were tried again, by cause."""
        return sum((reader.retried for reader in self._readers), Counter())

    def _produce(self) -> None:
        try:
            pending: deque[PendingBatch] = deque()
            number = 0
            while not self._closing.is_set():
                # One batch is decoded while the one before it is put together; nothing is planned before the first one.
                wanted = min(2, number + 1)
                while len(pending) < wanted and (picks := self._plan.batch(number)) is not None:
                    pending.append(self._begin(number, picks))
                    number += 1
                if not pending:
                    break
                self._hand_over(pending.popleft().finish())
            self._hand_over(None)
        except BaseException as error:
            # Whatever it is, the consumer has to learn of it rather than wait for ever.
            self._hand_over(error)

    def _hand_over(self, item: Handed) -> None:
        while not self._closing.is_set():
            try:
                self._batches.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _begin(self, number: int, picks: Picks) -> PendingBatch:
        awaited = self._ahead.start(number, picks)
        pending = PendingBatch(self._stream, picks, position_after=self._plan.span(number)[1])
        for begin in range(0, len(picks), SAMPLES_A_TASK):
            rows = range(begin, min(begin + SAMPLES_A_TASK, len(picks)))
            pending.tasks.append(self._decoders.submit(pending.load, rows, [awaited[row] for row in rows]))
        if number:
            # Reads for later batches are begun a batch at a time, and after the first one.
            self._ahead.read_on(most=len(picks))
        return pending
