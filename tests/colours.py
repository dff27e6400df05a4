"""Towers that see mean colours and read colour words, so that a test knows what the right answer is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacl_scale import checkpoint
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import PatchTokens, Preprocess, TextEncoderConfig, VisionConfig
from pacl_scale.evaluate import methods
from pacl_scale.model import build_embedder

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SYNONYMS = {"crimson": "red"}
PATCH = 4


class ColourVision:
    """Patch tokens (B, T, 3) are the mean red, green and blue of each patch, less one half; any stride."""

    width, patch_size = 3, PATCH
    blocks = ()
    preprocess = Preprocess(image_size=16, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), interpolation="bilinear")

    def __init__(self) -> None:
        self.pictures_encoded = 0

    def encode(self, images_BCHW: Tensor, stride: int | None = None) -> PatchTokens:
        self.pictures_encoded += len(images_BCHW)
        means_BChw = F.avg_pool2d(images_BCHW, PATCH, stride or PATCH)
        return PatchTokens(means_BChw.flatten(2).transpose(1, 2), (means_BChw.shape[2], means_BChw.shape[3]))

    def fingerprint(self) -> dict[str, Any]:
        return {"colours": True}


class ColourText:
    """The vector (3,) of a text is the sum of the colours that it names."""

    width = 3

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self._colour(text) for text in texts], dtype=torch.float32)

    def fingerprint(self) -> dict[str, Any]:
        return {"colours": True}

    def _colour(self, text: str) -> list[float]:
        words = [SYNONYMS.get(word, word) for word in text.replace(".", " ").split()]
        return [sum(RGB[word][channel] / 255 for word in words if word in RGB) + 0.01 for channel in range(3)]


def install(monkeypatch: pytest.MonkeyPatch) -> ColourVision:
    """Let evaluation build these towers, whatever a checkpoint says; returns the one that sees."""
    vision = ColourVision()
    monkeypatch.setattr(methods, "build_vision", lambda config, device, dtype: vision)
    monkeypatch.setattr(methods, "build_text", lambda config, device, dtype: ColourText())
    return vision


def write_run(
    run: Path,
    *,
    right: bool = True,
    width_out: int = 3,
    step: int = 7,
    loss: Mapping[str, Any] | None = None,
    towers: Mapping[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    **vision: Any,
) -> Path:
    """A run with a checkpoint whose embedder passes colours through (or takes red for green, if not ``right``).

    ``beside`` are other weights in the checkpoint.
    """
    embedder = build_embedder(EmbedderConfig(), 3, width_out)
    for parameter in embedder.parameters():
        torch.nn.init.zeros_(parameter)
    order = [0, 1, 2] if right else [1, 0, 2]
    with torch.no_grad():
        embedder.skip.weight[:3] = torch.eye(3)[order]
    config = {
        "vision": VisionConfig(**vision).__dict__,
        "text": TextEncoderConfig().__dict__,
        "embedder": EmbedderConfig().__dict__,
        "loss": {"attention_scale": 10.0, "pooling": "cosine"} | dict(loss or {}),
    }
    master = {f"embedder.{name}": weight for name, weight in embedder.state_dict().items()}
    master |= beside or {}
    state = {"master": master, "exp_avg": {}, "exp_avg_sq": {}}
    made_for = towers or {"vision": {"colours": True}, "text": {"colours": True}}
    info = {"config": config, "width_in": 3, "width_out": width_out, "data": {}, "towers": made_for}
    checkpoint.save(str(run / "checkpoints"), step, state, info, keep_last=1)
    return run


def write_pictures(root: Path, count: int = 5) -> Path:
    """Pictures with a block of each of two colours, masks 1 red, 2 green, 3 blue, 0 background, 255 void."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    words = list(RGB)
    for number in range(count):
        height, width = (32, 48) if number % 2 else (48, 32)
        first, second = number % 3, (number + 1) % 3
        pixels = np.zeros((height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        pixels[: height // 2], mask[: height // 2] = RGB[words[first]], first + 1
        pixels[height // 2 :], mask[height // 2 :] = RGB[words[second]], second + 1
        mask[0], mask[:, 0] = 255, 0
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    (root / "classes.yaml").write_text(
        "words: {1: red, 2: green, 3: blue}\nbackground: 0\n"
        "groups:\n  warm: {classes: [1]}\n  other_words: {classes: [1], words: {1: crimson}}\n"
    )
    return root


def write_captions(root: Path) -> Path:
    """One picture a colour with two captions each, the second of which may say the same as another's."""
    (root / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for word, colour in RGB.items():
        Image.new("RGB", (16, 16), colour).save(root / "images" / f"{word}.png")
        lines += [f"{word}.png,something {word}", f'{word}.png,"a {word}, {word} thing"']
    (root / "val.csv").write_text("\n".join(lines) + "\n")
    return root / "val.csv"


def pixels(path: Path) -> np.ndarray:
    """The values of a picture file; of a palette PNG, the indices."""
    with Image.open(path) as picture:
        return np.array(picture)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
