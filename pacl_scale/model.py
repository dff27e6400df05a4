"""The trainable part of PACL: the vision embedder and, if learned, the temperature.

Shapes: B pictures, T patches, Din width of the vision tower's tokens, D width of the text vectors.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pacl_scale import checkpoint
from pacl_scale.embedder import EmbedderConfig, PatchEmbedder
from pacl_scale.errors import UserError
from pacl_scale.loss import LogitScale, LossConfig


class PACLModel(nn.Module):
    """Embedder and logit scale as one module, so that one engine wraps every trainable number."""

    def __init__(self, embedder: PatchEmbedder, loss: LossConfig) -> None:
        super().__init__()
        self.embedder = embedder
        # LogitScale is the loss room's; only its place in the trainable module is decided here.
        self.logit_scale = LogitScale(loss)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded patches (B, T, D) of ``tokens`` (B, T, Din), and the logit scale, zero-dimensional.

        The scale is returned, instead of being read off the parameter outside, so that ZeRO 3 can shard it.
        """
        dtype = self.embedder.skip.weight.dtype
        return self.embedder(tokens.to(dtype)), self.logit_scale()


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's embedder in eval mode, and what is needed to use it."""

    embedder: PatchEmbedder
    config: dict[str, Any]
    """The resolved training configuration (keys vision, text, embedder, loss, ...)."""
    step: int
    path: str
    towers: dict[str, Any]
    """Fingerprints of the towers that it was trained on, keys vision and text."""


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
    prefix = "embedder."
    embedder = build_embedder(EmbedderConfig(**config["embedder"]), state["width_in"], state["width_out"])
    try:
        embedder.load_state_dict({name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)})
    except RuntimeError as error:
        raise UserError(f"{folder} was written by another architecture: {json.dumps(_shapes(weights))}") from error
    embedder.requires_grad_(False).eval().to(device)
    return LoadedModel(embedder=embedder, config=config, step=state["step"], path=folder, towers=state["towers"])


def _shapes(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}
