"""Other readings of the same pass of a vision tower, beside the tokens that PACL was trained on.

B pictures, T patches, P prefix tokens, D channels of the tower, E of the joint space.

* ``values``: the last block with every patch attending to itself alone, so that attention leaves its value only
  (MaskCLIP, Zhou et al., ECCV 2022); residual sums, MLP and final norm stay.
* ``projected``: CLIP's own projection of the patch tokens into the joint space; ``projected_values``: of the values.
* ``head``: CLIP's own vector of the picture, the projected class token, the same on every patch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pacl_scale.encoders.vision import PatchTokens
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.errors import UserError

Readout = Literal["tokens", "values", "projected", "projected_values", "head"]

JOINT = ("projected", "projected_values", "head")
"""Readings that lie in the space of CLIP's texts."""


class Readouts:
    """A :class:`~pacl_scale.encoders.vision.VisionEncoder` whose tokens are several readings side by side.

    Args:
        tower: the tower; it is run once.
        wanted: the readings, in the order of their channels.

    Raises:
        UserError: the tower cannot give a reading.
    """

    def __init__(self, tower: Any, wanted: Sequence[Readout]) -> None:
        if not isinstance(tower, FrozenViT):
            raise UserError("this vision tower is no plain transformer: its values and projections cannot be read")
        joint = tower.joint_DE
        if joint is None and set(wanted) & set(JOINT):
            raise UserError(
                "CLIP's own reading needs an open_clip tower with a projection, read at its last block with final_norm"
            )
        self._tower = tower
        self.patch_size, self.preprocess = tower.patch_size, tower.preprocess
        width, start = self._widths(), 0
        self.columns: dict[str, slice] = {}
        """Reading to its channels."""
        for reading in wanted:
            self.columns[reading] = slice(start, start + width[reading])
            start += width[reading]
        self.width = start

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See :attr:`pacl_scale.encoders.vision.VisionEncoder.blocks`."""
        return self._tower.blocks

    def fingerprint(self) -> dict[str, Any]:
        """The tower's own."""
        return self._tower.fingerprint()

    def encode(self, images_BCHW: Tensor, stride: int | None = None) -> PatchTokens:
        """See :meth:`pacl_scale.encoders.vision.VisionEncoder.encode`; (B, T, sum of the readings' channels)."""
        last = self._tower.blocks[-1]
        entered: list[Tensor] = []
        left: list[Tensor] = []
        hooks = [
            last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])),
            last.register_forward_hook(lambda _, inputs, output: left.append(output)),
        ]
        try:
            own_BTD, grid = self._tower.encode(images_BCHW, stride)
        finally:
            for hook in hooks:
                hook.remove()
        prefix = entered[0].shape[1] - grid[0] * grid[1]
        with torch.no_grad():
            readings: dict[str, Callable[[], Tensor]] = {
                "tokens": lambda: own_BTD,
                "projected": lambda: own_BTD if self._tower.projected else self._joint(own_BTD),
                "values": lambda: self._values(torch.cat(entered)[:, prefix:]),
                "projected_values": lambda: self._joint(self._values(torch.cat(entered)[:, prefix:])),
                "head": lambda: self._joint(self._tower.norm(torch.cat(left)[:, :1])).expand(-1, own_BTD.shape[1], -1),
            }
            return PatchTokens(torch.cat([readings[reading]() for reading in self.columns], dim=2), grid)

    def _widths(self) -> dict[str, int]:
        joint = self._tower.joint_DE
        inner = self._tower.width if joint is None else joint.shape[0]
        outer = 0 if joint is None else joint.shape[1]
        sizes = {"tokens": self._tower.width, "values": inner, **dict.fromkeys(JOINT, outer)}
        assert set(sizes) == set(get_args(Readout))
        return sizes

    def _values(self, entered_BTD: Tensor) -> Tensor:
        """The last block on each patch as if it were alone, then the norm."""
        alone_N1D = entered_BTD.flatten(0, 1).unsqueeze(1)
        return self._tower.norm(self._tower.blocks[-1](alone_N1D)).view(entered_BTD.shape)

    def _joint(self, tokens_BTD: Tensor) -> Tensor:
        joint = self._tower.joint_DE
        assert joint is not None, "checked when this was made"
        return tokens_BTD @ joint
