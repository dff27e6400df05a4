"""What a sweep found, as ``results.csv``, tables in Markdown and LaTeX with published figures beside, and plots."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pacl_scale import metrics, storage
from pacl_scale.sweep.cells import Cell
from pacl_scale.sweep.worker import Kind

PACL = "pacl"
LAST_LINES = 10
"""Lines of metrics.jsonl over which a training's final loss is averaged."""

Lines = list[dict[str, Any]]


def fold(sweep: Path, kind: Kind, cells: Mapping[str, Cell]) -> str:
    """Write all results of the sweep's finished cells below ``sweep``; returns the Markdown tables."""
    lines = trained(sweep, cells) if kind == "train" else evaluated(sweep, cells)
    if not lines:
        return "no cell is finished yet"
    write_text(sweep / "results.csv", as_csv(lines))
    blocks = training_tables(lines) if kind == "train" else evaluation_tables(lines)
    markdown = "\n\n".join(f"{title}\n\n{as_markdown(head, rows)}" for title, head, rows in blocks)
    write_text(sweep / "results.md", markdown + "\n")
    write_text(sweep / "results.tex", "\n\n".join(as_latex(*block) for block in blocks) + "\n")
    plot(sweep, kind, lines, cells)
    return f"{markdown}\n\n{sweep}/results.csv, results.md, results.tex, results.svg"


def evaluated(sweep: Path, cells: Mapping[str, Cell]) -> Lines:
    """One line a row of an evaluation: what the cell is, and its figures as shares."""
    from pacl_scale.errors import UserError
    from pacl_scale.evaluate.rows import read_rows

    lines: Lines = []
    for cell in cells.values():
        try:
            rows = read_rows(str(cell.folder(sweep)))
        except UserError:
            continue
        for row in rows:
            scores = {key: value for key, value in row.scores.items() if isinstance(value, (int, float))}
            for way in ("image_to_text", "text_to_image"):
                scores |= {f"{way} {rank}": value for rank, value in row.scores.get(way, {}).items()}
            low, high = (row.scores.get("intervals") or {}).get("miou") or (None, None)
            labels = {key: value for key, value in cell.labels.items() if key not in ("settings", "path")}
            line = labels | {"method": row.method, "settings": swept_of(cell), "layout": row.data.get("layout", "")}
            line |= scores | {"miou_low": low, "miou_high": high, "pictures": row.pictures, "seconds": row.seconds}
            lines.append(line | {"weights": cell.labels["path"], "cell": cell.name})
    return lines


def trained(sweep: Path, cells: Mapping[str, Cell]) -> Lines:
    """One line a training: its swept settings and its final loss, the mean of the last logged steps."""
    lines: Lines = []
    for cell in cells.values():
        file = cell.folder(sweep) / "run" / "metrics.jsonl"
        logged = metrics.read_metrics(file) if file.exists() else []
        if not logged or logged[-1]["step"] < cell.labels["steps"]:
            continue
        last = [line["loss"] for line in logged[-LAST_LINES:]]
        line = {key: shown(value) for key, value in cell.labels["settings"].items()}
        line |= {"loss": sum(last) / len(last), "steps": logged[-1]["step"], "samples": cell.labels["samples"]}
        lines.append(line | {"run": str(cell.folder(sweep) / "run"), "cell": cell.name})
    return lines


Block = tuple[str, list[str], list[list[str]]]
"""Title, headings, rows of a table."""


def evaluation_tables(lines: Lines) -> list[Block]:
    """mIoU in per cent, one table a protocol: methods by data sets, published figures below."""
    blocks: list[Block] = []
    segmentation = [line for line in lines if "miou" in line]
    for protocol in dict.fromkeys(line["protocol"] for line in segmentation):
        mine = [line for line in segmentation if line["protocol"] == protocol]
        data_sets = list(dict.fromkeys(line["data_set"] for line in mine))
        table: dict[str, dict[str, float]] = {}
        for line in mine:
            table.setdefault(row_name(line), {})[line["data_set"]] = line["miou"]
        rows = [[name, *(per_cent(found.get(data_set)) for data_set in data_sets)] for name, found in table.items()]
        rows += published_rows({line["data_set"]: line["layout"] for line in mine})
        blocks.append((f"mIoU in per cent, protocol {protocol}", ["method", *data_sets], rows))
    for data_set in dict.fromkeys(line["data_set"] for line in lines if "miou" not in line):
        mine = [line for line in lines if line["data_set"] == data_set]
        keys = [key for key in mine[0] if " R@" in key]
        rows = [[row_name(line), *(per_cent(line.get(key)) for key in keys)] for line in mine]
        blocks.append((f"Retrieval on {data_set}, in per cent", ["method", *keys], rows))
    return blocks


def published_rows(layouts: Mapping[str, str]) -> list[list[str]]:
    """What others published on the official data sets among these, the paper first; data set to layout."""
    from pacl_scale.evaluate.published import figures

    table: dict[str, dict[str, float]] = {}
    for data_set, layout in layouts.items():
        for figure in figures(layout):
            if figure.metric == "miou":
                table.setdefault(f"{figure.method} (published)", {})[data_set] = figure.value
    return [[name, *(per_cent(found.get(data_set)) for data_set in layouts)] for name, found in table.items()]


def training_tables(lines: Lines) -> list[Block]:
    """Trainings by their final loss, the best first."""
    ordered = sorted(lines, key=lambda line: line["loss"])
    swept = [key for key in ordered[0] if key not in ("loss", "steps", "samples", "run", "cell")]
    head = [*swept, "loss", "steps"]
    rows = [[*(str(line[key]) for key in swept), f"{line['loss']:.4f}", str(line["steps"])] for line in ordered]
    return [("Final loss", head, rows)]


def row_name(line: Mapping[str, Any]) -> str:
    """A method of a checkpoint under its swept settings."""
    name = line["checkpoint"] if line["method"] == PACL else f"{line['checkpoint']} {line['method'].replace('_', ' ')}"
    return ", ".join(part for part in (name, f"step {line['step']}", line["settings"]) if part)


def as_csv(lines: Lines) -> str:
    """All lines with all their keys as columns."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(escaped[0]), rule, *map(line, escaped[1:])])


def as_latex(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A ``tabular`` with booktabs' rules."""
    special = {character: f"\\{character}" for character in "&%$#_{}"} | {"\\": "\\textbackslash{}", "–": "--"}
    special |= {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}

    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(special.get(c, c) for c in cell) for cell in row) + " \\\\"

    body = "\n".join(map(line, rows))
    columns = "l" + "r" * (len(head) - 1)
    rules = ("\\toprule", line(head), "\\midrule", body, "\\bottomrule")
    return f"% {title}\n\\begin{{tabular}}{{{columns}}}\n" + "\n".join(rules) + "\n\\end{tabular}"


def plot(sweep: Path, kind: Kind, lines: Lines, cells: Mapping[str, Cell]) -> None:
    """mIoU (or, of trainings, loss) over pictures seen, as ``results.svg`` and ``results.png``."""
    import matplotlib.backends.backend_agg
    from matplotlib.figure import Figure

    curves = loss_curves(sweep, cells) if kind == "train" else miou_curves(lines)
    if not curves:
        return
    figure = Figure(figsize=(6.4, 3.2 * len(curves)), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    for axes, (title, found) in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves.items(), strict=True):
        for name, points in found.items():
            points.sort()
            axes.plot(*zip(*points, strict=True), marker="" if len(points) > 50 else "o", label=name)
        axes.set(title=title, xlabel="pictures seen", ylabel="loss" if kind == "train" else "mIoU in per cent")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for suffix in ("svg", "png"):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, dpi=150)
        storage.write_bytes(str(sweep / f"results.{suffix}"), content.getvalue())


Curves = dict[str, dict[str, list[tuple[float, float]]]]
"""Title of a plot to its lines by name."""


def miou_curves(lines: Lines) -> Curves:
    """One plot a data set; a line for each checkpoint's name, protocol and settings."""
    curves: Curves = {}
    for line in lines:
        if line["method"] == PACL and line.get("miou") is not None:
            name = ", ".join(part for part in (line["checkpoint"], line["protocol"], line["settings"]) if part)
            point = (line["samples"], 100 * line["miou"])
            curves.setdefault(line["data_set"], {}).setdefault(name, []).append(point)
    return curves


def loss_curves(sweep: Path, cells: Mapping[str, Cell]) -> Curves:
    """One plot; a line a training, unfinished ones too."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells.values():
        file = cell.folder(sweep) / "run" / "metrics.jsonl"
        if file.exists() and (logged := metrics.read_metrics(file)):
            batch = cell.labels["samples"] / cell.labels["steps"]
            found[swept_of(cell) or cell.name] = [(line["step"] * batch, line["loss"]) for line in logged]
    return {"trainings": found} if found else {}


def per_cent(share: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f}"


def swept_of(cell: Cell) -> str:
    """A cell's swept settings, as a reader writes them."""
    return ", ".join(f"{key}={shown(value)}" for key, value in cell.labels["settings"].items())


def shown(value: Any) -> str:
    """A setting as a reader writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def write_text(file: Path, text: str) -> None:
    """Replace a file."""
    storage.write_bytes(str(file), text.encode())
