"""Boundary IoU (Cheng et al., CVPR 2021): overlap of the inner bands along the outlines, as exact pixel counts.

A pixel is in the band of its class if any pixel within ``d`` rows and columns of it is of another class, is not
scored, or lies outside the picture; ``d`` is a share of the diagonal.
"""

import numpy as np

from pacl_scale.compiled import compiled
from pacl_scale.evaluate.classes import NOT_SCORED
from pacl_scale.evaluate.counts import iou_of


def boundary_counts(truth_HW: np.ndarray, predicted_HW: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Band pixels of each class that both have, that the truth has, and that the prediction has: (3, C) int64.

    What is predicted where the truth is not scored is taken as not scored too.
    """
    distance = max(1, round(share * float(np.hypot(*truth_HW.shape))))
    predicted_HW = np.where(truth_HW == NOT_SCORED, NOT_SCORED, predicted_HW)
    in_truth_HW = band(truth_HW, distance) & (truth_HW != NOT_SCORED)
    in_prediction_HW = band(predicted_HW, distance) & (truth_HW != NOT_SCORED)
    both_HW = in_truth_HW & in_prediction_HW & (truth_HW == predicted_HW)
    found = [truth_HW[both_HW], truth_HW[in_truth_HW], predicted_HW[in_prediction_HW]]
    return np.stack([np.bincount(labels, minlength=classes) for labels in found]).astype(np.int64)


def band(labels_HW: np.ndarray, distance: int) -> np.ndarray:
    """Pixels (H, W) bool with another label, or the picture's end, within ``distance`` rows and columns."""
    found_HW = np.ones(labels_HW.shape, bool)
    side = 2 * distance + 1
    if min(labels_HW.shape) < side:
        return found_HW
    found_HW[distance:-distance, distance:-distance] = _mixed(labels_HW, side)
    return found_HW


def boundary_iou(counts_3C: np.ndarray) -> np.ndarray:
    """Boundary IoU of each class, float64; NaN for classes without a band in the truth."""
    return iou_of(*counts_3C)


@compiled()
def _mixed(labels_HW, side):
    """Whether a square of ``side`` x ``side`` labels holds two different ones, for every place of it in the picture.

    A square is all one label exactly if no two neighbours in it differ; how many do is known from sums over all that
    lies above and to the left.
    """
    height, width = labels_HW.shape
    across, down = np.zeros((height + 1, width + 1), np.int32), np.zeros((height + 1, width + 1), np.int32)
    for y in range(height):
        so_far_across, so_far_down = 0, 0
        for x in range(width):
            label = labels_HW[y, x]
            if x + 1 < width and labels_HW[y, x + 1] != label:
                so_far_across += 1
            if y + 1 < height and labels_HW[y + 1, x] != label:
                so_far_down += 1
            across[y + 1, x + 1] = across[y, x + 1] + so_far_across
            down[y + 1, x + 1] = down[y, x + 1] + so_far_down
    mixed = np.empty((height - side + 1, width - side + 1), np.bool_)
    for y in range(len(mixed)):
        for x in range(width - side + 1):
            # Pairs side by side lie within ``side - 1`` columns of their left halves, pairs one below another likewise.
            right, below = x + side - 1, y + side - 1
            pairs = across[y + side, right] - across[y, right] - across[y + side, x] + across[y, x]
            pairs += down[below, x + side] - down[y, x + side] - down[below, x] + down[y, x]
            mixed[y, x] = pairs > 0
    return mixed
