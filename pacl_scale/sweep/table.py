"""The sweep on the terminal: one live table, or a line at each change where there is no terminal."""

import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pacl_scale.log import get_logger

if TYPE_CHECKING:
    from pacl_scale.sweep.runner import Runner

STATES = ("done", "running", "queued", "failed")
STYLES = {"done": "green", "running": "cyan", "queued": "dim", "failed": "red"}
SHOWN_FAILURES = 8
log = get_logger("pacl_scale.sweep")


class Display:
    """Shows a sweep for the length of a ``with`` block."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False, transient=False)
        self._started = time.monotonic()
        self._said: Counter[str] = Counter()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def show(self, runner: "Runner") -> None:
        """How every cell fares now."""
        states = {name: state_of(runner, name) for name in runner.cells}
        if self.console.is_terminal:
            self._live.update(self._drawn(runner, states), refresh=True)
            return
        counts = Counter(states.values())
        if counts != self._said:
            self._said = counts
            log.info("sweep", **{state: counts[state] for state in STATES})

    def _drawn(self, runner: "Runner", states: dict[str, str]) -> Group:
        groups: dict[str, Counter[str]] = {}
        for name, state in states.items():
            groups.setdefault(group_of(runner.cells[name].labels), Counter())[state] += 1
        table = Table(title=f"sweep {self.title}, {time.monotonic() - self._started:.0f} s, {len(runner.jobs)} jobs")
        table.add_column("cells")
        for state in STATES:
            table.add_column(state, justify="right", style=STYLES[state])
        for group, counts in groups.items():
            table.add_row(group, *(str(counts[state] or "") for state in STATES))
        if len(groups) > 1:
            totals = Counter(states.values())
            table.add_section()
            table.add_row("all", *(str(totals[state]) for state in STATES))
        failed = [name for name, state in states.items() if state == "failed"]
        lines = [Text(f"{name}: {why_of(runner, name)}", style="red") for name in failed[:SHOWN_FAILURES]]
        if len(failed) > SHOWN_FAILURES:
            lines.append(Text(f"and {len(failed) - SHOWN_FAILURES} more", style="red"))
        return Group(table, *lines)


def state_of(runner: "Runner", name: str) -> str:
    """One of :data:`STATES`."""
    if name in runner.done:
        return "done"
    last = runner.entries[name].last
    if last and last.outcome == "running":
        return "running"
    if last and last.call == runner.call and not runner.may_try(name):
        return "failed"
    return "queued"


def why_of(runner: "Runner", name: str) -> str:
    """Why a cell failed, in its own words."""
    last = runner.entries[name].last
    return last.why if last else ""


def group_of(labels: dict) -> str:
    """The line of the table that a cell is counted in."""
    if "data_set" not in labels:
        return "trainings"
    return f"{labels['checkpoint']} step {labels['step']}, {labels['protocol']}"
