"""How well every picture fits every text, on disk: too much for memory, and what an interruption must not lose.

``<part>of<parts>-<method>.f32`` holds a line of N float32 for each picture of the part, in the order of the pictures:
2.5 GB for five methods on COCO's 5,000 pictures and 25,000 captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# I pictures, N texts.

TYPE = np.dtype("<f4")


@dataclass(frozen=True)
class Compared:
    """The compatibilities of one process's pictures, and those that the others have written."""

    folder: Path
    methods: Sequence[str]
    pictures: int
    texts: int
    part: int = 0
    parts: int = 1

    def remaining(self) -> list[int]:
        """Numbers of this part's pictures that are not compared yet.

        A line that an interruption cut off is removed, and so is one that another method lacks.
        """
        own = self._numbers(self.part)
        done = min((self._lines(self.part, method) for method in self.methods), default=len(own))
        for method in self.methods:
            if (file := self._file(self.part, method)).exists():
                with file.open("r+b") as opened:
                    opened.truncate(done * self.texts * TYPE.itemsize)
        return own[done:]

    def add(self, phi_BN: Mapping[str, Tensor]) -> None:
        """The next pictures are compared, by method; their lines are on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for method in self.methods:
            with self._file(self.part, method).open("ab") as file:
                file.write(phi_BN[method].cpu().numpy().astype(TYPE).tobytes())

    def is_whole(self) -> bool:
        """Whether every part has compared all its pictures."""
        return all(
            self._lines(part, method) == len(self._numbers(part))
            for part in range(self.parts)
            for method in self.methods
        )

    def of_pictures(self, method: str, start: int, stop: int) -> Tensor:
        """Pictures ``start`` to ``stop`` with all texts: (stop - start, N) float32."""
        found = np.empty((stop - start, self.texts), TYPE)
        for part, lines in self._opened(method):
            numbers = np.array(self._numbers(part))
            first, last = np.searchsorted(numbers, [start, stop])
            found[numbers[first:last] - start] = lines[first:last]
        return torch.from_numpy(found)

    def of_texts(self, method: str, start: int, stop: int) -> Tensor:
        """All pictures with texts ``start`` to ``stop``: (I, stop - start) float32."""
        found = np.empty((self.pictures, stop - start), TYPE)
        for part, lines in self._opened(method):
            found[self._numbers(part)] = lines[:, start:stop]
        return torch.from_numpy(found)

    def _opened(self, method: str) -> list[tuple[int, np.ndarray]]:
        return [
            (part, np.memmap(self._file(part, method), TYPE, "r", shape=(len(self._numbers(part)), self.texts)))
            for part in range(self.parts)
            if self._numbers(part)
        ]

    def _numbers(self, part: int) -> list[int]:
        return list(range(part, self.pictures, self.parts))

    def _lines(self, part: int, method: str) -> int:
        try:
            return self._file(part, method).stat().st_size // (self.texts * TYPE.itemsize)
        except FileNotFoundError:
            return 0

    def _file(self, part: int, method: str) -> Path:
        return self.folder / f"{part}of{self.parts}-{method}.f32"
