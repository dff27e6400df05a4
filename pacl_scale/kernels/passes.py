"""The element-wise passes over a tile, in plain torch: for every device and type, each pass a few torch operations.

:mod:`pacl_scale.kernels.fused_passes` does the same for float32 and bfloat16 on a CPU, each pass in one sweep.

Legend: n texts, g images, T patches an image. Names as in ``README.md`` beside this file.
"""

import torch
from torch import Tensor

HIDDEN = -1e30
"""Added to the logit of a patch that does not count. Finite, so that no difference of two of them is nan."""


def attend(scores_ngT: Tensor, bias_gT: Tensor, scale: Tensor, attention_ngT: Tensor) -> Tensor:
    """Write softmax(scale * scores + bias) over patches to ``attention_ngT``; return the mean score (n, g) under it."""
    exact = scores_ngT.to(bias_gT.dtype)
    weights = torch.softmax(torch.addcmul(bias_gT, exact, scale), dim=-1)
    attention_ngT.copy_(weights)
    return weights.mul_(exact).sum(-1)


def best(scores_ngT: Tensor, bias_gT: Tensor, attention_ngT: Tensor) -> Tensor:
    """Write to ``attention_ngT`` 1 for the best patch, in equal parts where several are; return its score (n, g)."""
    visible = scores_ngT.to(bias_gT.dtype) + bias_gT
    highest = visible.amax(-1, keepdim=True)
    ties = visible.eq(highest)
    attention_ngT.copy_(ties.div(ties.sum(-1, keepdim=True)))
    return highest.squeeze(-1)


def pooled_square(attention_ngT: Tensor, mixed_ngT: Tensor, exact: torch.dtype) -> Tensor:
    """Squared length (n, g) of the pooled vectors: the dot products of the attention with h."""
    return (attention_ngT.to(exact) * mixed_ngT).sum(-1)


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
    """Replace the scores by their gradients and h by the weights of the outer product of attentions.

    Args:
        mixed_ngT: h; ``None`` where the pooled vector is not normalised.
        up_ng: gradient of the similarity.
        inverse_ng: r, one over the length of the pooled vector.
        pull_ng: phi * r * r, or 0 where the length is at its floor.
        offset_ng: what makes the slopes of a row sum to zero.

    Returns:
        The gradient of the attention scale, zero-dimensional.
    """
    attention = attention_ngT.to(up_ng.dtype)
    scores = scores_ngT.to(up_ng.dtype)
    up_ng1, inverse_ng1, pull_ng1 = up_ng.unsqueeze(-1), inverse_ng.unsqueeze(-1), pull_ng.unsqueeze(-1)
    slope = scores * inverse_ng1 - offset_ng.unsqueeze(-1)
    if mixed_ngT is not None:
        slope.sub_(mixed_ngT * pull_ng1)
        mixed_ngT.copy_(attention * (up_ng1 * pull_ng1))
    weighted = attention * up_ng1
    slope *= weighted
    grad_scale = (slope * scores).sum()
    scores_ngT.copy_(slope.mul_(scale).addcmul_(weighted, inverse_ng1))
    return grad_scale
