"""Figures that others published, as data, and how a row's own protocol differs from the one that each was got under.

A published figure beside one's own says something only as far as the two protocols are the same; what is not stated
about a figure's protocol counts as a difference too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pacl_scale.evaluate.rows import Row

NOT_STATED = "not stated"


@dataclass(frozen=True)
class Published:
    """One figure of one method on one data set."""

    method: str
    data_set: str
    """Name of the official layout (``voc_20``), see :data:`pacl_scale.evaluate.official.LAYOUTS`."""
    metric: str
    """Key of the figure in a row's scores; "miou" is over the pixels of the data set."""
    value: float
    """A share, 0 to 1."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """What is known of its protocol, under the keys of a row's own; :data:`NOT_STATED` where the source is silent."""
    towers: str = NOT_STATED
    """The frozen (or trained) towers behind it."""
    refinement: str = "none"
    """What is done to masks after the model, in a word."""
    source: str = ""
    """Where the figure stands."""


@dataclass(frozen=True)
class _Series:
    """One method's figures on the data sets of :data:`DATA_SETS`, in per cent."""

    method: str
    per_cent: tuple[float, ...]
    source: str
    towers: str
    protocol: Mapping[str, Any]
    refinement: str = "none"


DATA_SETS = ("voc_20", "context_59", "coco_stuff_171", "ade_150")

COMPARED = ("resize", "size", "window", "window_step", "stride", "scales", "flip", "template_set", "background_where")
"""Keys of a row's protocol that are held against a published figure's."""

# Short side 448, windows of 448 every 224, CLIP's eighty prompts: TCL's, and that of most figures compared with it.
_COMMON = {
    "resize": "short",
    "size": 448,
    "window": 448,
    "window_step": 224,
    "template_set": "imagenet",
    "background_where": "scored",
    "scales": [1.0],
    "flip": False,
}
_PAPER = {
    "resize": NOT_STATED,
    "size": NOT_STATED,
    "window": NOT_STATED,
    "stride": 4,
    "scales": NOT_STATED,
    "flip": NOT_STATED,
    "template_set": "paper",
    "background_where": "always",
}
_SMALL_WINDOWS = {**_COMMON, "size": 336, "window": 224, "window_step": 112}
_LARGE_WINDOWS = {**_COMMON, "size": NOT_STATED, "window": 336, "window_step": 112}
_UNKNOWN = dict.fromkeys(("resize", "size", "window", "stride", "scales", "flip", "template_set"), NOT_STATED)

_SERIES = (
    _Series(
        "PACL",
        (72.3, 50.1, 38.8, 31.4),
        "Mukhoti et al., CVPR 2023; never reproduced; whether mIoU is over pictures or the data set is not stated",
        "CLIP ViT-B/16, frozen, 30 M pairs",
        _PAPER,
    ),
    _Series("CLIP", (49.4, 11.1, 5.7, 3.1), "as compared in later papers", "CLIP ViT-B/16", _COMMON),
    _Series(
        "MaskCLIP", (74.9, 26.4, 16.7, 11.9), "Zhou et al., ECCV 2022, as compared later", "CLIP ViT-B/16", _COMMON
    ),
    _Series("TCL", (77.5, 30.3, 19.6, 14.9), "Cha et al., CVPR 2023", "CLIP ViT-B/16, CC15M", _COMMON),
    _Series(
        "CLIP-DINOiser",
        (80.9, 35.9, 24.6, 20.0),
        "Wysoczańska et al., ECCV 2024",
        "CLIP ViT-B/16, taught by DINO",
        _COMMON,
    ),
    _Series("NACLIP", (83.0, 38.4, 25.7, 19.1), "Hajimiri et al., WACV 2025", "CLIP ViT-B/16", _SMALL_WINDOWS, "PAMR"),
    _Series("ProxyCLIP", (80.3, 39.1, 26.5, 20.2), "Lan et al., ECCV 2024", "CLIP ViT-B/16 and DINO", _LARGE_WINDOWS),
    _Series(
        "CorrCLIPv2-L",
        (93.2, 56.8, 39.1, 36.5),
        "its authors' figures",
        "CLIP ViT-L/14 and several foundation models",
        _UNKNOWN,
        "masks of other models",
    ),
)

PATCH_ACCURACY_ON_VOC = (("ViT-B/16", 0.5249, 0.9651), ("ViT-L/14", 0.2791, 0.9533))
"""The paper's patch accuracy on VOC: tower, CLIP as it is, PACL."""


def figures(data_set: str) -> tuple[Published, ...]:
    """Published mIoU on an official data set, in the order of the years; none on a data set that nobody published on.

    Args:
        data_set: the layout's name (``voc_20``, also written ``VOC-20`` or ``voc20``).
    """
    wanted = _plain(data_set)
    found = [
        Published(
            series.method,
            name,
            "miou",
            round(per_cent / 100, 6),
            series.protocol,
            series.towers,
            series.refinement,
            series.source,
        )
        for series in _SERIES
        for name, per_cent in zip(DATA_SETS, series.per_cent, strict=True)
        if _plain(name) == wanted
    ]
    if wanted == _plain(DATA_SETS[0]):
        found += _patch_accuracies()
    return tuple(found)


def differences(figure: Published, row: Row) -> tuple[str, ...]:
    """How ``row`` was measured otherwise than ``figure``, one clause each; empty where nothing is known to differ."""
    found = []
    for key in COMPARED:
        theirs = figure.protocol.get(key)
        ours = _shown(row.protocol.get(key))
        if ours == "0":
            # Neither a window nor a distance between two.
            ours = "none"
        if theirs == NOT_STATED:
            found.append(f"{key}: {ours} here, {NOT_STATED} there")
        elif theirs is not None and _shown(theirs) != ours:
            found.append(f"{key}: {ours} here, {_shown(theirs)} there")
    model = str(row.towers.get("vision", {}).get("model", NOT_STATED))
    if _plain(model) not in _plain(figure.towers):
        found.append(f"towers: {model} here, {figure.towers} there")
    if figure.refinement != "none":
        found.append(f"refined with {figure.refinement} there")
    split = row.data.get("of")
    if split and row.pictures < split:
        found.append(f"{row.pictures} of {split} pictures here")
    return tuple(found)


def beside(row: Row) -> list[tuple[Published, tuple[str, ...]]]:
    """The published figures on a row's data set, each with the differences from the row's protocol."""
    return [(figure, differences(figure, row)) for figure in figures(str(row.data.get("layout", "")))]


def _patch_accuracies() -> list[Published]:
    source = "Mukhoti et al., CVPR 2023, read at second hand"
    return [
        Published(method, DATA_SETS[0], "patch_accuracy", value, _PAPER, f"CLIP {tower}", source=source)
        for tower, clip, pacl in PATCH_ACCURACY_ON_VOC
        for method, value in ((f"CLIP {tower}", clip), (f"PACL {tower}", pacl))
    ]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{part:g}" for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
