"""The ways to compute all-pairs patch-text similarity; ``README.md`` beside this file derives their equations.

* :mod:`~pacl_scale.kernels.eager`: the definition, line by line; the oracle of every test.
* :mod:`~pacl_scale.kernels.tiled`: any device, any size; recomputes in backward.
* :mod:`~pacl_scale.kernels.triton`: CUDA; the library's matrix products, and fused sweeps between them.

Each offers ``pool(patches_BTD, texts_ND, scale, pooling, mask_BT)``, where the texts are unit vectors already, of the
patches' type or a wider one, and the patches are not. Call them through
:func:`pacl_scale.similarity.patch_text_similarity`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

VECTOR_FLOOR = 1e-6
"""A vector shorter than this is divided by this instead of by its length when it is normalised."""

POOLED_FLOOR = 1e-4
"""A pooled image vector shorter than this counts as this long. Its square is the resolution of float32, in which
``a.(G a)`` is accumulated: patches that cancel out give a small similarity instead of a random one."""


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, and of all that is not a matrix product, for products of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Method = TypeVar("Method", bound=Callable[..., Any])


def without_autocast(method: Method) -> Method:
    """``forward`` or ``backward`` of an autograd function in the types that it chose, whatever mode surrounds it."""

    @functools.wraps(method)
    def call(ctx: Any, first: torch.Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *others)

    return cast(Method, call)
