"""The passes of :mod:`pacl_scale.kernels.passes` for float32 and bfloat16 on a CPU: one sweep over a tile each.

Compiled by numba, which brings its own code generator, so no compiler need be installed. A row of patches stays in the
first-level cache while it is widened, exponentiated, summed and narrowed again. bfloat16 travels as its 16 bits, as
neither numpy nor numba knows the type.
"""

import numpy as np
import torch
from torch import Tensor

from pacl_scale.compiled import compiled

LOG2_E = np.float32(1.4426950408889634)
SMALLEST_EXPONENT = np.float32(-126.0)
# 2**f for |f| <= 1/2 by its Taylor series, ln(2)**i / i!; the remainder is below 2e-7.
C1, C2, C3 = np.float32(0.6931471805599453), np.float32(0.2402265069591007), np.float32(0.05550410866482158)
C4, C5, C6 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443), np.float32(0.0001540353039338161)
HALF, ONE = np.float32(0.5), np.float32(1.0)

# No "ninf" nor "afn": a scale of 100 and inputs of inf must not be optimised on a promise.
FAST = {"nnan", "nsz", "reassoc", "contract", "arcp"}


@compiled(fastmath=FAST, boundscheck=False)
def _widen(bits, row):
    """float32 numbers (as bits) of a row of bfloat16 or float32 (as bits)."""
    if bits.itemsize == 2:
        for t in range(len(row)):
            row[t] = np.uint32(bits[t]) << np.uint32(16)
    else:
        for t in range(len(row)):
            row[t] = bits[t]


@compiled(fastmath=FAST, boundscheck=False)
def _narrow(row, bits):
    """The reverse, rounded to the nearest, ties to even."""
    if bits.itemsize == 2:
        for t in range(len(row)):
            odd = (row[t] >> np.uint32(16)) & np.uint32(1)
            bits[t] = np.uint16((row[t] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        for t in range(len(row)):
            bits[t] = row[t]


@compiled(fastmath=FAST, boundscheck=False)
def _attend(scores, bias, scale, attention, mean):
    images, patches = bias.shape
    score_bits, weight_bits = np.empty(patches, np.uint32), np.empty(patches, np.uint32)
    power_bits = np.empty(patches, np.uint32)
    score, weight, power = score_bits.view(np.float32), weight_bits.view(np.float32), power_bits.view(np.float32)
    for r in range(len(scores)):
        hide = bias[r % images]
        _widen(scores[r], score_bits)
        highest = np.float32(-np.inf)
        for t in range(patches):
            logit = score[t] * scale + hide[t]
            weight[t] = logit
            highest = max(highest, logit)
        for t in range(patches):
            exponent = max((weight[t] - highest) * LOG2_E, SMALLEST_EXPONENT)
            # The exponent is not positive, so truncating after taking 1/2 away rounds to the nearest.
            whole = np.int32(exponent - HALF)
            f = exponent - np.float32(whole)
            weight[t] = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
            power_bits[t] = np.uint32(whole + np.int32(127)) << np.uint32(23)
        total, dot = np.float32(0.0), np.float32(0.0)
        for t in range(patches):
            e = weight[t] * power[t]
            weight[t] = e
            total += e
            dot += e * score[t]
        share = ONE / total
        for t in range(patches):
            weight[t] *= share
        _narrow(weight_bits, attention[r])
        mean[r] = dot * share


@compiled(fastmath=FAST, boundscheck=False)
def _pooled_square(attention, mixed, square):
    patches = attention.shape[1]
    weight_bits, h_bits = np.empty(patches, np.uint32), np.empty(patches, np.uint32)
    weight, h = weight_bits.view(np.float32), h_bits.view(np.float32)
    for r in range(len(attention)):
        _widen(attention[r], weight_bits)
        _widen(mixed[r], h_bits)
        total = np.float32(0.0)
        for t in range(patches):
            total += weight[t] * h[t]
        square[r] = total


@compiled(fastmath=FAST, boundscheck=False)
def _slopes(scores, attention, mixed, has_mixed, scale, up, inverse, pull, offset):
    patches = attention.shape[1]
    score_bits, weight_bits = np.empty(patches, np.uint32), np.empty(patches, np.uint32)
    h_bits = np.empty(patches, np.uint32)
    score, weight, h = score_bits.view(np.float32), weight_bits.view(np.float32), h_bits.view(np.float32)
    h[:] = np.float32(0.0)  # Where nothing is mixed in, p is 0 and this must be finite.
    grad_scale = 0.0
    for r in range(len(scores)):
        _widen(scores[r], score_bits)
        _widen(attention[r], weight_bits)
        if has_mixed:
            _widen(mixed[r], h_bits)
        u, i, p, o = up[r], inverse[r], pull[r], offset[r]
        along, direct = scale * u, u * i
        turned = np.float32(0.0)
        for t in range(patches):
            slope = weight[t] * (score[t] * i - h[t] * p - o)
            turned += slope * score[t]
            score[t] = slope * along + weight[t] * direct
            weight[t] = weight[t] * (u * p)
        grad_scale += np.float64(turned) * np.float64(u)
        _narrow(score_bits, scores[r])
        if has_mixed:
            _narrow(weight_bits, mixed[r])
    return grad_scale


def attend(scores_ngT: Tensor, bias_gT: Tensor, scale: Tensor, attention_ngT: Tensor) -> Tensor:
    """See :func:`pacl_scale.kernels.passes.attend`."""
    mean_ng = bias_gT.new_empty(scores_ngT.shape[:2])
    _attend(_bits(scores_ngT), bias_gT.numpy(), np.float32(scale), _bits(attention_ngT), mean_ng.view(-1).numpy())
    return mean_ng


def pooled_square(attention_ngT: Tensor, mixed_ngT: Tensor, exact: torch.dtype) -> Tensor:
    """See :func:`pacl_scale.kernels.passes.pooled_square`."""
    square_ng = torch.empty(attention_ngT.shape[:2], dtype=exact)
    _pooled_square(_bits(attention_ngT), _bits(mixed_ngT), square_ng.view(-1).numpy())
    return square_ng


def slopes(
    scores_ngT: Tensor,
    attention_ngT: Tensor,
    mixed_ngT: Tensor | None,
    scale: Tensor,
    up_ng: Tensor,
    inverse_ng: Tensor,
    pull_ng: Tensor,
    offset_ng: Tensor,
) -> Tensor:
    """See :func:`pacl_scale.kernels.passes.slopes`."""
    numbers = (x.contiguous().view(-1).numpy() for x in (up_ng, inverse_ng, pull_ng, offset_ng))
    mixed = attention_ngT if mixed_ngT is None else mixed_ngT
    tile = _bits(scores_ngT), _bits(attention_ngT), _bits(mixed)
    grad_scale = _slopes(*tile, mixed_ngT is not None, np.float32(scale), *numbers)
    return torch.tensor(grad_scale, dtype=up_ng.dtype)


def _bits(tile_ngT: Tensor) -> np.ndarray:
    """(n * g, T): the numbers of a tile as unsigned integers of their size, without a copy."""
    integers = torch.uint16 if tile_ngT.element_size() == 2 else torch.uint32
    return tile_ngT.view(-1, tile_ngT.shape[-1]).view(integers).numpy()
