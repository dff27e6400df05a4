"""The methods that are measured side by side on one pass of the towers: checkpoints, and controls made from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import (
    TextEncoder,
    TextEncoderConfig,
    VisionConfig,
    VisionEncoder,
    build_text,
    build_vision,
)
from pacl_scale.errors import UserError
from pacl_scale.model import LoadedModel, build_embedder, load_model
from pacl_scale.similarity import Pooling

PACL = "pacl"
"""Name of the method that `--checkpoint` sets."""

UNTRAINED = "untrained"
MAJORITY = "majority_class"
PATCH_ORACLE = "patch_oracle"

TOWER_SECTIONS = ("vision", "text")


@dataclass
class Towers:
    """The two frozen encoders that all methods of one evaluation share."""

    vision: VisionEncoder
    text: TextEncoder
    device: torch.device
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration they were built from, for the rows."""


@dataclass
class Method:
    """Something that embeds patch tokens: (B, T, Din) -> (B, T, D)."""

    name: str
    embedder: nn.Module
    attention_scale: float
    pooling: Pooling
    checkpoint: dict[str, Any]
    """Where the weights come from: path, step, or the seed of a random embedder."""

    @torch.no_grad()
    def embed(self, tokens_BTD: Tensor) -> Tensor:
        """Embedded patches in the embedder's dtype (float32)."""
        return self.embedder(tokens_BTD.to(next(self.embedder.parameters()).dtype))


def load_methods(
    checkpoints: Mapping[str, str], untrained_seed: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[Towers, list[Method]]:
    """Load checkpoints, the towers they were trained on, and (given a seed) an untrained embedder beside them.

    Args:
        checkpoints: method name to a run directory or a checkpoint; the first one is the main one and gives the
            towers and the architecture of the untrained embedder.
        untrained_seed: seed of the random embedder; ``None`` leaves it out.
        device: where the towers and embedders go.
        dtype: compute dtype of the towers.

    Returns:
        The towers, and the methods in the order in which a reader compares them: untrained, the others, the main
        one last.

    Raises:
        UserError: no checkpoint, one of another architecture, or two that were trained on different towers.
    """
    # Building an embedder draws weights; the caller's random numbers go on as if nothing had been built.
    with torch.random.fork_rng(devices=[]):
        return _load(checkpoints, untrained_seed, device, dtype)


def choose_device(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is a GPU), "cpu" or "cuda"; a :class:`UserError` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but this machine has no usable CUDA GPU")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def build_towers(model: LoadedModel, device: torch.device, dtype: torch.dtype) -> Towers:
    """The frozen encoders that a checkpoint was trained on."""
    vision = build_vision(VisionConfig(**model.config["vision"]), device, dtype)
    text = build_text(TextEncoderConfig(**model.config["text"]), device, dtype)
    config = {section: model.config[section] for section in TOWER_SECTIONS}
    return Towers(vision, text, device, config | {"precision": str(dtype).removeprefix("torch.")})


def _load(
    checkpoints: Mapping[str, str], untrained_seed: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[Towers, list[Method]]:
    loaded = {name: load_model(path, device) for name, path in checkpoints.items()}
    first_name, first = next(iter(loaded.items()))
    for name, model in loaded.items():
        for section in TOWER_SECTIONS:
            if _canonical(model.config[section]) != _canonical(first.config[section]):
                raise UserError(
                    f"{checkpoints[name]} was trained on another {section} tower than {checkpoints[first_name]}; "
                    "evaluate them one by one"
                )
    towers = build_towers(first, device, dtype)
    main, *others = [_trained(name, model, towers) for name, model in loaded.items()]
    controls = [] if untrained_seed is None else [_untrained(main, first, towers, untrained_seed)]
    return towers, [*controls, *others, main]


def _trained(name: str, model: LoadedModel, towers: Towers) -> Method:
    widths = (model.embedder.skip.in_features, model.embedder.skip.out_features)
    if widths != (towers.vision.width, towers.text.width):
        raise UserError(
            f"{model.path} embeds {widths[0]} to {widths[1]}, but its towers are {towers.vision.width} and "
            f"{towers.text.width} wide: it is of another architecture"
        )
    for tower, found in (("vision", towers.vision.fingerprint()), ("text", towers.text.fingerprint())):
        wanted = model.towers[tower]
        if _canonical(found) != _canonical(wanted):
            keys = ", ".join(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
            raise UserError(f"{model.path} was trained on another {tower} tower ({keys} differ)")
    loss = model.config["loss"]
    checkpoint = {"path": model.path, "step": model.step}
    return Method(name, model.embedder, float(loss["attention_scale"]), loss["pooling"], checkpoint)


def _untrained(like: Method, model: LoadedModel, towers: Towers, seed: int) -> Method:
    torch.manual_seed(seed)
    config = EmbedderConfig(**model.config["embedder"])
    embedder = build_embedder(config, towers.vision.width, towers.text.width)
    embedder.requires_grad_(False).eval().to(towers.device)
    return Method(UNTRAINED, embedder, like.attention_scale, like.pooling, {"seed": seed, "step": 0})


def _canonical(section: Any) -> str:
    return json.dumps(section, sort_keys=True)
