"""What is known of a cell, in its folder: ``cell.json`` says what it is and how each attempt at it went.

Written by the one process that works on the cell, read by everybody else: the table, the next call, the next attempt.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pacl_scale.errors import UserError

FILE = "cell.json"
KEPT_ATTEMPTS = 50

Outcome = Literal["running", "done", "failed", "refused", "timeout", "stopped", "lost"]
"""running; done; failed: it crashed; refused: a mistake in its settings or data, said in a sentence; timeout: it ran
over its limit; stopped: its job was asked to stop; lost: its job ended without a word about it."""

FAILURES = ("failed", "refused", "timeout")


@dataclass
class Attempt:
    """One time that a cell was worked on."""

    call: str
    """The call of the sweep that it belongs to."""
    job: str
    node: str
    started: float
    outcome: Outcome = "running"
    why: str = ""
    seconds: float = 0.0


@dataclass
class Entry:
    """What ``cell.json`` holds."""

    cell: str
    hash: str
    """Of everything that the result depends on."""
    labels: dict[str, Any] = field(default_factory=dict)
    """What the cell is, for tables."""
    command: str = ""
    """The same by hand."""
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    def count(self, call: str, outcomes: Sequence[str]) -> int:
        """Attempts of a call that ended so."""
        return sum(one.call == call and one.outcome in outcomes for one in self.attempts)


def read(folder: Path) -> Entry | None:
    """The entry of a cell's folder; ``None`` where nothing was written yet.

    Raises:
        UserError: it is not one of ours.
    """
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        attempts = [Attempt(**one) for one in values.pop("attempts")]
        return Entry(**values, attempts=attempts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / FILE} cannot be read; delete its folder, and the cell is done again") from error


def write(folder: Path, entry: Entry) -> None:
    """Replace the entry of a cell's folder."""
    entry.attempts = entry.attempts[-KEPT_ATTEMPTS:]
    write_json(folder / FILE, asdict(entry))


def begin(folder: Path, call: str, job: str, node: str) -> Entry:
    """Note that a cell is being worked on; an attempt that never ended was lost with its job."""
    entry = read(folder)
    if entry is None:
        raise UserError(f"{folder / FILE} is gone; start the sweep again")
    if entry.last and entry.last.outcome == "running":
        end(folder, entry, "lost", f"job {entry.last.job} ended while it ran on {entry.last.node}")
    entry.attempts.append(Attempt(call, job, node, time.time()))
    write(folder, entry)
    return entry


def end(folder: Path, entry: Entry, outcome: Outcome, why: str = "") -> None:
    """Note how the newest attempt ended."""
    attempt = entry.attempts[-1]
    attempt.outcome, attempt.why, attempt.seconds = outcome, why, round(time.time() - attempt.started, 3)
    write(folder, entry)


def write_json(file: Path, values: Any) -> None:
    """Replace a file by plain values, so that a reader sees the old or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    partial.replace(file)
