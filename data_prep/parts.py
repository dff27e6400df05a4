"""A list cut into parts that different jobs take, so that a cluster can download one data set."""

import re
from dataclasses import dataclass
from math import gcd

from data_prep import layout
from pacl_scale import storage

NOTE = re.compile(r"verified-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True)
class Part:
    """Every ``of``-th shard, from shard ``number`` on; part 0 of 1 is the whole list.

    Interleaved, not in blocks: the shards of a retry, which come last, are then shared out too.
    """

    number: int = 0
    of: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing beside this part."""
        return self.of == 1

    def shards(self, count: int) -> range:
        """The part's own among ``count`` shards."""
        return range(self.number, count, self.of)

    def overlaps(self, other: "Part") -> bool:
        """Whether a shard can belong to both (the Chinese remainder theorem)."""
        return (self.number - other.number) % gcd(self.of, other.of) == 0

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


WHOLE = Part()


def note_verified(root_url: str, part: Part, verified: dict[str, str]) -> None:
    """Write down which tars a part has read to their end, with their checksums, for the run that ends the data set."""
    layout.write_json(_note_url(root_url, f"verified-{part.number:05d}-of-{part.of:05d}.json"), verified)


def read_verified(root_url: str) -> dict[str, str]:
    """Checksums of all tars that were read to their end, by name: from the report, and from runs after it."""
    report = layout.read_json(storage.join(root_url, layout.REPORT)) or {}
    verified: dict[str, str] = dict(report.get("verified", {}))
    for name in _notes(root_url):
        verified |= layout.read_json(_note_url(root_url, name)) or {}
    return verified


def remove_notes(root_url: str) -> None:
    """Delete what :func:`note_verified` wrote, once the report says the same."""
    for name in _notes(root_url):
        layout.remove(_note_url(root_url, name))


def _notes(root_url: str) -> list[str]:
    names = layout.file_sizes(storage.join(root_url, layout.LIST_FOLDER), ".json")
    return [name for name in names if NOTE.fullmatch(name)]


def _note_url(root_url: str, name: str) -> str:
    return storage.join(root_url, layout.LIST_FOLDER, name)
