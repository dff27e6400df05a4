"""Tables of scores, what is taken for what, class by class, and what others published."""

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pacl_scale.evaluate.command import columns
from pacl_scale.evaluate.examples import folder_of
from pacl_scale.evaluate.methods import PATCH_ORACLE
from pacl_scale.evaluate.published import beside
from pacl_scale.evaluate.rows import Row, by_cell
from pacl_scale.report.gallery import examples_of
from pacl_scale.report.wording import ORDER, PEEKING, WHEN, name_of, protocol_line

INTERVAL_OF = {
    "mIoU": "miou",
    "pixel accuracy": "pixel_accuracy",
    "class accuracy": "mean_class_accuracy",
    "mIoU per picture": "miou_per_picture",
    "boundary IoU": "boundary_iou",
    "patch accuracy": "patch_accuracy",
    "top-1": "top1",
    "top-5": "top5",
    "mean per class": "mean_per_class",
    **{f"R@{k} picture to text": f"image_to_text R@{k}" for k in (1, 5, 10)},
    **{f"R@{k} text to picture": f"text_to_image R@{k}" for k in (1, 5, 10)},
}
"""Column to the score whose bootstrap interval stands below its figure."""

CONFUSIONS_SHOWN = 8

CLASSES_SHOWN = 200
"""Of more classes than that, the best and the worst are drawn."""


def tables(rows: Sequence[Row], task: str) -> list[list[Row]]:
    """Rows of a task, those that may stand in one table together, methods in reading order.

    Of one data set the table that compares most comes first: it is the one that the head of the page shows.
    """

    def place(row: Row) -> tuple[int, int]:
        listed = [*ORDER, row.method, *PEEKING] if row.method not in ORDER + PEEKING else [*ORDER, "", *PEEKING]
        # Of one method at several steps the last one first: it is the one that the page is about.
        return listed.index(row.method), -(row.checkpoint.get("step") or 0)

    cells = by_cell([row for row in rows if row.task == task])
    data_sets = list(dict.fromkeys(cell[0].data_set for cell in cells))
    cells.sort(key=lambda cell: (data_sets.index(cell[0].data_set), -len(cell)))
    return [sorted(cell, key=place) for cell in cells]


def names_of(rows: Sequence[Row]) -> list[str]:
    """What each row of a table is called; rows of one method are told apart by step, run or seed."""
    names = []
    for row in rows:
        alike = [other for other in rows if other.method == row.method]
        name = name_of(row.method)
        for key, shown in (("step", "step {}"), ("path", "{}"), ("seed", "seed {}")):
            if len({str(other.checkpoint.get(key)) for other in alike}) > 1:
                value = row.checkpoint.get(key)
                name += ", " + shown.format(_run_name(value) if key == "path" else value)
        names.append(name)
    return names


def _run_name(path: Any) -> str:
    """The last folder of a checkpoint's path that says which run it is."""
    parts = [part for part in str(path).split("/") if part not in ("", "checkpoints") and not part.isdecimal()]
    return parts[-1] if parts else posixpath.basename(str(path))


def tiles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first data set's mIoU of each method that is a model, or the cheap guess."""
    return [
        {"method": row.method, "name": name, "value": row.scores["miou"], "when": WHEN.get(row.method)}
        for row, name in zip(rows, names_of(rows), strict=True)
        if row.method != PATCH_ORACLE
    ]


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Headings and cells; the best of the methods that do not peek is marked in each column."""
    headings = list(columns(rows[0]))
    honest = [columns(row) for row in rows if row.method not in PEEKING]
    best = {h: max((value for cells in honest if (value := cells[h]) is not None), default=None) for h in headings}
    lines = [
        {
            "method": row.method,
            "name": name,
            "peeks": row.method in PEEKING,
            "note": f"“{row.checkpoint['answer']}” everywhere" if "answer" in row.checkpoint else "",
            "cells": [
                {
                    "value": value,
                    "best": row.method not in PEEKING and value is not None and value == best[heading],
                    "interval": _interval(row, heading),
                }
                for heading, value in columns(row).items()
            ],
        }
        for row, name in zip(rows, names_of(rows), strict=True)
    ]
    return {"headings": headings, "lines": lines}


def _interval(row: Row, heading: str) -> list[float] | None:
    """The interval below a figure; that of a group's mIoU is the group's own."""
    for name, group in row.scores.get("groups", {}).items():
        if heading == f"mIoU {name.replace('_', ' ')}":
            return group.get("intervals", {}).get("miou")
    return row.scores.get("intervals", {}).get(INTERVAL_OF.get(heading))


def _common(rows: Sequence[Row]) -> dict[str, Any]:
    """What every task's part of the page says of its rows."""
    first = rows[0]
    return {
        "data_set": first.data_set,
        "key": first.cell,
        "pictures": first.pictures,
        "of": first.data.get("of"),
        "main": names_of(rows)[0],
        "protocol": first.protocol,
        "protocol_line": protocol_line(first),
        "precision": first.towers.get("precision"),
        "software": first.software,
        "table": _table(rows),
    }


def segmentation(run: str, rows: Sequence[Row]) -> dict[str, Any]:
    """All that the page says of one data set with masks under one protocol."""
    first = rows[0]
    galleries = (examples_of(folder_of(run, row)) for row in rows)
    return _common(rows) | {
        "classes": first.scores["classes"],
        "classes_present": first.scores["classes_present"],
        "groups": [
            {"name": name.replace("_", " "), "classes": group["classes"], "words": _asked(group)}
            for name, group in first.scores["groups"].items()
        ],
        "confusions": _confusions(first),
        "published": _published(first),
        "bars": _class_bars(rows, "iou"),
        # Examples are chosen by the main method of an evaluation, which need not be the first row.
        "examples": next((found for found in galleries if found), []),
    }


def retrieval(rows: Sequence[Row]) -> dict[str, Any]:
    """All that the page says of one data set with captions."""
    return _common(rows) | {"texts": rows[0].scores["texts"], "chance": min(1.0, 10 / rows[0].pictures)}


def classification(rows: Sequence[Row]) -> dict[str, Any]:
    """All that the page says of one data set of labelled pictures."""
    first = rows[0]
    pictures = {entry["word"]: entry["pictures"] for entry in first.scores["per_class"]}
    return _common(rows) | {
        "classes": first.scores["classes"],
        "templates": len(first.protocol["templates"]),
        "template_set": first.protocol["template_set"],
        "confusions": [
            {"true": true, "said": said, "share": count / pictures[true]}
            for true, said, count in first.scores["most_confused"][:CONFUSIONS_SHOWN]
        ],
        "bars": _class_bars(rows, "accuracy"),
    }


def _published(row: Row) -> list[dict[str, Any]]:
    """Others' figures on the same data set, highest first, with what keeps them from being compared with ``row``."""
    metrics = {"miou": "mIoU", "patch_accuracy": "patch accuracy"}
    found = [
        {
            "method": figure.method,
            "metric": metrics[figure.metric],
            "value": figure.value,
            "own": row.scores.get(figure.metric),
            "source": figure.source,
            "differences": differences,
        }
        for figure, differences in beside(row)
    ]
    return sorted(found, key=lambda line: (line["metric"], -line["value"]))


def _confusions(row: Row) -> list[dict[str, Any]]:
    """The largest errors of a row: a true word, what was answered instead, and the share of the word's pixels."""
    counts_CC = np.array(row.confusion, np.int64)
    words = [entry["word"] for entry in row.scores["per_class"]]
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    pairs = [divmod(int(place), len(words)) for place in order]
    return [
        {"true": words[t], "said": words[p], "share": float(wrong_CC[t, p] / counts_CC[t].sum())}
        for t, p in pairs
        if wrong_CC[t, p]
    ]


def _asked(group: Mapping[str, Any]) -> list[str]:
    return [f"{', '.join(words)} for {name}" for name, words in group.get("words", {}).items()]


def _class_bars(every: Sequence[Row], figure: str) -> dict[str, Any]:
    """Classes of the ground truth, best first by the first row, with each method's IoU or accuracy."""
    chosen = [(row, name) for row, name in zip(every, names_of(every), strict=True) if row.method not in PEEKING]
    if not chosen:
        return {"methods": [], "classes": [], "left_out": 0}
    # Rows of one table have one class list, in one order.
    entries = list(zip(*(row.scores["per_class"] for row, _ in chosen), strict=True))
    present = [alike for alike in entries if alike[0][figure] is not None]
    present.sort(key=lambda alike: -alike[0][figure])
    half = CLASSES_SHOWN // 2
    shown = present if len(present) <= CLASSES_SHOWN else [*present[:half], *present[-half:]]
    methods = [{"method": row.method, "name": name} for row, name in chosen]
    return {
        "methods": methods,
        "left_out": len(present) - len(shown),
        "classes": [
            {
                "word": alike[0]["word"],
                "pictures": alike[0]["pictures"],
                "bars": [method | {"value": entry[figure]} for method, entry in zip(methods, alike, strict=True)],
            }
            for alike in shown
        ],
    }
