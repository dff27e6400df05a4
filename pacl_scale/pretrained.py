"""A trained model in one line: ``pacl_scale.load("runs/demo").segment(picture, ["dog", "grass"])``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pacl_scale.evaluate.methods import PACL, Method, Towers, choose_device, load_methods
from pacl_scale.evaluate.protocol import Protocol, as_input
from pacl_scale.segment import segment
from pacl_scale.similarity import patch_text_similarity


@dataclass(frozen=True)
class Pretrained:
    """An embedder with the towers it was trained on."""

    towers: Towers
    method: Method

    def segment(self, picture: Image.Image, words: Sequence[str], threshold: float | None = None) -> np.ndarray:
        """Position in ``words`` of each pixel, (H, W) int64; a negative number where no word reaches ``threshold``."""
        return segment(picture.convert("RGB"), words, self.towers, self.method, Protocol(), threshold)

    @torch.no_grad()
    def similarity(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """The compatibility phi of pictures and texts (equation 4 of the paper), (B, N) float32 on the CPU.

        Pictures are squeezed to the tower's own size.
        """
        preprocess = self.towers.vision.preprocess
        side = (preprocess.image_size, preprocess.image_size)
        inputs = [as_input(picture.convert("RGB"), side, preprocess) for picture in pictures]
        tokens = self.towers.vision.encode(torch.stack(inputs).to(self.towers.device)).tokens
        phi = patch_text_similarity(
            self.method.embed(tokens),
            self.towers.text.encode(texts).to(self.towers.device),
            attention_scale=self.method.attention_scale,
            pooling=self.method.pooling,
        )
        return phi.float().cpu()


def load(
    path: str, device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["bf16", "fp32"] = "bf16"
) -> Pretrained:
    """The model of a run, a checkpoint or an exported folder; see :func:`pacl_scale.load`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    towers, (method,) = load_methods({PACL: path}, None, choose_device(device), dtype)
    return Pretrained(towers, method)
