"""The similarity on CUDA (sm_80 and later): the library's matrix products, and three fused sweeps between them.

Legend: B images, T patches an image, N texts, D width; g images make a launch.

Scores, attention and ``h = G e`` of g images are tables of g x T x N numbers in a workspace of bounded size; each sweep
reads and writes a table once, with all T patches of a few texts in one program, and leaves what concerns a pair behind
as one number. Products have the patches' type with float32 sums; scores stay float32. No atomic is used, so results are
the same every time. ``README.md`` beside this file derives the equations.
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

MAX_PATCHES = 4096
"""More patches than this do not fit into the registers of one program."""

TILE_NUMBERS = 4096
"""Of a program: all patches by a few texts; twice as many for many patches, lest too few texts lie side by side."""

THREAD_NUMBERS = 16
"""Of a tile that a thread holds; twice as many spill registers."""

TILE_TEXTS = 128
"""Texts of a tile, at most."""

WORKSPACE_BYTES = 1 << 28
"""What a launch's tables may take together; decides how many images a launch has."""


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
def _attend(scores, bias, scale, attention, phi, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attention of one image to a block of texts, and a . s of each. Program axes: blocks of texts, images."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * T + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    s = tl.load(scores + place, mask=inside, other=0.0)
    hide = tl.load(bias + image * T + t, mask=t < T, other=-1e30)
    logits = s * scale + hide[:, None]
    e = tl.exp(logits - tl.max(logits, 0)[None, :])
    # Rounded once: every later sum has the same attention, as which phi and its gradient are exact.
    a = (e / tl.sum(e, 0)[None, :]).to(attention.dtype.element_ty)
    tl.store(attention + place, a, mask=inside)
    tl.store(phi + image * N + n, tl.sum(a.to(tl.float32) * s, 0), mask=n < N)


@triton.jit
def _normalise(attention, mixed, phi, inverse, T, N, floor_square, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """From h: r, and phi = (a . s) r in place. Program axes as above."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * T + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    a = tl.load(attention + place, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(mixed + place, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.maximum(tl.sum(a * h, 0), floor_square))
    at, there = image * N + n, n < N
    tl.store(inverse + at, r, mask=there)
    tl.store(phi + at, tl.load(phi + at, mask=there, other=0.0) * r, mask=there)


@triton.jit
def _slopes(
    scores, scale, attention, mixed, slopes, weights, grad_scale, up, phi, inverse, T, N, most_inverse,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores (``slopes`` may be ``mixed``), and weights of the outer product of attentions."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * T + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    at, there = image * N + n, n < N
    s = tl.load(scores + place, mask=inside, other=0.0)
    a = tl.load(attention + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(up + at, mask=there, other=0.0)
    value = tl.load(phi + at, mask=there, other=0.0)
    if COSINE:
        r = tl.load(inverse + at, mask=there, other=0.0)
        # A pooled vector at its floor counts as of constant length.
        pull = tl.where(r >= most_inverse, 0.0, value * r * r)
        offset = tl.where(r >= most_inverse, value, 0.0)
        h = tl.load(mixed + place, mask=inside, other=0.0).to(tl.float32)
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
    """How a table is cut into programs, such that nothing spills from registers (``docs/similarity.md``)."""

    block_t: int
    block_n: int
    warps: int

    @staticmethod
    def of(patches: int) -> "Launch":
        """For so many patches an image."""
        block_t = max(16, triton.next_power_of_2(patches))
        tile = TILE_NUMBERS * (1 if block_t <= 512 else 2)
        block_n = min(TILE_TEXTS, tile // block_t)
        return Launch(block_t, block_n, warps=block_t * block_n // (32 * THREAD_NUMBERS))

    def options(self) -> dict[str, Any]:
        """Compile-time arguments and options that all kernels share."""
        return {"BLOCK_T": self.block_t, "BLOCK_N": self.block_n, "num_warps": self.warps}


class _Pool(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None
    ) -> Tensor:
        phi_BN = torch.empty(len(patches_BTD), len(texts_ND), dtype=torch.float32, device=texts_ND.device)
        inverse_BN = torch.empty_like(phi_BN) if pooling == "cosine" else None
        problem = _Problem(patches_BTD, texts_ND, scale, pooling, mask_BT)
        for group in problem.groups(backward=False):
            tables = problem.tables(group, phi_BN[group])
            if inverse_BN is not None:
                saved = phi_BN[group], inverse_BN[group]
                problem.sweep(_normalise, tables, tables.attention_gTN, tables.mixed(), *saved, end=(POOLED_FLOOR**2,))
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
        for group in problem.groups(backward=True):
            tables = problem.tables(group, torch.empty_like(phi_BN[group]))
            inverse = None if inverse_BN is None else inverse_BN[group]
            slopes_gTN, weights_gTN, turned = problem.slopes(
                tables, grads[0][group].contiguous(), phi_BN[group], inverse
            )
            grad_scale += turned
            if grad_patches is not None:
                grad_gTD = product(slopes_gTN.flatten(0, 1), texts_ND).view_as(tables.units_gTD)
                if weights_gTN is not None:
                    outer_gTT = torch.bmm(weights_gTN, tables.attention_gTN.transpose(1, 2))
                    grad_gTD -= product(outer_gTT, tables.units_gTD)
                grad_patches[group] = tables.through_length(grad_gTD)
            if grad_texts is not None:
                grad_texts += product(slopes_gTN.flatten(0, 1).t(), tables.units_gTD.flatten(0, 1))
        return grad_patches, grad_texts, grad_scale.to(scale.device) if needs_scale else None, None, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of two matrices, or of two stacks of them, as float32 (without rounding it in between)."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@dataclass(frozen=True)
class _Tables:
    """A launch's images, and the tables of scores and attention."""

    units_gTD: Tensor
    lengths_gT1: Tensor
    bias_gT: Tensor
    scores_gTN: Tensor
    attention_gTN: Tensor

    def mixed(self) -> Tensor:
        """h = G a, (g, T, N)."""
        return torch.bmm(torch.bmm(self.units_gTD, self.units_gTD.transpose(1, 2)), self.attention_gTN)

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
        self.launch = Launch.of(patches_BTD.shape[1])
        self.blocks = triton.cdiv(len(texts_ND), self.launch.block_n)

    def groups(self, backward: bool) -> list[slice]:
        """Images of each launch: scores, attention and h, in backward also weights, fit into the workspace."""
        B, T, _ = self.patches_BTD.shape
        numbers = 4 + (3 if backward else 2) * self.patches_BTD.element_size()
        step = max(1, min(B, WORKSPACE_BYTES // (numbers * T * len(self.texts_ND))))
        return [slice(start, min(B, start + step)) for start in range(0, B, step)]

    def tables(self, group: slice, phi_gN: Tensor) -> _Tables:
        """Scores and attention of some images; a . s goes to ``phi_gN``."""
        patches_gTD = self.patches_BTD[group].float()
        lengths_gT1 = torch.linalg.vector_norm(patches_gTD, dim=-1, keepdim=True)
        units_gTD = patches_gTD / lengths_gT1.clamp(min=VECTOR_FLOOR)
        bias_gT = lengths_gT1.new_zeros(units_gTD.shape[:2])
        if self.mask_BT is not None:
            # A patch that does not count may hold anything, nan included.
            units_gTD.masked_fill_(~self.mask_BT[group].unsqueeze(-1), 0.0)
            bias_gT.masked_fill_(~self.mask_BT[group], HIDDEN)
        units_gTD = units_gTD.to(self.texts_ND.dtype)
        scores_gTN = product(units_gTD.flatten(0, 1), self.texts_ND.t()).view(*units_gTD.shape[:2], -1)
        tables = _Tables(
            units_gTD, lengths_gT1, bias_gT, scores_gTN, torch.empty_like(scores_gTN, dtype=units_gTD.dtype)
        )
        self.sweep(_attend, tables, scores_gTN, bias_gT, self.scale, tables.attention_gTN, phi_gN)
        return tables

    def slopes(
        self, tables: _Tables, up_gN: Tensor, phi_gN: Tensor, inverse_gN: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of the scores, weights of the outer product (with normalised pooling), gradient of the scale."""
        cosine = self.pooling == "cosine"
        mixed_gTN = tables.mixed() if cosine else torch.empty_like(tables.attention_gTN)
        weights_gTN = torch.empty_like(tables.attention_gTN) if cosine else None
        partial = torch.empty(len(up_gN), self.blocks, dtype=torch.float32, device=up_gN.device)
        self.sweep(
            _slopes, tables, tables.scores_gTN, self.scale, tables.attention_gTN, mixed_gTN, mixed_gTN, weights_gTN,
            partial, up_gN, phi_gN, inverse_gN, end=(1 / POOLED_FLOOR,), COSINE=cosine,
        )  # fmt: skip
        return mixed_gTN, weights_gTN, partial.sum()

    def sweep(
        self, kernel: Any, tables: _Tables, *arguments: Any, end: tuple[float, ...] = (), **constants: bool
    ) -> None:
        """Launch ``kernel`` on tables. Pointers that it does not use for this pooling may be ``None``."""
        g, T, _ = tables.units_gTD.shape
        kernel[(self.blocks, g)](*arguments, T, len(self.texts_ND), *end, **constants, **self.launch.options())
