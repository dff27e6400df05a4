"""Tensors whose memory is used again when they are gone.

A batch of pictures is tens of megabytes. Memory of that size comes fresh from the kernel every time, and its page
faults cost as much as decoding; so a stream keeps the memory of batches that nobody holds any more.
"""

import threading
import weakref
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Memory(Protocol):
    """Where a stream's batches lie."""

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor with any content."""
        ...


class Buffers:
    """Float32 tensors of one stream.

    Args:
        pin: page-locked memory, for copies to a GPU that do not block; PyTorch keeps that for use again by itself.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """A tensor with any content. Its memory is given to another one when it and all its views are gone."""
        if self._pin:
            return torch.empty(shape, pin_memory=True)
        with self._lock:
            free = self._free.setdefault(shape, [])
            memory = free.pop() if free else np.empty(shape, np.float32)
        # The tensor holds the view, not the memory; so the view goes when the last tensor on it does.
        view = memory[...]
        weakref.finalize(view, free.append, memory).atexit = False
        return torch.from_numpy(view)
