"""The similarity on CUDA (sm_80 and later): one fused kernel forward, one backward, and library products between.

Legend: B images, T patches an image, N texts, D width; g images make a launch.

A program makes the tile of one image with a block of texts: scores (accumulated in float32 over slices of D), softmax
over all T at once, h = G e, and from them phi, or in backward the gradients of the scores. What must outlive a
program, e and in backward the gradients, goes to a workspace of bounded size, which a launch of g images fills; the
sums over texts are then plain matrix products of the library. No atomic is used, so results are the same every time.
``README.md`` beside this file derives the equations.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pacl_scale.kernels import POOLED_FLOOR, VECTOR_FLOOR, without_autocast
from pacl_scale.kernels.passes import HIDDEN

MAX_PATCHES = 1024
"""More patches than this do not fit into the registers of one program."""

TILE_BYTES = 1 << 14
"""A tile's scores in the type of the products, where 16 texts need no more. Twice this spills registers."""

TILE_TEXTS = 128
"""Texts of a tile, at most; at least 16, below which there is no matrix instruction."""

WORKSPACE_BYTES = 1 << 28
"""What a launch's e, gradients of scores and weights may take together; decides how many images a launch has."""


def reason_not_to(patches: Tensor, pooling: str) -> str | None:
    """Why these kernels cannot run on ``patches``; ``None`` if they can."""
    if patches.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"its kernels need a CUDA device, and the patches are on {patches.device}"
    if patches.device.type == "cuda" and torch.cuda.get_device_capability(patches.device) < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or later"
    if patches.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, bfloat16 or float16, not in {patches.dtype}"
    if patches.shape[1] > MAX_PATCHES:
        return f"its kernels take at most {MAX_PATCHES} patches an image, not {patches.shape[1]}"
    return "it has no kernel for max pooling" if pooling == "max" else None


def pool(patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None) -> Tensor:
    """Similarity (B, N); arguments as :func:`pacl_scale.kernels.eager.pool`."""
    return _Pool.apply(patches_BTD, texts_ND, scale, pooling, mask_BT)


@triton.jit
def _tile(
    units, texts, bias, scale, gram, attention, image, t, n, T, N, D,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Scores s, attention a and h = G a of one image with a block of texts, each (BLOCK_T, BLOCK_N)."""
    s = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, D, SLICE):
        d = start + tl.arange(0, SLICE)
        inside_v, inside_x = (t[:, None] < T) & (d[None, :] < D), (n[None, :] < N) & (d[:, None] < D)
        v = tl.load(units + (image * T + t[:, None]) * D + d[None, :], mask=inside_v, other=0.0)
        x = tl.load(texts + n[None, :].to(tl.int64) * D + d[:, None], mask=inside_x, other=0.0)
        s = tl.dot(v, x, s, input_precision="ieee")
    hide = tl.load(bias + image * T + t, mask=t < T, other=-1e30)
    logits = s * scale + hide[:, None]
    e = tl.exp(logits - tl.max(logits, 0)[None, :])
    a = e / tl.sum(e, 0)[None, :]
    h = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if COSINE:
        inside = (t[:, None] < T) & (n[None, :] < N)
        tl.store(attention + (image * T + t[:, None]) * N + n[None, :], a.to(attention.dtype.element_ty), mask=inside)
        # Other threads of this program read what was just written.
        tl.debug_barrier()
        for start in range(0, T, SLICE):
            u = start + tl.arange(0, SLICE)
            inside_g, inside_w = (t[:, None] < T) & (u[None, :] < T), (u[:, None] < T) & (n[None, :] < N)
            g = tl.load(gram + (image * T + t[:, None]) * T + u[None, :], mask=inside_g, other=0.0)
            w = tl.load(attention + (image * T + u[:, None]) * N + n[None, :], mask=inside_w, other=0.0)
            h = tl.dot(g, w, h, input_precision="ieee")
    return s, a, h


@triton.jit
def _forward(
    units, texts, bias, scale, gram, attention, phi, inverse, T, N, D, floor_square,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """phi (and r) of one image with a block of texts. Program axes: blocks of texts, images."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s, a, h = _tile(
        units, texts, bias, scale, gram, attention, image, t, n, T, N, D, BLOCK_T, BLOCK_N, SLICE, COSINE
    )  # fmt: skip
    value = tl.sum(a * s, 0)
    if COSINE:
        r = tl.rsqrt(tl.maximum(tl.sum(a * h, 0), floor_square))
        tl.store(inverse + image * N + n, r, mask=n < N)
        value *= r
    tl.store(phi + image * N + n, value, mask=n < N)


@triton.jit
def _backward(
    units, texts, bias, scale, gram, attention, slopes, weights, grad_scale,
    up, phi, inverse, T, N, D, most_inverse,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores, and weights of the outer product of attentions. Program axes as in forward."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s, a, h = _tile(
        units, texts, bias, scale, gram, attention, image, t, n, T, N, D, BLOCK_T, BLOCK_N, SLICE, COSINE
    )  # fmt: skip
    at = image * N + n
    g = tl.load(up + at, mask=n < N, other=0.0)
    value = tl.load(phi + at, mask=n < N, other=0.0)
    place = (image * T + t[:, None]) * N + n[None, :]
    inside = (t[:, None] < T) & (n[None, :] < N)
    if COSINE:
        r = tl.load(inverse + at, mask=n < N, other=0.0)
        # A pooled vector at its floor counts as of constant length.
        pull = tl.where(r >= most_inverse, 0.0, value * r * r)
        offset = tl.where(r >= most_inverse, value, 0.0)
        tl.store(weights + place, (a * (g * pull)[None, :]).to(weights.dtype.element_ty), mask=inside)
        slope = a * (s * r[None, :] - h * pull[None, :] - offset[None, :])
        direct = g * r
    else:
        slope = a * (s - value[None, :])
        direct = g
    turned = tl.sum(tl.sum(slope * s, 0) * g, 0)
    tl.store(grad_scale + image * tl.num_programs(0) + tl.program_id(0), turned)
    grad = slope * (g * scale)[None, :] + a * direct[None, :]
    tl.store(slopes + place, grad.to(slopes.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Launch:
    """How a problem is cut into programs, such that nothing spills from registers (``docs/similarity.md``)."""

    block_t: int
    block_n: int
    slice: int
    """Slice of D, and of T in h = G e, that is multiplied at a time."""
    warps: int
    stages: int

    @staticmethod
    def of(patches: int, element_size: int) -> "Launch":
        """For so many patches an image, of so many bytes a number."""
        block_t = max(16, triton.next_power_of_2(patches))
        fitting = TILE_BYTES // element_size // block_t
        block_n = max(16, min(TILE_TEXTS, fitting))
        wide = block_t > 512
        return Launch(
            block_t=block_t,
            block_n=block_n,
            slice=16 if wide or element_size == 4 else 32,
            warps=8 if fitting >= 16 else 16,
            stages=2 if wide else 3,
        )

    def arguments(self, pooling: str) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_N": self.block_n,
            "SLICE": self.slice,
            "COSINE": pooling == "cosine",
        }

    def options(self) -> dict[str, int]:
        """The options of its compilation."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class _Pool(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None
    ) -> Tensor:
        phi_BN = torch.empty(len(patches_BTD), len(texts_ND), dtype=torch.float32, device=texts_ND.device)
        inverse_BN = torch.empty_like(phi_BN) if pooling == "cosine" else None
        problem = _Problem(patches_BTD, texts_ND, scale, pooling, mask_BT)
        for group in problem.groups(1):
            g = problem.begin(group)
            problem.run(_forward, g, phi_BN[group], _rows(inverse_BN, group), end=POOLED_FLOOR**2)
        ctx.save_for_backward(patches_BTD, problem.texts_ND, scale, mask_BT, phi_BN, inverse_BN)
        ctx.pooling = pooling
        return phi_BN

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        patches_BTD, texts_ND, scale, mask_BT, phi_BN, inverse_BN = ctx.saved_tensors
        needs_patches, needs_texts, needs_scale = ctx.needs_input_grad[:3]
        grad_patches = torch.empty_like(patches_BTD) if needs_patches else None
        grad_texts = torch.zeros_like(texts_ND, dtype=torch.float32) if needs_texts else None
        grad_scale = torch.zeros((), dtype=torch.float32, device=texts_ND.device)
        problem = _Problem(patches_BTD, texts_ND, scale, ctx.pooling, mask_BT)
        for group in problem.groups(3):
            g = problem.begin(group)
            slopes_gTN, weights_gTN = torch.empty_like(g.attention_gTN), torch.empty_like(g.attention_gTN)
            partial = torch.empty(len(g.units_gTD), problem.blocks, dtype=torch.float32, device=texts_ND.device)
            saved = grads[0][group].contiguous(), phi_BN[group], _rows(inverse_BN, group)
            problem.run(_backward, g, slopes_gTN, weights_gTN, partial, *saved, end=1 / POOLED_FLOOR)
            grad_scale += partial.sum()
            if grad_patches is not None:
                grad_gTD = torch.matmul(slopes_gTN, problem.texts_ND).float()
                if problem.pooling == "cosine":
                    outer_gTT = torch.bmm(weights_gTN, g.attention_gTN.transpose(1, 2))
                    grad_gTD -= torch.bmm(outer_gTT, g.units_gTD)
                grad_patches[group] = g.through_length(grad_gTD)
            if grad_texts is not None:
                grad_texts += torch.mm(slopes_gTN.flatten(0, 1).t(), g.units_gTD.flatten(0, 1))
        return grad_patches, grad_texts, grad_scale.to(scale.device) if needs_scale else None, None, None


@dataclass(frozen=True)
class _Group:
    """What a launch needs of its images."""

    units_gTD: Tensor
    lengths_gT1: Tensor
    bias_gT: Tensor
    gram_gTT: Tensor
    attention_gTN: Tensor
    """Workspace."""

    def through_length(self, grad_gTD: Tensor) -> Tensor:
        """From the gradient of unit patches to that of patches: what lies along the patch does not count."""
        units = self.units_gTD.float()
        along = (grad_gTD * units).sum(-1, keepdim=True).masked_fill_(self.lengths_gT1 < VECTOR_FLOOR, 0.0)
        grad_gTD.addcmul_(units, along, value=-1).div_(self.lengths_gT1.clamp(min=VECTOR_FLOOR))
        return grad_gTD.masked_fill_(self.bias_gT.unsqueeze(-1) < 0, 0.0)


class _Problem:
    """The inputs of a call and how its kernels are launched."""

    def __init__(
        self, patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None
    ) -> None:
        self.patches_BTD, self.mask_BT, self.pooling = patches_BTD, mask_BT, pooling
        self.texts_ND = texts_ND.to(patches_BTD.dtype).contiguous()
        self.scale = float(scale)
        self.launch = Launch.of(patches_BTD.shape[1], patches_BTD.element_size())
        self.blocks = triton.cdiv(len(texts_ND), self.launch.block_n)

    def groups(self, arrays: int) -> list[slice]:
        """Images of each launch, when it needs so many arrays of g x T x N numbers."""
        B, T, _ = self.patches_BTD.shape
        size = arrays * T * len(self.texts_ND) * self.patches_BTD.element_size()
        step = max(1, min(B, WORKSPACE_BYTES // size))
        return [slice(start, min(B, start + step)) for start in range(0, B, step)]

    def begin(self, group: slice) -> _Group:
        patches_gTD = self.patches_BTD[group].float()
        lengths_gT1 = torch.linalg.vector_norm(patches_gTD, dim=-1, keepdim=True)
        units_gTD = patches_gTD / lengths_gT1.clamp(min=VECTOR_FLOOR)
        bias_gT = lengths_gT1.new_zeros(units_gTD.shape[:2])
        if self.mask_BT is not None:
            # A patch that does not count may hold anything, nan included.
            units_gTD.masked_fill_(~self.mask_BT[group].unsqueeze(-1), 0.0)
            bias_gT.masked_fill_(~self.mask_BT[group], HIDDEN)
        units_gTD = units_gTD.to(self.texts_ND.dtype)
        gram_gTT = torch.bmm(units_gTD, units_gTD.transpose(1, 2)) if self.pooling == "cosine" else units_gTD
        attention_gTN = units_gTD.new_empty(*units_gTD.shape[:2], len(self.texts_ND))
        return _Group(units_gTD, lengths_gT1, bias_gT, gram_gTT, attention_gTN)

    def run(self, kernel: Any, g: _Group, *arrays: Tensor | None, end: float) -> None:
        """Launch ``kernel`` on a group. Pointers that it does not use for this pooling may be ``None``."""
        _, T, D = g.units_gTD.shape
        kernel[(self.blocks, len(g.units_gTD))](
            g.units_gTD, self.texts_ND, g.bias_gT, self.scale, g.gram_gTT, g.attention_gTN, *arrays,
            T, len(self.texts_ND), D, end,
            **self.launch.arguments(self.pooling), **self.launch.options(),
        )  # fmt: skip


def _rows(values_BN: Tensor | None, group: slice) -> Tensor | None:
    return None if values_BN is None else values_BN[group]
