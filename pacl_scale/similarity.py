"""All-pairs patch-text similarity: how well every image of a batch fits every text of it (the heart of PACL).

For image i with patches v_t and text j with vector x (both of unit length), the paper's compatibility function is

    s_t = v_t . x         a = softmax over t of (k s_t)         w = sum over t of a_t v_t         phi = cos(w, x)

Every pair has its own attention, so a naive evaluation holds B x N x T scores and B x N x D pooled vectors. The
backends hold neither; ``kernels/README.md`` derives how.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pacl_scale.kernels import VECTOR_FLOOR, eager, exact_type, tiled

Pooling = Literal["cosine", "mean", "max"]
"""How patches become one number: the paper's cosine of the pooled vector with the text; the same without the pooled
vector's normalisation (the attention-weighted mean of the scores); the best patch's score alone (as FILIP does)."""

Backend = Literal["auto", "eager", "tiled", "triton"]
"""Who computes it. "auto": triton where it can run, else tiled."""


NORMALISE_TEXTS = {"cpu": 1024, "cuda": 16384}
"""Texts that are brought to unit length at a time: few enough for a cache, or for few launches."""


def patch_text_similarity(
    patches: Tensor,
    texts: Tensor,
    *,
    attention_scale: float | Tensor = 10.0,
    pooling: Pooling = "cosine",
    backend: Backend = "auto",
    patch_mask: Tensor | None = None,
) -> Tensor:
    """Similarity of every image with every text, by softmax pooling of its patches (PACL, arXiv 2212.04994).

    Args:
        patches: (B, T, D) patch vectors of any length and float type; the type decides in which the matrix products
            are made (bfloat16 and float16 with float32 sums, float32, float64).
        texts: (N, D) text vectors of any length and float type, on the same device.
        attention_scale: k above, the inverse temperature of the attention over patches; 0 pools all patches alike. A
            tensor of one number receives a gradient. Unused by "max".
        pooling: see :data:`Pooling`.
        backend: see :data:`Backend`.
        patch_mask: (B, T) booleans, true for the patches that count (padding is false); each image needs one.

    Returns:
        (B, N) float32 (float64 if the patches are float64), each within [-1, 1] up to rounding. Gradients reach the
        patches, the texts and the attention scale where they require one. Patches or texts of no length have
        similarity 0 with everything.

    Raises:
        ValueError: shapes, types or devices that do not fit, an image without a patch, or a backend that cannot run.
    """
    _check(patches, texts, pooling, patch_mask)
    pool = _choose(backend, patches, pooling)
    exact = exact_type(patches.dtype)
    units = _unit_vectors(texts, exact if texts.requires_grad or backend == "eager" else patches.dtype)
    scale = torch.as_tensor(attention_scale, dtype=exact, device=_device_of(attention_scale)).reshape(())
    # The patches' type says in which to multiply; autocast would have another opinion.
    with torch.autocast(patches.device.type, enabled=False):
        return pool(patches, units, scale, pooling, patch_mask)


@torch.no_grad()
def attention_entropy(patches: Tensor, texts: Tensor, attention_scale: float) -> float:
    """How spread the attention of each picture to its own text is, 0 (one patch) to 1 (all patches alike).

    Args:
        patches: (B, T, D) patch vectors.
        texts: (B, D) text vectors, one a picture.
        attention_scale: k of :func:`patch_text_similarity`.

    Returns:
        Mean over pictures of the entropy of the softmax over patches, as a share of log T; 0 for a single patch.
    """
    if patches.shape[1] == 1:
        return 0.0
    units, texts = functional.normalize(patches.float(), dim=-1), functional.normalize(texts.float(), dim=-1)
    log_attention = torch.log_softmax(attention_scale * torch.einsum("btd,bd->bt", units, texts), dim=1)
    entropy = -(log_attention.exp() * log_attention).sum(1).mean()
    return float(entropy) / math.log(patches.shape[1])


def _check(patches: Tensor, texts: Tensor, pooling: str, mask: Tensor | None) -> None:
    if patches.dim() != 3 or texts.dim() != 2 or patches.shape[2] != texts.shape[1]:
        raise ValueError(
            f"patches must be (B, T, D) and texts (N, D), not {tuple(patches.shape)} and {tuple(texts.shape)}"
        )
    if 0 in patches.shape or 0 in texts.shape:
        raise ValueError(f"an empty batch has no similarity: {tuple(patches.shape)} and {tuple(texts.shape)}")
    if not (patches.is_floating_point() and texts.is_floating_point()):
        raise ValueError(f"patches and texts must be of a float type, not {patches.dtype} and {texts.dtype}")
    if patches.device != texts.device:
        raise ValueError(f"patches are on {patches.device} but texts on {texts.device}")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, not {pooling!r}")
    if mask is None:
        return
    if mask.shape != patches.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"patch_mask must be booleans of shape {tuple(patches.shape[:2])}, not {mask.dtype} of {tuple(mask.shape)}"
        )
    if not bool(mask.any(dim=1).all()):
        raise ValueError("patch_mask leaves an image without any patch")


def _choose(backend: str, patches: Tensor, pooling: str) -> Callable[..., Tensor]:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if backend == "eager":
        return eager.pool
    if backend == "tiled" or (backend == "auto" and patches.device.type != "cuda"):
        return tiled.pool
    if importlib.util.find_spec("triton") is None:
        reason: str | None = "the package triton is not installed"
    else:
        from pacl_scale.kernels import triton

        reason = triton.reason_not_to(patches, pooling)
        if reason is None:
            return triton.pool
    if backend == "triton":
        raise ValueError(f"backend triton cannot run: {reason}")
    return tiled.pool


def _unit_vectors(texts: Tensor, dtype: torch.dtype) -> Tensor:
    """``texts`` at length 1, as ``dtype``; some at a time where nothing must be kept for a gradient."""
    exact = exact_type(dtype)
    if texts.requires_grad:
        return functional.normalize(texts.to(exact), dim=-1, eps=VECTOR_FLOOR).to(dtype)
    units = torch.empty_like(texts, dtype=dtype, memory_format=torch.contiguous_format)
    size = NORMALISE_TEXTS.get(texts.device.type, 1024)
    for some, out in zip(texts.split(size), units.split(size), strict=True):
        out.copy_(functional.normalize(some.to(exact), dim=-1, eps=VECTOR_FLOOR))
    return units


def _device_of(attention_scale: float | Tensor) -> torch.device | None:
    return attention_scale.device if isinstance(attention_scale, Tensor) else None
