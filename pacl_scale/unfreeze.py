"""Training more than the paper does: the last blocks of the vision tower, and an embedder of text vectors.

Off by default. PACL keeps both towers and the text side frozen; whoever has the data and the memory to go further
finds the two usual ways here. Both are parts of the one trainable module, so checkpoints, ZeRO and exact accumulation
treat them as they treat the embedder.

n texts, D channels of a text vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacl_scale.encoders import TextEncoder, VisionEncoder
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.encoders.weights import load_strictly

TAIL, TEXT_EMBEDDER = "tail.", "text_embedder."
"""What the names of their weights begin with in checkpoints."""


@dataclass
class UnfreezeConfig:
    """What else is trained than the vision embedder; the paper trains nothing else."""

    vision_blocks: int = 0
    """The last so many blocks of the vision tower, and the norm after them. Needs pictures, not cached tokens; what
    enters the first of them is kept for the whole step."""

    text_embedder: bool = False
    """A residual block on the text vectors, which starts as the identity. The text tower itself stays frozen."""

    text_hidden: int | None = None
    """Channels between that block's two linear layers; null is as many as a text vector has."""

    tower_lr_share: float = 0.1
    """Learning rate of the tower's blocks as a share of `optim.lr`: trained weights need smaller steps."""

    def __post_init__(self) -> None:
        if self.vision_blocks < 0:
            raise ValueError("unfreeze.vision_blocks cannot be negative")
        if self.text_hidden is not None and self.text_hidden < 1:
            raise ValueError("unfreeze.text_hidden must be at least 1, or null")
        if not 0 < self.tower_lr_share <= 1:
            raise ValueError("unfreeze.tower_lr_share must lie above 0 and not above 1")

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return bool(self.vision_blocks or self.text_embedder)

    def hidden(self, width: int) -> int | None:
        """Channels between the layers of the embedder of text vectors of ``width``, if there is to be one."""
        return (self.text_hidden or width) if self.text_embedder else None


class TextEmbedder(nn.Module):
    """x + Linear-ReLU-Linear of x / |x|, (n, D) -> (n, D); the identity (but for length) until it is trained.

    Args:
        width: D.
        hidden: channels in between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, texts_nD: Tensor) -> Tensor:
        """Embed text vectors of any float type; float32, not normalised."""
        units_nD = F.normalize(texts_nD.float(), dim=-1)
        change_nD = self.linear2(F.relu(self.linear1(units_nD.to(self.linear1.weight.dtype))))
        return units_nD + change_nD.float()


def build_text_embedder(config: UnfreezeConfig, width: int) -> TextEmbedder | None:
    """The embedder of text vectors of ``width`` channels, if there is to be one."""
    hidden = config.hidden(width)
    return TextEmbedder(width, hidden) if hidden else None


class EmbeddedText:
    """A :class:`~pacl_scale.encoders.TextEncoder` whose vectors have gone through a trained text embedder."""

    def __init__(self, text: TextEncoder, embedder: TextEmbedder) -> None:
        self.width, self.module, self.batch_size = text.width, text.module, text.batch_size
        self._text, self._embedder = text, embedder

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`pacl_scale.encoders.TextEncoder.encode`."""
        return self._embedder(self._text.encode(texts))

    def fingerprint(self) -> dict[str, Any]:
        """The tower's own."""
        return self._text.fingerprint()


def trained_towers(
    config: UnfreezeConfig,
    vision: VisionEncoder,
    text: TextEncoder,
    weights: Mapping[str, Tensor],
    origin: str,
    device: torch.device,
) -> tuple[VisionEncoder, TextEncoder]:
    """Both towers with what was trained of them; those that came in stay as they are.

    Args:
        config: what was trained.
        vision: built with ``config.vision_blocks``.
        text: the frozen tower.
        weights: of a checkpoint, by parameter name.
        origin: what a message calls it.
        device: where the text embedder goes.

    Raises:
        UserError: the weights are those of another architecture.
    """
    if config.vision_blocks:
        assert isinstance(vision, FrozenViT)
        vision = vision.with_trained_tail(named(weights, TAIL), origin)
    if embedder := build_text_embedder(config, text.width):
        load_strictly(embedder, named(weights, TEXT_EMBEDDER), origin)
        text = EmbeddedText(text, embedder.requires_grad_(False).eval().to(device))
    return vision, text


def named(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of ``weights`` whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
