"""What is counted of each picture, as plain numbers that can be written down, and the scores of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pacl_scale.evaluate.boundaries import boundary_iou
from pacl_scale.evaluate.classes import ClassList
from pacl_scale.evaluate.counts import Confusion, per_class_table
from pacl_scale.evaluate.intervals import DRAWS, LEVEL, intervals

OWN_WORDS = ""
"""Key of the counts under the classes' own words; other keys are groups with words."""


@dataclass
class PictureCounts:
    """Exact counts of one method on one picture."""

    confusions: dict[str, list[list[int]]]
    """Word set to positions in the flattened confusion matrix and the pixels there, zeros left out."""
    boundary: list[list[int]] | None = None
    """Per class the band pixels of both, truth and prediction; see :mod:`pacl_scale.evaluate.boundaries`."""
    patches: list[int] | None = None
    """Patches whose best class is their most frequent true one, and patches with a scored pixel."""

    def matrix(self, classes: int, word_set: str = OWN_WORDS) -> Confusion:
        """The confusion matrix (C, C); methods without words answer every word set alike."""
        positions, pixels = self.confusions.get(word_set, self.confusions[OWN_WORDS])
        flat = np.zeros(classes * classes, np.int64)
        flat[positions] = pixels
        return Confusion(flat.reshape(classes, classes))


def sparse(counts: Confusion) -> list[list[int]]:
    """A confusion matrix as :class:`PictureCounts` keeps it."""
    flat = counts.counts_CC.ravel()
    positions = np.flatnonzero(flat)
    return [positions.tolist(), flat[positions].tolist()]


@dataclass
class Tally:
    """One method's counts of every picture, by the picture's name."""

    pictures: dict[str, PictureCounts] = field(default_factory=dict)

    def total(self, classes: int, word_set: str = OWN_WORDS) -> Confusion:
        """The sum over pictures; exact, so the order does not matter."""
        return sum(
            (counts.matrix(classes, word_set) for counts in self.pictures.values()), start=Confusion.empty(classes)
        )

    def per_picture(self, classes: int) -> dict[str, dict[str, Any]]:
        """Scores of each picture, in the order of names, rounded to 6 digits."""
        found = {}
        for name, counts in sorted(self.pictures.items()):
            matrix = counts.matrix(classes)
            scores = {"miou": matrix.miou(), "pixel_accuracy": matrix.pixel_accuracy()}
            found[name] = {key: None if value is None else round(value, 6) for key, value in scores.items()} | {
                "classes": int((matrix.truth_C > 0).sum())
            }
        return found


def majority(truths: Tally, classes: int) -> tuple[Tally, int]:
    """The tally of a method that answers the most frequent true class of ``truths``' pictures, and that class."""
    answer = int(truths.total(classes).truth_C.argmax())
    pictures = {
        name: PictureCounts({OWN_WORDS: sparse(Confusion.constant(counts.matrix(classes).truth_C, answer))})
        for name, counts in truths.pictures.items()
    }
    return Tally(pictures), answer


def scores_of(tally: Tally, classes: ClassList, positions: int) -> dict[str, Any]:
    """All figures of a method, for its row.

    Args:
        tally: counts of every picture.
        classes: the data set's classes.
        positions: size of the confusion matrices; one more than the classes where background can be answered.
    """
    names = sorted(tally.pictures)
    matrices = {name: tally.pictures[name].matrix(positions) for name in names}
    total = tally.total(positions)
    mious = [matrices[name].miou() for name in names]
    scored = [value for value in mious if value is not None]
    counts_P3C = np.array(
        [[np.diag(m.counts_CC), m.truth_C, m.predicted_C] for m in matrices.values()], np.int64
    ).reshape(len(names), 3, positions)
    miou_P = np.array([np.nan if value is None else value for value in mious])
    pictures_C = (counts_P3C[:, 1] > 0).sum(axis=0)
    foreground = list(range(len(classes.indices)))
    scores = total.summary() | {
        "miou_per_picture": float(np.mean(scored)) if scored else None,
        "boundary_iou": _boundary(tally, positions),
        "patch_accuracy": _patches(tally),
        "intervals": {"level": LEVEL, "draws": DRAWS, **intervals(counts_P3C, miou_P)},
        "groups": _groups(tally, total, classes, positions),
        "per_class": per_class_table(total, classes, pictures_C),
    }
    if classes.score_background:
        scores["foreground"] = total.summary(foreground)
    return scores


def _groups(tally: Tally, total: Confusion, classes: ClassList, positions: int) -> dict[str, Any]:
    groups = {}
    for name, group in classes.groups.items():
        counts = tally.total(positions, name) if group.words else total
        groups[name] = counts.summary(classes.members(name))
        if group.words:
            asked = classes.synonyms(name)
            groups[name]["words"] = {classes.names[c]: asked[c] for c in classes.members(name)}
    return groups


def _boundary(tally: Tally, positions: int) -> float | None:
    """Mean over the present classes of the boundary IoU of the whole data set's counts."""
    every = [counts.boundary for counts in tally.pictures.values()]
    if not every or any(counts is None for counts in every):
        return None
    iou_C = boundary_iou(sum((np.array(counts, np.int64) for counts in every), start=np.zeros((3, positions), int)))
    present = iou_C[~np.isnan(iou_C)]
    return float(present.mean()) if len(present) else None


def _patches(tally: Tally) -> float | None:
    every: Sequence[list[int] | None] = [counts.patches for counts in tally.pictures.values()]
    right = sum(counts[0] for counts in every if counts is not None)
    patches = sum(counts[1] for counts in every if counts is not None)
    return right / patches if patches else None
