"""Boundary IoU (Cheng et al., CVPR 2021): overlap of the inner bands along the outlines, as exact pixel counts.

A pixel is in the band of its class if any pixel within ``d`` rows and columns of it is of another class, is not
scored, or lies outside the picture; ``d`` is a share of the diagonal.
"""

import numpy as np

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
    # A square is all one label exactly if no two neighbours in it differ, and sums over squares cost nothing extra.
    across = _sums(labels_HW[:, 1:] != labels_HW[:, :-1], side, side - 1)
    down = _sums(labels_HW[1:] != labels_HW[:-1], side - 1, side)
    found_HW[distance:-distance, distance:-distance] = (across + down) > 0
    return found_HW


def boundary_iou(counts_3C: np.ndarray) -> np.ndarray:
    """Boundary IoU of each class, float64; NaN for classes without a band in the truth."""
    return iou_of(*counts_3C)


def _sums(differs_HW: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many are true in every box of ``rows`` x ``columns``, by sums over all that lies above and to the left."""
    table = np.zeros((differs_HW.shape[0] + 1, differs_HW.shape[1] + 1), np.int32)
    table[1:, 1:] = differs_HW
    table = table.cumsum(axis=0).cumsum(axis=1)
    strips = table[rows:] - table[:-rows]
    return strips[:, columns:] - strips[:, :-columns]
