"""The similarity in tiles, with its own backward: nothing of size B x N x T, and nothing kept but (B, N) numbers.

Legend: B images, T patches an image, N texts, D width; g images and n texts make a tile.

A tile holds the scores of one image (or a few with few patches) with a block of texts, small enough for the cache. It
is made twice, in forward and again in backward, in buffers that are allocated once. Matrix products are torch's;
what is between them is :mod:`~pacl_scale.kernels.passes`, or on a CPU with numba installed the several times faster
:mod:`~pacl_scale.kernels.fused_passes`. ``README.md`` beside this file derives the equations.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pacl_scale.kernels import POOLED_FLOOR, VECTOR_FLOOR, exact_type, passes, without_autocast

Result = TypeVar("Result")

TILE_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""How many scores a tile holds: on a CPU few enough for its caches, on a GPU enough to fill it."""

SMALLEST_SHARE = 64
"""On a CPU a tile is at most this part of all scores, so that a small problem needs little memory beside its table."""

TILE_PATCHES = 256
"""On a CPU, images are taken together up to this many patches, so that few patches still make good products."""

TEXT_GRADIENT_NUMBERS = 1 << 26
"""Each worker sums its own text gradients; no more workers than this many numbers allow."""


def pool(patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None) -> Tensor:
    """Similarity (B, N); arguments as :func:`pacl_scale.kernels.eager.pool`."""
    return _Pool.apply(patches_BTD, texts_ND, scale, pooling, mask_BT)


def tile_shape(images: int, patches: int, texts: int, on_cpu: bool) -> tuple[int, int]:
    """Images and texts of a tile, for a problem of so many images, patches an image, and texts."""
    limit = TILE_NUMBERS["cuda"]
    if on_cpu:
        limit = min(TILE_NUMBERS["cpu"], images * patches * texts // SMALLEST_SHARE)
    together = min(images, max(1, (TILE_PATCHES if on_cpu else limit // texts) // patches))
    return together, _even_step(texts, max(16, limit // (together * patches)))


def fused_passes_exist() -> bool:
    """Whether numba is installed, which the fast passes of the CPU are compiled with."""
    return importlib.util.find_spec("numba") is not None


class _Pool(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None
    ) -> Tensor:
        problem = _Problem.of(patches_BTD, texts_ND, scale, pooling, mask_BT)
        phi_BN = torch.empty(len(patches_BTD), len(texts_ND), dtype=problem.exact, device=texts_ND.device)
        inverse_BN = torch.empty_like(phi_BN) if pooling == "cosine" else None
        _share(problem, lambda groups: _forward(problem, groups, phi_BN, inverse_BN))
        ctx.save_for_backward(patches_BTD, problem.texts_ND, scale, mask_BT, phi_BN, inverse_BN)
        ctx.pooling = pooling
        return phi_BN

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        patches_BTD, texts_ND, scale, mask_BT, phi_BN, inverse_BN = ctx.saved_tensors
        problem = _Problem.of(patches_BTD, texts_ND, scale, ctx.pooling, mask_BT)
        needs_patches, needs_texts, needs_scale = ctx.needs_input_grad[:3]
        grad_patches = torch.empty_like(patches_BTD) if needs_patches else None
        shares = _share(
            problem,
            lambda groups: _backward(problem, groups, grads[0], phi_BN, inverse_BN, grad_patches, needs_texts),
            max(1, TEXT_GRADIENT_NUMBERS // texts_ND.numel()) if needs_texts else None,
        )
        texts_grads, scale_grads = zip(*shares, strict=True)
        # In the order of the shares, so that the sum is the same every time.
        grad_texts = functools.reduce(Tensor.add_, texts_grads) if needs_texts else None
        grad_scale = functools.reduce(Tensor.add, scale_grads).to(scale.device) if needs_scale else None
        return grad_patches, grad_texts, grad_scale, None, None


@dataclass(frozen=True)
class _Problem:
    """The inputs of a call, and how they are cut into tiles."""

    patches_BTD: Tensor
    texts_ND: Tensor
    """Unit vectors in the type of the products, which is that of the patches."""
    scale: Tensor
    bias_BT: Tensor
    """0 for a patch that counts, else a number that keeps it out of any softmax."""
    pooling: str
    images: int
    """Images of a tile (g)."""
    texts: int
    """Texts of a tile (n)."""
    passes: ModuleType

    @staticmethod
    def of(patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None) -> "_Problem":
        B, T, _ = patches_BTD.shape
        on_cpu = patches_BTD.device.type == "cpu"
        images, texts = tile_shape(B, T, len(texts_ND), on_cpu)
        exact = exact_type(patches_BTD.dtype)
        bias_BT = torch.zeros(B, T, dtype=exact, device=patches_BTD.device)
        if mask_BT is not None:
            bias_BT.masked_fill_(~mask_BT, passes.HIDDEN)
        fast = on_cpu and pooling != "max" and patches_BTD.dtype in (torch.float32, torch.bfloat16)
        return _Problem(
            patches_BTD=patches_BTD.detach(),
            texts_ND=texts_ND.detach().to(patches_BTD.dtype),
            scale=scale.detach().to(patches_BTD.device),
            bias_BT=bias_BT,
            pooling=pooling,
            images=images,
            texts=texts,
            passes=_fused_passes() if fast and fused_passes_exist() else passes,
        )

    @property
    def exact(self) -> torch.dtype:
        """The type of sums and of everything between the products."""
        return self.bias_BT.dtype

    @property
    def groups(self) -> list[slice]:
        return _cut(len(self.patches_BTD), self.images)

    @property
    def blocks(self) -> list[slice]:
        return _cut(len(self.texts_ND), self.texts)


class _Tile:
    """The scores of a group of images with a block of texts, and what the softmax makes of them.

    The products of bfloat16 numbers are summed in float32 and rounded once, when they are written.
    """

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        size = problem.texts * problem.images * problem.patches_BTD.shape[1]
        self.buffers = [problem.texts_ND.new_empty(size) for _ in range(3 if problem.pooling == "cosine" else 2)]

    def begin(self, group: slice) -> None:
        """Take up a group of images: their unit patches and, where pooled vectors are normalised, G."""
        problem = self.problem
        exact_gTD = problem.patches_BTD[group].to(problem.exact)
        self.lengths_gT1 = torch.linalg.vector_norm(exact_gTD, dim=-1, keepdim=True)
        exact_gTD = exact_gTD / self.lengths_gT1.clamp(min=VECTOR_FLOOR)
        self.bias_gT = problem.bias_BT[group]
        # A patch that does not count may hold anything, nan included.
        exact_gTD.masked_fill_(self.bias_gT.unsqueeze(-1) < 0, 0.0)
        self.exact_units_gTD = exact_gTD
        self.units_gTD = exact_gTD.to(problem.texts_ND.dtype)
        self.gram_gTT = _square(self.units_gTD) if problem.pooling == "cosine" else None

    def fill(self, block: slice) -> Tensor:
        """Make the tile of a block of texts; returns the mean scores (n, g), or the best ones."""
        problem, (g, T, D) = self.problem, self.units_gTD.shape
        n = block.stop - block.start
        self.scores_ngT, self.attention_ngT, *mixed = (buffer[: n * g * T].view(n, g, T) for buffer in self.buffers)
        torch.mm(problem.texts_ND[block], self.units_gTD.view(g * T, D).t(), out=self.scores_ngT.view(n, g * T))
        self.mixed_ngT = None
        if problem.pooling == "max":
            return passes.best(self.scores_ngT, self.bias_gT, self.attention_ngT)
        mean_ng = problem.passes.attend(self.scores_ngT, self.bias_gT, problem.scale, self.attention_ngT)
        if self.gram_gTT is not None:
            self.mixed_ngT = mixed[0]
            _multiply(self.attention_ngT, self.gram_gTT, self.mixed_ngT)
        return mean_ng


def _forward(problem: _Problem, groups: Sequence[slice], phi_BN: Tensor, inverse_BN: Tensor | None) -> None:
    tile = _Tile(problem)
    for group in groups:
        tile.begin(group)
        for block in problem.blocks:
            phi_ng = tile.fill(block)
            if inverse_BN is not None:
                square_ng = problem.passes.pooled_square(tile.attention_ngT, tile.mixed_ngT, problem.exact)
                inverse_ng = square_ng.clamp_(min=POOLED_FLOOR**2).rsqrt_()
                inverse_BN[group, block] = inverse_ng.t()
                phi_ng = phi_ng.mul_(inverse_ng)
            phi_BN[group, block] = phi_ng.t()


def _backward(
    problem: _Problem,
    groups: Sequence[slice],
    up_BN: Tensor,
    phi_BN: Tensor,
    inverse_BN: Tensor | None,
    grad_patches_BTD: Tensor | None,
    needs_texts: bool,
) -> tuple[Tensor | None, Tensor]:
    """Write the gradient of the groups' patches; return those of the texts and of the scale as far as they go."""
    tile = _Tile(problem)
    grad_texts_ND = torch.zeros_like(problem.texts_ND, dtype=problem.exact) if needs_texts else None
    grad_scale = torch.zeros((), dtype=problem.exact, device=up_BN.device)
    for group in groups:
        tile.begin(group)
        g, T, D = tile.units_gTD.shape
        grad_gTD = torch.zeros(g * T, D, dtype=problem.exact, device=up_BN.device)
        outer_gTT = torch.zeros(g, T, T, dtype=problem.exact, device=up_BN.device)
        for block in problem.blocks:
            tile.fill(block)
            up_ng, phi_ng = up_BN[group, block].t(), phi_BN[group, block].t()
            inverse_ng = None if inverse_BN is None else inverse_BN[group, block].t()
            grad_scale += _differentiate(tile, up_ng, phi_ng, inverse_ng)
            grad_scores = tile.scores_ngT.flatten(1)
            if grad_patches_BTD is not None:
                grad_gTD += torch.mm(grad_scores.t(), problem.texts_ND[block])
                if tile.mixed_ngT is not None:
                    outer_gTT += _outer(tile.mixed_ngT, tile.attention_ngT)
            if grad_texts_ND is not None:
                grad_texts_ND[block] += torch.mm(grad_scores, tile.units_gTD.view(g * T, D))
        if grad_patches_BTD is not None:
            grad_gTD = grad_gTD.view(g, T, D)
            if tile.gram_gTT is not None:
                grad_gTD -= torch.bmm(outer_gTT.to(tile.units_gTD.dtype), tile.units_gTD)
            grad_patches_BTD[group] = _through_length(tile, grad_gTD)
    return grad_texts_ND, grad_scale


def _differentiate(tile: _Tile, up_ng: Tensor, phi_ng: Tensor, inverse_ng: Tensor | None) -> Tensor:
    """Turn the tile's scores into their gradients; returns the gradient of the scale."""
    if tile.problem.pooling == "max":
        torch.mul(tile.attention_ngT, up_ng.unsqueeze(-1), out=tile.scores_ngT)
        return up_ng.new_zeros(())
    if inverse_ng is None:
        inverse_ng, pull_ng, offset_ng = torch.ones_like(phi_ng), torch.zeros_like(phi_ng), phi_ng
    else:
        # A pooled vector at its floor counts as of constant length.
        floored = inverse_ng >= 1 / POOLED_FLOOR
        pull_ng = torch.where(floored, 0.0, phi_ng * inverse_ng * inverse_ng)
        offset_ng = torch.where(floored, phi_ng, 0.0)
    return tile.problem.passes.slopes(
        tile.scores_ngT,
        tile.attention_ngT,
        tile.mixed_ngT,
        tile.problem.scale,
        up_ng,
        inverse_ng,
        pull_ng,
        offset_ng,
    )


def _through_length(tile: _Tile, grad_gTD: Tensor) -> Tensor:
    """From the gradient of unit patches to that of patches: what lies along the patch does not count."""
    units, lengths = tile.exact_units_gTD, tile.lengths_gT1
    along_gT1 = (grad_gTD * units).sum(-1, keepdim=True).masked_fill_(lengths < VECTOR_FLOOR, 0.0)
    grad_gTD.addcmul_(units, along_gT1, value=-1).div_(lengths.clamp(min=VECTOR_FLOOR))
    return grad_gTD.masked_fill_(tile.bias_gT.unsqueeze(-1) < 0, 0.0)


def _square(units_gTD: Tensor) -> Tensor:
    return torch.bmm(units_gTD, units_gTD.transpose(1, 2))


def _multiply(attention_ngT: Tensor, gram_gTT: Tensor, out_ngT: Tensor) -> None:
    """h of every image: one plain product for one image, which is much the fastest, a batched one for several."""
    if len(gram_gTT) == 1:
        torch.mm(attention_ngT.flatten(1), gram_gTT[0], out=out_ngT.flatten(1))
    else:
        out_ngT.copy_(torch.bmm(attention_ngT.transpose(0, 1), gram_gTT).transpose(0, 1))


def _outer(weights_ngT: Tensor, attention_ngT: Tensor) -> Tensor:
    """Sum over texts of the outer products of weights and attention (g, T, T)."""
    if weights_ngT.shape[1] == 1:
        return torch.mm(weights_ngT.flatten(1).t(), attention_ngT.flatten(1)).unsqueeze(0)
    return torch.bmm(weights_ngT.permute(1, 2, 0), attention_ngT.transpose(0, 1))


def _even_step(total: int, most: int) -> int:
    """The step that cuts ``total`` into as few parts as ``most`` allows, all about as long."""
    return -(-total // -(-total // most))


def _cut(total: int, step: int) -> list[slice]:
    return [slice(start, min(total, start + step)) for start in range(0, total, step)]


def _share(problem: _Problem, work: Callable[[Sequence[slice]], Result], most: int | None = None) -> list[Result]:
    """Do the groups of images in as many shares as there are threads (on a CPU), in an order that never changes.

    A core that makes whole tiles keeps them in its own cache, and nobody waits between two operations.
    """
    groups, threads = problem.groups, torch.get_num_threads()
    workers = min(threads, len(groups), most or threads) if problem.patches_BTD.device.type == "cpu" else 1
    # Grad mode belongs to a thread, so it must be put off where the work is done.
    quiet = torch.no_grad()(work)
    if workers == 1:
        return [quiet(groups)]
    shares = [groups[worker::workers] for worker in range(workers)]
    return list(_pool_of(workers, threads // workers, os.getpid()).map(quiet, shares))


@functools.cache
def _pool_of(workers: int, threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use ``threads`` threads each; made anew after a fork (hence ``process``)."""
    before, started = torch.get_num_threads(), threading.Barrier(workers + 1)

    def prepare() -> None:
        torch.set_num_threads(threads)
        started.wait()

    executor = ThreadPoolExecutor(workers, "pacl-tiles", prepare)
    for _ in range(workers):
        executor.submit(int)
    started.wait()
    # torch keeps the number per thread, but what was set last is what threads started later begin with.
    torch.set_num_threads(before)
    return executor


@functools.cache
def _fused_passes() -> ModuleType:
    from pacl_scale.kernels import fused_passes

    return fused_passes
