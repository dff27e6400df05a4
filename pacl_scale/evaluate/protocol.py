"""How a picture is shown to a model and how its scores become labels: everything a figure depends on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacl_scale.data.decode import FILTERS, normalise
from pacl_scale.encoders import PAPER_TEMPLATES, Preprocess, TextEncoder, prompt_ensemble

# C classes, N word vectors, h x w the grid of patches, H x W the picture as it came.

TemplateSet = Literal["paper", "imagenet", "single", "none"]


def template_set(name: TemplateSet) -> tuple[str, ...]:
    """The prompts that :attr:`Protocol.templates` names, with ``{}`` in the word's place."""
    if name == "imagenet":
        # Seconds to import, and commands that never ask for these know this module.
        import open_clip

        # It keeps CLIP's eighty as functions of the word.
        return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    return {"paper": tuple(PAPER_TEMPLATES), "single": ("a photo of a {}.",), "none": ("{}",)}[name]


@dataclass(frozen=True)
class Protocol:
    """The settings of a segmentation measurement; recorded in every row."""

    name: str = "whole"
    """Short name of these settings; part of the row's file name."""

    crop: Literal["none", "centre"] = "none"
    """"centre": picture and mask are first cut to the square in their middle, and only that is scored."""

    resize: Literal["short", "square"] = "short"
    """"short": the short side becomes `size`, the aspect ratio stays; "square": both sides become `size`.
    Either way each side is then rounded to whole patches."""

    size: int = 0
    """Pixels of the short side (or of both); 0 takes the vision tower's own image size."""

    window: int = 0
    """Side in pixels of square windows that slide over the resized picture and pass the tower one by one, rounded to
    whole patches; 0 shows the picture whole."""

    window_step: int = 0
    """Pixels between windows, rounded to whole patches; 0 is half a window. The last window ends at the edge."""

    stride: int = 0
    """Pixels between neighbouring patches; 0 is the patch size. Less gives overlapping patches (the paper: 4)."""

    scales: tuple[float, ...] = (1.0,)
    """The picture is shown at `size` times each of these, and the scores are averaged."""

    flip: bool = False
    """Also show every view mirrored, and average."""

    templates: TemplateSet = "paper"
    """Prompts around a class word: the paper's seven, CLIP's eighty, "a photo of a {}.", or the bare word."""

    synonyms: Literal["mean", "max", "first"] = "mean"
    """A class of several words: one vector, their normalised mean; or the best of their scores on each patch; or the
    first word alone."""

    background: Literal["none", "cosine", "probability", "entropy", "words"] = "none"
    """When a pixel becomes background. "cosine": its best score is below `background_threshold`. "probability": the
    largest softmax of `background_scale` times the scores is. "entropy": the entropy of that softmax is above
    `background_threshold`. "words": one of `background_words` scores best."""

    background_where: Literal["scored", "always"] = "scored"
    """"scored": the rule is applied to data sets that score background as a class. "always": also to the others,
    where a pixel of a class that becomes background is lost."""

    background_threshold: float = 0.0
    """See `background`."""

    background_scale: float = 100.0
    """What scores are multiplied by before the softmax; 100 is where CLIP's logit scale ends up. The paper does not
    state its own."""

    log_base: Literal["e", "2"] = "e"
    """Base of the entropy's logarithm; the paper does not state it."""

    background_words: list[str] = field(default_factory=lambda: ["background"])
    """Words of the rule "words"; the best of their scores counts, whatever `synonyms` says."""

    boundary: float = 0.02
    """Width of the band for boundary IoU, as a share of the picture's diagonal; 0 leaves that score out."""

    def __post_init__(self) -> None:
        for key in ("size", "window", "window_step", "stride"):
            if getattr(self, key) < 0:
                raise ValueError(f"protocol.{key} cannot be negative")
        if self.window_step and not self.window:
            raise ValueError("protocol.window_step needs a protocol.window")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError("protocol.scales must be positive, at least one")
        if self.background_scale <= 0:
            raise ValueError("protocol.background_scale must be positive")
        if not 0 <= self.boundary < 1:
            raise ValueError("protocol.boundary is a share of the diagonal: at least 0, below 1")
        if self.background == "words" and not any(word.strip() for word in self.background_words):
            raise ValueError("protocol.background=words needs protocol.background_words")
        if not self.name or not self.name.replace("_", "").replace(".", "").isalnum():
            raise ValueError("protocol.name may hold letters, digits, '_' and '.' only")

    def record(self) -> dict[str, Any]:
        """All that fixes the figure, for the row: the settings, and what is the same in every protocol."""
        return dataclasses.asdict(self) | {
            "templates": list(template_set(self.templates)),
            "template_set": self.templates,
            "scales": list(self.scales),
            "word_vector": "normalised mean of its normalised prompts",
            "score": "cosine of embedded patch and word vector",
            "upsampling": "bilinear between patch centres, to the picture's original size, then arg-max",
            "scored_at": "original size",
        }

    def background_applies(self, scored: bool) -> bool:
        """Whether the background rule is applied to a data set that does (or does not) score background."""
        return self.background != "none" and (scored or self.background_where == "always")

    def input_size(self, height: int, width: int, native: int, patch_size: int, scale: float = 1.0) -> tuple[int, int]:
        """Height and width at which a picture of ``height`` x ``width`` pixels enters the vision tower."""
        size = (self.size or native) * scale
        ratio = size / min(height, width)
        sides = (size, size) if self.resize == "square" else (height * ratio, width * ratio)
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


@dataclass(frozen=True)
class ClassVectors:
    """Unit vectors of words and the class that each belongs to."""

    vectors_ND: Tensor
    owners_N: Tensor
    """(N,) int64: position of each vector's class, ascending."""

    @property
    def classes(self) -> int:
        """C; background words, if any, are the last one."""
        return int(self.owners_N[-1]) + 1

    def to(self, device: torch.device) -> "ClassVectors":
        """The same on ``device``."""
        return ClassVectors(self.vectors_ND.to(device), self.owners_N.to(device))


def class_vectors(text_encoder: TextEncoder, synonyms: Sequence[Sequence[str]], protocol: Protocol) -> Tensor:
    """One unit vector a class, (C, D) float32: the mean over its words' prompt ensembles, normalised."""
    templates = template_set(protocol.templates)
    words = [prompt_ensemble(text_encoder, words, templates).mean(dim=0) for words in synonyms]
    return F.normalize(torch.stack(words), dim=-1)


def vectors_for(
    text_encoder: TextEncoder, synonyms: Sequence[Sequence[str]], protocol: Protocol, background: bool
) -> ClassVectors:
    """The vectors of classes under a protocol; with ``background``, those of its background words as a last class."""
    if protocol.synonyms == "max":
        words = [(word, c) for c, alike in enumerate(synonyms) for word in alike]
        vectors_ND = prompt_ensemble(text_encoder, [word for word, _ in words], template_set(protocol.templates))
        owners = [c for _, c in words]
    else:
        asked = [alike[:1] for alike in synonyms] if protocol.synonyms == "first" else synonyms
        vectors_ND = class_vectors(text_encoder, asked, protocol)
        owners = list(range(len(synonyms)))
    if background:
        rest = prompt_ensemble(text_encoder, protocol.background_words, template_set(protocol.templates))
        vectors_ND = torch.cat([vectors_ND, rest])
        owners += [len(synonyms)] * len(rest)
    return ClassVectors(vectors_ND, torch.tensor(owners))


def patch_scores(patches_BTD: Tensor, vectors: Tensor | ClassVectors, grid: tuple[int, int]) -> Tensor:
    """Scores of embedded patches (B, h*w, D) as maps (B, C, h, w).

    The score of a class is the cosine with its unit vector, or the largest with its several.
    """
    if isinstance(vectors, Tensor):
        vectors = ClassVectors(vectors, torch.arange(len(vectors), device=vectors.device))
    scores_BTC = F.normalize(patches_BTD.float(), dim=-1) @ vectors.vectors_ND.T
    if vectors.classes < scores_BTC.shape[2]:
        owners_BTN = vectors.owners_N.expand(scores_BTC.shape)
        empty_BTC = scores_BTC.new_full((*scores_BTC.shape[:2], vectors.classes), -torch.inf)
        scores_BTC = empty_BTC.scatter_reduce(2, owners_BTN, scores_BTC, "amax")
    return scores_BTC.transpose(1, 2).unflatten(2, grid)
