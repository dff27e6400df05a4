"""The nameable things of the drawn scenes, as vector shapes.

A shape is a list of parts painted in order, each a closed polygon in its own coordinates: x to the right, y
down, the longer side of the whole shape spanning [-1, 1] after :func:`shape` has fitted it. A part is painted in
the object's own colour (``main``, or the darker ``shade`` and lighter ``light`` of it) or in a colour that
belongs to the kind, such as the wood of a trunk; ``hole`` takes away what lies beneath.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from pacl_scale.quickstart.outlines import Points, box, mirrored, oval, polygon, smooth, stroke, turned

PAINTS: dict[str, tuple[int, int, int]] = {
    "ink": (38, 35, 42),
    "cream": (248, 241, 226),
    "wood": (130, 86, 52),
    "leaf": (72, 142, 66),
    "gold": (247, 194, 62),
    "glass": (178, 220, 238),
    "skin": (228, 196, 150),
    "rose": (236, 146, 152),
    "flame": (246, 120, 40),
    "steel": (166, 172, 182),
}
"""Colours that do not follow the object's, RGB in 0..255."""

OWN_PAINTS = ("main", "shade", "light")
"""Colours made from the object's."""

HOLE = "hole"


@dataclass(frozen=True)
class Part:
    """A polygon and what it is painted with: a name of ``OWN_PAINTS``, of ``PAINTS``, or ``HOLE``."""

    points: Points
    paint: str


@dataclass(frozen=True)
class Shape:
    """What a kind looks like, and how it may lie in a picture."""

    parts: tuple[Part, ...]
    tilt: float
    """Largest turn to either side, in degrees; 180 for a thing without an upright."""


@cache
def shape(kind: str) -> Shape:
    """The shape of ``kind``, fitted so that its longer side spans [-1, 1] around the origin."""
    drawing, tilt = KINDS[kind]
    parts = drawing()
    corners = np.concatenate([part.points for part in parts if part.paint != HOLE])
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, half = (low + high) / 2, (high - low).max() / 2
    return Shape(tuple(Part((part.points - centre) / half, part.paint) for part in parts), tilt)


def _both(points: Points, paint: str) -> list[Part]:
    """The part and its mirror image."""
    return [Part(points, paint), Part(mirrored(points), paint)]


def _star() -> list[Part]:
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    facets = [Part(np.array([corners[i], corners[(i + 1) % 10], (0, 0)]), "shade") for i in range(0, 10, 2)]
    return [Part(corners, "main"), *facets]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 80)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [
        Part(np.stack([16 * np.sin(t) ** 3, -y], axis=1), "main"),
        Part(oval(-7.4, -6.2, 3.6, 2.1, turn=-38), "light"),
    ]


def _house() -> list[Part]:
    return [
        Part(box(0.36, -0.86, 0.58, -0.3), "wood"),
        Part(box(-0.7, -0.2, 0.7, 0.86), "main"),
        Part(polygon((-0.96, -0.16), (0, -0.98), (0.96, -0.16)), "shade"),
        Part(box(-0.17, 0.3, 0.17, 0.86), "wood"),
        Part(oval(0.1, 0.6, 0.035), "gold"),
        *_both(box(0.3, 0.05, 0.58, 0.36), "ink"),
        *_both(box(0.33, 0.08, 0.425, 0.19), "glass"),
        *_both(box(0.455, 0.08, 0.55, 0.19), "glass"),
        *_both(box(0.33, 0.22, 0.425, 0.33), "glass"),
        *_both(box(0.455, 0.22, 0.55, 0.33), "glass"),
    ]


def _tree() -> list[Part]:
    return [
        Part(smooth((-0.13, 0.1), (0.13, 0.1), (0.13, 0.7), (0.27, 0.98), (-0.27, 0.98), (-0.13, 0.7)), "wood"),
        Part(stroke(polygon((0, 0.5), (0.3, 0.15)), 0.1), "wood"),
        Part(stroke(polygon((0, 0.5), (-0.28, 0.2)), 0.1), "wood"),
        Part(oval(-0.42, -0.02, 0.4), "main"),
        Part(oval(0.42, -0.02, 0.4), "main"),
        Part(oval(-0.27, -0.45, 0.4), "main"),
        Part(oval(0.27, -0.45, 0.4), "main"),
        Part(oval(0, -0.6, 0.38), "main"),
        Part(oval(0, -0.1, 0.42), "main"),
        Part(stroke(oval(0.42, -0.02, 0.3, start=-10, end=100), 0.05), "shade"),
        Part(stroke(oval(-0.4, 0.0, 0.3, start=50, end=150), 0.05), "shade"),
        Part(stroke(oval(0.08, -0.2, 0.26, start=30, end=130), 0.05), "shade"),
        Part(stroke(oval(-0.2, -0.5, 0.27, start=180, end=270), 0.05), "light"),
    ]


def _fish() -> list[Part]:
    body = smooth(
        (-0.98, 0.02),
        (-0.62, -0.34),
        (-0.05, -0.42),
        (0.42, -0.12),
        (0.42, 0.16),
        (-0.05, 0.44),
        (-0.62, 0.36),
    )
    return [
        Part(smooth((0.36, 0), (0.62, -0.28), (1, -0.5), (0.86, 0), (1, 0.5), (0.62, 0.3)), "shade"),
        Part(smooth((-0.35, -0.36), (-0.02, -0.66), (0.3, -0.56), (0.24, -0.2)), "shade"),
        Part(smooth((-0.15, 0.36), (0.1, 0.64), (0.3, 0.52), (0.16, 0.3)), "shade"),
        Part(body, "main"),
        Part(smooth((-0.18, 0.0), (0.1, -0.02), (0.14, 0.22), (-0.06, 0.18)), "shade"),
        Part(stroke(oval(-0.62, 0, 0.26, 0.32, start=-62, end=62), 0.045), "ink"),
        Part(oval(-0.66, -0.1, 0.115), "cream"),
        Part(oval(-0.68, -0.1, 0.06), "ink"),
        Part(stroke(smooth((-0.96, 0.08), (-0.86, 0.14), (-0.76, 0.12), closed=False), 0.04), "ink"),
    ]


def _mushroom() -> list[Part]:
    cap = smooth(
        (-0.97, 0.02),
        (-0.82, -0.48),
        (-0.35, -0.88),
        (0.35, -0.88),
        (0.82, -0.48),
        (0.97, 0.02),
        (0.5, 0.13),
        (-0.5, 0.13),
    )
    return [
        Part(
            smooth((-0.27, 0), (0.27, 0), (0.27, 0.5), (0.4, 0.86), (0, 0.95), (-0.4, 0.86), (-0.27, 0.5)),
            "cream",
        ),
        Part(smooth((-0.4, 0.1), (0, 0.02), (0.4, 0.1), (0, 0.34)), "skin"),
        Part(cap, "main"),
        Part(oval(-0.48, -0.34, 0.17, 0.15), "cream"),
        Part(oval(0.08, -0.56, 0.19, 0.16), "cream"),
        Part(oval(0.58, -0.27, 0.15, 0.14), "cream"),
        Part(oval(0.1, -0.1, 0.14, 0.1), "cream"),
        Part(oval(-0.76, -0.02, 0.09, 0.07), "cream"),
    ]


def _car() -> list[Part]:
    body = smooth(
        (-1, 0.2),
        (-0.95, -0.06),
        (-0.66, -0.12),
        (-0.42, -0.48),
        (0.0, -0.54),
        (0.36, -0.46),
        (0.6, -0.12),
        (0.95, -0.02),
        (1, 0.26),
        (0.9, 0.36),
        (-0.9, 0.36),
    )
    return [
        Part(body, "main"),
        Part(smooth((-0.52, -0.1), (-0.34, -0.4), (-0.06, -0.43), (-0.05, -0.1)), "glass"),
        Part(smooth((0.05, -0.1), (0.05, -0.43), (0.3, -0.38), (0.48, -0.1)), "glass"),
        Part(box(-0.95, 0.2, 0.95, 0.26), "shade"),
        Part(box(0.1, 0.02, 0.24, 0.06), "ink"),
        Part(oval(0.93, 0.08, 0.07, 0.09), "gold"),
        *_both(oval(-0.55, 0.34, 0.25), "ink"),
        *_both(oval(-0.55, 0.34, 0.13), "steel"),
        *_both(oval(-0.55, 0.34, 0.05), "ink"),
    ]


def _boat() -> list[Part]:
    return [
        Part(box(-0.04, -0.96, 0.04, 0.4), "wood"),
        Part(smooth((0.08, -0.9), (0.44, -0.45), (0.8, 0.22), (0.4, 0.28), (0.08, 0.24)), "main"),
        Part(smooth((-0.08, -0.74), (-0.36, -0.3), (-0.66, 0.2), (-0.36, 0.25), (-0.08, 0.22)), "cream"),
        Part(
            smooth((-1, 0.36), (0, 0.44), (1, 0.34), (0.82, 0.68), (0.58, 0.92), (-0.56, 0.92), (-0.82, 0.7)),
            "main",
        ),
        Part(stroke(smooth((-0.88, 0.54), (0, 0.6), (0.88, 0.53), closed=False), 0.07), "cream"),
    ]


def _flower() -> list[Part]:
    petals = []
    for i in range(7):
        petal = turned(
            smooth((0.1, 0), (0.3, -0.17), (0.56, -0.17), (0.66, 0), (0.56, 0.17), (0.3, 0.17)),
            i * 360 / 7 - 90,
        )
        petals.append(Part(petal + (0, -0.34), "main"))
        petals.append(Part(turned(stroke(polygon((0.25, 0), (0.5, 0)), 0.04), i * 360 / 7 - 90) + (0, -0.34), "shade"))
    return [
        Part(stroke(smooth((0, -0.2), (0.05, 0.35), (0, 1), closed=False), 0.09), "leaf"),
        Part(smooth((0.03, 0.72), (0.22, 0.4), (0.56, 0.34), (0.4, 0.64)), "leaf"),
        Part(smooth((0.02, 0.82), (-0.2, 0.54), (-0.5, 0.5), (-0.34, 0.76)), "leaf"),
        *petals,
        Part(oval(0, -0.34, 0.2), "gold"),
    ]


def _cup() -> list[Part]:
    body = smooth(
        (-0.74, -0.55),
        (-0.72, -0.1),
        (-0.64, 0.45),
        (-0.44, 0.72),
        (0.24, 0.72),
        (0.44, 0.45),
        (0.52, -0.1),
        (0.54, -0.55),
    )
    return [
        Part(oval(0.52, 0.02, 0.42, 0.38), "main"),
        Part(oval(0.52, 0.02, 0.24, 0.21), HOLE),
        Part(body, "main"),
        Part(oval(-0.1, -0.55, 0.65, 0.19), "light"),
        Part(oval(-0.1, -0.53, 0.55, 0.13), "wood"),
        Part(stroke(smooth((-0.62, -0.14), (-0.56, 0.3), (-0.46, 0.54), closed=False), 0.07), "light"),
    ]


def _key() -> list[Part]:
    return [
        Part(oval(-0.58, 0, 0.42, 0.42), "main"),
        Part(box(-0.25, -0.1, 1, 0.1), "main"),
        Part(box(0.5, 0, 0.64, 0.36), "main"),
        Part(box(0.76, 0, 0.98, 0.44), "main"),
        Part(box(-0.16, -0.16, -0.06, 0.16), "shade"),
        Part(stroke(oval(-0.58, 0, 0.3), 0.05), "shade"),
        Part(oval(-0.62, 0, 0.2), HOLE),
    ]


def _umbrella() -> list[Part]:
    dome = np.concatenate(
        [oval(0, 0, 0.98, 0.82, start=180, end=360)]
        + [oval(0.98 - 0.245 * (2 * i + 1), 0, 0.245, 0.12, start=0, end=-180) for i in range(4)]
    )
    middle = np.concatenate(
        [
            smooth((0, -0.82), (0.28, -0.55), (0.49, 0), closed=False),
            oval(0.245, 0, 0.245, 0.12, start=0, end=-180),
            oval(-0.245, 0, 0.245, 0.12, start=0, end=-180),
            smooth((-0.49, 0), (-0.28, -0.55), (0, -0.82), closed=False),
        ]
    )
    return [
        Part(box(-0.03, -0.98, 0.03, 0.75), "wood"),
        Part(stroke(oval(0.16, 0.75, 0.16, 0.2, start=180, end=0), 0.09), "wood"),
        Part(dome, "main"),
        Part(middle, "light"),
        Part(stroke(polygon((0, -0.8), (0, -0.12)), 0.03), "shade"),
    ]


def _arrow() -> list[Part]:
    return [
        Part(polygon((-1, -0.2), (0.1, -0.2), (0.1, -0.6), (1, 0), (0.1, 0.6), (0.1, 0.2), (-1, 0.2)), "main"),
        Part(
            polygon((-1, 0.08), (0.22, 0.08), (0.22, 0.36), (1, 0), (0.1, 0.6), (0.1, 0.2), (-1, 0.2)),
            "shade",
        ),
    ]


def _moon() -> list[Part]:
    outer = oval(0, 0, 1, start=-50, end=-310)
    inner = oval(0.42, 0, 0.79, start=-284, end=-76)
    return [
        Part(np.concatenate([outer, inner]), "main"),
        Part(oval(-0.68, 0.1, 0.12), "shade"),
        Part(oval(-0.58, -0.4, 0.09), "shade"),
        Part(oval(-0.42, 0.62, 0.1), "shade"),
        Part(oval(-0.8, -0.14, 0.05), "shade"),
    ]


def _cat() -> list[Part]:
    head = smooth(
        (-0.86, 0.1),
        (-0.8, -0.34),
        (-0.4, -0.52),
        (0.4, -0.52),
        (0.8, -0.34),
        (0.86, 0.1),
        (0.62, 0.56),
        (0, 0.78),
        (-0.62, 0.56),
    )
    whiskers = [stroke(polygon((0.3, 0.3 + dy), (1.05, 0.24 + 3.2 * dy)), 0.032) for dy in (-0.05, 0, 0.05)]
    return [
        *_both(polygon((0.82, -0.1), (0.78, -0.98), (0.16, -0.48)), "main"),
        *_both(polygon((0.71, -0.35), (0.68, -0.76), (0.36, -0.48)), "rose"),
        Part(head, "main"),
        Part(smooth((0, 0.18), (0.3, 0.24), (0.36, 0.46), (0, 0.6), (-0.36, 0.46), (-0.3, 0.24)), "light"),
        *_both(oval(0.37, -0.04, 0.17, 0.19), "gold"),
        *_both(oval(0.37, -0.04, 0.06, 0.17), "ink"),
        Part(polygon((-0.12, 0.2), (0.12, 0.2), (0, 0.34)), "rose"),
        Part(stroke(smooth((0, 0.34), (0.08, 0.45), (0.22, 0.44), closed=False), 0.04), "ink"),
        Part(stroke(smooth((0, 0.34), (-0.08, 0.45), (-0.22, 0.44), closed=False), 0.04), "ink"),
        *(part for whisker in whiskers for part in _both(whisker, "ink")),
    ]


def _bird() -> list[Part]:
    body = smooth(
        (-0.78, -0.5),
        (-0.5, -0.74),
        (-0.2, -0.52),
        (0.08, -0.22),
        (0.5, -0.02),
        (0.4, 0.3),
        (-0.05, 0.5),
        (-0.48, 0.34),
        (-0.68, -0.06),
    )
    return [
        Part(stroke(polygon((-0.14, 0.4), (-0.16, 0.82), (-0.34, 0.86)), 0.05), "flame"),
        Part(stroke(polygon((0.06, 0.4), (0.08, 0.82), (-0.1, 0.88)), 0.05), "flame"),
        Part(polygon((0.34, -0.1), (1, -0.26), (0.98, 0.02), (0.38, 0.24)), "shade"),
        Part(polygon((-0.72, -0.6), (-1.04, -0.42), (-0.7, -0.34)), "flame"),
        Part(body, "main"),
        Part(smooth((-0.5, 0.06), (-0.3, 0.36), (-0.02, 0.42), (-0.26, 0.2)), "light"),
        Part(smooth((-0.26, -0.2), (0.06, -0.14), (0.62, 0.2), (0.2, 0.3), (-0.16, 0.16)), "shade"),
        Part(oval(-0.52, -0.5, 0.085), "cream"),
        Part(oval(-0.54, -0.5, 0.05), "ink"),
    ]


def _butterfly() -> list[Part]:
    upper = smooth((0.04, -0.1), (0.2, -0.6), (0.66, -0.86), (0.98, -0.66), (0.86, -0.2), (0.42, 0.02))
    lower = smooth((0.04, 0), (0.5, 0.06), (0.76, 0.36), (0.6, 0.76), (0.28, 0.66), (0.08, 0.3))
    feeler = stroke(smooth((0.02, -0.4), (0.1, -0.7), (0.3, -0.88), closed=False), 0.035)
    return [
        *_both(lower, "shade"),
        *_both(upper, "main"),
        *_both(oval(0.66, -0.52, 0.16, 0.13), "light"),
        *_both(oval(0.34, -0.28, 0.1, 0.08), "light"),
        *_both(oval(0.46, 0.38, 0.14), "light"),
        *_both(oval(0.66, -0.52, 0.07), "ink"),
        *_both(feeler, "ink"),
        Part(oval(0, 0.1, 0.08, 0.5), "ink"),
        Part(oval(0, -0.42, 0.1), "ink"),
    ]


def _apple() -> list[Part]:
    half = [(0.0, -0.42), (0.34, -0.58), (0.72, -0.44), (0.86, -0.02), (0.7, 0.5), (0.36, 0.88), (0.1, 0.84)]
    knots = [*half, *[(-x, y) for x, y in half[:0:-1]]]
    return [
        Part(smooth(*knots), "main"),
        Part(oval(0, -0.43, 0.2, 0.07), "shade"),
        Part(stroke(smooth((0, -0.42), (0.03, -0.66), (0.14, -0.9), closed=False), 0.09), "wood"),
        Part(smooth((0.1, -0.62), (0.3, -0.9), (0.66, -0.9), (0.44, -0.66)), "leaf"),
        Part(oval(-0.5, -0.16, 0.1, 0.2, turn=18), "light"),
    ]


def _hat() -> list[Part]:
    return [
        Part(oval(0, 0.44, 1, 0.28), "main"),
        Part(oval(0, 0.36, 0.72, 0.17), "shade"),
        Part(
            smooth(
                (-0.62, 0.36),
                (-0.58, -0.1),
                (-0.64, -0.66),
                (0, -0.76),
                (0.64, -0.66),
                (0.58, -0.1),
                (0.62, 0.36),
                (0, 0.5),
            ),
            "main",
        ),
        Part(smooth((-0.61, 0.14), (0, 0.26), (0.61, 0.14), (0.62, 0.38), (0, 0.5), (-0.62, 0.38)), "rose"),
        Part(oval(0, -0.66, 0.6, 0.12), "light"),
    ]


def _guitar() -> list[Part]:
    half = [(0.16, -0.08), (0.4, -0.06), (0.42, 0.16), (0.32, 0.32), (0.52, 0.56), (0.48, 0.88), (0.2, 0.99)]
    knots = [*half, *[(-x, y) for x, y in half[::-1]]]
    frets = [Part(box(-0.07, y, 0.07, y + 0.02), "steel") for y in (-0.55, -0.4, -0.25, -0.12)]
    pegs = [part for y in (-0.93, -0.8) for part in _both(oval(0.16, y, 0.05, 0.035), "steel")]
    return [
        Part(smooth(*knots), "main"),
        *pegs,
        Part(box(-0.075, -0.75, 0.075, 0.22), "wood"),
        Part(polygon((-0.1, -0.7), (-0.13, -1), (0.13, -1), (0.1, -0.7)), "wood"),
        *frets,
        Part(oval(0, 0.3, 0.15), "ink"),
        Part(box(-0.18, 0.66, 0.18, 0.73), "ink"),
        *_both(box(0.015, -0.75, 0.035, 0.68), "cream"),
    ]


def _snail() -> list[Part]:
    t = np.linspace(0.6, 5.2 * np.pi, 90)
    radius = 0.032 * t
    spiral = np.stack([0.2 + radius * np.cos(t), -0.12 + radius * np.sin(t)], axis=1)
    foot = smooth(
        (-0.98, 0.12),
        (-0.8, -0.06),
        (-0.62, 0.12),
        (-0.44, 0.44),
        (0.3, 0.46),
        (0.98, 0.66),
        (0.3, 0.72),
        (-0.5, 0.72),
        (-0.84, 0.48),
    )
    return [
        Part(stroke(polygon((-0.84, 0.0), (-0.98, -0.42)), 0.05), "skin"),
        Part(stroke(polygon((-0.74, 0.0), (-0.66, -0.42)), 0.05), "skin"),
        Part(oval(-0.98, -0.44, 0.06), "ink"),
        Part(oval(-0.66, -0.44, 0.06), "ink"),
        Part(foot, "skin"),
        Part(oval(0.2, -0.1, 0.6), "main"),
        Part(stroke(spiral, 0.075), "shade"),
        Part(stroke(smooth((-0.94, 0.26), (-0.86, 0.32), (-0.76, 0.3), closed=False), 0.035), "ink"),
    ]


def _clock() -> list[Part]:
    ticks = [Part(turned(box(-0.025, -0.52, 0.025, -0.42), 30 * i) + (0, 0.08), "ink") for i in range(12)]
    return [
        *_both(stroke(polygon((0.4, 0.6), (0.62, 0.95)), 0.14), "shade"),
        *_both(oval(0.52, -0.66, 0.3, 0.2, turn=38), "shade"),
        Part(box(-0.05, -0.98, 0.05, -0.6), "shade"),
        Part(oval(0, 0.08, 0.82), "main"),
        Part(oval(0, 0.08, 0.57), "cream"),
        *ticks,
        Part(stroke(polygon((0, 0.08), (0, -0.34)), 0.06), "ink"),
        Part(stroke(polygon((0, 0.08), (0.28, 0.22)), 0.07), "ink"),
        Part(oval(0, 0.08, 0.07), "flame"),
    ]


def _crown() -> list[Part]:
    body = polygon((-0.84, 0.66), (-0.98, -0.4), (-0.5, 0.08), (0, -0.72), (0.5, 0.08), (0.98, -0.4), (0.84, 0.66))
    return [
        Part(body, "main"),
        *_both(oval(0.96, -0.46, 0.11), "gold"),
        Part(oval(0, -0.76, 0.12), "gold"),
        Part(box(-0.86, 0.42, 0.86, 0.68), "shade"),
        Part(oval(0, 0.55, 0.1, 0.09), "glass"),
        *_both(oval(0.46, 0.55, 0.08), "rose"),
        Part(polygon((0, -0.1), (0.14, 0.12), (0, 0.32), (-0.14, 0.12)), "light"),
    ]


def _rocket() -> list[Part]:
    return [
        Part(smooth((-0.2, 0.56), (0.2, 0.56), (0.22, 0.76), (0, 1.05), (-0.22, 0.76)), "flame"),
        Part(smooth((-0.1, 0.56), (0.1, 0.56), (0.1, 0.7), (0, 0.86), (-0.1, 0.7)), "gold"),
        *_both(smooth((0.24, 0.06), (0.5, 0.3), (0.58, 0.78), (0.42, 0.66), (0.2, 0.56)), "shade"),
        Part(
            smooth(
                (0, -1),
                (0.22, -0.68),
                (0.34, -0.2),
                (0.32, 0.24),
                (0.2, 0.6),
                (-0.2, 0.6),
                (-0.32, 0.24),
                (-0.34, -0.2),
                (-0.22, -0.68),
            ),
            "main",
        ),
        Part(smooth((0, -1), (0.16, -0.78), (0.25, -0.56), (0, -0.5), (-0.25, -0.56), (-0.16, -0.78)), "cream"),
        Part(oval(0, -0.18, 0.2), "steel"),
        Part(oval(0, -0.18, 0.145), "glass"),
        Part(box(-0.27, 0.36, 0.27, 0.43), "shade"),
    ]


Drawing = Callable[[], list[Part]]

KINDS: dict[str, tuple[Drawing, float]] = {
    "star": (_star, 180),
    "heart": (_heart, 35),
    "house": (_house, 18),
    "tree": (_tree, 20),
    "fish": (_fish, 35),
    "mushroom": (_mushroom, 30),
    "car": (_car, 22),
    "boat": (_boat, 20),
    "flower": (_flower, 35),
    "cup": (_cup, 25),
    "key": (_key, 180),
    "umbrella": (_umbrella, 35),
    "arrow": (_arrow, 180),
    "moon": (_moon, 40),
    "cat": (_cat, 30),
    "bird": (_bird, 28),
    "butterfly": (_butterfly, 50),
    "apple": (_apple, 35),
    "hat": (_hat, 30),
    "guitar": (_guitar, 60),
    "snail": (_snail, 25),
    "clock": (_clock, 25),
    "crown": (_crown, 25),
    "rocket": (_rocket, 60),
}
"""How each kind is drawn, and its largest tilt in degrees."""
