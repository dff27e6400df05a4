"""Cached patch tokens: how they lie in a tar, and back.

A sample of a features data set has ``<key>.patches``, T x D numbers in row order, and for int8 ``<key>.scale``, T
float16 numbers: token t is ``patches[t] * scale[t]``, and ``scale[t]`` is the largest magnitude in the token over 127.
bfloat16 and float32 need no scale.
Its text members are those of the picture's sample, so the data set stands alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacl_scale.data.decode import BadPicture
from pacl_scale.data.index import PATCHES_EXTENSION, SampleIndex
from pacl_scale.errors import UserError

SCALE_EXTENSION = "scale"
CODES = {"int8": np.int8, "bfloat16": np.uint16, "float32": np.float32}
"""How a number lies in the tar. float32 is what the others are measured against."""
LARGEST_INT8 = 127


@dataclass(frozen=True)
class FeatureFormat:
    """What an index says of its patch tokens."""

    tokens: int
    """T, of every picture."""
    width: int
    """D."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    dtype: str
    """"int8", "bfloat16" or "float32"."""
    vision: dict[str, Any] = field(compare=True)
    """Fingerprint of the encoder that computed them."""

    @classmethod
    def of(cls, index: SampleIndex) -> "FeatureFormat | None":
        """The format of a features data set; None for pictures. Raises UserError where the index does not say."""
        if index.kind != "features":
            return None
        try:
            extra = index.extra
            rows, columns = extra["grid"]
            found = cls(int(extra["tokens"]), int(extra["width"]), (rows, columns), extra["dtype"], extra["vision"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{index.root_url}: its index does not describe its patch tokens ({error!r})") from error
        if found.dtype not in CODES or rows * columns != found.tokens:
            raise UserError(f"{index.root_url}: patch tokens of an unknown format ({extra})")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For the ``extra`` of an index."""
        return {
            "tokens": self.tokens,
            "width": self.width,
            "grid": list(self.grid),
            "dtype": self.dtype,
            "vision": self.vision,
        }

    def check_encoder(self, named: Mapping[str, Any]) -> None:
        """Raise UserError where a configuration names other tokens than these, by keys of a fingerprint."""
        known = {key: (self.vision[key], value) for key, value in named.items() if key in self.vision}
        wrong = [f"{key} is {own!r}, not {asked!r}" for key, (own, asked) in known.items() if own != asked]
        if wrong:
            raise UserError(
                f"the data set holds patch tokens of another tower than vision names: {', '.join(wrong)}; "
                "name the same one, or leave vision out"
            )

    def pack(self, tokens_BTD: Tensor) -> list[dict[str, bytes]]:
        """The members that hold each picture's tokens, from (B, T, D) of any float type on any device."""
        if self.dtype == "bfloat16":
            bits_BTD = tokens_BTD.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
            return [{PATCHES_EXTENSION: bits.tobytes()} for bits in bits_BTD]
        tokens_BTD = tokens_BTD.float()
        if self.dtype == "float32":
            return [{PATCHES_EXTENSION: tokens_TD.tobytes()} for tokens_TD in tokens_BTD.cpu().numpy()]
        # The scale is rounded first, so that the codes are the best for the scale that is stored. The smallest normal
        # float16 keeps a token of zeros from dividing by zero.
        scale_BT = (tokens_BTD.abs().amax(dim=2) / LARGEST_INT8).clamp_min(2**-14).half()
        codes_BTD = (tokens_BTD / scale_BT.float()[:, :, None]).round().clamp(-LARGEST_INT8, LARGEST_INT8)
        codes, scales = codes_BTD.to(torch.int8).cpu().numpy(), scale_BT.cpu().numpy()
        return [
            {PATCHES_EXTENSION: code.tobytes(), SCALE_EXTENSION: scale.tobytes()}
            for code, scale in zip(codes, scales, strict=True)
        ]

    def read(self, members: Mapping[str, bytes | memoryview], ids: np.ndarray | None, out_ND: Tensor) -> None:
        """Write the tokens ``ids`` (all if None) of a sample into ``out_ND``, float32.

        Raises:
            BadPicture: no tokens, or not as many as the index says.
        """
        content = members.get(PATCHES_EXTENSION, b"")
        code = np.dtype(CODES[self.dtype])
        if len(content) != self.tokens * self.width * code.itemsize:
            raise BadPicture("patch tokens of the wrong size")
        codes_TD = np.frombuffer(content, code).reshape(self.tokens, self.width)
        codes_ND = codes_TD if ids is None else codes_TD[ids]
        if self.dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            out_ND.view(torch.int32).numpy()[:] = codes_ND.astype(np.int32) << 16
            return
        if self.dtype == "float32":
            out_ND.numpy()[:] = codes_ND
            return
        scale = members.get(SCALE_EXTENSION, b"")
        if len(scale) != 2 * self.tokens:
            raise BadPicture("patch tokens without their scale")
        scale_T = np.frombuffer(scale, np.float16).astype(np.float32)
        np.multiply(codes_ND, (scale_T if ids is None else scale_T[ids])[:, None], out=out_ND.numpy())
