"""Both towers of open_clip: built-in models and their tags, local checkpoints, and small models of one's own.

n strings, L tokens, D channels.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer, text_global_pool
from torch import Tensor, nn

from pacl_scale.encoders.from_timm import encoder_of_timm_model
from pacl_scale.encoders.text import TextEncoderConfig, TextTower, padded_length
from pacl_scale.encoders.vision import (
    Placement,
    Preprocess,
    VisionConfig,
    VisionEncoder,
    fingerprint_of,
    preprocess_for,
)
from pacl_scale.encoders.vit import FrozenViT, ViTParts, blocks_up_to
from pacl_scale.encoders.weights import RANDOM, freeze, hash_of, load_strictly, read_state
from pacl_scale.errors import UserError, first_line

DEFAULT_TAG = "openai"


def build_open_clip_vision(config: VisionConfig, place: Placement) -> VisionEncoder:
    """The vision tower that ``config`` names; see :func:`pacl_scale.encoders.build_vision`."""
    model, _ = _create(config.model, config.weights, config.seed)
    visual = model.visual
    preprocess = preprocess_for(config, _native_preprocess(visual))
    if hasattr(visual, "trunk") and hasattr(visual.trunk, "blocks"):
        if config.projection:
            raise UserError(f"projection: {config.model} pools before it projects; set it to false")
        return encoder_of_timm_model(visual.trunk, config, preprocess, place)
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise UserError(f"model: the vision tower of {config.model} gives no patch tokens")
    depth = len(visual.transformer.resblocks)
    if not -depth <= config.layer < depth:
        raise UserError(f"layer: {config.model} has blocks 0 to {depth - 1}, not {config.layer}")
    fingerprint = fingerprint_of(config, preprocess, hash_of(visual))
    return FrozenViT(parts_of(visual, config), preprocess, fingerprint, place)


def parts_of(visual: VisionTransformer, config: VisionConfig) -> ViTParts:
    """The parts of open_clip's own transformer, cut after block ``config.layer``."""
    positions_1TD = visual.positional_embedding.unsqueeze(0)
    return ViTParts(
        patch_conv=visual.conv1,
        patch_norm=nn.Identity(),
        prefix_1PD=visual.class_embedding.view(1, 1, -1) + positions_1TD[:, :1],
        positions_1TD=positions_1TD[:, 1:],
        native_grid=visual.grid_size,
        norm_pre=visual.ln_pre,
        blocks=blocks_up_to(visual.transformer.resblocks, config.layer),
        norm=visual.ln_post if config.final_norm else nn.Identity(),
        projection_DE=visual.proj if config.projection else None,
        joint_DE=visual.proj if _reads_as_clip(visual, config) else None,
    )


def _reads_as_clip(visual: VisionTransformer, config: VisionConfig) -> bool:
    """Whether the tokens are those that CLIP's own projection was trained on: of the last block, normalised."""
    is_last = range(len(visual.transformer.resblocks))[config.layer] == len(visual.transformer.resblocks) - 1
    return is_last and config.final_norm and not visual.final_ln_after_pool and visual.pool_type == "tok"


def build_open_clip_text(config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> TextTower:
    """The text tower that ``config`` names; see :func:`pacl_scale.encoders.build_text`."""
    model, tokenizer = _create(config.model, config.weights, config.seed)
    # The picture half is not needed, and may be three quarters of the memory.
    model.visual = nn.Identity()
    return OpenClipText(model, tokenizer, config.max_tokens, device, dtype)


class OpenClipText:
    """A :class:`~pacl_scale.encoders.text.TextTower` by an open_clip model; vectors are not normalised."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_tokens: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self._fingerprint = {
            "source": "open_clip",
            "weights_blake2b": hash_of(model),
            "max_tokens": max_tokens,
        }
        self.module: Any = freeze(model).to(device, dtype)
        self._tokenizer = tokenizer
        self._length = min(max_tokens or tokenizer.context_length, tokenizer.context_length)
        with torch.no_grad():
            self.width = self.embed(self.tokenize(["a"])).shape[-1]

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """See :meth:`pacl_scale.encoders.text.TextTower.tokenize`."""
        rows = self._tokenizer(texts, context_length=self._length).tolist()
        # A causal tower never looks at what follows the end token: cut the padding, most of a caption's 77 tokens.
        return [row[: len(row) - row[::-1].index(max(row))] for row in rows] if self._is_causal() else rows

    def padded_length(self, tokens: list[int]) -> int:
        """See :meth:`pacl_scale.encoders.text.TextTower.padded_length`."""
        return padded_length(len(tokens), self._length) if self._is_causal() else self._tokenizer.context_length

    def embed(self, tokens: list[list[int]]) -> Tensor:
        """See :meth:`pacl_scale.encoders.text.TextTower.embed`."""
        length = max(self.padded_length(row) for row in tokens)
        tokens_nL = torch.tensor([row + [0] * (length - len(row)) for row in tokens]).to(self.device)
        return _causal_vectors(self.module, tokens_nL) if self._is_causal() else self.module.encode_text(tokens_nL)

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`pacl_scale.encoders.text.TextEncoder.fingerprint`."""
        return dict(self._fingerprint)

    def _is_causal(self) -> bool:
        model = self.module
        return isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"


def _causal_vectors(model: open_clip.CLIP, tokens_nL: Tensor) -> Tensor:
    """What ``encode_text`` of a plain CLIP computes, for fewer tokens than its context holds."""
    length = tokens_nL.shape[1]
    x_nLD = model.token_embedding(tokens_nL) + model.positional_embedding[:length]
    assert model.attn_mask is not None
    x_nLD = model.ln_final(model.transformer(x_nLD, attn_mask=model.attn_mask[:length, :length]))
    vectors_nD = text_global_pool(x_nLD, tokens_nL, "argmax")
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(vectors_nD)
    return vectors_nD if model.text_projection is None else vectors_nD @ model.text_projection


def _create(name: str, weights: str | None, seed: int) -> tuple[Any, Any]:
    """The loaded model and its tokenizer."""
    with _open_clip_name(name) as known_name:
        tag = _tag(name, weights)
        # OpenAI's weights were trained with another GELU than open_clip's configuration of the same name says.
        quick_gelu = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        try:
            with torch.random.fork_rng(devices=[]), _random_on_purpose():
                torch.manual_seed(seed)
                model = open_clip.create_model(
                    known_name,
                    pretrained=tag,
                    load_weights=weights is None or tag is not None,
                    force_quick_gelu=quick_gelu,
                    pretrained_text=weights is None,
                    weights_only=True,
                )
            tokenizer = open_clip.get_tokenizer(known_name)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"model: open_clip cannot give {name}: {first_line(error)}") from error
    if weights not in (None, RANDOM) and tag is None:
        _load_file(model, str(weights))
    return model, tokenizer


@contextmanager
def _random_on_purpose() -> Iterator[None]:
    """Without open_clip's warning that weights are random: asked for, or a file's replace them right after."""

    def other(record: logging.LogRecord) -> bool:
        return "Model initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _tag(name: str, weights: str | None) -> str | None:
    """The pre-training tag that ``weights`` means for a built-in model, if it means one.

    Raises:
        UserError: the model has no such tag, and there is no such file.
    """
    if weights == RANDOM:
        return None
    if name not in open_clip.list_models():
        if weights is None and name.endswith(".json"):
            raise UserError(f"weights: {name} describes a model without weights; name a checkpoint file, or {RANDOM}")
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = DEFAULT_TAG if weights is None else weights
    if tag in tags:
        return tag
    if weights is None or not Path(weights).exists():
        raise UserError(f"weights: {name} has no tag or file {tag!r}; its tags are {', '.join(tags) or 'none'}")
    return None


@contextmanager
def _open_clip_name(name: str) -> Iterator[str]:
    """What open_clip calls the model: a JSON file becomes a folder of open_clip's own form while it is needed."""
    if not name.endswith(".json"):
        if name not in open_clip.list_models() and not name.startswith("hf-hub:"):
            raise UserError(f"model: open_clip has no {name!r}")
        yield name
        return
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {name} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= content.keys():
        raise UserError(f"model: {name} must hold embed_dim, vision_cfg and text_cfg, as open_clip's own files do")
    with tempfile.TemporaryDirectory(prefix="pacl-scale-") as folder:
        Path(folder, "open_clip_config.json").write_text(json.dumps({"model_cfg": content}), encoding="utf-8")
        yield f"local-dir:{folder}"


def _load_file(model: nn.Module, path: str) -> None:
    """Load a checkpoint of the whole model: safetensors, or tensors alone as open_clip's training writes them."""
    load_strictly(model, read_state(path), path)


def _native_preprocess(visual: Any) -> Preprocess:
    settings = visual.preprocess_cfg
    size = settings["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise UserError(f"model: its pictures are {height} x {width}; only square ones are supported")
    return Preprocess(
        image_size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        resize="squash" if settings["resize_mode"] == "squash" else "shortest",
    )
