"""One forward pass for every plain vision transformer: what timm and open_clip call by different names.

B pictures, T patches on a grid of h x w, P prefix tokens (class, registers), D channels.

timm is imported where a tower is at work: every command knows this module, and many never build one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacl_scale.encoders.tail import VisionTail
from pacl_scale.encoders.vision import PatchTokens, Placement, Preprocess
from pacl_scale.encoders.weights import freeze, load_strictly
from pacl_scale.errors import UserError


@dataclass
class ViTParts:
    """The parts of a vision transformer in the order in which a picture meets them."""

    patch_conv: nn.Conv2d
    """Pixels to patch tokens."""
    patch_norm: nn.Module
    """After it; mostly the identity."""
    prefix_1PD: Tensor
    """Class and register tokens with their positions added."""
    positions_1TD: Tensor | None
    """Positions of the patches on ``native_grid``, or None where the tower has none of its own."""
    native_grid: tuple[int, int]
    """Rows and columns for which ``positions_1TD`` was learnt."""
    norm_pre: nn.Module
    """Before the first block; CLIP has one."""
    blocks: Sequence[nn.Module]
    """Those up to the layer that is wanted, each (B, P + T, D) -> (B, P + T, D)."""
    norm: nn.Module
    """After the last of them."""
    projection_DE: Tensor | None = None
    """Into another space; CLIP's joint one."""
    joint_DE: Tensor | None = None
    """The projection into the joint space even where ``projection_DE`` does not apply it: CLIP's own reading of tokens
    of its last block. None where there is none, or where the tokens are another block's."""
    antialias_positions: bool = True
    """Whether interpolating ``positions_1TD`` to a smaller grid filters them; timm and open_clip do."""


class FrozenViT:
    """A :class:`~pacl_scale.encoders.vision.VisionEncoder` from the parts of a vision transformer.

    Where the last blocks are to be trained, they and the norm after them are its ``tail``, a module in float32.
    """

    def __init__(
        self,
        parts: ViTParts,
        preprocess: Preprocess,
        fingerprint: dict[str, Any],
        place: Placement,
    ) -> None:
        device, dtype, trainable_blocks = place.device, place.dtype, place.trainable_blocks
        depth = len(parts.blocks)
        if trainable_blocks >= depth:
            raise UserError(f"{trainable_blocks} blocks cannot be trained: at most {depth - 1} of its {depth} blocks")
        self.patch_size = parts.patch_conv.kernel_size[0]
        self.width = parts.patch_conv.out_channels if parts.projection_DE is None else parts.projection_DE.shape[1]
        self.preprocess = preprocess
        self.device, self.dtype = device, dtype
        self._fingerprint = fingerprint
        self._parts = parts
        self._pictures_per_pass: int | None = None
        self.tail: VisionTail | None = None
        if trainable_blocks:
            last, parts.blocks = parts.blocks[depth - trainable_blocks :], parts.blocks[: depth - trainable_blocks]
            projection_DE = None if parts.projection_DE is None else parts.projection_DE.detach()
            prefix, width = parts.prefix_1PD.shape[1:]
            self.tail = VisionTail(last, parts.norm, width, prefix, projection_DE).eval().to(device)
        if device.type == "cpu":
            from pacl_scale.encoders.cpu_block import PICTURES_PER_PASS

            self._pictures_per_pass = PICTURES_PER_PASS
        if place.shard:
            for block in parts.blocks:
                place.shard(freeze(block).to(dtype))
        else:
            parts.blocks = [_packed(block, device, dtype) for block in parts.blocks]
        self._conv: Any = freeze(parts.patch_conv).to(device, dtype)
        after = [] if self.tail else [parts.norm]
        self._rest = freeze(nn.ModuleList([parts.patch_norm, parts.norm_pre, *parts.blocks, *after]))
        self._rest.to(device, dtype)
        self._prefix_1PD = parts.prefix_1PD.detach().to(device, dtype)
        self._projection_DE = None if parts.projection_DE is None else parts.projection_DE.detach().to(device, dtype)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.norm: nn.Module = parts.norm
        self.joint_DE = None if parts.joint_DE is None else parts.joint_DE.detach().to(device, dtype)
        self.projected = parts.projection_DE is not None

    def encode(self, images_BCHW: Tensor, stride: int | None = None) -> PatchTokens:
        """See :meth:`pacl_scale.encoders.vision.VisionEncoder.encode`."""
        assert self.tail is None, "what a trainable tail puts out is training's to compute"
        return self._in_passes(images_BCHW, stride, self._finish)

    def encode_up_to_tail(self, images_BCHW: Tensor) -> Tensor:
        """What enters the tail, (B, P + T, D), detached."""
        return self._in_passes(images_BCHW, None, lambda x_BTD: x_BTD).tokens

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See :attr:`pacl_scale.encoders.vision.VisionEncoder.blocks`; a tail is not frozen, and not among them."""
        return self._parts.blocks

    def with_spare_tail(self) -> "FrozenViT":
        """This tower with a copy of the tail, for :meth:`with_trained_tail` while an engine owns the tail itself."""
        spare = copy.copy(self)
        spare.tail = copy.deepcopy(self.tail)
        return spare

    def with_trained_tail(self, weights: Mapping[str, Tensor], origin: str) -> "FrozenViT":
        """This tower, frozen, with its tail's weights as they were trained. The tail itself stays as it is.

        Raises:
            UserError: the weights of ``origin`` are those of another architecture.
        """
        tail = copy.deepcopy(self.tail)
        assert tail is not None
        load_strictly(tail, weights, origin)
        tower = copy.copy(self)
        blocks = [_packed(block, self.device, self.dtype) for block in tail.blocks]
        freeze(nn.ModuleList([*blocks, tail.norm])).to(self.device, self.dtype)
        tower._parts = replace(self._parts, blocks=[*self._parts.blocks, *blocks], norm=tail.norm)
        tower.norm, tower.tail = tail.norm, None
        return tower

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`pacl_scale.encoders.vision.VisionEncoder.fingerprint`."""
        return dict(self._fingerprint)

    def _in_passes(self, images_BCHW: Tensor, stride: int | None, finish: Callable[[Tensor], Tensor]) -> PatchTokens:
        stride = self.patch_size if stride is None else stride
        check_pictures(images_BCHW, self.patch_size, stride)
        # no_grad, not inference_mode: autograd refuses to save inference tensors, and what is trained above has to
        # save these tokens for its own backward pass.
        with torch.no_grad(), attention_by_parts():
            passes = images_BCHW.split(self._pictures_per_pass or max(1, len(images_BCHW)))
            results = [self._forward(part.to(self.device, self.dtype), stride) for part in passes]
            finished = [finish(x_BTD) for x_BTD, _ in results]
            return PatchTokens(finished[0] if len(finished) == 1 else torch.cat(finished), results[0][1])

    def _forward(self, images_BCHW: Tensor, stride: int) -> tuple[Tensor, tuple[int, int]]:
        """What the last frozen block puts out, prefix tokens first, and the grid of patches."""
        patches_BDhw = F.conv2d(images_BCHW, self._conv.weight, self._conv.bias, stride=stride)
        grid = (patches_BDhw.shape[2], patches_BDhw.shape[3])
        x_BTD = self._parts.patch_norm(patches_BDhw.flatten(2).transpose(1, 2))
        if self._parts.positions_1TD is not None:
            x_BTD = x_BTD + self._positions_on(grid)
        x_BTD = torch.cat([self._prefix_1PD.expand(len(x_BTD), -1, -1), x_BTD], dim=1)
        x_BTD = self._parts.norm_pre(x_BTD)
        for block in self._parts.blocks:
            x_BTD = block(x_BTD)
        return x_BTD, grid

    def _finish(self, x_BTD: Tensor) -> Tensor:
        tokens_BTD = self._parts.norm(x_BTD[:, self._prefix_1PD.shape[1] :])
        return tokens_BTD if self._projection_DE is None else tokens_BTD @ self._projection_DE

    def _positions_on(self, grid: tuple[int, int]) -> Tensor:
        """Positions interpolated to ``grid`` in float32 by a bicubic filter, as timm and open_clip do it."""
        if grid not in self._positions:
            from timm.layers import resample_abs_pos_embed

            assert self._parts.positions_1TD is not None
            positions_1TD = resample_abs_pos_embed(
                self._parts.positions_1TD.detach().float(),
                new_size=list(grid),
                old_size=list(self._parts.native_grid),
                num_prefix_tokens=0,
                antialias=self._parts.antialias_positions,
            )
            # Pictures come in few sizes, except in evaluation at their own: keep only the latest.
            self._positions = {grid: positions_1TD.to(self.device, self.dtype)}
        return self._positions[grid]


@contextmanager
def attention_by_parts() -> Iterator[None]:
    """Keep torch's own attention module from its fast path, which holds all scores at once: (B, H, T, T), 7 GB for one
    picture of 448 pixels at stride 4."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _packed(block: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """``block`` as it computes fastest there."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return block
    from pacl_scale.encoders.cpu_block import CpuBlock, is_plain

    return CpuBlock(block) if is_plain(block) else block


def check_pictures(images_BCHW: Tensor, patch_size: int, stride: int) -> None:
    """Refuse pictures that a tower cannot cut into patches (ValueError)."""
    shape = tuple(images_BCHW.shape)
    if images_BCHW.ndim != 4 or shape[1] != 3 or min(shape) < 1 or any(side % patch_size for side in shape[2:]):
        raise ValueError(f"pictures must be (B, 3, H, W), H and W multiples of {patch_size}, not {shape}")
    if not 1 <= stride <= patch_size:
        raise ValueError(f"stride must be from 1 to the patch size {patch_size}, not {stride}")


def blocks_up_to(blocks: Iterable[nn.Module], layer: int) -> list[nn.Module]:
    """The blocks that lead to the output of block ``layer`` (counted from 0, or from the end if negative).

    Raises:
        IndexError: there is no such block.
    """
    every = list(blocks)
    return every[: range(len(every))[layer] + 1]
