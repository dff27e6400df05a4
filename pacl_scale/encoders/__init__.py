"""The frozen towers: pictures to patch tokens, strings to vectors.

Two small protocols, :class:`VisionEncoder` and :class:`TextEncoder`, are all that the rest of the project knows.
Where a tower comes from is one word of its configuration (``source``) and one module here (``from_*.py``).
"""

from pacl_scale.encoders.templates import PAPER_TEMPLATES, prompt_ensemble
from pacl_scale.encoders.text import TextEncoder, TextEncoderConfig, build_text
from pacl_scale.encoders.vision import PatchTokens, Placement, Preprocess, VisionConfig, VisionEncoder, build_vision

__all__ = [
    "PAPER_TEMPLATES",
    "PatchTokens",
    "Placement",
    "Preprocess",
    "TextEncoder",
    "TextEncoderConfig",
    "VisionConfig",
    "VisionEncoder",
    "build_text",
    "build_vision",
    "prompt_ensemble",
]
