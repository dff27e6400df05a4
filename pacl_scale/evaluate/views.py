"""How a picture is shown to a tower: cropped, resized, cut into windows, mirrored."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pacl_scale.encoders import VisionEncoder
from pacl_scale.errors import UserError
from pacl_scale.evaluate.labels import Lattice, View
from pacl_scale.evaluate.protocol import Protocol, as_input

MOST_PATCHES = 65536
"""Patches of one view: attention among more takes hours. A strip of 1 x 1000 pixels asks for three times as many."""

MOST_SHOWN_PIXELS = 64_000_000
"""Pixels of a resized picture."""


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


def recorded(protocol: Protocol, vision: VisionEncoder) -> dict[str, Any]:
    """A protocol for the rows, with everything resolved that it leaves to the tower: two that show a picture alike
    are recorded alike."""
    lattice, preprocess = lattice_of(vision, protocol), vision.preprocess
    window, step = window_sides(protocol, vision.patch_size) if protocol.window else (0, 0)
    return protocol.record() | {
        "size": protocol.size or preprocess.image_size,
        "window": window,
        "window_step": step,
        "stride": lattice.stride,
        "patch_size": lattice.patch,
        "filter": f"{preprocess.interpolation}, antialiased, as Pillow resizes",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }


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
    _, step = window_sides(protocol, patch_size)
    box = windows_box(size, protocol, patch_size)
    tops, lefts = (_starts(length, part, step) for length, part in zip(size, box, strict=True))
    return [(top, left, box) for top in tops for left in lefts]


def window_sides(protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Side of a window and distance between two, in pixels, rounded to whole patches."""
    side = max(1, round(protocol.window / patch_size)) * patch_size
    step = max(1, round((protocol.window_step or protocol.window / 2) / patch_size)) * patch_size
    return side, step


def _starts(length: int, part: int, step: int) -> list[int]:
    """Starts of windows that cover ``length``; the last one ends where the picture does."""
    return sorted({*range(0, length - part, step), length - part})


def check_size(size: tuple[int, int], name: str, vision: VisionEncoder, protocol: Protocol) -> None:
    """Refuse a picture of ``size`` (height, width) that would enter the tower at a size out of all proportion.

    Raises:
        UserError: a view of it has more than :data:`MOST_PATCHES` patches, or the resized picture over
            :data:`MOST_SHOWN_PIXELS` pixels; ``name`` is how the sentence calls it.
    """
    sides = (min(size), min(size)) if protocol.crop == "centre" else size
    for scale in protocol.scales:
        shown = protocol.input_size(*sides, vision.preprocess.image_size, vision.patch_size, scale)
        rows, columns = lattice_of(vision, protocol).grid(windows_box(shown, protocol, vision.patch_size))
        if rows * columns > MOST_PATCHES or shown[0] * shown[1] > MOST_SHOWN_PIXELS:
            raise UserError(
                f"{name} ({size[1]} x {size[0]} pixels) would enter the vision tower as {shown[1]} x {shown[0]} pixels "
                f"and {rows * columns} patches at a time, of which at most {MOST_PATCHES} are allowed; cut it, or "
                "choose a smaller size or a larger stride"
            )


def windows_box(size: tuple[int, int], protocol: Protocol, patch_size: int) -> tuple[int, int]:
    """Height and width of what the tower sees at once of a resized picture."""
    if not protocol.window:
        return size
    side, _ = window_sides(protocol, patch_size)
    return min(side, size[0]), min(side, size[1])


def check_stride(vision: VisionEncoder, protocol: Protocol) -> None:
    """Try the protocol's stride on a grey picture. Raises :class:`ValueError` where the tower cannot have it."""
    if protocol.stride:
        side = vision.patch_size
        vision.encode(torch.zeros(1, 3, side, side), protocol.stride)
