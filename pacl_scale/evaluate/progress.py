"""Counts of finished pictures on disk: an interrupted evaluation goes on, several processes share one data set.

``<run>/evals/progress/<key>/<part>of<parts>.jsonl`` gets one line a picture, as soon as it is counted. The key stands
for everything the counts depend on, so that other settings never find them.

Two parts that end at the same moment on a shared file system may each see the other as unfinished, and then nobody
writes rows: running any part again finds everything counted and writes them.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.evaluate.rows import FOLDER
from pacl_scale.evaluate.tallies import PictureCounts

Counts = dict[str, Any]
"""Method to its counts of one picture: :class:`PictureCounts`, or what another task counts."""


def folder_for(output: str, depends_on: Any, parts: int) -> Path | None:
    """Where is remembered what was counted under ``depends_on`` (plain values); None below a URL.

    Raises:
        UserError: several parts with an output that is no folder.
    """
    if not storage.is_local(output):
        if parts > 1:
            raise UserError("parts need an output that is a folder all of them see, not a URL")
        return None
    key = hashlib.blake2b(json.dumps(depends_on, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(output.removeprefix("file://")) / FOLDER / "progress" / key


def forget(folder: Path) -> None:
    """Remove what was remembered: the rows are written. Another part may be doing the same."""
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Progress:
    """The counts of one process's part of a data set, and those that the others have written."""

    folder: Path | None
    """None remembers nothing on disk."""
    part: int
    parts: int
    found: dict[str, Counts] = field(default_factory=dict)
    kind: Callable[..., Any] = PictureCounts
    """The dataclass of a method's counts of one picture, of plain values."""

    @classmethod
    def forgetful(cls, kind: Callable[..., Any] = PictureCounts) -> "Progress":
        """All pictures are this process's, and nothing is written."""
        return cls(None, 0, 1, kind=kind)

    @classmethod
    def open(
        cls, output: str, depends_on: Any, part: int, parts: int, kind: Callable[..., Any] = PictureCounts
    ) -> "Progress":
        """Go on from what is there below ``output``, a run directory.

        Args:
            output: a run directory; of a URL nothing is remembered.
            depends_on: plain values that decide the counts.
            part: number of this process, from 0.
            parts: how many share the data set.
            kind: the dataclass of a method's counts of one picture.

        Raises:
            UserError: several parts with an output that is no folder.
        """
        folder = folder_for(output, depends_on, parts)
        if folder is None:
            return cls.forgetful(kind)
        progress = cls(folder, part, parts, kind=kind)
        own = progress._file(part)
        progress.found = _read(own, kind)
        if own.exists():
            # A line cut off by the interruption must not become the beginning of the next one.
            content = own.read_bytes()
            own.write_bytes(content[: content.rfind(b"\n") + 1])
        return progress

    def remaining(self, names: list[str]) -> list[int]:
        """Numbers of this part's pictures that are not counted yet."""
        return [n for n in range(self.part, len(names), self.parts) if names[n] not in self.found]

    def add(self, name: str, counts: Counts) -> None:
        """A picture is finished; its line is on disk when this returns."""
        self.found[name] = counts
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps([name, {method: dataclasses.asdict(found) for method, found in counts.items()}])
        with self._file(self.part).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def all_done(self, pictures: int) -> dict[str, Counts] | None:
        """The counts of all parts, or None while pictures of another part are missing."""
        every = dict(self.found)
        for part in range(self.parts):
            if part != self.part:
                every |= _read(self._file(part), self.kind)
        return every if len(every) == pictures else None

    def forget(self) -> None:
        """Remove what is on disk: the rows are written."""
        if self.folder is not None:
            forget(self.folder)

    def _file(self, part: int) -> Path:
        assert self.folder is not None, "only what is remembered has files"
        return self.folder / f"{part}of{self.parts}.jsonl"


def _read(path: Path, kind: Callable[..., Any]) -> dict[str, Counts]:
    """Whole lines only: the last one may have been cut off. Nothing where there is no file, or no longer one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # Another part has written the rows and forgotten the counts in this moment.
        return {}
    whole = content[: content.rfind(b"\n") + 1]
    found = {}
    for line in whole.decode().splitlines():
        name, methods = json.loads(line)
        found[name] = {method: kind(**counts) for method, counts in methods.items()}
    return found
