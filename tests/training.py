"""Small training runs for tests: made-up patch tokens, a recipe, and the curve that it gives."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from pacl_scale import metrics
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig
from pacl_scale.encoders import TextEncoderConfig
from pacl_scale.engine import EngineConfig
from pacl_scale.optim import OptimConfig
from pacl_scale.train import TrainConfig

THINGS = ("dog", "boat", "tree", "cup")
TOKENS, WIDTH, SAMPLES, STEPS = 6, 8, 48, 6


def write_features(root: Path, poisoned: Collection[int] = ()) -> str:
    """Patch tokens in which a caption's thing can be told from one channel; those ``poisoned`` are not numbers."""
    layout = FeatureFormat(TOKENS, WIDTH, (2, 3), "bfloat16", {"source": "test"})
    random = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for shard in range(3):
        with webdataset.TarWriter(str(root / f"{shard:05d}.tar"), encoder=False) as tar:
            for number in range(shard * SAMPLES // 3, (shard + 1) * SAMPLES // 3):
                kind = int(random.integers(len(THINGS)))
                tokens = torch.from_numpy(random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32))
                tokens[:, :3, kind] += 4
                if number in poisoned:
                    tokens[:, :, 0] = float("nan")
                texts = {"captions": [f"a {THINGS[kind]} number {number}"], "nouns": [THINGS[kind]]}
                tar.write({"__key__": f"{number:07d}", "json": json.dumps(texts).encode(), **layout.pack(tokens)[0]})
    build_index(str(root), kind="features", extra=layout.to_dict())
    return str(root)


def settings_for(features: str, run: Path | str, **changes: Any) -> TrainConfig:
    """A recipe of a second; ``changes`` are keys of it."""
    values: dict[str, Any] = {
        "run": str(run),
        "steps": STEPS,
        "global_batch_size": 16,
        "log_every": 1,
        "data": DataConfig(root=features, patch_sample=4),
        "text": TextEncoderConfig(source="package", model="all-minilm-l6-v2"),
        "optim": OptimConfig(lr=0.01, warmup_steps=2),
        "engine": EngineConfig(zero_stage=1, precision="fp32"),
        "checkpoint": CheckpointConfig(every_steps=2),
    }
    return TrainConfig(**(values | changes))


def curve(run: Path) -> list[float]:
    """The loss of every step."""
    lines = metrics.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
