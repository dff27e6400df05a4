"""Memory comes back when the last tensor on it is gone, and not before."""

import gc

import torch

from pacl_scale.data.buffers import Buffers


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers(pin=False)
    first = buffers.empty(4, 5)
    address, part = first.data_ptr(), first[2:]
    del first
    gc.collect()
    held = buffers.empty(4, 5)
    assert held.data_ptr() != address  # a view of the first is alive
    part.fill_(7)
    assert held.shape == (4, 5)
    del part
    gc.collect()
    assert buffers.empty(4, 5).data_ptr() == address
    assert buffers.empty(2, 2).shape == (2, 2)


def test_numpy_views_hold_it_too() -> None:
    buffers = Buffers(pin=False)
    tensor = buffers.empty(3)
    array, address = tensor.numpy(), tensor.data_ptr()
    del tensor
    gc.collect()
    other = buffers.empty(3)
    assert other.data_ptr() != address
    other.fill_(1)
    array[:] = 2
    assert torch.equal(other, torch.ones(3))
