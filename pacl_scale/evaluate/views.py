"""How a picture is shown to a tower: cropped, resized, cut into windows, mirrored."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pacl_scale.encoders import VisionEncoder
from pacl_scale.evaluate.labels import Lattice, View
from pacl_scale.evaluate.protocol import Protocol, as_input


@dataclass
class Prepared:
    """One picture ready for the tower, and what the tower has said of it so far."""

    number: int
    picture: Image.Image
    truth_HW: np.ndarray
    views: list[View]
    inputs: list[Tensor]
    """(3, h, w) a view; dropped once it is encoded."""
    tokens: dict[int, Tensor] = field(default_factory=dict)
    """View to patch tokens (1, T, Din)."""
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)


def lattice_of(vision: VisionEncoder, protocol: Protocol) -> Lattice:
    """Patch size and stride in pixels of the tower's input."""
    return Lattice(vision.patch_size, protocol.stride or vision.patch_size)


def cropped(picture: Image.Image, truth_HW: np.ndarray, protocol: Protocol) -> tuple[Image.Image, np.ndarray]:
    """Picture and mask as they are scored: whole, or the square in their middle."""
    if protocol.crop == "none":
        return picture, truth_HW
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)), truth_HW[top : top + side, left : left + side]


def prepare(
    number: int, picture: Image.Image, truth_HW: np.ndarray, vision: VisionEncoder, protocol: Protocol
) -> Prepared:
    """All views of a picture under a protocol."""
    picture, truth_HW = cropped(picture, truth_HW, protocol)
    views, inputs = [], []
    for number_of_scale, scale in enumerate(protocol.scales):
        size = protocol.input_size(
            picture.height, picture.width, vision.preprocess.image_size, vision.patch_size, scale
        )
        pixels_3HW = as_input(picture, size, vision.preprocess)
        for top, left, box in windows(size, protocol, vision.patch_size):
            part_3hw = pixels_3HW[:, top : top + box[0], left : left + box[1]]
            for flipped in (False, True) if protocol.flip else (False,):
                views.append(View(number_of_scale, size, top, left, box, flipped))
                inputs.append(part_3hw.flip(-1) if flipped else part_3hw)
    return Prepared(number, picture, truth_HW, views, inputs)


def windows(size: tuple[int, int], protocol: Protocol, patch_size: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Top, left and (height, width) of every window over a picture of ``size``, row by row."""
    if not protocol.window:
        return [(0, 0, size)]
    side = max(1, round(protocol.window / patch_size)) * patch_size
    step = max(1, round((protocol.window_step or protocol.window / 2) / patch_size)) * patch_size
    box = (min(side, size[0]), min(side, size[1]))
    tops, lefts = (_starts(length, part, step) for length, part in zip(size, box, strict=True))
    return [(top, left, box) for top in tops for left in lefts]


def _starts(length: int, part: int, step: int) -> list[int]:
    """Starts of windows that cover ``length``; the last one ends where the picture does."""
    return sorted({*range(0, length - part, step), length - part})


def check_stride(vision: VisionEncoder, protocol: Protocol) -> None:
    """Try the protocol's stride on a grey picture. Raises :class:`ValueError` where the tower cannot have it."""
    if protocol.stride:
        side = vision.patch_size
        vision.encode(torch.zeros(1, 3, side, side), protocol.stride)
