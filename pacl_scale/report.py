"""A run as one HTML file that needs no network: pictures with masks, scores, curves, data, time.

``python -m pacl_scale.report runs/photos`` writes ``runs/photos/report.html``.
"""

import base64
import io
import json
import math
import posixpath
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from pacl_scale import config, storage
from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.command import columns
from pacl_scale.evaluate.examples import TRUTH, folder_of
from pacl_scale.evaluate.masks import UNLABELLED
from pacl_scale.evaluate.methods import MAJORITY, PACL, PATCH_ORACLE, UNTRAINED
from pacl_scale.evaluate.rows import Row, read_rows
from pacl_scale.metrics import read_metrics
from pacl_scale.pages import templates

PROG = "python -m pacl_scale.report"

TITLE = "What a PACL run learned"
INTRODUCTION = (
    "PACL learns which parts of a picture a word describes from pictures and their captions alone; it is never shown "
    "an outline. This page shows one training run: below, words were looked for in pictures that the model had "
    "never seen."
)

MEAN_POOLED = "mean_pooled"
NAMES = {
    PACL: "PACL",
    MEAN_POOLED: "Mean-pooled",
    UNTRAINED: "Untrained",
    MAJORITY: "Majority class",
    PATCH_ORACLE: "Patch oracle",
}
WHEN = {UNTRAINED: "before", PACL: "after"}
MEANINGS = {
    PACL: "The method: each caption pools the patches that fit it.",
    MEAN_POOLED: "The same data, towers and budget, but every patch counts alike while training.",
    UNTRAINED: "The same architecture with random weights.",
    MAJORITY: "Answers the data set's most frequent true class everywhere; it peeks at the truth.",
    PATCH_ORACLE: "Knows the true class of each patch: what this grid of patches could reach. No model does better "
    "by much.",
}
PEEKING = (MAJORITY, PATCH_ORACLE)
INTERVAL_OF = {
    "mIoU": "miou",
    "pixel accuracy": "pixel_accuracy",
    "class accuracy": "mean_class_accuracy",
    "mIoU per picture": "miou_per_picture",
}
"""Column to the score whose bootstrap interval stands below its figure."""

CONFUSIONS_SHOWN = 8

ORDER = (PACL, MEAN_POOLED, UNTRAINED)

RANK_TITLES = {"best": "Best", "median": "Middling", "worst": "Worst"}

PALE = 80
"""Alpha (of 255) of predictions where the truth says nothing: they are not scored."""


@dataclass
class ReportConfig:
    """One self-contained HTML page of a run."""

    runs: dict[str, str] = field(default_factory=dict)
    """Method to run directory, for the training curves; not given, RUN itself as `pacl`."""

    preparation: str | None = None
    """The `report.json` of the training data's preparation, a path or URL."""

    output: str | None = None
    """HTML file to write; not given, `report.html` in RUN."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 or raises :class:`pacl_scale.errors.UserError`."""
    positionals: list[tuple[str, dict[str, Any]]] = [("run", {"help": "Run directory with evals/."})]
    settings, given = config.parse(ReportConfig, argv, PROG, positionals)
    run = given["run"]
    preparation = json.loads(storage.read_bytes(settings.preparation)) if settings.preparation else None
    print(
        write_report(
            settings.output or storage.join(run, "report.html"),
            evaluated=run,
            runs=settings.runs or {PACL: run},
            preparation=preparation,
        )
    )
    return 0


def write_report(
    output: str,
    evaluated: str,
    runs: Mapping[str, str],
    preparation: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    title: str = TITLE,
    introduction: str = INTRODUCTION,
) -> str:
    """Write the page and return its address.

    Args:
        output: where the HTML file goes.
        evaluated: run directory whose ``evals/`` holds rows and examples.
        runs: method to run directory; their ``metrics.jsonl`` become the curves, those without one are left out.
        preparation: the account of the data's preparation: ``expected``, ``got``, ``failures`` by cause, and, if
            there, ``list_rows``, ``left_out`` by cause, ``shards``, ``bytes``, ``samples``.
        seconds: stage to seconds, in the order in which they ran.
        title: heading of the page.
        introduction: what is below it.

    Raises:
        UserError: there are no rows to report on.
    """
    rows = read_rows(evaluated)
    if not rows:
        raise UserError(f"{evaluated} has no evaluation yet; run python -m pacl_scale.evaluate first")
    environment = templates(html=True)
    environment.filters |= {"percent": percent, "duration": duration, "number": lambda value: f"{value:,}"}
    segmentation = _by_data_set(rows, "segmentation")
    page = environment.get_template("report.html.j2").render(
        title=title,
        introduction=introduction,
        meanings=MEANINGS,
        segmentation=[_segmentation(evaluated, found) for found in segmentation],
        retrieval=[_retrieval(found) for found in _by_data_set(rows, "retrieval")],
        tiles=_tiles(segmentation[0]) if segmentation else [],
        curves=_curves(runs),
        facts=_facts(runs),
        preparation=_preparation(preparation) if preparation else None,
        stages=_bars(seconds or {}),
        total_seconds=sum((seconds or {}).values()),
    )
    storage.write_bytes(output, page.encode())
    return output


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


def _by_data_set(rows: Sequence[Row], task: str) -> list[list[Row]]:
    """Rows of a task, those of one data set and protocol together, methods in reading order."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.task == task:
            cells.setdefault((row.data_set, row.protocol["name"]), []).append(row)

    def place(row: Row) -> int:
        listed = [*ORDER, row.method, *PEEKING] if row.method not in ORDER + PEEKING else [*ORDER, "", *PEEKING]
        return listed.index(row.method)

    return [sorted(cell, key=place) for cell in cells.values()]


def _tiles(rows: Sequence[Row]) -> list[dict[str, Any]]:
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


def _segmentation(run: str, rows: Sequence[Row]) -> dict[str, Any]:
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
        "classes_bars": _class_bars([row for row in rows if row.method not in PEEKING]),
        "examples": _examples(folder_of(run, first.data_set, first.protocol["name"])),
    }


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


def _retrieval(rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    texts = first.scores["texts"]
    return {
        "data_set": first.data_set,
        "pictures": first.pictures,
        "texts": texts,
        "chance": min(1.0, 10 / first.pictures),
        "table": _table(rows),
    }


def _examples(folder: str) -> list[dict[str, Any]]:
    """Examples by rank, everything that shows them inlined."""
    listing_at = storage.join(folder, "examples.json")
    if not storage.exists(listing_at):
        return []
    listing = json.loads(storage.read_bytes(listing_at))
    ranks: dict[str, list[dict[str, Any]]] = {}
    for example in listing["examples"]:
        ranks.setdefault(example["rank"], []).append(_example(folder, example))
    return [{"title": RANK_TITLES[rank], "rank": rank, "examples": found} for rank, found in ranks.items()]


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
        "panels": [_panel(name, labels[name], truth_HW, palette, example) for name in order],
    }


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
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(runs: Mapping[str, str]) -> dict[str, Any] | None:
    """The loss over steps of every run that has a ``metrics.jsonl``, as inline SVG and as numbers."""
    found = {}
    for method, run in runs.items():
        path = Path(run) / "metrics.jsonl"
        if path.exists():
            lines = [line for line in read_metrics(path) if isinstance(line.get("loss"), (int, float))]
            if len(lines) > 1:
                found[method] = ([line["step"] for line in lines], [line["loss"] for line in lines])
    if not found:
        return None
    return {
        "svg": _loss_svg(found, _guessing(runs)),
        "ends": [
            {"name": name_of(m), "method": m, "first": losses[0], "last": losses[-1], "steps": steps[-1]}
            for m, (steps, losses) in found.items()
        ],
    }


def _guessing(runs: Mapping[str, str]) -> float | None:
    """Loss of a model that knows nothing: the logarithm of the global batch size, if the runs agree on it."""
    sizes = {settings.get("global_batch_size") for settings in map(_settings, runs.values())}
    size = sizes.pop() if len(sizes) == 1 else None
    return math.log(size) if size else None


def _loss_svg(curves: Mapping[str, tuple[list[int], list[float]]], guessing: float | None) -> Markup:
    # Imported here: it takes a second that pages without a curve need not spend.
    import matplotlib
    from matplotlib.figure import Figure

    # Every ink is a marker colour that the page's own style then replaces, so that the curve follows light and dark.
    inks = {"#010101": "var(--ink-soft)", "#020202": "var(--rule)"}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loss", "font.size": 11}):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        for number, (method, (steps, losses)) in enumerate(curves.items(), start=16):
            ink = f"#0303{number:02x}"
            inks[ink] = f"var(--method-{method}, var(--method-other))"
            axes.plot(steps, losses, color=ink, linewidth=0.8, alpha=0.35)
            axes.plot(steps, _smoothed(losses), color=ink, linewidth=2.2, label=name_of(method))
        if guessing is not None:
            axes.axhline(guessing, color="#010101", linewidth=1, linestyle=(0, (4, 4)))
            axes.annotate(
                "guessing", (1, guessing), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#010101"
            )
        axes.set_xlabel("step", color="#010101")
        axes.set_ylabel("loss", color="#010101")
        axes.tick_params(colors="#010101", length=0)
        axes.grid(axis="y", color="#020202", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#020202")
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # From here on without matplotlib's own metadata, which names addresses that this page has no need of.
    svg = svg[svg.index("<svg") : svg.index("<metadata>")] + svg[svg.index("</metadata>") + len("</metadata>") :]
    for marker, variable in inks.items():
        svg = svg.replace(marker, variable)
    # The curve is described in the caption and the table beside it; a screen reader need not spell the axes.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Mean over a window of about a twentieth of the curve, narrower at its ends."""
    reach = max(1, len(losses) // 40)
    return np.array([np.mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))])


def _settings(run: str) -> dict[str, Any]:
    path = Path(run) / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def _facts(runs: Mapping[str, str]) -> list[tuple[str, str]]:
    """What the first run was, in a reader's words."""
    settings = _settings(next(iter(runs.values()))) if runs else {}
    facts = []
    if {"steps", "global_batch_size"} <= settings.keys():
        steps, batch = settings["steps"], settings["global_batch_size"]
        facts.append(("Training", f"{steps:,} steps of {batch:,} pairs, seed {settings.get('seed')}"))
    for key, name in (("vision", "Vision tower"), ("text", "Text tower")):
        if key in settings:
            facts.append((name, f"{settings[key].get('model')} ({settings[key].get('source')}), frozen"))
    if "engine" in settings:
        engine, ranks = settings["engine"], settings.get("distributed", {}).get("ranks")
        facts.append(("Engine", f"DeepSpeed ZeRO {engine.get('zero_stage')}, {engine.get('precision')}, {ranks} ranks"))
    return facts


def _preparation(account: Mapping[str, Any]) -> dict[str, Any]:
    expected, got = account["expected"], account["got"]
    facts = [("Rows in the list", account.get("list_rows")), ("Shards", account.get("shards"))]
    size = account.get("bytes")
    return {
        "expected": expected,
        "got": got,
        "share": got / expected if expected else None,
        "left_out": _bars(account.get("left_out") or {}),
        "failures": _bars(account.get("failures") or {}),
        "facts": [(name, f"{value:,}") for name, value in facts if value is not None]
        + ([("Size", f"{size / 1e6:,.1f} MB")] if size is not None else []),
    }


def _bars(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, value and share of the largest, for bars."""
    largest = max(values.values(), default=0) or 1
    return [
        {"name": posixpath.basename(name).replace("_", " "), "value": value, "share": value / largest}
        for name, value in values.items()
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
