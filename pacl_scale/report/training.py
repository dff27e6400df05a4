"""What a run did: its loss over steps, its settings in words, and how its data came about."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from pacl_scale.metrics import read_metrics
from pacl_scale.report.wording import bars, name_of


def curves_of(runs: Mapping[str, str]) -> dict[str, Any] | None:
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


def facts_of(runs: Mapping[str, str]) -> list[tuple[str, str]]:
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


def preparation_of(account: Mapping[str, Any]) -> dict[str, Any]:
    expected, got = account["expected"], account["got"]
    facts = [("Rows in the list", account.get("list_rows")), ("Shards", account.get("shards"))]
    size = account.get("bytes")
    return {
        "expected": expected,
        "got": got,
        "share": got / expected if expected else None,
        "left_out": bars(account.get("left_out") or {}),
        "failures": bars(account.get("failures") or {}),
        "facts": [(name, f"{value:,}") for name, value in facts if value is not None]
        + ([("Size", f"{size / 1e6:,.1f} MB")] if size is not None else []),
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
