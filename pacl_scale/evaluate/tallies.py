"""What is counted of each picture, as plain numbers that can be written down, and the scores of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pacl_scale.evaluate.classes import ClassList
from pacl_scale.evaluate.counts import Confusion, iou_of, per_class_table
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
        counts = Confusion.empty(classes)
        self.add_to(counts, word_set)
        return counts

    def add_to(self, counts: Confusion, word_set: str = OWN_WORDS) -> None:
        """Add this picture's pixels to ``counts``, in place."""
        positions, pixels = self.confusions.get(word_set, self.confusions[OWN_WORDS])
        counts.counts_CC.reshape(-1)[positions] += np.array(pixels, np.int64)

    def sums(self, classes: int, word_set: str = OWN_WORDS) -> np.ndarray:
        """Pixels found, true pixels and predicted pixels of each class, (3, C) int64."""
        positions, pixels = self.confusions.get(word_set, self.confusions[OWN_WORDS])
        true, said = np.divmod(np.array(positions, np.int64), classes)
        sums_3C, pixels_n = np.zeros((3, classes), np.int64), np.array(pixels, np.int64)
        np.add.at(sums_3C[0], true[true == said], pixels_n[true == said])
        np.add.at(sums_3C[1], true, pixels_n)
        np.add.at(sums_3C[2], said, pixels_n)
        return sums_3C


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
        total = Confusion.empty(classes)
        for counts in self.pictures.values():
            counts.add_to(total, word_set)
        return total

    def sums(self, classes: int, word_set: str = OWN_WORDS) -> np.ndarray:
        """:meth:`PictureCounts.sums` of every picture, in the order of names: (P, 3, C) int64.

        A confusion matrix a picture would be a gigabyte for COCO's 5,000 pictures and 171 classes.
        """
        names = sorted(self.pictures)
        sums = [self.pictures[name].sums(classes, word_set) for name in names]
        return np.array(sums, np.int64).reshape(len(names), 3, classes)

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
    total = tally.total(positions)
    counts_P3C = tally.sums(positions)
    mious = [mean_iou(sums_3C) for sums_3C in counts_P3C]
    scored = [value for value in mious if value is not None]
    miou_P = np.array([np.nan if value is None else value for value in mious])
    bands_P3C, patches_P2 = _bands(tally, positions), _patches(tally)
    pictures_C = (counts_P3C[:, 1] > 0).sum(axis=0)
    scores = total.summary() | {
        "miou_per_picture": float(np.mean(scored)) if scored else None,
        "boundary_iou": None if bands_P3C is None else mean_iou(bands_P3C.sum(axis=0)),
        "patch_accuracy": None if patches_P2 is None else float(patches_P2[:, 0].sum() / patches_P2[:, 1].sum()),
        "intervals": {"level": LEVEL, "draws": DRAWS}
        | intervals(counts_P3C, miou_P, bands_P3C=bands_P3C, patches_P2=patches_P2),
        "groups": _groups(tally, total, counts_P3C, classes, positions),
        "per_class": per_class_table(total, classes, pictures_C),
    }
    if classes.score_background:
        foreground = list(range(len(classes.indices)))
        scores["foreground"] = total.summary(foreground) | {"intervals": intervals(counts_P3C[:, :, foreground])}
    return scores


def _groups(
    tally: Tally, total: Confusion, counts_P3C: np.ndarray, classes: ClassList, positions: int
) -> dict[str, Any]:
    groups = {}
    for name, group in classes.groups.items():
        members = classes.members(name)
        counts, sums_P3C = total, counts_P3C
        if group.words:
            counts, sums_P3C = tally.total(positions, name), tally.sums(positions, name)
        groups[name] = counts.summary(members) | {"intervals": intervals(sums_P3C[:, :, members])}
        if group.words:
            asked = classes.synonyms(name)
            groups[name]["words"] = {classes.names[c]: asked[c] for c in classes.members(name)}
    return groups


def mean_iou(sums_3C: np.ndarray) -> float | None:
    """Mean over the present classes of found over found, missed and wrongly claimed; None without such a class."""
    iou_C = iou_of(*sums_3C)
    present = iou_C[~np.isnan(iou_C)]
    return float(present.mean()) if len(present) else None


def _bands(tally: Tally, positions: int) -> np.ndarray | None:
    """Band pixels (P, 3, C) of every picture; None where they were not counted."""
    every = [tally.pictures[name].boundary for name in sorted(tally.pictures)]
    if not every or any(counts is None for counts in every):
        return None
    return np.array(every, np.int64).reshape(len(every), 3, positions)


def _patches(tally: Tally) -> np.ndarray | None:
    """Right patches and all patches (P, 2) of every picture; None where they were not counted, or there is none."""
    every: Sequence[list[int] | None] = [tally.pictures[name].patches for name in sorted(tally.pictures)]
    counts_P2 = np.array([counts or [0, 0] for counts in every], np.int64).reshape(len(every), 2)
    return counts_P2 if counts_P2[:, 1].any() else None
