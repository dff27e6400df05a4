"""Exact pixel counts and the scores made of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pacl_scale.evaluate.classes import NOT_SCORED, ClassList


@dataclass
class Confusion:
    """Pixels by true class (row) and predicted class (column): (C, C) int64.

    Counts are exact integers, so those of any division of the pictures over processes add up to the same matrix.
    """

    counts_CC: np.ndarray

    @classmethod
    def empty(cls, classes: int) -> "Confusion":
        """No pixel yet."""
        return cls(np.zeros((classes, classes), np.int64))

    @classmethod
    def of(cls, truth_HW: np.ndarray, predicted_HW: np.ndarray, classes: int) -> "Confusion":
        """The counts of one picture; pixels whose truth is :data:`NOT_SCORED` are left out."""
        scored = truth_HW != NOT_SCORED
        pairs = truth_HW[scored].astype(np.int64) * classes + predicted_HW[scored]
        return cls(np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.int64))

    @classmethod
    def constant(cls, truth_C: np.ndarray, predicted: int) -> "Confusion":
        """The counts of a method that answers ``predicted`` everywhere, from the true pixels of each class."""
        counts = cls.empty(len(truth_C))
        counts.counts_CC[:, predicted] = truth_C
        return counts

    def __add__(self, other: "Confusion") -> "Confusion":
        return Confusion(self.counts_CC + other.counts_CC)

    @property
    def truth_C(self) -> np.ndarray:
        """True pixels of each class."""
        return self.counts_CC.sum(axis=1)

    @property
    def predicted_C(self) -> np.ndarray:
        """Scored pixels that were given each class."""
        return self.counts_CC.sum(axis=0)

    def iou_C(self) -> np.ndarray:
        """Intersection over union of each class, float64; NaN for classes that the ground truth lacks."""
        return iou_of(np.diag(self.counts_CC), self.truth_C, self.predicted_C)

    def accuracy_C(self) -> np.ndarray:
        """Share of each class's true pixels that were found, float64; NaN for absent classes."""
        hits_C = np.diag(self.counts_CC)
        return np.divide(hits_C, self.truth_C, out=np.full(len(hits_C), np.nan), where=self.truth_C > 0)

    def miou(self, members: list[int] | None = None) -> float | None:
        """Mean IoU over the classes present in the ground truth (of ``members``); None if there is none."""
        return _mean(self.iou_C(), members)

    def mean_class_accuracy(self, members: list[int] | None = None) -> float | None:
        """Mean over the present classes of the share of their pixels found; None if there is none."""
        return _mean(self.accuracy_C(), members)

    def pixel_accuracy(self, members: list[int] | None = None) -> float | None:
        """Share of the scored pixels (whose true class is of ``members``) that are right; None if no pixel."""
        rows = list(range(len(self.counts_CC))) if members is None else members
        pixels = int(self.truth_C[rows].sum())
        return float(np.diag(self.counts_CC)[rows].sum() / pixels) if pixels else None

    def summary(self, members: list[int] | None = None) -> dict[str, Any]:
        """The three scores, and how many classes of the ground truth they rest on."""
        rows = list(range(len(self.counts_CC))) if members is None else members
        return {
            "miou": self.miou(members),
            "pixel_accuracy": self.pixel_accuracy(members),
            "mean_class_accuracy": self.mean_class_accuracy(members),
            "classes_present": int((self.truth_C[rows] > 0).sum()),
            "classes": len(rows),
            "pixels": int(self.truth_C[rows].sum()),
        }


def iou_of(hits_C: np.ndarray, truth_C: np.ndarray, predicted_C: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64; NaN for classes that the ground truth lacks."""
    union_C = truth_C + predicted_C - hits_C
    return np.divide(hits_C, union_C, out=np.full(len(hits_C), np.nan), where=truth_C > 0)


def per_class_table(counts: Confusion, classes: ClassList, pictures_C: np.ndarray) -> list[dict[str, Any]]:
    """One entry a class, in mask order; ``iou`` and ``accuracy`` are None where the ground truth lacks it.

    A last position without a class is background; its ``index`` is None.
    """
    indices: list[int | None] = [*classes.indices]
    words = list(classes.names)
    if len(counts.counts_CC) > len(words):
        indices, words = [*indices, None], [*words, "background"]
    iou_C, accuracy_C = counts.iou_C(), counts.accuracy_C()
    return [
        {
            "index": indices[c],
            "word": words[c],
            "iou": _number(iou_C[c]),
            "accuracy": _number(accuracy_C[c]),
            "truth_pixels": int(counts.truth_C[c]),
            "predicted_pixels": int(counts.predicted_C[c]),
            "pictures": int(pictures_C[c]),
        }
        for c in range(len(words))
    ]


def _mean(values_C: np.ndarray, members: list[int] | None) -> float | None:
    chosen = values_C if members is None else values_C[members]
    present = chosen[~np.isnan(chosen)]
    return float(present.mean()) if len(present) else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
