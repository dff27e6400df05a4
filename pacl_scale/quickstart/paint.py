"""A vector shape becomes pixels: anti-aliased, textured, lit from one side, with an outline.

Shape legend: H, W the tile's height and width in pixels; pictures are float32 with values in 0..255.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pacl_scale.quickstart.shapes import HOLE, OWN_PAINTS, PAINTS, shape

Array = NDArray[np.floating]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 38, 38),
    "orange": (243, 134, 24),
    "yellow": (250, 214, 48),
    "green": (46, 152, 70),
    "blue": (40, 96, 208),
    "purple": (126, 58, 176),
    "pink": (246, 136, 186),
    "brown": (122, 74, 38),
    "black": (44, 42, 48),
    "white": (240, 240, 238),
}
"""The nameable colours of objects, RGB in 0..255."""

TEXTURES = ("plain", "striped", "spotted", "checkered")
"""The nameable textures of objects."""

SUPERSAMPLING = 3
"""Edges are drawn this many times larger and averaged down."""

MARGIN = 3
"""Pixels around a tile's shape, so that nothing is cut off by blurring or outlining."""


@dataclass(frozen=True)
class Tile:
    """A painted object: colours (H,W,3), and how much of each pixel it covers (H,W) in 0..1."""

    rgb: Array
    cover: Array


def paint_object(
    kind: str,
    colour: str,
    texture: str,
    span: float,
    tilt: float,
    flip: bool,
    light: float,
    rng: np.random.Generator,
) -> Tile:
    """Paint one object on a tile that just holds it.

    Args:
        kind: a name of ``shapes.KINDS``.
        colour: a name of ``COLOURS``.
        texture: a name of ``TEXTURES``.
        span: the longer side of the upright shape in pixels.
        tilt: clockwise turn in degrees.
        flip: exchange left and right before turning.
        light: direction the light comes from, in degrees; -90 is from above.
        rng: for the small differences between two things of a kind.
    """
    angle = np.radians(tilt)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1.0 if flip else 1.0, 1.0])
    parts = [((part.points * mirror) @ turn.T * span / 2, part.paint) for part in shape(kind).parts]
    corners = np.concatenate([points for points, paint in parts if paint != HOLE])
    origin = np.floor(corners.min(axis=0)) - MARGIN
    width, height = (np.ceil(corners.max(axis=0)) + MARGIN - origin).astype(int)

    paints = list(dict.fromkeys(paint for _, paint in parts if paint != HOLE))
    layers = _layers([(points - origin, paint) for points, paint in parts], paints, width, height)
    cover = sum(layers.values(), start=np.zeros((height, width), np.float32))

    # Object coordinates of each pixel: textures turn and scale with the object.
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    inverse = (turn * (2 / span)).astype(np.float32)
    dx, dy = x + 0.5 + np.float32(origin[0]), y + 0.5 + np.float32(origin[1])
    u, v = dx * inverse[0, 0] + dy * inverse[1, 0], dx * inverse[0, 1] + dy * inverse[1, 1]

    base = _vary(np.array(COLOURS[colour], np.float32), rng)
    rgb = np.zeros((height, width, 3), np.float32)
    for paint, layer in layers.items():
        if paint == "main":
            rgb += layer[..., None] * _textured(base, texture, u, v, rng)
        elif paint in OWN_PAINTS:
            rgb += layer[..., None] * _toned(base, paint)
        else:
            rgb += layer[..., None] * np.array(_accent(paint, base), np.float32)
    rgb /= np.maximum(cover, 1e-3)[..., None]
    rgb *= _relief(cover, span, light)[..., None]
    return Tile(np.clip(rgb, 0, 255), cover)


def _layers(
    parts: list[tuple[NDArray[np.float64], str]], paints: list[str], width: int, height: int
) -> dict[str, Array]:
    """How much of each pixel each paint covers; later parts hide earlier ones."""
    numbers = {paint: number for number, paint in enumerate(paints, start=1)} | {HOLE: 0}
    large = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    pen = ImageDraw.Draw(large)
    for points, paint in parts:
        pen.polygon((points * SUPERSAMPLING).ravel().tolist(), fill=numbers[paint])
    index = np.asarray(large)
    layers: dict[str, Array] = {}
    for paint in paints:
        only = Image.fromarray((index == numbers[paint]).view(np.uint8) * 255)
        layers[paint] = np.asarray(only.reduce(SUPERSAMPLING), np.float32) / 255
    return layers


def _vary(base: Array, rng: np.random.Generator) -> Array:
    """No two red things are the same red."""
    return np.clip(base * np.float32(rng.uniform(0.9, 1.08)) + rng.uniform(-8, 8, 3).astype(np.float32), 8, 250)


def _brightness(colour: Array) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114], np.float32))


def _toned(base: Array, paint: str) -> Array:
    if paint == "light":
        return base + (255 - base) * np.float32(0.42)
    # Black cannot be shaded darker so that one sees it.
    return base + 34 if _brightness(base) < 60 else base * np.float32(0.8)


def _accent(paint: str, base: Array) -> tuple[int, int, int]:
    if paint == "ink" and _brightness(base) < 60:
        return (128, 124, 134)
    return PAINTS[paint]


def _textured(base: Array, texture: str, u: Array, v: Array, rng: np.random.Generator) -> Array:
    """The object's own colour with a pattern of a lighter or darker tone of it, (H,W,3)."""
    if texture == "plain":
        return np.broadcast_to(base, (*u.shape, 3))
    density = rng.uniform(10, 14)
    turn = rng.uniform(0, np.pi)
    a = (u * np.cos(turn) + v * np.sin(turn)).astype(np.float32) * np.float32(density)
    b = (v * np.cos(turn) - u * np.sin(turn)).astype(np.float32) * np.float32(density)
    wave = {
        "striped": lambda: np.sin(a),
        "spotted": lambda: np.cos(a) + np.cos(b) - np.float32(0.55),
        "checkered": lambda: np.sin(a) * np.sin(b) * 2,
    }[texture]()
    share = np.clip(0.5 + wave * 2.5, 0, 1)[..., None]
    tone = base + (255 - base) * np.float32(0.55) if _brightness(base) < 150 else base * np.float32(0.66)
    return base + (tone - base) * share * np.float32(0.85)


def _relief(cover: Array, span: float, light: float) -> Array:
    """Brightness (H,W) around 1: a rounded body lit from ``light`` degrees, with a dark outline."""
    mask = Image.fromarray((cover.clip(0, 1) * 255).astype(np.uint8))
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(span * 0.055)), np.float32) / 255
    slope_y, slope_x = np.gradient(soft)
    toward = slope_x * np.float32(np.cos(np.radians(light))) + slope_y * np.float32(np.sin(np.radians(light)))
    inner = cover.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner = np.minimum(inner, np.roll(cover, step, axis))  # the margin is empty: nothing wraps
    outline = np.clip(cover - inner, 0, 1)
    return (1 - np.clip(toward * np.float32(span * 0.11), -0.28, 0.28)) * (1 - np.float32(0.42) * outline)
