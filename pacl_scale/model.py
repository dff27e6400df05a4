"""The trainable part of PACL: the vision embedder, if learned the temperature, and what else is unfrozen.

Shapes: B pictures, P prefix tokens, T patches of which n take part, Din width of the vision tower's tokens, N texts, D
width of the text vectors.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pacl_scale import checkpoint
from pacl_scale.embedder import EmbedderConfig, PatchEmbedder
from pacl_scale.encoders.tail import VisionTail
from pacl_scale.errors import UserError
from pacl_scale.loss import LogitScale, LossConfig
from pacl_scale.unfreeze import TAIL, TextEmbedder, UnfreezeConfig, named

EMBEDDER = "embedder."
"""What the names of the vision embedder's weights begin with in checkpoints."""


class PACLModel(nn.Module):
    """Everything that is trained as one module, so that one engine wraps every trainable number."""

    def __init__(
        self,
        embedder: PatchEmbedder,
        loss: LossConfig,
        tail: VisionTail | None = None,
        text_embedder: TextEmbedder | None = None,
        tail_lr_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedder = embedder
        # LogitScale is the loss room's; only its place in the trainable module is decided here.
        self.logit_scale = LogitScale(loss)
        self.tail = tail
        self.text_embedder = text_embedder
        self.lr_shares = {TAIL: tail_lr_share}
        """Beginning of a parameter's name to its share of the learning rate."""

    def forward(
        self, tokens: Tensor, chosen: Tensor | None = None, texts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the similarity is made of.

        Args:
            tokens: (B, T, Din) patch tokens; with a tail (B, P + T, Din), what enters it.
            chosen: (B, n) int64, which patches take part; None if all in ``tokens`` do.
            texts: (N, D) vectors to embed, if texts are embedded.

        Returns:
            Embedded patches (B, n, D); the logit scale, zero-dimensional; embedded texts (N, D), or None. The scale is
            returned, instead of being read off the parameter outside, so that ZeRO 3 can shard it.
        """
        tokens = tokens.to(self.embedder.skip.weight.dtype)
        if self.tail is not None:
            tokens = self.tail(tokens)
        if chosen is not None:
            tokens = torch.take_along_dim(tokens, chosen[:, :, None], dim=1)
        return self.embedder(tokens), self.logit_scale(), self.embed_texts(texts)

    def embed_texts(self, texts: Tensor | None) -> Tensor | None:
        """Embedded texts (N, D); None where texts stay as they are."""
        return None if self.text_embedder is None or texts is None else self.text_embedder(texts)

    def smallest_input(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Zeros that pass every weight: arguments of :meth:`forward`."""
        tokens = torch.zeros(1, 1 + (self.tail.prefix if self.tail else 0), self.width_in, device=device)
        texts = None
        if self.text_embedder is not None:
            texts = torch.zeros(1, self.text_embedder.linear1.in_features, device=device)
        return tokens, None, texts

    @property
    def width_in(self) -> int:
        """Din; with a tail, of what enters it."""
        return self.tail.width if self.tail is not None else self.embedder.linear1.in_features


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's embedder in eval mode, and what is needed to use it."""

    embedder: PatchEmbedder
    config: dict[str, Any]
    """The resolved training configuration (keys vision, text, embedder, loss, ...)."""
    step: int
    path: str
    towers: dict[str, Any]
    """Fingerprints of the towers that training began with, keys vision and text."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """All that was trained, by parameter name."""

    @property
    def unfreeze(self) -> UnfreezeConfig:
        """What else was trained."""
        return UnfreezeConfig(**self.config.get("unfreeze", {}))


def build_embedder(config: EmbedderConfig, width_in: int, width_out: int) -> PatchEmbedder:
    """The embedder from a vision tower of ``width_in`` to a text tower of ``width_out``."""
    return PatchEmbedder(width_in, width_out, config.hidden, config.init)


def load_model(path: str, device: torch.device | str = "cpu") -> LoadedModel:
    """Load the embedder of a checkpoint, or of the newest whole checkpoint of a run directory.

    Raises:
        UserError: no checkpoint there, a damaged one, or one of another architecture.
    """
    folder = checkpoint.resolve(path)
    state = checkpoint.read_state(folder)
    weights = checkpoint.read_weights(folder, state)
    config = state["config"]
    embedder = build_embedder(EmbedderConfig(**config["embedder"]), state["width_in"], state["width_out"])
    try:
        embedder.load_state_dict(named(weights, EMBEDDER))
    except RuntimeError as error:
        raise UserError(f"{folder} was written by another architecture: {json.dumps(_shapes(weights))}") from error
    embedder.requires_grad_(False).eval().to(device)
    return LoadedModel(
        embedder=embedder,
        config=config,
        step=state["step"],
        path=folder,
        towers=state["towers"],
        weights=weights,
    )


def _shapes(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}
