"""What is found in one picture, and the files that show it: overlay, masks, run lengths, heat maps."""

import io
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.heat import heat_png, small_size
from pacl_scale.evaluate.masks import index_png, run_lengths
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.look import Found, find, see

MAX_SIDE = 1600
"""The overlay is at most this wide or high, in pixels; masks have the picture's own size."""

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Suffix of an overlay to its format."""

HEAT_SIDE = 640
"""Longest side of heat maps in pixels."""


def segment(
    picture: Image.Image,
    words: Sequence[str],
    towers: Towers,
    method: Method,
    protocol: Protocol,
    threshold: float | None = None,
) -> np.ndarray:
    """Position in ``words`` of each pixel (H, W) int64; ``overlay.NOTHING`` below the threshold."""
    return find(see(picture, towers, method, protocol), words, towers, protocol, threshold).labels_HW


def draw(
    picture: Image.Image, labels_HW: np.ndarray, words: Sequence[str], shares: dict[str, float], opacity: float
) -> Image.Image:
    """The overlay: colours over the picture, each word on its region, and a legend with shares below."""
    palette = overlay.colours(len(words))
    colored = overlay.draw_labels(overlay.blend(picture, labels_HW, palette, opacity), labels_HW, words)
    entries = [(palette[number], f"{word} {100 * shares[word]:.1f} %") for number, word in enumerate(words)]
    return overlay.with_legend(colored, entries)


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its camera meant it to be seen."""
    return ImageOps.exif_transpose(picture)


def kind_of(output: str) -> tuple[str, str]:
    """Stem and format of an overlay's file name.

    Raises:
        UserError: its suffix is of no format that is written.
    """
    stem, suffix = posixpath.splitext(output)
    if suffix.lower() not in KINDS:
        raise UserError(f"{output}: the output's name must end in {', '.join(KINDS)}")
    return stem, KINDS[suffix.lower()]


def write_overlay(
    output: str, picture: Image.Image, labels_HW: np.ndarray, words: Sequence[str], opacity: float
) -> dict[str, float]:
    """Write the overlay, no larger than :data:`MAX_SIDE`; returns each word's share of the picture."""
    shares = {word: float((labels_HW == number).mean()) for number, word in enumerate(words)}
    small = picture.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if small.size != picture.size:
        labels_HW = overlay.nearest(labels_HW, small.size)
    buffer = io.BytesIO()
    draw(small, labels_HW, words, shares, opacity).save(buffer, kind_of(output)[1], quality=92)
    storage.write_bytes(output, buffer.getvalue())
    return shares


def write_masks(
    stem: str, address: str, labels_HW: np.ndarray, shares: dict[str, float], extra: dict[str, Any]
) -> None:
    """Write ``stem.mask.png`` and ``stem.json``, of the picture's own size, turned as its EXIF data say."""
    storage.write_bytes(f"{stem}.mask.png", index_png(labels_HW, overlay.colours(len(shares))))
    found = [
        {"word": word, "share": share, "rle": run_lengths(labels_HW == number)}
        for number, (word, share) in enumerate(shares.items())
    ]
    height, width = labels_HW.shape
    content = {"picture": address, "height": height, "width": width, "words": found} | extra
    storage.write_bytes(f"{stem}.json", (json.dumps(content) + "\n").encode())


def write_heat(stem: str, found: Found, words: Sequence[str]) -> dict[str, Any]:
    """Write ``stem.heat-N.png`` for each of the first words; returns what their values mean."""
    height, width = found.seen.size
    scores_NHW = found.scores(small_size(height, width, HEAT_SIDE))[: len(words)]
    low, high = float(scores_NHW.min()), float(scores_NHW.max())
    files = {}
    for number, (word, scores_HW) in enumerate(zip(words, scores_NHW, strict=True)):
        files[word] = f"{stem}.heat-{number}.png"
        storage.write_bytes(files[word], heat_png(scores_HW, low, high))
    names = {word: file.rpartition("/")[2] for word, file in files.items()}
    return {"low": round(low, 4), "high": round(high, 4), "files": names}
