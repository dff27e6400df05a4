"""The page as a whole: rows, curves and pictures put into the template; and the command that writes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pacl_scale import config, storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate.methods import PACL
from pacl_scale.evaluate.rows import Row, read_rows
from pacl_scale.pages import templates
from pacl_scale.report import scores
from pacl_scale.report.training import curves_of, facts_of, preparation_of
from pacl_scale.report.wording import MEANINGS, ORDER, PEEKING, bars, duration, name_of, percent

PROG = "python -m pacl_scale.report"

TITLE = "What a PACL run learned"
INTRODUCTION = (
    "PACL learns which parts of a picture a word describes from pictures and their captions alone; it is never shown "
    "an outline. This page shows one training run: below, words were looked for in pictures that the model had "
    "never seen."
)


@dataclass
class ReportConfig:
    """One self-contained HTML page of a run."""

    runs: dict[str, str] = field(default_factory=dict)
    """Method to run directory, for the training curves; not given, RUN itself as `pacl`."""

    preparation: str | None = None
    """The `report.json` of the training data's preparation, a path or URL."""

    output: str | None = None
    """HTML file to write; not given, `report.html` in RUN."""

    def __post_init__(self) -> None:
        for name in self.runs:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"runs: {name!r}: names of methods hold letters, digits, '_' and '.' only")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0 or raises :class:`pacl_scale.errors.UserError`."""
    positionals: list[tuple[str, dict[str, Any]]] = [("run", {"help": "Run directory with evals/."})]
    settings, given = config.parse(ReportConfig, argv, PROG, positionals)
    run = given["run"]
    preparation = None
    if settings.preparation:
        try:
            preparation = json.loads(storage.read_bytes(settings.preparation))
        except ValueError as error:
            raise UserError(f"{settings.preparation} is not JSON ({error})") from error
    print(
        write_report(
            settings.output or storage.join(run, "report.html"),
            evaluated=run,
            runs=settings.runs or {PACL: run},
            preparation=preparation,
        )
    )
    return 0


def meanings_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What each method on the page is, in reading order."""
    there = {row.method for row in rows}
    return [(name_of(method), MEANINGS[method]) for method in [*ORDER, *PEEKING] if method in there]


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
        runs: method to run directory (a path or URL); their ``metrics.jsonl`` and ``validation.jsonl`` become the
            curves, those without one are left out.
        preparation: the account of the data's preparation: ``expected``, ``got``, ``failures`` by cause, and, if
            there, ``list_rows``, ``left_out`` by cause, ``shards``, ``bytes``, ``samples``.
        seconds: stage to seconds, in the order in which they ran.
        title: heading of the page.
        introduction: what is below it.

    Raises:
        UserError: there are no rows to report on, or a file of the run is damaged.
    """
    rows = read_rows(evaluated)
    if not rows:
        raise UserError(f"{evaluated} has no evaluation yet; run python -m pacl_scale.evaluate first")
    environment = templates(html=True)
    environment.filters |= {"percent": percent, "duration": duration, "number": lambda value: f"{value:,}"}
    segmentation = scores.tables(rows, "segmentation")
    page = environment.get_template("report.html.j2").render(
        title=title,
        introduction=introduction,
        meanings=meanings_of(rows),
        segmentation=[scores.segmentation(evaluated, found) for found in segmentation],
        classification=[scores.classification(found) for found in scores.tables(rows, "classification")],
        retrieval=[scores.retrieval(found) for found in scores.tables(rows, "retrieval")],
        tiles=scores.tiles(segmentation[0]) if segmentation else [],
        curves=curves_of(runs),
        facts=facts_of(runs),
        preparation=preparation_of(preparation) if preparation else None,
        stages=bars(seconds or {}),
        total_seconds=sum((seconds or {}).values()),
    )
    storage.write_bytes(output, page.encode())
    return output
