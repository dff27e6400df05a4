"""Collectives of tensors whose first axis has another length on each rank, and nothing at all on a rank alone."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# torch 2.14 gave these two new names and deprecated the old ones.
_NEW_NAMES = hasattr(distributed, "all_gather_single")
ALL_GATHER = "all_gather_single" if _NEW_NAMES else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if _NEW_NAMES else "reduce_scatter_tensor"


class Gather(torch.autograd.Function):
    """Concatenation over ranks; the gradient is summed over ranks and each keeps its part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather(local, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(grads[0], ctx.counts, ctx.group), None, None


def gather(local: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """(sum of counts, ...) from (own count, ...). Ranks with fewer rows than the longest send padding."""
    if len(counts) == 1:
        return local.clone()
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    everything = local.new_empty(len(counts) * longest, *local.shape[1:])
    getattr(distributed, ALL_GATHER)(everything, padded, group=group)
    parts = everything.view(len(counts), longest, *local.shape[1:])
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatter(everything: Tensor, counts: list[int], group: ProcessGroup | None) -> Tensor:
    """The adjoint of :func:`gather`."""
    if len(counts) == 1:
        return everything.clone()
    longest = max(counts)
    padded = everything.new_zeros(len(counts), longest, *everything.shape[1:])
    for rank, part in enumerate(everything.split(counts)):
        padded[rank, : len(part)] = part
    own = everything.new_empty(longest, *everything.shape[1:])
    getattr(distributed, REDUCE_SCATTER)(own, padded.flatten(0, 1), group=group)
    return own[: counts[distributed.get_rank(group)]]


def counts_of(texts: Tensor, group: ProcessGroup | None) -> list[int]:
    """How many texts each rank has."""
    if world_size(group) == 1:
        return [len(texts)]
    own = torch.tensor([len(texts)], device=texts.device)
    counts = own.new_empty(world_size(group))
    getattr(distributed, ALL_GATHER)(counts, own, group=group)
    return counts.tolist()


def all_reduce(values: Tensor, operation: Any, group: ProcessGroup | None) -> None:
    """Over the ranks of ``group``, in place."""
    if world_size(group) > 1:
        distributed.all_reduce(values, op=operation, group=group)


def world_size(group: ProcessGroup | None) -> int:
    """Ranks of ``group``; 1 outside of any."""
    return distributed.get_world_size(group) if distributed.is_initialized() else 1


def rank_in(group: ProcessGroup | None) -> int:
    """This rank's number in ``group``; 0 outside of any."""
    return distributed.get_rank(group) if distributed.is_initialized() else 0
