"""What the numbers in a data set's masks mean, and which words ask for them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from pacl_scale.errors import UserError

NOT_SCORED = -1
"""Class number of a pixel that does not count: void, or background under the rule "none"."""

_UNKNOWN = -2


@dataclass
class ClassGroup:
    """Classes scored apart from the others, and optionally asked for by other words."""

    classes: list[int]
    """Mask indices of the group. Its scores average over these; predictions still choose among all classes."""

    words: dict[int, str | list[str]] = field(default_factory=dict)
    """Other words for some of these classes (boat asked for as "ship"); the rest keep their own."""

    def __post_init__(self) -> None:
        _check_words("a group's words", self.words)
        if not isinstance(self.classes, list) or not all(isinstance(index, int) for index in self.classes):
            raise ValueError("the classes of a group are a list of mask indices")
        if not self.classes:
            raise ValueError("a group of classes needs at least one class")
        if strangers := sorted(set(self.words) - set(self.classes)):
            raise ValueError(f"a group has words for classes {strangers} that are not in it")


@dataclass
class ClassList:
    """The classes of a data set: mask index to words, and the indices that are no class."""

    words: dict[int, str | list[str]]
    """Mask index to its word, or to a list of synonyms whose text vectors are averaged."""

    void: int | list[int] | None = 255
    """Mask index, or indices, of pixels that nobody labelled; never scored."""

    background: int | list[int] | None = None
    """Mask index, or indices, of "none of the classes"."""

    score_background: bool = False
    """Whether background is a class of its own, scored as the last one and answered by the protocol's background
    rule (VOC-21, Context-60). If not, its pixels are not scored (VOC-20, Context-59)."""

    groups: dict[str, ClassGroup] = field(default_factory=dict)
    """Named subsets of the classes that get scores of their own."""

    def __post_init__(self) -> None:
        _check_words("words", self.words)
        if len(self.words) < 2:
            raise ValueError("a class list needs at least two classes")
        for special in ("void", "background"):
            for index in _as_list(getattr(self, special)):
                if not isinstance(index, int):
                    raise ValueError(f"{special} has {index!r}, which is no mask index")
                if index in self.words:
                    raise ValueError(f"the {special} index {index} is also a class")
        if self.score_background and not _as_list(self.background):
            raise ValueError("score_background needs the mask index of the background")
        for name, group in self.groups.items():
            if strangers := sorted(set(group.classes) - set(self.words)):
                raise ValueError(f"group {name!r} has indices {strangers} that are no classes")
        for word_set in self.word_sets():
            seen: dict[str, int] = {}
            for index, synonyms in zip(self.indices, self.synonyms(word_set), strict=True):
                if not synonyms or not all(word.strip() for word in synonyms):
                    raise ValueError(f"class {index} has no word")
                for word in synonyms:
                    if seen.setdefault(word, index) != index:
                        raise ValueError(f"the word {word!r} names both class {seen[word]} and class {index}")

    @property
    def indices(self) -> list[int]:
        """Mask indices in ascending order; a class's position here is its row in every table of scores."""
        return sorted(self.words)

    @property
    def names(self) -> list[str]:
        """The first word of each class."""
        return [synonyms[0] for synonyms in self.synonyms()]

    def word_sets(self) -> list[str | None]:
        """The ways in which the classes are asked for: ``None`` (their own words) and groups with words."""
        return [None, *(name for name, group in self.groups.items() if group.words)]

    def synonyms(self, word_set: str | None = None) -> list[list[str]]:
        """The words of each class, in the order of :attr:`indices`, under a word set."""
        words = self.words | (self.groups[word_set].words if word_set is not None else {})
        return [_as_list(words[index]) for index in self.indices]

    def record(self) -> dict[str, Any]:
        """The list for the rows: each class's mask index and words, special values, groups."""
        return {
            "classes": [[index, words] for index, words in zip(self.indices, self.synonyms(), strict=True)],
            "void": self.void,
            "background": self.background,
            "score_background": self.score_background,
            "groups": {
                name: {"classes": sorted(group.classes), "words": [[i, _as_list(w)] for i, w in group.words.items()]}
                for name, group in self.groups.items()
            },
        }

    @property
    def background_position(self) -> int:
        """Position of background in tables of scores: after the last class."""
        return len(self.words)

    def members(self, group: str) -> list[int]:
        """Positions (not mask indices) of a group's classes."""
        return [self.indices.index(index) for index in sorted(set(self.groups[group].classes))]

    def positions(self, mask_HW: np.ndarray, name: str) -> np.ndarray:
        """Mask indices (H, W) to positions (H, W) int16, :data:`NOT_SCORED` where a pixel does not count.

        Scored background is :attr:`background_position`.

        Raises:
            UserError: the mask has an index that the class list does not explain.
        """
        size = 65536 if mask_HW.dtype.itemsize > 1 else 256
        if mask_HW.min(initial=0) < 0 or mask_HW.max(initial=0) >= size:
            raise UserError(f"{name}: the mask has indices from {mask_HW.min()} to {mask_HW.max()}")
        table = np.full(size, _UNKNOWN, np.int16)
        table[[index for index in _as_list(self.void) if index < size]] = NOT_SCORED
        background = self.background_position if self.score_background else NOT_SCORED
        table[[index for index in _as_list(self.background) if index < size]] = background
        for position, index in enumerate(self.indices):
            if index < size:
                table[index] = position
        positions_HW = table[mask_HW]
        if (positions_HW == _UNKNOWN).any():
            strangers = sorted({int(value) for value in mask_HW[positions_HW == _UNKNOWN]})
            raise UserError(f"{name}: the mask has the indices {strangers[:8]}, which the class list does not name")
        return positions_HW


def _check_words(key: str, words: Any) -> None:
    """Refuse what YAML lets through: indices that are no whole numbers, words that are no text."""
    if not isinstance(words, dict):
        raise ValueError(f"{key} must say a word for each mask index")
    for index, alike in words.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"{key} has {index!r}, which is no mask index")
        # "no" and "on" are words that YAML takes for something else.
        if not all(isinstance(word, str) for word in _as_list(alike)):
            raise ValueError(f"{key}: class {index} is no word ({alike!r}); put it in quotes")


def read_class_list(content: bytes, name: str) -> ClassList:
    """A class list from YAML with the keys of :class:`ClassList`.

    Raises:
        UserError: not YAML, unknown keys, or classes that contradict each other.
    """
    try:
        values: Any = yaml.safe_load(content)
        groups = {key: ClassGroup(**group) for key, group in (values.pop("groups", None) or {}).items()}
        return ClassList(**values, groups=groups)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name} is no class list ({' '.join(str(error).split())}); see docs/evaluation.md") from error


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
