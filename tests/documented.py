"""What README and the documentation tell people to type: every shell command, snippet and patch in them."""

import importlib
import os
import re
import shlex
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import started_quickly

from pacl_scale.errors import run_command

ROOT = Path(__file__).resolve().parents[1]

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pacl_scale").rglob("*.md")])

LANGUAGES = ("sh", "python", "yaml", "diff", "text")
"""What a block may be; all but the last are checked."""

PROGRAMS = re.compile(r"(\.venv/bin/)?(python3?|pip|pacl-scale|make|sbatch|srun|pytest|git|torchrun|pre-commit) \S")
"""How code within a line begins, if it is a command."""

COMMENT = re.compile(r"(^|\s+)# .*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str


def blocks() -> list[Block]:
    """All fenced blocks of all pages, in order."""
    return [block for page in PAGES for block in _blocks(page)]


def commands() -> dict[str, str]:
    """Shell commands on one line each, comments gone -> where each stands first."""
    found: dict[str, str] = {}
    for block in blocks():
        if block.language == "sh":
            for command in _commands(block.text):
                found.setdefault(_plain(command), f"{block.page}:{block.line}")
    for page in PAGES:
        for number, line in enumerate(_outside_of_blocks(page), start=1):
            for code in re.findall(r"`([^`]+)`", line):
                # Dots stand for words that the reader knows already.
                if PROGRAMS.match(code) and "..." not in code:
                    found.setdefault(_plain(code), f"{_name(page)}:{number}")
    return found


def _plain(command: str) -> str:
    """Whose Python it is is the reader's business."""
    return re.sub(r"^\.venv/bin/python ", "python ", command)


def _commands(text: str) -> Iterator[str]:
    whole = ""
    for line in text.splitlines():
        line = COMMENT.sub("", line).strip()
        whole += line.removesuffix("\\").rstrip() + " "
        if line and not line.endswith("\\"):
            yield whole.strip()
            whole = ""


def _blocks(page: Path) -> Iterator[Block]:
    opened, kept = None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            kept.append(line)
        elif opened is None:
            opened, kept = (number, line.removeprefix("```")), []
        else:
            yield Block(_name(page), *opened, "\n".join(kept) + "\n")
            opened = None


def _outside_of_blocks(page: Path) -> Iterator[str]:
    """Its lines, empty where a block is."""
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside ^= line.startswith("```")
        yield "" if inside or line.startswith("```") else line


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Step:
    """A documented command as a test runs it."""

    command: str
    more: tuple[str, ...] = ()
    """Words after it, that make it small."""
    instead: tuple[tuple[str, str], ...] = ()
    """Parts of it and what stands for them here, such as an address."""
    copies: tuple[tuple[str, str], ...] = ()
    """Folders to copy before it runs."""
    status: int = 0

    @property
    def words(self) -> list[str]:
        """The words to run."""
        command = self.command
        for part, stand_in in self.instead:
            assert part in command, f"{part!r} is not in {command!r}"
            command = command.replace(part, stand_in)
        return [*shlex.split(command), *self.more]


def entry(words: Sequence[str]) -> tuple[Callable[[Sequence[str]], int | None], list[str]]:
    """The function that ``python -m pacl_scale.x ...`` or ``python data_prep/x.py ...`` calls, and its words."""
    assert words[0] == "python", words
    if words[1] == "-m":
        return importlib.import_module(words[2]).main, list(words[3:])
    return importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main, list(words[2:])


def run(words: Sequence[str]) -> int:
    """Run a command in this process; returns its exit status."""
    main, rest = entry(words)
    return run_command(lambda: main(rest))


def run_alone(step: Step, folder: Path) -> None:
    """Run ``step`` in ``folder``, in a process of its own that need not import anything; raises where it fails."""
    for source, target in step.copies:
        shutil.copytree(folder / source, folder / target)
    context = started_quickly()
    outcome = context.SimpleQueue()
    process = context.Process(target=_run_there, args=(step.words, folder, dict(os.environ), outcome))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    found = "a process that ended without a word" if outcome.empty() else outcome.get()
    assert found == step.status, f"{step.command} ended with {found}"


def _run_there(words: list[str], folder: Path, environment: dict[str, str], outcome: Any) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    try:
        outcome.put(run(words))
    except BaseException:
        outcome.put(traceback.format_exc())


def checkout(folder: Path) -> Path:
    """``folder`` with what commands find beside them in a checkout."""
    for name in ("configs", "data_prep", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def unfenced() -> list[str]:
    """Lines of code that stand in no fence but are indented, as ``page:line``."""
    found = []
    for page in PAGES:
        paragraph, before = "", ""
        for number, line in enumerate(_outside_of_blocks(page), start=1):
            if line and not line.startswith(" "):
                paragraph = line
            # Below a list's item such a line goes on with it.
            elif line.startswith("    ") and not before and not re.match(r"([-*]|\d+\.) ", paragraph):
                found.append(f"{_name(page)}:{number}")
            before = line
    return found
