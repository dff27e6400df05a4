"""How the page says things: the names of methods, shares as per cent, seconds as people say them."""

import posixpath
from collections.abc import Mapping
from typing import Any

from pacl_scale.evaluate.methods import CLIP, MAJORITY, MASKCLIP, PACL, PATCH_ORACLE, UNTRAINED, VALUE_PATH
from pacl_scale.evaluate.rows import Row

MEAN_POOLED = "mean_pooled"
NAMES = {
    PACL: "PACL",
    MEAN_POOLED: "Mean-pooled",
    UNTRAINED: "Untrained",
    CLIP: "CLIP as it is",
    MASKCLIP: "MaskCLIP",
    VALUE_PATH: "PACL on values",
    MAJORITY: "Majority class",
    PATCH_ORACLE: "Patch oracle",
}
WHEN = {UNTRAINED: "before", PACL: "after"}
MEANINGS = {
    PACL: "The method: each caption pools the patches that fit it.",
    MEAN_POOLED: "The same data, towers and budget, but every patch counts alike while training.",
    UNTRAINED: "The same architecture with random weights.",
    CLIP: "The same towers without PACL: their own projection of each patch.",
    MASKCLIP: "The same towers, each patch of the last layer attending to itself alone; nothing is trained.",
    VALUE_PATH: "PACL's embedder on the value path of the last layer: each patch attends to itself alone there.",
    MAJORITY: "Answers the data set's most frequent true class everywhere; it peeks at the truth.",
    PATCH_ORACLE: "Knows the true class of each patch: what this grid of patches could reach. No model does better "
    "by much.",
}
PEEKING = (MAJORITY, PATCH_ORACLE)
ORDER = (PACL, MEAN_POOLED, VALUE_PATH, MASKCLIP, CLIP, UNTRAINED)
"""Methods in reading order; the others follow, those that peek last."""


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a number of per cent, without the sign; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def name_of(method: str) -> str:
    """A method as the page calls it."""
    return NAMES.get(method, method.replace("_", " "))


def protocol_line(row: Row) -> str:
    """What a row's figures hang on, in a line: enough to see that two tables are not of one kind."""
    protocol = row.protocol
    count = len(protocol.get("templates", []))
    prompts = f"{count} prompt{'' if count == 1 else 's'} a word ({protocol.get('template_set')})" if count else ""
    shown = f"short side {protocol['size']}"
    if protocol["resize"] in ("square", "squash"):
        shown = f"squeezed to {protocol['size']} x {protocol['size']}"
    parts = [f"protocol {protocol['name']}", shown]
    if row.task == "segmentation":
        windows = f"windows of {protocol['window']} every {protocol['window_step']}"
        scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
        rule = f"background by {protocol['background']}"
        if protocol["background"] != "words":
            rule += f" at {protocol['background_threshold']:g}"
        parts += [
            windows if protocol["window"] else "whole picture",
            f"patches of {protocol['patch_size']} every {protocol['stride']}",
            *([f"scales {scales}"] if scales != "1" else []),
            *(["mirrored too"] if protocol["flip"] else []),
            *(["only the square in the middle"] if protocol["crop"] != "none" else []),
            rule if protocol["background_applied"] else "no background rule",
        ]
    parts += [prompts] if prompts else []
    return ", ".join([*parts, *([row.towers["precision"]] if "precision" in row.towers else [])])


def bars(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, value and share of the largest, for bars."""
    largest = max(values.values(), default=0) or 1
    return [
        {"name": posixpath.basename(name).replace("_", " "), "value": value, "share": value / largest}
        for name, value in values.items()
    ]
