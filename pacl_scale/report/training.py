"""What a run did: its loss and its scores over samples seen, its settings in words, and how its data came about."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.metrics import parse_metrics
from pacl_scale.report.wording import bars, name_of

Curve = tuple[list[float], list[float]]
"""Places on the axis below, and values."""

SHOWN = {
    "miou": ("mIoU", "-"),
    "image_to_text_R@1": ("R@1 picture to text", "-"),
    "text_to_image_R@1": ("R@1 text to picture", "--"),
}
"""Figure of ``validation.jsonl`` to its name and the dash of its line."""


def curves_of(runs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Charts of what ``metrics.jsonl`` and ``validation.jsonl`` of the runs hold, as inline SVG and as numbers.

    The axis counts samples seen where every run says how many a step takes, and steps otherwise.

    Raises:
        UserError: a file is there and cannot be read.
    """
    settings = {method: settings_of(run) for method, run in runs.items()}
    batches = {method: found.get("global_batch_size") for method, found in settings.items()}
    by_samples = all(isinstance(size, int) and size > 0 for size in batches.values())
    unit = "samples" if by_samples else "steps"

    def curve(method: str, lines: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
        kept = [line for line in lines if isinstance(line.get(key), (int, float)) and "step" in line]
        each = batches[method] if by_samples else 1
        return ([line["step"] * each for line in kept], [line[key] for line in kept]) if len(kept) > 1 else None

    logged = {method: _lines_of(storage.join(run, "metrics.jsonl")) for method, run in runs.items()}
    validated = {method: _lines_of(storage.join(run, "validation.jsonl")) for method, run in runs.items()}
    losses = {(m, "loss"): one for m, lines in logged.items() if (one := curve(m, lines, "loss"))}
    charts = []
    if losses:
        svg = _svg("loss", losses, unit, _guessing(list(batches.values())))
        charts.append({"title": "Loss", "kind": "loss", "unit": unit, "svg": svg, "ends": _ends(losses)})
    for kind, title, keys in (
        ("miou", "Overlap with the truth while training", ("miou",)),
        ("recall", "Retrieval while training", ("image_to_text_R@1", "text_to_image_R@1")),
    ):
        shares = {(m, key): one for m, lines in validated.items() for key in keys if (one := curve(m, lines, key))}
        if shares:
            figures = {name: (places, [100 * value for value in values]) for name, (places, values) in shares.items()}
            svg = _svg("per cent", figures, unit)
            charts.append({"title": title, "kind": kind, "unit": unit, "svg": svg, "ends": _ends(figures)})
    return charts


def facts_of(runs: Mapping[str, str]) -> list[tuple[str, str]]:
    """What the first run was, in a reader's words."""
    settings = settings_of(next(iter(runs.values()))) if runs else {}
    facts = []
    steps, batch = settings.get("steps"), settings.get("global_batch_size")
    if isinstance(steps, int) and isinstance(batch, int):
        facts.append(("Training", f"{steps:,} steps of {batch:,} pairs, seed {settings.get('seed')}"))
    for key, name in (("vision", "Vision tower"), ("text", "Text tower")):
        if isinstance(tower := settings.get(key), dict):
            facts.append((name, f"{tower.get('model')} ({tower.get('source')}), frozen"))
    if isinstance(engine := settings.get("engine"), dict):
        ranks = (settings.get("distributed") or {}).get("ranks")
        facts.append(("Engine", f"DeepSpeed ZeRO {engine.get('zero_stage')}, {engine.get('precision')}, {ranks} ranks"))
    return facts


def preparation_of(account: Any) -> dict[str, Any]:
    """How the data came about, from the account of its preparation.

    Raises:
        UserError: it has another form.
    """
    try:
        expected, got = int(account["expected"]), int(account["got"])
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"preparation: this is no report of a data preparation ({type(error).__name__}: {error}); it is the "
            "report.json that data_prep/download.py writes"
        ) from error


def settings_of(run: str) -> dict[str, Any]:
    """The ``config.yaml`` of a run, wherever it lies; empty where there is none.

    Raises:
        UserError: it is there and is no YAML of keys.
    """
    url = storage.join(run, "config.yaml")
    if not storage.exists(url):
        return {}
    try:
        found = yaml.safe_load(storage.read_bytes(url)) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{url} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"{url} is no configuration of a run")
    return found


def _lines_of(url: str) -> list[dict[str, Any]]:
    if not storage.exists(url):
        return []
    lines = parse_metrics(storage.read_bytes(url).decode("utf-8", "replace"))
    return [line for line in lines if isinstance(line, dict)]


def _ends(curves: Mapping[tuple[str, str], Curve]) -> list[dict[str, Any]]:
    return [
        {
            "name": name_of(method) + (f", {SHOWN[key][0]}" if key in SHOWN else ""),
            "method": method,
            "dashed": SHOWN.get(key, ("", "-"))[1] == "--",
            "first": values[0],
            "last": values[-1],
            "places": int(places[-1]),
        }
        for (method, key), (places, values) in curves.items()
    ]


def _guessing(sizes: Sequence[Any]) -> float | None:
    """Loss of a model that knows nothing: the logarithm of the global batch size, if the runs agree on it."""
    size = sizes[0] if len(set(sizes)) == 1 else None
    return math.log(size) if isinstance(size, int) and size > 0 else None


def _svg(label: str, curves: Mapping[tuple[str, str], Curve], unit: str, guessing: float | None = None) -> Markup:
    # Imported here: it takes a second that pages without a curve need not spend.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # Every ink is a marker colour that the page's own style then replaces, so that the curve follows light and dark.
    inks = {"#010101": "var(--ink-soft)", "#020202": "var(--rule)"}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 11}):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.subplots()
        methods = list(dict.fromkeys(method for method, _ in curves))
        for (method, key), (places, values) in curves.items():
            ink = f"#0303{16 + methods.index(method):02x}"
            # Only what names a colour of the page may stand in its markup.
            tone = f"--method-{method}" if method.replace("_", "").isalnum() and method.isascii() else "--method-other"
            inks[ink] = f"var({tone}, var(--method-other))"
            if key == "loss":
                axes.plot(places, values, color=ink, linewidth=0.8, alpha=0.35)
                axes.plot(places, _smoothed(values), color=ink, linewidth=2.2)
            else:
                axes.plot(places, values, color=ink, linewidth=2.0, linestyle=SHOWN[key][1], marker="o", markersize=3.5)
        if guessing is not None:
            axes.axhline(guessing, color="#010101", linewidth=1, linestyle=(0, (4, 4)))
            axes.annotate(
                "guessing", (1, guessing), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#010101"
            )
        axes.set_xlabel(f"{unit} seen" if unit == "samples" else unit, color="#010101")
        axes.set_ylabel(label, color="#010101")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: short(place)))
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
    # The curve is described in the caption and the list below it; a screen reader need not spell the axes.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))


def short(count: float) -> str:
    """A number of samples as an axis says it: 1.5k, 30M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Mean over a window of about a twentieth of the curve, narrower at its ends."""
    reach = max(1, len(losses) // 40)
    return np.array([np.mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))])
