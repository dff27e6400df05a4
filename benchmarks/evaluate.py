"""Evaluation against a plain loop of the same forward passes; its memory at stride 4; whether two runs agree.

``python benchmarks/evaluate.py [--quick] [--json FILE]``. The paper's ViT-B/16 with its text tower in float32, of
random weights on drawn pictures: what is measured does not depend on what a tower has learned. For memory ``--quick``
computes one of the twelve blocks, whose activations take as much as those of twelve, with all weights in memory.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import VisionConfig, build_vision
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedConfig, AnnotatedPictures, open_annotated
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.rows import Row
from pacl_scale.evaluate.segmentation import evaluate_segmentation
from pacl_scale.model import build_embedder

DEPTH = 12
"""Blocks of ViT-B/16."""
CLASSES = 20
MANY_CLASSES = 171
"""As COCO-Stuff has."""
WIDTH_OUT = 384
BATCH = 7
PLAIN = Protocol(templates="single")


class RandomText:
    """A vector a text, by its letters."""

    width = WIDTH_OUT

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(N, D) float32."""
        seeds = [sum(map(ord, text)) for text in texts]
        return torch.stack([torch.randn(WIDTH_OUT, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def fingerprint(self) -> dict[str, Any]:
        """What rows say of it."""
        return {"random": True}


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


def towers_and_methods(blocks: int) -> tuple[Towers, list[Method]]:
    """The paper's ViT-B/16 in float32, of random weights, of which the first blocks are computed; two embedders."""
    last = blocks - 1 if blocks < DEPTH else -1
    vision = build_vision(VisionConfig(source="open_clip", model="ViT-B-16", weights="random", layer=last))
    torch.manual_seed(0)
    methods = []
    for name in ("untrained", "pacl"):
        embedder = build_embedder(EmbedderConfig(), vision.width, WIDTH_OUT).requires_grad_(False).eval()
        methods.append(Method(name, embedder, 10.0, "cosine", {"step": 0}))
    text: Any = RandomText()
    return Towers(vision, text, torch.device("cpu")), methods


def figures_of(rows: list[Row]) -> str:
    """All figures of an evaluation, in a few letters."""
    return hashlib.sha256(json.dumps([[r.scores, r.confusion, r.per_picture] for r in rows]).encode()).hexdigest()


def throughput(pictures: int, rounds: int) -> dict[str, Any]:
    """Pictures a second of the evaluation of two methods with the usual controls, and of a plain loop.

    The loop passes tensors of the same shapes through the tower and both embedders, and does nothing else: no file, no
    upsampling, no counts. Both take turns; the first round of each is for warming up.
    """
    towers, methods = towers_and_methods(DEPTH)
    with tempfile.TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", pictures)
        batch = torch.randn(BATCH, 3, 224, 304)
        figures, seconds, plain = set(), [], []
        for number in range(rounds + 1):
            started = time.perf_counter()
            figures.add(figures_of(evaluate_segmentation("noise", data, towers, methods, PLAIN, BATCH)))
            done = time.perf_counter()
            for _ in range(pictures // BATCH):
                tokens = towers.vision.encode(batch).tokens
                for method in methods:
                    method.embed(tokens)
            if number:
                seconds.append(done - started)
                plain.append(time.perf_counter() - done)
    ratios = [loop / whole for loop, whole in zip(plain, seconds, strict=True)]
    return {
        "pictures_per_s": pictures / statistics.median(seconds),
        "plain_pictures_per_s": pictures / statistics.median(plain),
        "over_plain_forward": statistics.median(ratios),
        "over_plain_forward_rounds": [round(ratio, 3) for ratio in ratios],
        "figures": sorted(figures),
    }


def memory(pictures: int, blocks: int, again: int) -> tuple[float, str]:
    """Peak resident MB of evaluating 171 classes at stride 4 and 448 pixels, and figures of ``again`` pictures.

    The whole model, both towers of it, is in memory, however few blocks are computed.
    """
    whole = open_clip.create_model("ViT-B-16")
    towers, methods = towers_and_methods(blocks)
    with tempfile.TemporaryDirectory() as folder:
        data = write_pictures(Path(folder) / "data", pictures, classes=MANY_CLASSES)
        protocol = Protocol(size=448, stride=4, templates="single", resize="square")
        evaluate_segmentation("noise", data, towers, methods[-1:], protocol, BATCH)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        del whole
        data = write_pictures(Path(folder) / "again", again)
        towers, methods = towers_and_methods(DEPTH)
        return peak, figures_of(evaluate_segmentation("noise", data, towers, methods, PLAIN, BATCH))


def main() -> int:
    """Measure and print; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="about 50 seconds on two cores")
    parser.add_argument("--json", help="file to write the figures to")
    words = parser.parse_args()
    pictures, rounds, blocks = (BATCH, 2, 1) if words.quick else (8 * BATCH, 7, DEPTH)
    # A process each: the peak is then of nothing else, and what both compute they share with nobody.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak, again = pool.apply(memory, (1 if words.quick else 2, blocks, pictures))
        found = pool.apply(throughput, (pictures, rounds))
    found["bit_identical"] = found.pop("figures") == [again]
    found |= {"peak_mb_stride4_448": peak, "peak_blocks_computed": blocks}
    text = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()})
    print(text)
    if words.json:
        Path(words.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
