"""Masks as others read them: PNG of indices, and COCO's run lengths."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pacl_scale.evaluate.overlay import Colour

UNLABELLED = 255
"""Pixel value of what has no label."""


def run_lengths(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed RLE of a bool mask: ``size`` [H, W] and ``counts`` down the columns, zeros first."""
    flat = mask_HW.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    counts = np.diff(edges).tolist()
    if len(flat) and flat[0]:
        counts = [0, *counts]
    return {"size": [int(side) for side in mask_HW.shape], "counts": counts}


def index_png(labels_HW: np.ndarray, colours: Sequence[Colour]) -> bytes:
    """A palette PNG whose values are labels (below 255); negative ones are :data:`UNLABELLED`, in white."""
    picture = Image.fromarray(np.where(labels_HW < 0, UNLABELLED, labels_HW).astype(np.uint8))
    # All 256 entries: with fewer, Pillow stores fewer bits a pixel and UNLABELLED would not survive.
    palette = [*colours, *[(255, 255, 255)] * (UNLABELLED + 1 - len(colours))]
    picture.putpalette([value for colour in palette for value in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
