"""The definition of the similarity, in the order of the paper; automatic differentiation does the backward.

Legend: B images, T patches an image, N texts, D width.

It holds tensors of B x N x T and B x N x D numbers, so it is for tests and for sizes that fit.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pacl_scale.kernels import POOLED_FLOOR, VECTOR_FLOOR, exact_type


def pool(patches_BTD: Tensor, texts_ND: Tensor, scale: Tensor, pooling: str, mask_BT: Tensor | None) -> Tensor:
    """Similarity (B, N) of every image with every text.

    Args:
        patches_BTD: patch vectors of any length.
        texts_ND: unit vectors.
        scale: attention scale, zero-dimensional.
        pooling: "cosine", "mean" or "max".
        mask_BT: true where a patch counts; ``None``: all do.
    """
    exact = exact_type(patches_BTD.dtype)
    patches_BTD, texts_ND = patches_BTD.to(exact), texts_ND.to(exact)
    if mask_BT is not None:
        patches_BTD = patches_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0.0)
    patches_BTD = functional.normalize(patches_BTD, dim=-1, eps=VECTOR_FLOOR)
    scores_BNT = torch.einsum("btd,nd->bnt", patches_BTD, texts_ND)
    if pooling == "max":
        return _hide(scores_BNT, mask_BT).amax(-1)
    attention_BNT = torch.softmax(_hide(scale * scores_BNT, mask_BT), dim=-1)
    pooled_BND = torch.einsum("bnt,btd->bnd", attention_BNT, patches_BTD)
    similarity_BN = (pooled_BND * texts_ND).sum(-1)
    if pooling == "mean":
        return similarity_BN
    return similarity_BN / torch.linalg.vector_norm(pooled_BND, dim=-1).clamp(min=POOLED_FLOOR)


def _hide(scores_BNT: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return scores_BNT
    return scores_BNT.masked_fill(~mask_BT.unsqueeze(1), float("-inf"))
