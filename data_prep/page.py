"""The report as one HTML page that needs nothing beside itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep import layout, sources
from data_prep.causes import CAUSES
from data_prep.report import Report
from pacl_scale.pages import templates

TEMPLATE = "data_report.html.j2"

MOST_SHOWN = 30
"""Domains and hosts on the page; the JSON has more of them."""

STATUS_MEANINGS = {
    "http_403": "forbidden",
    "http_404": "not found",
    "http_410": "gone for good",
    "http_429": "too many requests",
    "http_500": "the server failed",
    "http_503": "the server is busy",
}


def write_page(url: str, report: Report) -> None:
    """Write the page to ``url``; a reader sees the old one or the new one."""
    layout.write_bytes(url, as_page(report).encode())


def as_page(report: Report) -> str:
    """The page's HTML."""
    environment = templates(html=True)
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = _percent
    environment.filters["size"] = _size
    environment.filters["duration"] = _duration
    survey = report.survey
    bins = {
        "Shorter side of the pictures as downloaded, in pixels": _bins(survey.get("shorter_side", {})),
        "Width over height": _bins(survey.get("aspect", {})),
        "Length of captions, in characters": _bins(survey.get("caption_length", {})),
    }
    return environment.get_template(TEMPLATE).render(
        report=report,
        source=sources.SOURCES.get(report.source),
        most=MOST_SHOWN,
        survey=survey,
        fates=_fates(report),
        causes=[{"cause": c, "rows": n, "means": _meaning(c)} for c, n in report.failures.items()],
        histograms={title: lines for title, lines in bins.items() if any(line["value"] for line in lines)},
    )


def _fates(report: Report) -> list[dict[str, Any]]:
    """Where the rows of the list went, each with its share of the list."""
    fates = [("samples", report.got), ("failed", sum(report.failures.values())), ("not asked yet", report.pending)]
    fates += [(f"left out: {cause}", rows) for cause, rows in report.left_out.items()]
    return [{"name": name, "value": rows, "share": _share(rows, report.list_rows)} for name, rows in fates if rows]


def _bins(histogram: Mapping[str, Any]) -> list[dict[str, Any]]:
    counts: Sequence[int] = histogram.get("counts", ())
    bounds: Sequence[float] = histogram.get("bounds", ())
    names = [f"below {bounds[0]:g}"] if bounds else []
    names += [f"{low:g} to {high:g}" for low, high in zip(bounds, bounds[1:], strict=False)]
    names += [f"{bounds[-1]:g} or more"] if bounds else []
    largest = max(counts, default=0)
    return [
        {"name": name, "value": count, "share": _share(count, largest)}
        for name, count in zip(names, counts, strict=True)
    ]


def _meaning(cause: str) -> str:
    if cause.startswith("http_"):
        return STATUS_MEANINGS.get(cause, f"the server answered with status {cause.removeprefix('http_')}")
    return CAUSES.get(cause, "")


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
