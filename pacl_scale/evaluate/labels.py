"""From scores on patches to a class for every pixel: upsampling, merging views, and the background rule.

C classes, h x w a grid of patches, H x W the picture as it came, one slice of classes at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pacl_scale.evaluate.protocol import Protocol

CLASSES_AT_ONCE = 32
"""Classes upsampled together at most."""

VALUES_AT_ONCE = 12_000_000
"""Float values upsampled together: of a picture of 12 million pixels one class at a time, of VOC's all 32."""

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A part of a resized picture as the tower sees it."""

    scale: int
    """Number of the scale."""
    size: Size
    """Height and width of the whole resized picture."""
    top: int
    left: int
    box: Size
    """Height and width of the part."""
    flipped: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole picture."""
        return self.box == self.size


@dataclass(frozen=True)
class Lattice:
    """Where patches lie: side and distance in pixels of the tower's input."""

    patch: int
    stride: int

    def grid(self, size: Size) -> Size:
        """Rows and columns of the patches of an input of ``size`` pixels."""
        return (size[0] - self.patch) // self.stride + 1, (size[1] - self.patch) // self.stride + 1


def spread(maps_Chw: Tensor, out: Size, box: Size, lattice: Lattice) -> Tensor:
    """Maps (C, h, w) of an input of ``box`` pixels as (C, H, W) of ``out``: bilinear between the patches' centres.

    Patch i has its centre at ``patch / 2 + i * stride``, whatever the stride; beyond the outermost centres the
    nearest value goes on. At the tower's own stride this is torch's bilinear interpolation with half-pixel centres.
    """
    if lattice.stride == lattice.patch:
        # Maps whose classes lie side by side would be upsampled that way, in four times the time.
        return F.interpolate(maps_Chw.contiguous()[None], size=out, mode="bilinear", align_corners=False)[0]
    # As products with matrices of two weights a row: half the time of gathering neighbours, and a third of the memory.
    rows_Hh = _weights(maps_Chw.shape[1], out[0], box[0], lattice, maps_Chw)
    columns_Ww = _weights(maps_Chw.shape[2], out[1], box[1], lattice, maps_Chw)
    tall_CHw = rows_Hh @ maps_Chw
    return (tall_CHw.flatten(0, 1) @ columns_Ww.T).view(len(maps_Chw), *out)


def cells(count: int, out: int, box: int, lattice: Lattice) -> Tensor:
    """(out,) int64: which of ``count`` patches in a row has its centre nearest to each pixel of the picture."""
    place = _places(count, out, box, lattice, torch.zeros(()))
    return (place + 0.5).floor().long().clamp(0, count - 1)


def merged(maps: Sequence[tuple[View, Tensor]], classes: slice, out: Size, lattice: Lattice) -> Tensor:
    """The mean over scales and mirrored views of the maps (c, H, W) of some classes.

    Windows of one scale are added on the resized picture, divided by how many cover each pixel, then resized.
    """
    scales: dict[int, list[tuple[View, Tensor]]] = {}
    for view, maps_Chw in maps:
        scales.setdefault(view.scale, []).append((view, maps_Chw[classes]))
    merged_CHW, *others = (_one_scale(views, out, lattice) for views in scales.values())
    for other_CHW in others:
        merged_CHW = merged_CHW + other_CHW
    return merged_CHW / len(scales) if others else merged_CHW


def label_pixels(
    portion_of: Callable[[slice], Tensor],
    classes: int,
    pixels: int,
    protocol: Protocol,
    background: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best class (H, W) int64 of each pixel, or ``background`` where the protocol's rule says so; and its score.

    Args:
        portion_of: full-size maps (c, H, W) of a slice of the classes.
        classes: C.
        pixels: H x W.
        protocol: gives the rule.
        background: position that the rule answers; ``None`` applies no rule. Under the rule "words" the background
            words are a class like the others.

    On a tie the earlier class wins.
    """
    best_HW, class_HW, softmax = None, None, None
    by_softmax = background is not None and protocol.background in ("probability", "entropy")
    at_once = max(1, min(CLASSES_AT_ONCE, VALUES_AT_ONCE // pixels))
    for start in range(0, classes, at_once):
        portion_CHW = portion_of(slice(start, min(start + at_once, classes)))
        value_HW, index_HW = portion_CHW.max(dim=0)
        if best_HW is None or class_HW is None:
            best_HW, class_HW = value_HW, index_HW
        else:
            better_HW = value_HW > best_HW
            best_HW = torch.where(better_HW, value_HW, best_HW)
            class_HW = torch.where(better_HW, index_HW + start, class_HW)
        if by_softmax:
            softmax = _with_portion(softmax, portion_CHW * protocol.background_scale)
    assert best_HW is not None and class_HW is not None, "at least one class"
    if background is None or protocol.background in ("none", "words"):
        return class_HW, best_HW
    if softmax is None:
        is_background_HW = best_HW < protocol.background_threshold
    else:
        top_HW, mass_HW, weighted_HW = softmax
        if protocol.background == "probability":
            is_background_HW = 1 / mass_HW < protocol.background_threshold
        else:
            entropy_HW = mass_HW.log() - weighted_HW / mass_HW
            base = math.log(2) if protocol.log_base == "2" else 1.0
            is_background_HW = entropy_HW / base > protocol.background_threshold
    return torch.where(is_background_HW, background, class_HW), best_HW


def _one_scale(views: Sequence[tuple[View, Tensor]], out: Size, lattice: Lattice) -> Tensor:
    if all(view.is_whole for view, _ in views):
        spreads = [_unflipped(spread(maps, out, view.box, lattice), view) for view, maps in views]
        return spreads[0] if len(spreads) == 1 else torch.stack(spreads).mean(dim=0)
    size, first = views[0][0].size, views[0][1]
    canvas_cHW = first.new_zeros((len(first), *size))
    covered_HW = first.new_zeros(size)
    for view, maps in views:
        rows, columns = slice(view.top, view.top + view.box[0]), slice(view.left, view.left + view.box[1])
        canvas_cHW[:, rows, columns] += _unflipped(spread(maps, view.box, view.box, lattice), view)
        covered_HW[rows, columns] += 1
    canvas_cHW /= covered_HW
    return F.interpolate(canvas_cHW[None], size=out, mode="bilinear", align_corners=False)[0]


def _unflipped(maps_CHW: Tensor, view: View) -> Tensor:
    return maps_CHW.flip(-1) if view.flipped else maps_CHW


def _places(count: int, out: int, box: int, lattice: Lattice, like: Tensor) -> Tensor:
    """Each pixel's place on the axis whose whole numbers are the patches' centres, within the outermost two."""
    centres = (torch.arange(out, dtype=torch.float64) + 0.5) * box / out
    return ((centres - lattice.patch / 2) / lattice.stride).clamp(0, count - 1).to(like.device)


def _weights(count: int, out: int, box: int, lattice: Lattice, like: Tensor) -> Tensor:
    """(out, count): how much each patch's value counts at each pixel of an axis; two a pixel, which add up to 1."""
    places = _places(count, out, box, lattice, like)
    before = places.floor().long().clamp(max=max(0, count - 2))
    after = (before + 1).clamp(max=count - 1)
    share = (places - before).to(like.dtype)
    weights = like.new_zeros(out, count)
    weights.scatter_add_(1, before[:, None], (1 - share)[:, None])
    return weights.scatter_add_(1, after[:, None], share[:, None])


def _with_portion(softmax: tuple[Tensor, Tensor, Tensor] | None, logits_CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit m, sum of exp(x - m), and sum of (x - m) exp(x - m) over the classes so far, each (H, W).

    The logits are written over, as memory is what large pictures lack.
    """
    top_HW = logits_CHW.amax(dim=0)
    if softmax is not None:
        top_HW = torch.maximum(top_HW, softmax[0])
    lower_CHW = logits_CHW.sub_(top_HW)
    exp_CHW = lower_CHW.exp()
    mass_HW = exp_CHW.sum(dim=0)
    weighted_HW = exp_CHW.mul_(lower_CHW).sum(dim=0)
    if softmax is not None:
        drop_HW = softmax[0] - top_HW
        mass_HW = mass_HW + softmax[1] * drop_HW.exp()
        weighted_HW = weighted_HW + (softmax[2] + drop_HW * softmax[1]) * drop_HW.exp()
    return top_HW, mass_HW, weighted_HW
