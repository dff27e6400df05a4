"""How a picture is shown to a model and how its scores become labels: everything a figure depends on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacl_scale.data.decode import FILTERS, normalise
from pacl_scale.encoders import PAPER_TEMPLATES, Preprocess, TextEncoder, prompt_ensemble

# C classes, h x w the grid of patches, H x W the picture as it came.

TEMPLATES = {"paper": PAPER_TEMPLATES, "single": ("a photo of a {}.",), "none": ("{}",)}

CLASSES_AT_ONCE = 32
"""Classes upsampled together: bounds memory to 32 full-size float maps, whatever the number of classes."""


@dataclass(frozen=True)
class Protocol:
    """The settings of a segmentation measurement; recorded in every row."""

    name: str = "whole"
    """Short name of these settings; part of the row's file name."""

    resize: Literal["short", "square"] = "short"
    """"short": the short side becomes `size`, the aspect ratio stays; "square": both sides become `size`.
    Either way each side is then rounded to whole patches. Never cropped: the model sees the whole picture."""

    size: int = 0
    """Pixels of the short side (or of both); 0 takes the vision tower's own image size."""

    templates: Literal["paper", "single", "none"] = "paper"
    """Prompts around a class word: the paper's seven, "a photo of a {}.", or the bare word."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("protocol.size cannot be negative")
        if not self.name or not self.name.replace("_", "").replace(".", "").isalnum():
            raise ValueError("protocol.name may hold letters, digits, '_' and '.' only")

    def record(self) -> dict[str, Any]:
        """All that fixes the figure, for the row: the settings, and what is the same in every protocol."""
        return dataclasses.asdict(self) | {
            "templates": list(TEMPLATES[self.templates]),
            "window": "whole picture",
            "word_vector": "normalised mean of its normalised prompts",
            "class_vector": "normalised mean of its words' vectors",
            "score": "cosine of embedded patch and class vector",
            "upsampling": "bilinear (half-pixel centres) to the picture's original size, then arg-max",
            "background_rule": "none",
            "scored_at": "original size",
        }

    def input_size(self, height: int, width: int, native: int, patch_size: int) -> tuple[int, int]:
        """Height and width at which a picture of ``height`` x ``width`` pixels enters the vision tower."""
        size = self.size or native
        scale = size / min(height, width)
        sides = (size, size) if self.resize == "square" else (height * scale, width * scale)
        rows, columns = (max(1, round(side / patch_size)) for side in sides)
        return rows * patch_size, columns * patch_size


def as_input(picture: Image.Image, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """A picture resized to ``size`` (height, width) and normalised as the tower wants: (3, H, W) float32."""
    resized = picture.convert("RGB").resize((size[1], size[0]), FILTERS[preprocess.interpolation])
    return normalised(np.asarray(resized), preprocess)


def normalised(pixels_HW3: np.ndarray, preprocess: Preprocess) -> Tensor:
    """RGB pixels of 0 to 255 as the numbers that the tower expects: (3, H, W) float32."""
    pixels_3HW = np.empty((3, *pixels_HW3.shape[:2]), np.float32)
    normalise(pixels_HW3, preprocess, pixels_3HW)
    return torch.from_numpy(pixels_3HW)


def class_vectors(text_encoder: TextEncoder, synonyms: Sequence[Sequence[str]], protocol: Protocol) -> Tensor:
    """One unit vector a class, (C, D) float32: the mean over its words' prompt ensembles, normalised."""
    templates = TEMPLATES[protocol.templates]
    words = [prompt_ensemble(text_encoder, words, templates).mean(dim=0) for words in synonyms]
    return F.normalize(torch.stack(words), dim=-1)


def patch_scores(patches_BTD: Tensor, vectors_CD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines of embedded patches (B, h*w, D) and unit class vectors (C, D) as maps (B, C, h, w)."""
    scores_BTC = F.normalize(patches_BTD.float(), dim=-1) @ vectors_CD.T
    return scores_BTC.transpose(1, 2).unflatten(2, grid)


def best_class(scores_Chw: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Maps (C, h, w) upsampled to the picture's size: the best class (H, W) int64 and its score (H, W).

    Works through the classes in portions of :data:`CLASSES_AT_ONCE`; on a tie the earlier portion wins.
    """
    best_HW, class_HW = None, None
    for start in range(0, len(scores_Chw), CLASSES_AT_ONCE):
        portion = scores_Chw[None, start : start + CLASSES_AT_ONCE]
        portion_CHW = F.interpolate(portion, size=(height, width), mode="bilinear", align_corners=False)[0]
        value_HW, index_HW = portion_CHW.max(dim=0)
        if best_HW is None or class_HW is None:
            best_HW, class_HW = value_HW, index_HW
        else:
            better_HW = value_HW > best_HW
            best_HW = torch.where(better_HW, value_HW, best_HW)
            class_HW = torch.where(better_HW, index_HW + start, class_HW)
    assert best_HW is not None and class_HW is not None, "at least one class"
    return class_HW, best_HW
