"""How well one word fits each part of a picture: score maps as pictures that anybody can read.

A heat map is a palette PNG. Its values are scores, 0 the lowest of the picture's maps and 255 the highest, so that the
maps of one picture can be compared with each other; the palette (matplotlib's "inferno", as bright as the score is
high) shows them.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pacl_scale.evaluate.labels import Lattice, Size, View, merged

SIDE = 160
"""Longest side in pixels of the heat maps that are kept: patches are larger than that."""


def word_maps(maps: Sequence[tuple[View, Tensor]], words: Sequence[int], out: Size, lattice: Lattice) -> np.ndarray:
    """Scores (n, H, W) float32 of some words on a picture of ``out`` pixels, views merged as for its labels.

    Args:
        maps: each view's scores (C, h, w) on patches.
        words: n positions among the C.
        out: height and width of the result.
        lattice: where patches lie.
    """
    wanted = torch.tensor(list(words), dtype=torch.long)
    chosen = [(view, maps_Chw[wanted.to(maps_Chw.device)]) for view, maps_Chw in maps]
    return merged(chosen, slice(None), out, lattice).float().cpu().numpy()


def small_size(height: int, width: int, side: int = SIDE) -> Size:
    """``height`` and ``width`` scaled down to at most ``side``."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def heat_png(scores_HW: np.ndarray, low: float, high: float) -> bytes:
    """A palette PNG of scores from ``low`` (0) to ``high`` (255)."""
    span = high - low
    shares_HW = (scores_HW - low) / span if span > 0 else np.zeros(scores_HW.shape)
    picture = Image.fromarray((shares_HW.clip(0, 1) * 255).round().astype(np.uint8))
    picture.putpalette(palette().ravel().tolist())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def palette() -> np.ndarray:
    """(256, 3) uint8: dark to bright."""
    import matplotlib

    return matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
