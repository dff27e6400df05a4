"""Polygons that drawn things are made of; x to the right, y down."""

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""(n, 2) corners of a polygon."""


def polygon(*corners: tuple[float, float]) -> Points:
    """A polygon of straight sides."""
    return np.array(corners, dtype=np.float64)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """An upright rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def oval(
    x: float,
    y: float,
    rx: float,
    ry: float | None = None,
    turn: float = 0,
    start: float = 0,
    end: float = 360,
) -> Points:
    """An ellipse around (x, y), turned by ``turn`` degrees; with ``start`` and ``end``, the part between."""
    angles = np.radians(np.linspace(start, end, 40))
    points = np.stack([rx * np.cos(angles), (rx if ry is None else ry) * np.sin(angles)], axis=1)
    return turned(points, turn) + (x, y)


def turned(points: Points, degrees: float) -> Points:
    """``points`` turned clockwise (y points down) around the origin."""
    angle = np.radians(degrees)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ matrix.T


def mirrored(points: Points) -> Points:
    """``points`` with left and right exchanged."""
    return points * (-1, 1)


def smooth(*knots: tuple[float, float], closed: bool = True) -> Points:
    """A Catmull-Rom curve through ``knots``: round, and easy to draw by eye."""
    p = np.array(knots, dtype=np.float64)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, 9)[:-1, None]
    pieces = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        cubic = (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
        pieces.append(b + ((c - a) * t + cubic) / 2)
    return np.concatenate([*pieces, p[-2:-1]])


def stroke(line: Points, width: float) -> Points:
    """The outline of a pen of ``width`` drawn along ``line``, with round ends."""
    steps = np.gradient(line, axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    across = np.stack([-steps[:, 1], steps[:, 0]], axis=1) * width / 2
    ends = []
    for place, direction in ((line[-1], steps[-1]), (line[0], -steps[0])):
        turn = np.degrees(np.arctan2(direction[1], direction[0]))
        ends.append(oval(place[0], place[1], width / 2, turn=turn, start=90, end=-90))
    return np.concatenate([line + across, ends[0], (line - across)[::-1], ends[1]])
