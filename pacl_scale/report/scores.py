"""Tables of scores, what is taken for what, class by class, and what others published."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pacl_scale.evaluate.command import columns
from pacl_scale.evaluate.examples import folder_of
from pacl_scale.evaluate.methods import PATCH_ORACLE
from pacl_scale.evaluate.published import beside
from pacl_scale.evaluate.rows import Row
from pacl_scale.report.gallery import examples_of
from pacl_scale.report.wording import ORDER, PEEKING, WHEN, name_of

INTERVAL_OF = {
    "mIoU": "miou",
    "pixel accuracy": "pixel_accuracy",
    "class accuracy": "mean_class_accuracy",
    "mIoU per picture": "miou_per_picture",
    "top-1": "top1",
    "top-5": "top5",
}
"""Column to the score whose bootstrap interval stands below its figure."""

CONFUSIONS_SHOWN = 8


def by_data_set(rows: Sequence[Row], task: str) -> list[list[Row]]:
    """Rows of a task, those of one data set and protocol together, methods in reading order."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.task == task:
            cells.setdefault((row.data_set, row.protocol["name"]), []).append(row)

    def place(row: Row) -> int:
        listed = [*ORDER, row.method, *PEEKING] if row.method not in ORDER + PEEKING else [*ORDER, "", *PEEKING]
        return listed.index(row.method)

    return [sorted(cell, key=place) for cell in cells.values()]


def tiles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first data set's mIoU of each method that is a model, or the cheap guess."""
    return [
        {"method": row.method, "name": name_of(row.method), "value": row.scores["miou"], "when": WHEN.get(row.method)}
        for row in rows
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
            "name": name_of(row.method),
            "peeks": row.method in PEEKING,
            "note": f"“{row.checkpoint['answer']}” everywhere" if "answer" in row.checkpoint else "",
            "cells": [
                {
                    "value": value,
                    "best": row.method not in PEEKING and value is not None and value == best[heading],
                    "interval": row.scores.get("intervals", {}).get(INTERVAL_OF.get(heading)),
                }
                for heading, value in columns(row).items()
            ],
        }
        for row in rows
    ]
    return {"headings": headings, "lines": lines}


def segmentation(run: str, rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    return {
        "data_set": first.data_set,
        "pictures": first.pictures,
        "classes": first.scores["classes"],
        "classes_present": first.scores["classes_present"],
        "main": name_of(first.method),
        "protocol": first.protocol,
        "precision": first.towers.get("precision"),
        "table": _table(rows),
        "groups": [
            {"name": name.replace("_", " "), "classes": group["classes"], "words": _asked(group)}
            for name, group in first.scores["groups"].items()
        ],
        "confusions": _confusions(first),
        "published": _published(first),
        "classes_bars": _class_bars([row for row in rows if row.method not in PEEKING]),
        "examples": examples_of(folder_of(run, first.data_set, first.protocol["name"])),
    }


def retrieval(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    texts = first.scores["texts"]
    return {
        "data_set": first.data_set,
        "pictures": first.pictures,
        "texts": texts,
        "chance": min(1.0, 10 / first.pictures),
        "table": _table(rows),
    }


CLASSES_NAMED = 5


def classification(rows: Sequence[Row]) -> dict[str, Any]:
    """The table of a data set of labelled pictures, and which classes the first method knows best and worst."""
    first = rows[0]
    present = [entry for entry in first.scores["per_class"] if entry["accuracy"] is not None]
    order = sorted(present, key=lambda entry: -entry["accuracy"])
    return {
        "data_set": first.data_set,
        "pictures": first.pictures,
        "of": first.data.get("of"),
        "classes": first.scores["classes"],
        "templates": len(first.protocol["templates"]),
        "template_set": first.protocol["template_set"],
        "main": name_of(first.method),
        "known": order[:CLASSES_NAMED],
        "missed": order[: -CLASSES_NAMED - 1 : -1] if len(order) >= 2 * CLASSES_NAMED else [],
        "table": _table(rows),
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


def _class_bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Classes of the ground truth, best first by the first row, with each method's IoU."""
    by_method = {row.method: {entry["index"]: entry for entry in row.scores["per_class"]} for row in rows}
    present = [entry for entry in rows[0].scores["per_class"] if entry["iou"] is not None]
    return [
        {
            "word": entry["word"],
            "pictures": entry["pictures"],
            "bars": [
                {"method": method, "name": name_of(method), "iou": entries[entry["index"]]["iou"]}
                for method, entries in by_method.items()
            ],
        }
        for entry in sorted(present, key=lambda entry: -entry["iou"])
    ]
