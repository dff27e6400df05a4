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
from pacl_scale.loss import LossConfig


class PACLModel(nn.Module):
    """Embedder and logit scale as one module, so that one engine wraps every trainable number.

    ``forward(tokens_BTD) -> (patches_BTD, logit_scale)``: the scale is a 0-dim float32 tensor, already
    exponentiated and clamped, and part of the graph where it is learned. Returning it from ``forward`` (instead
    of reading the parameter outside) is what lets ZeRO 3 keep the parameter sharded.
    """

    def __init__(self, embedder: PatchEmbedder, loss: LossConfig) -> None:
        super().__init__()
        self.embedder = embedder
        self.max_logit_scale = loss.max_logit_scale
        log_scale = torch.tensor([loss.init_logit_scale]).log()
        if loss.learn_logit_scale:
            # One element, not zero dimensions: DeepSpeed flattens and partitions parameters.
            self.log_logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_logit_scale", log_scale, persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ``tokens`` (B, T, Din) of any float dtype; see the class."""
        dtype = next(self.embedder.parameters()).dtype
        scale = self.log_logit_scale.float().exp().clamp(max=self.max_logit_scale).squeeze(0)
        return self.embedder(tokens.to(dtype)), scale


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's embedder in eval mode, and what is needed to use it."""

    embedder: PatchEmbedder
    config: dict[str, Any]
    """The resolved training configuration (keys vision, text, embedder, loss, ...)."""
    step: int
    path: str


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
    return LoadedModel(embedder=embedder, config=config, step=state["step"], path=folder)


def _shapes(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}
