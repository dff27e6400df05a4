"""Evaluation against a plain loop of the same forward passes; its memory at stride 4; whether two runs agree.

``python benchmarks/evaluate.py [--quick] [--json FILE]``. Towers of random weights on drawn pictures: what is
measured does not depend on what a tower has learned. Both are of the paper's ViT-B/16 in float32; its activations take
as much after two blocks as after twelve, so for memory only two are computed.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import VisionConfig, build_vision
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedConfig, AnnotatedPictures, open_annotated
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.segmentation import evaluate_segmentation
from pacl_scale.model import build_embedder

CLASSES = 20
MANY_CLASSES = 171
"""As COCO-Stuff has."""
WIDTH_OUT = 384
BATCH = 8


class RandomText:
    """A vector a text, by its letters."""

    width = WIDTH_OUT

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(N, D) float32."""
        seeds = [sum(map(ord, text)) for text in texts]
        return torch.stack([torch.randn(WIDTH_OUT, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def write_pictures(
    root: Path, count: int, width: int = 500, height: int = 375, classes: int = CLASSES
) -> AnnotatedPictures:
    """Noise of VOC's size with masks of blocks."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / "images" / f"{number:04d}.jpg", quality=90)
        mask = random.integers(1, classes + 1, (5, 5), dtype=np.uint8)
        Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST).save(
            root / "masks" / f"{number:04d}.png"
        )
    words = ", ".join(f"{number}: thing{number}" for number in range(1, classes + 1))
    (root / "classes.yaml").write_text(f"words: {{{words}}}\n")
    return open_annotated(AnnotatedConfig(str(root)))


def towers_and_method(model: str, layer: int = -1) -> tuple[Towers, Method]:
    """A frozen tower in float32, cut after block ``layer``, and a random embedder."""
    vision = build_vision(VisionConfig(source="timm", model=model, weights="random", layer=layer))
    torch.manual_seed(0)
    embedder = build_embedder(EmbedderConfig(), vision.width, WIDTH_OUT).requires_grad_(False).eval()
    text: Any = RandomText()
    return Towers(vision, text, torch.device("cpu")), Method("pacl", embedder, 10.0, "cosine", {})


def throughput(pictures: int, rounds: int) -> dict[str, Any]:
    """Pictures a second of the evaluation and of a loop over the same batches, in turns; and whether runs agree."""
    towers, method = towers_and_method("vit_base_patch16_224")
    with tempfile.TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", pictures)
        batch = torch.randn(BATCH, 3, 224, 304)
        figures, seconds, plain = [], [], []
        for number in range(rounds + 1):
            started = time.perf_counter()
            rows = evaluate_segmentation("noise", data, towers, [method], Protocol(templates="single"), BATCH, [])
            done = time.perf_counter()
            for _ in range(pictures // BATCH):
                method.embed(towers.vision.encode(batch).tokens)
            if number:
                seconds.append(done - started)
                plain.append(time.perf_counter() - done)
            figures.append(json.dumps([rows[0].scores, rows[0].confusion, rows[0].per_picture]))
    return {
        "pictures_per_s": pictures / min(seconds),
        "plain_pictures_per_s": pictures / min(plain),
        "over_plain_forward": min(plain) / min(seconds),
        "bit_identical": len(set(figures)) == 1,
    }


def peak_mb(pictures: int) -> float:
    """Largest resident memory in MB of a process that evaluates 171 classes at stride 4 and 448 pixels."""
    towers, method = towers_and_method("vit_base_patch16_224", layer=1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", pictures, classes=MANY_CLASSES)
        protocol = Protocol(size=448, stride=4, templates="single", resize="square")
        evaluate_segmentation("noise", data, towers, [method], protocol, BATCH, [])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Measure and print; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="within 50 seconds on two cores")
    parser.add_argument("--json", help="file to write the figures to")
    words = parser.parse_args()
    # A process of its own: this one's peak is then of nothing else.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(peak_mb, (1 if words.quick else 4,))
    found = throughput(*((8, 1) if words.quick else (128, 5))) | {"peak_mb_stride4_448": memory}
    text = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()})
    print(text)
    if words.json:
        Path(words.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
