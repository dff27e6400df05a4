"""Vision towers of timm: plain vision transformers, and its others that give patch tokens (EVA, DINOv3)."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pacl_scale.encoders.vision import (
    PatchTokens,
    Placement,
    Preprocess,
    VisionConfig,
    VisionEncoder,
    fingerprint_of,
    preprocess_for,
)
from pacl_scale.encoders.vit import FrozenViT, ViTParts, blocks_up_to, check_pictures
from pacl_scale.encoders.weights import RANDOM, freeze, hash_of, load_strictly, read_state
from pacl_scale.errors import UserError, first_line


def build_timm_vision(config: VisionConfig, place: Placement) -> VisionEncoder:
    """The timm tower that ``config`` names; see :func:`pacl_scale.encoders.build_vision`."""
    model = _create(config)
    preprocess = preprocess_for(config, _native_preprocess(model))
    return encoder_of_timm_model(model, config, preprocess, place)


def encoder_of_timm_model(
    model: nn.Module,
    config: VisionConfig,
    preprocess: Preprocess,
    place: Placement,
    antialias_positions: bool = True,
) -> VisionEncoder:
    """A loaded timm model as a vision encoder; positions are interpolated as timm does it, or without a filter.

    Raises:
        UserError: ``config.layer`` is not one of its blocks, or some are to be trained of a model that is not plain.
    """
    fingerprint = fingerprint_of(config, preprocess, hash_of(model))
    depth = len(model.blocks)  # type: ignore[arg-type]
    if not -depth <= config.layer < depth:
        raise UserError(f"layer: {config.model} has blocks 0 to {depth - 1}, not {config.layer}")
    if type(model) is VisionTransformer and type(model.patch_embed.proj) is nn.Conv2d:
        parts = parts_of(model, config.layer, config.final_norm)
        parts.antialias_positions = antialias_positions
        return FrozenViT(parts, preprocess, fingerprint, place)
    if place.trainable_blocks:
        raise UserError(f"{config.model} is no plain vision transformer: its blocks cannot be trained")
    return TimmEncoder(model, config.layer, config.final_norm, preprocess, fingerprint, place)


def parts_of(model: VisionTransformer, layer: int, final_norm: bool) -> ViTParts:
    """The parts of a plain timm transformer, cut after block ``layer``."""
    prefix: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
    prefix_1PD = torch.cat(prefix, dim=1) if prefix else torch.empty(1, 0, model.embed_dim)
    positions_1TD: Tensor | None = model.pos_embed
    if positions_1TD is not None and not model.no_embed_class:
        # One table serves all tokens, the prefix first; later models keep positions for the patches alone.
        prefix_1PD = prefix_1PD + positions_1TD[:, : model.num_prefix_tokens]
        positions_1TD = positions_1TD[:, model.num_prefix_tokens :]
    return ViTParts(
        patch_conv=model.patch_embed.proj,
        patch_norm=model.patch_embed.norm,
        prefix_1PD=prefix_1PD,
        positions_1TD=positions_1TD,
        native_grid=model.patch_embed.grid_size,
        norm_pre=model.norm_pre,
        blocks=blocks_up_to(model.blocks, layer),
        norm=model.norm if final_norm else nn.Identity(),
    )


class TimmEncoder:
    """A :class:`~pacl_scale.encoders.vision.VisionEncoder` by timm's own ``forward_intermediates``.

    For transformers that are not plain (rotary positions, other patch embeddings); their stride is fixed.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        final_norm: bool,
        preprocess: Preprocess,
        fingerprint: dict[str, Any],
        place: Placement,
    ) -> None:
        self.width = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self.preprocess = preprocess
        self.device, self.dtype = place.device, place.dtype
        self._fingerprint = fingerprint
        self._layer = range(len(model.blocks))[layer]
        self._final_norm = final_norm
        self._model: Any = freeze(model)
        if place.shard:
            for block in self.blocks:
                place.shard(block.to(place.dtype))
        self._model.to(place.device, place.dtype)

    def encode(self, images_BCHW: Tensor, stride: int | None = None) -> PatchTokens:
        """See :meth:`pacl_scale.encoders.vision.VisionEncoder.encode`."""
        check_pictures(images_BCHW, self.patch_size, self.patch_size)
        if stride not in (None, self.patch_size):
            raise ValueError(f"this tower's stride is its patch size, {self.patch_size}; it cannot be {stride}")
        # no_grad, not inference_mode: the trainable embedder has to save these tokens for its backward pass.
        with torch.no_grad():
            (tokens_BTD,) = self._model.forward_intermediates(
                images_BCHW.to(self.device, self.dtype),
                indices=[self._layer],
                norm=self._final_norm,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return PatchTokens(
            tokens_BTD, (images_BCHW.shape[2] // self.patch_size, images_BCHW.shape[3] // self.patch_size)
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See :attr:`pacl_scale.encoders.vision.VisionEncoder.blocks`."""
        return list(self._model.blocks)[: self._layer + 1]

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`pacl_scale.encoders.vision.VisionEncoder.fingerprint`."""
        return dict(self._fingerprint)


def _create(config: VisionConfig) -> nn.Module:
    if not timm.is_model(config.model):
        raise UserError(f"model: timm has no {config.model!r}")
    from_hub = config.weights is None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = timm.create_model(config.model, pretrained=from_hub, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise UserError(f"model: timm's {config.model} is no vision transformer with patch tokens") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"model: timm cannot give {config.model} with its weights: {first_line(error)}") from error
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "blocks"):
        raise UserError(f"model: timm's {config.model} is no vision transformer with patch tokens")
    if config.weights not in (None, RANDOM):
        state = read_state(config.weights)
        headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        load_strictly(model, headless, config.weights)
    return model


def _native_preprocess(model: nn.Module) -> Preprocess:
    settings = timm.data.resolve_model_data_config(model)
    return Preprocess(
        image_size=settings["input_size"][-1],
        mean=settings["mean"],
        std=settings["std"],
        interpolation="bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
        resize="squash" if settings.get("crop_mode") == "squash" else "shortest",
    )
