"""Pictures with masks and heat maps, everything inlined, from the examples that an evaluation left."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.examples import TRUTH
from pacl_scale.evaluate.masks import UNLABELLED
from pacl_scale.evaluate.methods import PACL, UNTRAINED
from pacl_scale.report.wording import WHEN, name_of

RANK_TITLES = {"best": "Best", "median": "Middling", "worst": "Worst"}

PALE = 80
"""Alpha (of 255) of predictions where the truth says nothing: they are not scored."""


def examples_of(folder: str) -> list[dict[str, Any]]:
    """Examples by rank, everything that shows them inlined.

    Raises:
        UserError: the list of examples or one of their files is damaged.
    """
    listing_at = storage.join(folder, "examples.json")
    if not storage.exists(listing_at):
        return []
    ranks: dict[str, list[dict[str, Any]]] = {}
    try:
        for example in json.loads(storage.read_bytes(listing_at))["examples"]:
            ranks.setdefault(example["rank"], []).append(_example(folder, example))
        return [{"title": RANK_TITLES[rank], "rank": rank, "examples": found} for rank, found in ranks.items()]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        # Pillow's own complaint of a damaged file is an OSError.
        raise UserError(
            f"{listing_at} or a file beside it is damaged ({type(error).__name__}: {error}); evaluate again"
        ) from error


def _example(folder: str, example: Mapping[str, Any]) -> dict[str, Any]:
    photo = storage.read_bytes(storage.join(folder, example["files"]["picture"]))
    labels = {
        name: np.asarray(Image.open(io.BytesIO(storage.read_bytes(storage.join(folder, file)))))
        for name, file in example["files"].items()
        if name not in ("picture", "strip")
    }
    truth_HW = labels[TRUTH]
    palette = [tuple(colour) for colour in example["colours"]]
    swatches = [
        {"word": word, "colour": "#{:02x}{:02x}{:02x}".format(*colour), "true": number < example["truth_words"]}
        for number, (word, colour) in enumerate(zip(example["words"], palette, strict=True))
    ]
    order = [TRUTH, *sorted((name for name in labels if name != TRUTH), key=_panel_place)]
    return {
        "picture": example["picture"],
        "photo": "data:image/jpeg;base64," + base64.b64encode(photo).decode(),
        "width": truth_HW.shape[1],
        "height": truth_HW.shape[0],
        "words": swatches,
        "unscored": bool((truth_HW == UNLABELLED).any()),
        "heat": _heat(folder, example.get("heat") or {}),
        "panels": [_panel(name, labels[name], truth_HW, palette, example) for name in order],
    }


def _heat(folder: str, heat: Mapping[str, Any]) -> dict[str, Any] | None:
    """The score map of each word, and what its darkest and brightest mean; None for an evaluation without them."""
    if not heat:
        return None
    maps = [
        {"word": word, "png": _png_url(storage.read_bytes(storage.join(folder, f)))}
        for word, f in heat["files"].items()
    ]
    return {"method": name_of(heat["method"]), "low": heat["low"], "high": heat["high"], "maps": maps}


def _panel_place(method: str) -> int:
    """Untrained first, PACL last: before and after."""
    return {UNTRAINED: 0, PACL: 2}.get(method, 1)


def _panel(
    name: str,
    labels_HW: np.ndarray,
    truth_HW: np.ndarray,
    palette: Sequence[overlay.Colour],
    example: Mapping[str, Any],
) -> dict[str, Any]:
    labels_HW = np.where(labels_HW == UNLABELLED, overlay.NOTHING, labels_HW.astype(np.int64))
    scored_HW = truth_HW != UNLABELLED
    named_HW = np.where(scored_HW, labels_HW, overlay.NOTHING)
    area = {example["words"][n]: float((named_HW == n).sum() / max(1, scored_HW.sum())) for n in range(len(palette))}
    said = ", ".join(f"{word} {100 * share:.0f} %" for word, share in area.items() if share >= 0.01)
    return {
        "name": "Truth" if name == TRUTH else name_of(name),
        "method": name,
        "when": WHEN.get(name),
        "miou": None if name == TRUTH else example["scores"][name]["miou"],
        "mask": _mask_png(labels_HW, scored_HW, palette),
        "said": said,
        "tags": _tags(named_HW, example["words"]),
    }


def _tags(named_HW: np.ndarray, words: Sequence[str]) -> list[dict[str, str]]:
    """Words on their regions, the largest first; one that would lie on another's is left to the legend."""
    points = overlay.label_points(named_HW)
    placed: list[tuple[float, float]] = []
    tags = []
    for label in sorted(points, key=lambda label: -int((named_HW == label).sum())):
        x, y = points[label]
        if all(abs(x - other_x) > 0.3 or abs(y - other_y) > 0.13 for other_x, other_y in placed):
            placed.append((x, y))
            tags.append({"word": words[label], "x": f"{100 * x:.1f}", "y": f"{100 * y:.1f}"})
    return tags


def _mask_png(labels_HW: np.ndarray, scored_HW: np.ndarray, palette: Sequence[overlay.Colour]) -> str:
    table = np.array([(*colour, 255) for colour in palette] + [(0, 0, 0, 0)], np.uint8)
    drawn_HW4 = table[labels_HW]
    drawn_HW4[~scored_HW, 3] = np.minimum(drawn_HW4[~scored_HW, 3], PALE)
    drawn_HW4[overlay.borders(labels_HW) & scored_HW] = (10, 10, 10, 255)
    buffer = io.BytesIO()
    Image.fromarray(drawn_HW4).save(buffer, "PNG", optimize=True)
    return _png_url(buffer.getvalue())


def _png_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
