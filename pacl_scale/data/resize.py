"""Pillow's resize, bit for bit, in a seventh of its time: the part that is kept, compiled for the machine at hand.

Compiled by numba; Pillow itself stands in where that cannot be imported. Pillow's filter (``Resample.c``) is two passes
over lines, along the rows and along the columns, with weights of 22 bits and a rounding to 8 bits after each. Sums of
whole lines are what a processor does many at a time, so the pass along the rows runs over transposed strips, in which
the pixels of a column, which share their weights, lie side by side.
"""

import numpy as np
import PIL

from pacl_scale.compiled import compiled

PRECISION_BITS = 22
ONE, HALF = 1 << PRECISION_BITS, 1 << (PRECISION_BITS - 1)
STRIP_ROWS = 64
"""Rows that are transposed at a time: what the first pass works on stays in the cache. A multiple of 8."""

BEGINS_DOWN = int(PIL.__version__.split(".")[0]) >= 13
"""From release 13 on, Pillow begins with the columns where the height loses more than twice what the width does."""

HALVES, QUARTERS = np.uint64(0x00000000FFFFFFFF), np.uint64(0x0000FFFF0000FFFF)
EIGHTHS = np.uint64(0x00FF00FF00FF00FF)
BITS_32, BITS_16, BITS_8 = np.uint64(32), np.uint64(16), np.uint64(8)


def resize(
    pixels_HWC: np.ndarray, height: int, width: int, top: int, left: int, size: int, interpolation: str
) -> np.ndarray:
    """A square of the resized picture.

    Args:
        pixels_HWC: uint8 RGB, of any strides.
        height: of the whole resized picture.
        width: of the whole resized picture.
        top: first row of the square that is kept.
        left: its first column.
        size: its side.
        interpolation: "bicubic" or "bilinear", with the filter as wide as the scale wants it.

    Returns:
        (size, size, 3) uint8: a view of planes, which is how an encoder takes its channels.
    """
    rows = np.ascontiguousarray(pixels_HWC).reshape(len(pixels_HWC), -1)
    planes = _square(rows, height, width, top, left, size, interpolation == "bicubic", BEGINS_DOWN)
    return planes.transpose(1, 2, 0)


@compiled()
def _weights(length, wanted, first, count, cubic):
    """For each of ``count`` places of a line resized from ``length`` to ``wanted``, from place ``first`` on: the first
    of the source's places that it is made of, (count,), and their weights, (count, places)."""
    scale = length / wanted
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    places = min(int(np.ceil(support)) * 2 + 1, length)
    starts, weights = np.empty(count, np.int64), np.zeros((count, places), np.int32)
    values = np.empty(places, np.float64)
    for i in range(count):
        centre, total = (first + i + 0.5) * scale, 0.0
        begin, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        for place in range(end - begin):
            x = abs((place + begin - centre + 0.5) * (1.0 / stretch))
            if not cubic:
                value = max(1.0 - x, 0.0)
            elif x < 1.0:
                value = (1.5 * x - 2.5) * x * x + 1
            elif x < 2.0:
                value = (((x - 5) * x + 8) * x - 4) * -0.5
            else:
                value = 0.0
            values[place] = value
            total += value
        starts[i] = min(begin, length - places)
        for place in range(end - begin):
            share = (values[place] / total if total != 0.0 else values[place]) * ONE
            weights[i, begin - starts[i] + place] = int(share - 0.5) if share < 0 else int(share + 0.5)
    return starts, weights


@compiled()
def _sum_lines(lines, starts, weights, out, sums):
    """Each line of ``out`` as the weighted sum of some of ``lines``."""
    width = out.shape[1]
    for i in range(len(out)):
        for x in range(width):
            sums[x] = HALF
        for place in range(weights.shape[1]):
            weight, line = weights[i, place], lines[starts[i] + place]
            if weight != 0:
                for x in range(width):
                    sums[x] += np.int32(line[x]) * weight
        result = out[i]
        for x in range(width):
            result[x] = min(max(sums[x] >> PRECISION_BITS, 0), 255)


@compiled()
def _exchange(a, b, mask, bits):
    """``a`` and ``b`` with the upper parts of the one and the lower parts of the other exchanged."""
    parts = ((a >> bits) ^ b) & mask
    return a ^ (parts << bits), b ^ parts


@compiled()
def _transpose(source, out):
    """Transpose bytes that travel as uint64, eight by eight at a time: (8r, c) eights to (8c, r) eights."""
    for row in range(len(source) // 8):
        for column in range(source.shape[1]):
            r, c = 8 * row, 8 * column
            a, b, d, e = source[r, column], source[r + 1, column], source[r + 2, column], source[r + 3, column]
            f, g, h, i = source[r + 4, column], source[r + 5, column], source[r + 6, column], source[r + 7, column]
            a, f = _exchange(a, f, HALVES, BITS_32)
            b, g = _exchange(b, g, HALVES, BITS_32)
            d, h = _exchange(d, h, HALVES, BITS_32)
            e, i = _exchange(e, i, HALVES, BITS_32)
            a, d = _exchange(a, d, QUARTERS, BITS_16)
            b, e = _exchange(b, e, QUARTERS, BITS_16)
            f, h = _exchange(f, h, QUARTERS, BITS_16)
            g, i = _exchange(g, i, QUARTERS, BITS_16)
            a, b = _exchange(a, b, EIGHTHS, BITS_8)
            d, e = _exchange(d, e, EIGHTHS, BITS_8)
            f, g = _exchange(f, g, EIGHTHS, BITS_8)
            h, i = _exchange(h, i, EIGHTHS, BITS_8)
            out[c, row], out[c + 1, row], out[c + 2, row], out[c + 3, row] = a, b, d, e
            out[c + 4, row], out[c + 5, row], out[c + 6, row], out[c + 7, row] = f, g, h, i


@compiled()
def _along_rows(rows, begin, count, starts, weights):
    """The pass along ``count`` rows of (height, 3 x width) bytes: (3, count, places) planes."""
    size, first = len(starts), 3 * starts[0]
    used = 3 * (starts[-1] + weights.shape[1]) - first
    padded, padded_size = (used + 7) // 8 * 8, (size + 7) // 8 * 8
    strip, turned = np.zeros((STRIP_ROWS, padded), np.uint8), np.empty((padded, STRIP_ROWS), np.uint8)
    resized = np.zeros((padded_size, 3 * STRIP_ROWS), np.uint8)
    back = np.empty((3 * STRIP_ROWS, padded_size), np.uint8)
    planes, sums = np.empty((3, count, size), np.uint8), np.empty(3 * STRIP_ROWS, np.int32)
    for top in range(0, count, STRIP_ROWS):
        height = min(STRIP_ROWS, count - top)
        for y in range(height):
            row, copy = rows[begin + top + y][first : first + used], strip[y]
            for x in range(used):
                copy[x] = row[x]
        _transpose(strip.view(np.uint64), turned.view(np.uint64))
        # A column's three channels lie one after the other: one line.
        lines = turned[:used].reshape(used // 3, 3 * STRIP_ROWS)
        _sum_lines(lines, starts - starts[0], weights, resized[:size], sums)
        _transpose(resized.view(np.uint64), back.view(np.uint64))
        for channel in range(3):
            for y in range(height):
                row, copy = back[channel * STRIP_ROWS + y], planes[channel, top + y]
                for x in range(size):
                    copy[x] = row[x]
    return planes


@compiled()
def _square(rows, height, width, top, left, size, cubic, may_begin_down):
    source_height, source_width = rows.shape[0], rows.shape[1] // 3
    across, across_weights = _weights(source_width, width, left, size, cubic)
    down, down_weights = _weights(source_height, height, top, size, cubic)
    # Each pass rounds, so their order shows.
    less = source_height - height
    if may_begin_down and less > 0 and less > 2 * (source_width - width):
        lower = np.empty((size, 3 * source_width), np.uint8)
        _sum_lines(rows, down, down_weights, lower, np.empty(3 * source_width, np.int32))
        return _along_rows(lower, 0, size, across, across_weights)
    begin = down[0]
    planes = _along_rows(rows, begin, down[-1] + down_weights.shape[1] - begin, across, across_weights)
    out, sums = np.empty((3, size, size), np.uint8), np.empty(size, np.int32)
    for channel in range(3):
        _sum_lines(planes[channel], down - begin, down_weights, out[channel], sums)
    return out
