"""Masks drawn over pictures: colours that colour-blind readers can tell apart, borders, labels and a legend."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

NOTHING = -1
"""Label of pixels that are left as they are."""

# Okabe and Ito's set without black, then Tol's "muted" ones that stay apart from them.
COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (136, 34, 85),
    (17, 119, 51),
    (170, 153, 221),
)
OTHER: Colour = (150, 150, 150)
"""Colour of everything that has no colour of its own."""

LABEL_SHARE = 0.01
"""A region gets a label where its word covers at least this share of the picture."""


def colours(count: int) -> list[Colour]:
    """``count`` colours: the colour-blind-safe ones first, then hues a golden angle apart in three lightnesses."""
    more = []
    for number in range(max(0, count - len(COLOURS))):
        red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, (0.45, 0.65, 0.3)[number % 3], 0.6)
        more.append((round(red * 255), round(green * 255), round(blue * 255)))
    return [*COLOURS, *more][:count]


def blend(picture: Image.Image, labels_HW: np.ndarray, palette: Sequence[Colour], opacity: float) -> Image.Image:
    """``picture`` (RGB) with each label's colour laid over it and a dark line between regions.

    Args:
        picture: H x W pixels.
        labels_HW: positions in ``palette``, or :data:`NOTHING`.
        palette: a colour a label.
        opacity: 0 (the picture) to 1 (the colours alone).
    """
    pixels_HW3 = np.asarray(picture.convert("RGB")).astype(np.float32)
    table = np.array([*palette, (0, 0, 0)], np.float32)
    covered_HW1 = (labels_HW != NOTHING)[..., None]
    mixed_HW3 = pixels_HW3 * (1 - opacity) + table[labels_HW] * opacity
    drawn_HW3 = np.where(covered_HW1, mixed_HW3, pixels_HW3)
    drawn_HW3[borders(labels_HW)] *= 0.35
    return Image.fromarray(drawn_HW3.round().astype(np.uint8))


def nearest(labels_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels at another size (width, height): each pixel has the label that was at its middle."""
    rows = (np.arange(size[1]) + 0.5) * labels_HW.shape[0] / size[1]
    columns = (np.arange(size[0]) + 0.5) * labels_HW.shape[1] / size[0]
    return labels_HW[rows.astype(int)][:, columns.astype(int)]


def borders(labels_HW: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool whose right or lower neighbour has another label."""
    found_HW = np.zeros(labels_HW.shape, bool)
    found_HW[:, :-1] |= labels_HW[:, :-1] != labels_HW[:, 1:]
    found_HW[:-1] |= labels_HW[:-1] != labels_HW[1:]
    return found_HW


def label_points(labels_HW: np.ndarray) -> dict[int, tuple[float, float]]:
    """For each label that covers enough, the point farthest inside it, as (x, y) shares of width and height."""
    height, width = labels_HW.shape
    # A coarse copy is enough to find a point, and makes the erosion cheap whatever the picture's size.
    step = max(1, max(height, width) // 96)
    coarse_HW = labels_HW[step // 2 :: step, step // 2 :: step]
    points = {}
    for label in np.unique(coarse_HW):
        inside_HW = np.pad(coarse_HW == label, 1)
        if label == NOTHING or inside_HW.sum() < LABEL_SHARE * coarse_HW.size:
            continue
        while (deeper_HW := _eroded(inside_HW)).any():
            inside_HW = deeper_HW
        ys, xs = np.nonzero(inside_HW)
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        points[int(label)] = (
            float((xs[middle] - 0.5) / coarse_HW.shape[1]),
            float((ys[middle] - 0.5) / coarse_HW.shape[0]),
        )
    return points


def draw_labels(picture: Image.Image, labels_HW: np.ndarray, words: Sequence[str]) -> Image.Image:
    """``picture`` with each word written on its region."""
    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    letters = font(max(11, min(picture.size) // 22))
    for label, (x, y) in label_points(labels_HW).items():
        left, top, right, bottom = pen.textbbox((0, 0), words[label], font=letters)
        wide, high = right - left + 10, bottom - top + 8
        x0 = min(max(0, x * picture.width - wide / 2), max(0, picture.width - wide))
        y0 = min(max(0, y * picture.height - high / 2), max(0, picture.height - high))
        pen.rounded_rectangle((x0, y0, x0 + wide, y0 + high), radius=4, fill=(20, 20, 20))
        pen.text((x0 + 5 - left, y0 + 4 - top), words[label], font=letters, fill=(255, 255, 255))
    return drawn


def with_legend(picture: Image.Image, entries: Sequence[tuple[Colour, str]], title: str = "") -> Image.Image:
    """``picture`` above a white panel with one colour sample and text an entry, as many columns as fit."""
    size = max(13, min(17, picture.width // 28))
    letters, line = font(size), round(size * 1.7)
    widest = max((letters.getlength(text) for _, text in entries), default=0)
    column = round(widest + 2.4 * size)
    width = max(picture.width, column + 2 * size)
    if title:
        width = max(width, round(letters.getlength(title)) + 2 * size)
    columns = max(1, (width - 2 * size) // max(1, column))
    lines = -(-len(entries) // columns) + bool(title)
    sheet = Image.new("RGB", (width, picture.height + lines * line + size), (255, 255, 255))
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    top = picture.height + size // 2
    if title:
        pen.text((size, top + line / 2), title, font=letters, fill=(20, 20, 20), anchor="lm")
        top += line
    for number, (colour, text) in enumerate(entries):
        x, y = size + number % columns * column, top + number // columns * line
        sample = (x, y + line * 0.2, x + size, y + line * 0.8)
        pen.rounded_rectangle(sample, radius=3, fill=colour, outline=(60, 60, 60))
        pen.text((x + 1.5 * size, y + line / 2), text, font=letters, fill=(20, 20, 20), anchor="lm")
    return sheet


def write(picture: Image.Image, at: tuple[float, float], text: str, size: int = 15) -> None:
    """Write ``text`` onto ``picture`` in dark letters, ``at`` being the middle of its left edge."""
    ImageDraw.Draw(picture).text(at, text, font=font(size), fill=(20, 20, 20), anchor="lm")


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans in pixels; it comes with matplotlib, so that no machine needs a font of its own."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _eroded(inside_HW: np.ndarray) -> np.ndarray:
    eroded_HW = inside_HW.copy()
    eroded_HW[1:-1, 1:-1] &= inside_HW[:-2, 1:-1] & inside_HW[2:, 1:-1] & inside_HW[1:-1, :-2] & inside_HW[1:-1, 2:]
    return eroded_HW
