"""The methods that are measured side by side on one pass of the towers: checkpoints, and controls made from them."""

import json
from collections.abc import Mapping, Sequence
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
from pacl_scale.encoders.readouts import Readout, Readouts
from pacl_scale.errors import UserError
from pacl_scale.model import LoadedModel, build_embedder, load_model
from pacl_scale.similarity import Pooling, patch_text_similarity
from pacl_scale.unfreeze import trained_towers

PACL = "pacl"
"""Name of the method that `--checkpoint` sets."""

UNTRAINED = "untrained"
MAJORITY = "majority_class"
PATCH_ORACLE = "patch_oracle"

CLIP = "clip"
"""The same towers without PACL: CLIP's own projection of patch tokens; of whole pictures, CLIP's own head."""

MASKCLIP = "maskclip"
VALUE_PATH = "value_path"

TOWER_METHODS = (CLIP, MASKCLIP, VALUE_PATH)
"""Controls that read the same pass of the vision tower otherwise than PACL does."""

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
    channels: slice = field(default_factory=lambda: slice(None))
    """Those of the tower's tokens that it embeds; :class:`~pacl_scale.encoders.readouts.Readouts` gives several."""
    head_channels: slice | None = None
    """Those that stand for a whole picture, where it has a head of its own; None pools its patches."""

    @torch.no_grad()
    def embed(self, tokens_BTD: Tensor) -> Tensor:
        """Embedded patches in the embedder's dtype (float32)."""
        return self._embedded(tokens_BTD[..., self.channels])

    @property
    def compares_by(self) -> dict[str, Any]:
        """How whole pictures are compared with texts, for rows."""
        if self.head_channels is not None:
            return {"head": "CLIP's own: the projected class token"}
        return {"attention_scale": self.attention_scale, "pooling": self.pooling}

    @torch.no_grad()
    def compare(self, tokens_BTD: Tensor, texts_ND: Tensor) -> Tensor:
        """The compatibility (B, N) float32 of whole pictures with texts: PACL's phi, or the cosine of CLIP's head."""
        if self.head_channels is not None:
            # The head's vector stands on every patch; one of them is enough.
            patches_BTD = self._embedded(tokens_BTD[:, :1, self.head_channels])
        else:
            patches_BTD = self.embed(tokens_BTD)
        return patch_text_similarity(
            patches_BTD, texts_ND, attention_scale=self.attention_scale, pooling=self.pooling
        ).float()

    def _embedded(self, tokens_BTD: Tensor) -> Tensor:
        first = next(self.embedder.parameters(), None)
        return self.embedder(tokens_BTD.to(torch.float32 if first is None else first.dtype))


def load_methods(
    checkpoints: Mapping[str, str],
    untrained_seed: int | None,
    device: torch.device,
    dtype: torch.dtype,
    beside: Sequence[str] = (),
) -> tuple[Towers, list[Method]]:
    """Load checkpoints, the towers they were trained on, and (given a seed) an untrained embedder beside them.

    Args:
        checkpoints: method name to a run directory or a checkpoint; the first one is the main one and gives the
            towers and the architecture of the untrained embedder.
        untrained_seed: seed of the random embedder; ``None`` leaves it out.
        device: where the towers and embedders go.
        dtype: compute dtype of the towers.
        beside: of :data:`TOWER_METHODS`.

    Returns:
        The towers, and the methods in the order in which a reader compares them: untrained, those of the towers, the
        other checkpoints, the main one last.

    Raises:
        UserError: no checkpoint, one of another architecture, two that were trained on different towers, or towers
            that cannot be read as ``beside`` asks.
    """
    # Building an embedder draws weights; the caller's random numbers go on as if nothing had been built.
    with torch.random.fork_rng(devices=[]):
        return _load(checkpoints, untrained_seed, device, dtype, beside)


def choose_device(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is a GPU), "cpu" or "cuda"; a :class:`UserError` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but this machine has no usable CUDA GPU")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def build_towers(model: LoadedModel, device: torch.device, dtype: torch.dtype) -> Towers:
    """The encoders that a checkpoint was trained on, with what it trained of them."""
    unfreeze = model.unfreeze
    tail = (unfreeze.vision_blocks,) if unfreeze.vision_blocks else ()
    vision = build_vision(VisionConfig(**model.config["vision"]), device, dtype, *tail)
    text = build_text(TextEncoderConfig(**model.config["text"]), device, dtype)
    vision, text = trained_towers(unfreeze, vision, text, model.weights, model.path, device)
    config = {section: model.config[section] for section in TOWER_SECTIONS}
    if unfreeze.any:
        config["unfreeze"] = model.config["unfreeze"]
    return Towers(vision, text, device, config | {"precision": str(dtype).removeprefix("torch.")})


def _load(
    checkpoints: Mapping[str, str],
    untrained_seed: int | None,
    device: torch.device,
    dtype: torch.dtype,
    beside: Sequence[str],
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
    for name, model in loaded.items():
        if len(loaded) > 1 and model.unfreeze.any:
            raise UserError(f"{checkpoints[name]} trained parts of its towers; evaluate it by itself")
    towers = build_towers(first, device, dtype)
    main, *others = [_trained(name, model, towers) for name, model in loaded.items()]
    controls = [] if untrained_seed is None else [_untrained(main, first, towers, untrained_seed)]
    if beside:
        own = [*controls, *others, main]
        controls += _beside(main, first, towers, [name for name in TOWER_METHODS if name in beside])
        for method in own:
            # PACL's own tokens are the first of the tower's readings.
            method.channels = slice(0, main.embedder.skip.in_features)  # type: ignore[union-attr]
    return towers, [*controls, *others, main]


def _beside(main: Method, model: LoadedModel, towers: Towers, names: Sequence[str]) -> list[Method]:
    """Methods that read the towers otherwise; the towers then give all their readings side by side.

    Raises:
        UserError: the towers share no space, or cannot be read so.
    """
    projected = bool(model.config["vision"].get("projection"))
    values: Readout = "projected_values" if projected else "values"
    readings: dict[str, list[Readout]] = {
        CLIP: ["projected", "head"],
        MASKCLIP: ["projected_values", "head"],
        VALUE_PATH: [values],
    }
    if set(names) & {CLIP, MASKCLIP}:
        if model.unfreeze.any:
            raise UserError(
                "controls clip and maskclip need towers as they came; this checkpoint trained parts of them"
            )
        _check_shared_space(model)
    wanted = list(dict.fromkeys(["tokens", *(reading for name in names for reading in readings[name])]))
    vision = Readouts(towers.vision, wanted)
    towers.vision = vision
    found = []
    for name in names:
        first, *rest = readings[name]
        embedder = main.embedder if name == VALUE_PATH else nn.Identity()
        checkpoint = main.checkpoint if name == VALUE_PATH else {"path": "none: the towers alone", "step": 0}
        head = vision.columns[rest[0]] if rest else None
        found.append(
            Method(name, embedder, main.attention_scale, main.pooling, checkpoint, vision.columns[first], head)
        )
    return found


def _check_shared_space(model: LoadedModel) -> None:
    vision, text = model.config["vision"], model.config["text"]
    keys = ("source", "model", "weights", "seed")
    if vision["source"] != "open_clip" or any(vision.get(key) != text.get(key) for key in keys):
        raise UserError(
            f"controls clip and maskclip need both towers of one open_clip model; {vision['model']} and "
            f"{text['model']} share no space"
        )


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
