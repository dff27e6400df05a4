"""The nameable grounds of the drawn scenes, as procedural textures.

A *plate* is a large picture of one ground; a scene shows a random cut of it, mirrored, scaled and tinted anew. So
a scene costs a millisecond, and a few plates for each ground give thousands of different scenes.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.floating]

PLATE = 400
"""Side of a plate in pixels."""

PLATES = 3
"""Plates of each ground."""


def cut_background(name: str, size: int, plate_seed: tuple[int, ...], rng: np.random.Generator) -> Array:
    """A picture (size, size, 3) of the ground ``name``, values in 0..255.

    Args:
        name: a name of ``BACKGROUNDS``.
        size: side in pixels.
        plate_seed: what the plates are drawn from; splits that must not share plates have different ones.
        rng: chooses the plate, the cut and the tint.
    """
    image = plate(name, (*plate_seed, int(rng.integers(PLATES))))
    side = int(rng.integers(PLATE // 2, int(PLATE * 0.85)))
    left, top = rng.integers(0, PLATE - side, 2).tolist()
    piece = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tint = rng.normal(1, 0.02, 3).clip(0.95, 1.05) * rng.uniform(0.86, 1.05)
    return np.asarray(piece, np.float32) * tint.astype(np.float32)


@lru_cache(maxsize=128)
def plate(name: str, seed: tuple[int, ...]) -> Image.Image:
    """The plate of the ground ``name`` that belongs to ``seed``."""
    rng = np.random.default_rng((*seed, list(BACKGROUNDS).index(name)))
    return Image.fromarray(BACKGROUNDS[name](rng).clip(0, 255).astype(np.uint8))


def _noise(rng: np.random.Generator, rows: int, columns: int | None = None) -> Array:
    """Smooth noise (PLATE, PLATE) of mean 0 and deviation about 1, with ``rows`` bumps from top to bottom."""
    coarse = Image.fromarray(rng.standard_normal((rows, columns or rows)).astype(np.float32))
    smooth = np.asarray(coarse.resize((PLATE, PLATE), Image.Resampling.BICUBIC))
    return (smooth / max(float(smooth.std()), 1e-6)).astype(np.float32)


def _cloudy(rng: np.random.Generator, rows: int, octaves: int = 4) -> Array:
    """Noise on several scales, each half as strong and twice as fine as the one before."""
    layers = [_noise(rng, rows * 2**octave) / 2**octave for octave in range(octaves)]
    return np.sum(layers, axis=0) / np.float32(1.15)


def _grain(rng: np.random.Generator) -> Array:
    return rng.standard_normal((PLATE, PLATE)).astype(np.float32)


def _colour(red: float, green: float, blue: float) -> Array:
    return np.array([red, green, blue], np.float32)


def _blend(low: Array, high: Array, share: Array) -> Array:
    return low + (high - low) * np.clip(share, 0, 1)[..., None]


def _grid() -> tuple[Array, Array]:
    y, x = np.mgrid[0:PLATE, 0:PLATE].astype(np.float32)
    return x, y


def _grass(rng: np.random.Generator) -> Array:
    soil = _blend(_colour(52, 92, 34), _colour(86, 132, 52), 0.5 + 0.25 * _cloudy(rng, 5))
    image = Image.fromarray(soil.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(5000):
        x, y = rng.uniform(-10, PLATE + 10, 2)
        lean, height = rng.normal(0, 4), rng.uniform(7, 17)
        green = rng.uniform(0.62, 1.25)
        blade = (int(96 * green + rng.uniform(-14, 20)), int(158 * green), int(58 * green))
        pen.line([(x, y), (x + lean * 0.4, y - height * 0.6), (x + lean, y - height)], fill=blade, width=2)
    return np.asarray(image, np.float32)


def _sand(rng: np.random.Generator) -> Array:
    x, y = _grid()
    ripples = np.sin(y / 11 + 1.8 * _noise(rng, 5) + x / 90)
    image = _blend(_colour(206, 172, 118), _colour(238, 212, 164), 0.5 + 0.26 * ripples + 0.1 * _cloudy(rng, 6))
    return image + (5 * _grain(rng))[..., None]


def _sky(rng: np.random.Generator) -> Array:
    _, y = _grid()
    image = _blend(_colour(84, 152, 226), _colour(168, 210, 244), y / PLATE)
    clouds = np.clip(_cloudy(rng, 4, 5) * 0.75 - 0.25, 0, 1)
    return _blend(image, _colour(252, 252, 252), clouds)


def _water(rng: np.random.Generator) -> Array:
    x, y = _grid()
    bend = _noise(rng, 6) * 9
    waves = np.sin((y + bend) / 7.5 + x / 60) + 0.7 * np.sin((y - bend) / 4.5 - x / 35 + _noise(rng, 9))
    image = _blend(_colour(10, 74, 112), _colour(42, 148, 176), 0.5 + 0.22 * waves + 0.1 * _cloudy(rng, 4))
    crests = np.clip(waves + 0.5 * _noise(rng, 30, 12) - 1.25, 0, 1)
    return _blend(image, _colour(206, 238, 240), crests)


def _wall(rng: np.random.Generator) -> Array:
    x, y = _grid()
    height, width, joint = 22, 50, 3
    row = (y // height).astype(int)
    shifted = x + (row % 2) * width / 2
    column = (shifted // width).astype(int)
    tones = rng.normal(0, 1, (row.max() + 1, column.max() + 1)).astype(np.float32)[row, column]
    image = _blend(_colour(134, 54, 40), _colour(188, 96, 70), 0.5 + 0.24 * tones + 0.1 * _cloudy(rng, 12))
    across, down = shifted % width, y % height
    edge = np.minimum(np.minimum(across, width - across), np.minimum(down, height - down))
    image += (np.clip((down < 6) * 14 - (down > height - 5) * 18, -20, 20) * (edge >= joint / 2))[..., None]
    mortar = np.clip(joint - edge, 0, 1)
    return _blend(image, _colour(198, 190, 178), mortar) + (5 * _grain(rng))[..., None]


def _floor(rng: np.random.Generator) -> Array:
    x, y = _grid()
    plank = 58
    row = (y // plank).astype(int)
    shift = rng.uniform(0, 400, row.max() + 1).astype(np.float32)[row]
    tone = rng.normal(0, 1, row.max() + 1).astype(np.float32)[row]
    warp = _noise(rng, 7, 2) * 5 + _noise(rng, 16, 4) * 2
    rings = np.sin((y + warp + shift) / 2.9) + 0.5 * np.sin((y + 1.6 * warp + shift) / 1.4)
    fibres = _noise(rng, 200, 8)
    image = _blend(_colour(146, 96, 54), _colour(206, 156, 100), 0.5 + 0.13 * rings + 0.1 * fibres + 0.13 * tone)
    gap = np.clip(2.2 - np.minimum(y % plank, plank - y % plank), 0, 1)
    ends = rng.integers(0, PLATE, row.max() + 1)[row]
    gap = np.maximum(gap, np.clip(1.8 - np.abs(x - ends), 0, 1))
    return _blend(image, _colour(72, 44, 24), gap)


def _snow(rng: np.random.Generator) -> Array:
    drifts = _cloudy(rng, 4, 4)
    slope = np.gradient(drifts, axis=0) * 16 + np.gradient(drifts, axis=1) * 10
    image = _blend(_colour(178, 196, 226), _colour(250, 251, 255), 0.66 + 0.3 * slope + 0.1 * drifts)
    glitter = (rng.random((PLATE, PLATE)) > 0.997).astype(np.float32)
    return image + (glitter * 40 + 2.5 * _grain(rng))[..., None]


def _pavement(rng: np.random.Generator) -> Array:
    # Voronoi cells around one random point in each square of a grid: the nearest lies within two squares.
    x, y = _grid()
    square = 26
    count = PLATE // square + 6
    points = (
        np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1) - 2 + rng.uniform(0.1, 0.9, (count, count, 2))
    ) * square
    tones = rng.normal(0, 1, (count, count)).astype(np.float32)
    warmth = rng.normal(0, 1, (count, count)).astype(np.float32)
    nearest = np.full((PLATE, PLATE), np.inf, np.float32)
    second = nearest.copy()
    tone, warm = np.zeros_like(nearest), np.zeros_like(nearest)
    column, row = (x // square).astype(int) + 2, (y // square).astype(int) + 2
    for down in range(-2, 3):
        for across in range(-2, 3):
            r, c = row + down, column + across
            distance = np.hypot(x - points[r, c, 0], y - points[r, c, 1]).astype(np.float32)
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            tone, warm = np.where(closer, tones[r, c], tone), np.where(closer, warmth[r, c], warm)
            nearest = np.where(closer, distance, nearest)
    border = second - nearest
    image = _blend(_colour(98, 98, 102), _colour(176, 174, 170), 0.5 + 0.25 * tone + 0.08 * _cloudy(rng, 16))
    image = image + warm[..., None] * _colour(7, 1, -7)
    image *= (1.06 - 0.012 * nearest)[..., None] * (0.72 + 0.28 * np.clip(border / 9, 0, 1))[..., None]
    return _blend(image, _colour(52, 46, 42), np.clip(1.6 - border / 2.2, 0, 1)) + (4 * _grain(rng))[..., None]


def _night(rng: np.random.Generator) -> Array:
    _, y = _grid()
    image = _blend(_colour(8, 10, 34), _colour(34, 36, 84), y / PLATE + 0.16 * _cloudy(rng, 3, 5))
    image = image + (np.clip(_cloudy(rng, 4, 5) - 0.6, 0, 2) * 0.5)[..., None] * _colour(40, 26, 70)
    for _ in range(240):
        x, top = rng.integers(1, PLATE - 1, 2)
        shine = rng.uniform(60, 255)
        image[top, x] += shine
        if shine > 200:
            image[top - 1 : top + 2, x] += shine * 0.35
            image[top, x - 1 : x + 2] += shine * 0.35
    return image


BACKGROUNDS: dict[str, Callable[[np.random.Generator], Array]] = {
    "grass": _grass,
    "sand": _sand,
    "sky": _sky,
    "water": _water,
    "wall": _wall,
    "floor": _floor,
    "snow": _snow,
    "pavement": _pavement,
    "night": _night,
}
"""How the plate of each ground is drawn."""
