"""The similarity on CUDA (sm_80 and later): the library's matrix products, and three fused sweeps between them.

Legend: B images, T patches an image, N texts, D width; g images make a launch, and P is T filled up with patches of
zeros until rows of P numbers are aligned to 16 bytes, without which the library's products take a slower way.

Scores, attention and ``h = G e`` of g images are tables of g x P x N numbers in a workspace of bounded size; each sweep
reads and writes a table once, with all patches of a few texts in one program, and leaves what concerns a pair behind
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

from pacl_scale.kernels import POOLED_FLOOR, VECTOR_FLOOR, passes, without_autocast

HIDDEN = tl.constexpr(passes.HIDDEN)

MAX_PATCHES = 4096
"""More patches than this do not fit into the registers of one program."""

TILE_NUMBERS, THREAD_NUMBERS = 8192, 32
"""Of a program: all patches by a few texts; twice as many for many patches, lest too few texts lie side by side. And
what a thread holds of them. Chosen by measuring (``docs/similarity.md``)."""

TILE_TEXTS = 128
"""Texts of a tile, at most."""

ROWS, WIDTH, ROW_WARPS = 2, 512, 4
"""Of a program that goes along patches: how many, numbers of each that it looks at together, and warps."""

WORKSPACE_BYTES = 1 << 29
"""What a launch's tables may take together; decides how many images a launch has."""

SWEEPS = ("unit", "through_length", "attend", "normalise", "slopes")
"""The kernels below."""


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
def _unit(
    patches, mask, units, lengths, rows, T, P, D, floor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Patches brought to length 1, and the lengths they had; both are 0 for patches that do not count."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, d = row < rows, tl.arange(0, WIDTH)
    source = row // P * T + row % P
    counts = there & (row % P < T)
    if MASKED:
        # A patch that does not count may hold anything, nan included: it is not even read.
        counts = counts & (tl.load(mask + source, mask=counts, other=0) != 0)
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        inside = counts[:, None] & (start + d < D)[None, :]
        x = tl.load(patches + source[:, None] * D + (start + d)[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
    length = tl.sqrt_rn(square)
    tl.store(lengths + row, length, mask=there)
    over = 1 / tl.maximum(length, floor)
    for start in range(0, D, WIDTH):
        place, inside = source[:, None] * D + (start + d)[None, :], (start + d < D)[None, :]
        x = tl.load(patches + place, mask=counts[:, None] & inside, other=0.0).to(tl.float32)
        place = row[:, None] * D + (start + d)[None, :]
        tl.store(units + place, (x * over[:, None]).to(units.dtype.element_ty), mask=there[:, None] & inside)


@triton.jit
def _through_length(
    direct, pull, units, lengths, mask, grads, rows, T, P, D, floor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of patches from those of their units, ``direct - pull``: what lies along the patch does not count."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, there, target = tl.arange(0, WIDTH), (row < rows) & (row % P < T), row // P * T + row % P
    counts = there
    if MASKED:
        counts = there & (tl.load(mask + target, mask=there, other=0) != 0)
    along = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        place = row[:, None] * D + (start + d)[None, :]
        inside = counts[:, None] & (start + d < D)[None, :]
        grad = tl.load(direct + place, mask=inside, other=0.0)
        if COSINE:
            grad -= tl.load(pull + place, mask=inside, other=0.0)
        along += tl.sum(grad * tl.load(units + place, mask=inside, other=0.0).to(tl.float32), 1)
    length = tl.load(lengths + row, mask=there, other=1.0)
    # A vector shorter than the floor was divided by a constant.
    along = tl.where(length < floor, 0.0, along)
    over = 1 / tl.maximum(length, floor)
    for start in range(0, D, WIDTH):
        place, within = row[:, None] * D + (start + d)[None, :], (start + d < D)[None, :]
        inside = counts[:, None] & within
        grad = tl.load(direct + place, mask=inside, other=0.0)
        if COSINE:
            grad -= tl.load(pull + place, mask=inside, other=0.0)
        unit = tl.load(units + place, mask=inside, other=0.0).to(tl.float32)
        result = (grad - unit * along[:, None]) * over[:, None]
        place = target[:, None] * D + (start + d)[None, :]
        tl.store(grads + place, result.to(grads.dtype.element_ty), mask=there[:, None] & within)


@triton.jit
def _attend(
    scores, mask, scale, attention, phi, T, P, N,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention of one image to a block of texts, and a . s of each. Program axes: blocks of texts, images."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * P + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    s = tl.load(scores + place, mask=inside, other=0.0)
    counts = t < T
    if MASKED:
        counts = counts & (tl.load(mask + image * T + t, mask=counts, other=0) != 0)
    logits = tl.where(counts[:, None], s * tl.load(scale), HIDDEN)
    e = tl.exp(logits - tl.max(logits, 0)[None, :])
    # Rounded once: every later sum has the same attention, as which phi and its gradient is exact.
    a = (e / tl.sum(e, 0)[None, :]).to(attention.dtype.element_ty)
    # Zeros for patches that fill up.
    tl.store(attention + place, a, mask=(t[:, None] < P) & (n[None, :] < N))
    tl.store(phi + image * N + n, tl.sum(a.to(tl.float32) * s, 0), mask=n < N)


@triton.jit
def _normalise(attention, mixed, phi, inverse, T, P, N, floor_square, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """From h: r, and phi = (a . s) r in place. Program axes as above."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * P + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    a = tl.load(attention + place, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(mixed + place, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.maximum(tl.sum(a * h, 0), floor_square))
    at, there = image * N + n, n < N
    tl.store(inverse + at, r, mask=there)
    tl.store(phi + at, tl.load(phi + at, mask=there, other=0.0) * r, mask=there)


@triton.jit
def _slopes(
    scores, scale, attention, mixed, slopes, weights, grad_scale, up, phi, inverse, T, P, N, most_inverse,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores (``slopes`` may be ``mixed``), and weights of the outer product of attentions."""
    image = tl.program_id(1).to(tl.int64)
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = (image * P + t[:, None]) * N + n[None, :], (t[:, None] < T) & (n[None, :] < N)
    at, there = image * N + n, n < N
    filled = (t[:, None] < P) & there[None, :]
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
        tl.store(weights + place, (a * (g * pull)[None, :]).to(weights.dtype.element_ty), mask=filled)
        slope = a * (s * r[None, :] - h * pull[None, :] - offset[None, :])
        direct = g * r
    else:
        slope = a * (s - value[None, :])
        direct = g
    turned = tl.sum(tl.sum(slope * s, 0) * g, 0)
    k = tl.load(scale)
    tl.store(grad_scale + image * tl.num_programs(0) + tl.program_id(0), turned)
    grad = slope * (g * k)[None, :] + a * direct[None, :]
    tl.store(slopes + place, grad.to(slopes.dtype.element_ty), mask=filled)


@dataclass(frozen=True)
class Launch:
    """How a table is cut into programs."""

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
                problem.sweep(_normalise, tables, tables.attention_gPN, tables.mixed(), *saved, end=(POOLED_FLOOR**2,))
        ctx.save_for_backward(patches_BTD, problem.texts_ND, problem.scale, mask_BT, phi_BN, inverse_BN)
        ctx.pooling, ctx.scale_device = pooling, scale.device
        return phi_BN

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        patches_BTD, texts_ND, scale, mask_BT, phi_BN, inverse_BN = ctx.saved_tensors
        needs_patches, needs_texts, needs_scale = ctx.needs_input_grad[:3]
        grad_patches = torch.empty_like(patches_BTD, memory_format=torch.contiguous_format) if needs_patches else None
        grad_texts: Tensor | None = None
        problem = _Problem(patches_BTD, texts_ND, scale, ctx.pooling, mask_BT)
        turned = torch.empty(len(phi_BN), problem.blocks, dtype=torch.float32, device=texts_ND.device)
        up_BN = grads[0].contiguous()
        for group in problem.groups(backward=True):
            tables = problem.tables(group, torch.empty_like(phi_BN[group]))
            inverse = None if inverse_BN is None else inverse_BN[group]
            slopes_gPN, weights_gPN = problem.slopes(tables, up_BN[group], phi_BN[group], inverse, turned[group])
            if grad_patches is not None:
                direct_gPD = product(slopes_gPN.flatten(0, 1), texts_ND).view_as(tables.units_gPD)
                pull_gPD = None
                if weights_gPN is not None:
                    outer_gPP = torch.bmm(weights_gPN, tables.attention_gPN.transpose(1, 2))
                    pull_gPD = product(outer_gPP, tables.units_gPD)
                problem.through_length(tables, direct_gPD, pull_gPD, grad_patches[group])
            if needs_texts:
                grad = product(slopes_gPN.flatten(0, 1).t(), tables.units_gPD.flatten(0, 1))
                grad_texts = grad if grad_texts is None else grad_texts.add_(grad)
        return grad_patches, grad_texts, turned.sum().to(ctx.scale_device) if needs_scale else None, None, None


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

    units_gPD: Tensor
    lengths_gP: Tensor
    mask_gT: Tensor | None
    scores_gPN: Tensor
    attention_gPN: Tensor

    def mixed(self) -> Tensor:
        """h = G a, (g, P, N)."""
        return torch.bmm(torch.bmm(self.units_gPD, self.units_gPD.transpose(1, 2)), self.attention_gPN)


class _Problem:
    """The inputs of a call and how its kernels are launched."""

    def __init__(
        self, patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None
    ) -> None:
        self.patches_BTD, self.pooling = patches_BTD.contiguous(), pooling
        self.mask_BT = None if mask_BT is None else mask_BT.contiguous().view(torch.uint8)
        self.texts_ND = texts_ND.to(patches_BTD.dtype).contiguous()
        # Read by the kernels, not by Python: reading it would wait for the GPU.
        self.scale = scale.detach().to(patches_BTD.device, torch.float32)
        self.patches = patches_BTD.shape[1]
        aligned = 16 // patches_BTD.element_size()
        self.filled = triton.cdiv(self.patches, aligned) * aligned
        self.launch = Launch.of(self.patches)
        self.blocks = triton.cdiv(len(texts_ND), self.launch.block_n)

    def groups(self, backward: bool) -> list[slice]:
        """Images of each launch: scores, attention and h, in backward also weights, fit into the workspace."""
        B = len(self.patches_BTD)
        numbers = 4 + (3 if backward else 2) * self.patches_BTD.element_size()
        step = max(1, min(B, WORKSPACE_BYTES // (numbers * self.filled * len(self.texts_ND))))
        return [slice(start, min(B, start + step)) for start in range(0, B, step)]

    def tables(self, group: slice, phi_gN: Tensor) -> _Tables:
        """Scores and attention of some images; a . s goes to ``phi_gN``."""
        patches_gTD = self.patches_BTD[group]
        units_gPD = patches_gTD.new_empty(len(patches_gTD), self.filled, patches_gTD.shape[2])
        lengths_gP = units_gPD.new_empty(units_gPD.shape[:2], dtype=torch.float32)
        mask_gT = None if self.mask_BT is None else self.mask_BT[group]
        self.along(_unit, units_gPD, patches_gTD, mask_gT, units_gPD, lengths_gP, MASKED=mask_gT is not None)
        scores_gPN = product(units_gPD.flatten(0, 1), self.texts_ND.t()).view(*units_gPD.shape[:2], -1)
        attention_gPN = torch.empty_like(scores_gPN, dtype=units_gPD.dtype)
        tables = _Tables(units_gPD, lengths_gP, mask_gT, scores_gPN, attention_gPN)
        self.sweep(
            _attend, tables, scores_gPN, mask_gT, self.scale, attention_gPN, phi_gN, MASKED=mask_gT is not None
        )  # fmt: skip
        return tables

    def slopes(
        self, tables: _Tables, up_gN: Tensor, phi_gN: Tensor, inverse_gN: Tensor | None, turned: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the scores, and weights of the outer product (with normalised pooling).

        The gradient of the scale goes to ``turned``, in parts: (g, blocks of texts).
        """
        cosine = self.pooling == "cosine"
        mixed_gPN = tables.mixed() if cosine else torch.empty_like(tables.attention_gPN)
        weights_gPN = torch.empty_like(tables.attention_gPN) if cosine else None
        self.sweep(
            _slopes, tables, tables.scores_gPN, self.scale, tables.attention_gPN, mixed_gPN, mixed_gPN, weights_gPN,
            turned, up_gN, phi_gN, inverse_gN, end=(1 / POOLED_FLOOR,), COSINE=cosine,
        )  # fmt: skip
        return mixed_gPN, weights_gPN

    def through_length(self, tables: _Tables, direct_gPD: Tensor, pull_gPD: Tensor | None, grads_gTD: Tensor) -> None:
        """Write the gradients of patches, given those of their units."""
        self.along(
            _through_length, tables.units_gPD, direct_gPD, pull_gPD, tables.units_gPD, tables.lengths_gP,
            tables.mask_gT, grads_gTD, MASKED=tables.mask_gT is not None, COSINE=pull_gPD is not None,
        )  # fmt: skip

    def sweep(
        self, kernel: Any, tables: _Tables, *arguments: Any, end: tuple[float, ...] = (), **constants: bool
    ) -> None:
        """Launch ``kernel`` on tables. Pointers that it does not use for this pooling may be ``None``."""
        sizes = self.patches, self.filled, len(self.texts_ND)
        kernel[(self.blocks, len(tables.units_gPD))](*arguments, *sizes, *end, **constants, **self.launch.options())

    def along(self, kernel: Any, rows_gPD: Tensor, *arguments: Any, **constants: bool) -> None:
        """Launch ``kernel`` on rows of D numbers."""
        g, P, D = rows_gPD.shape
        width = min(WIDTH, triton.next_power_of_2(D))
        sizes = g * P, self.patches, P, D
        kernel[(triton.cdiv(g * P, ROWS),)](
            *arguments, *sizes, VECTOR_FLOOR, ROWS=ROWS, WIDTH=width, num_warps=ROW_WARPS, **constants
        )  # fmt: skip
