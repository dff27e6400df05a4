"""Prompt templates, and the vector of a word as the mean over them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pacl_scale.encoders.text import TextEncoder

PAPER_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven best templates, which PACL uses for its noun prompts and for the class vectors."""


def prompt_ensemble(
    text_encoder: "TextEncoder", words: Sequence[str], templates: Sequence[str] = PAPER_TEMPLATES
) -> Tensor:
    """One unit vector per word: the mean of its prompts' unit vectors, normalised again (CLIP, section 3.1.4).

    Args:
        text_encoder: the frozen text tower.
        words: N class names.
        templates: each holds ``{}`` once, where the word goes.

    Returns:
        (N, D) float32, each row of length 1.

    Raises:
        ValueError: no template, or one without a place for the word.
    """
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError("there must be at least one template, and each must hold {} once")
    prompts = [template.replace("{}", word) for word in words for template in templates]
    vectors_ND = F.normalize(text_encoder.encode(prompts), dim=-1)
    return F.normalize(vectors_ND.unflatten(0, (len(words), len(templates))).mean(dim=1), dim=-1)
