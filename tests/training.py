"""Small training runs for tests: made-up patch tokens, a recipe, and the curve that it gives."""

import json
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset

from pacl_scale import metrics
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.captions import PictureTexts, possible_texts
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.encoders import TextEncoderConfig
from pacl_scale.engine import EngineConfig
from pacl_scale.optim import OptimConfig
from pacl_scale.train import TrainConfig

THINGS = ("dog", "boat", "tree", "cup")
TOKENS, WIDTH, SAMPLES, STEPS = 6, 8, 48, 6
VECTORS = VectorFormat(16, {"source": "test"}, {"source": "package", "model": "all-minilm-l6-v2"})


def write_features(root: Path, poisoned: Collection[int] = (), vectors: VectorFormat | None = None) -> str:
    """Patch tokens in which a caption's thing can be told from one channel; those ``poisoned`` are not numbers.

    With ``vectors`` (:data:`VECTORS`) the texts' vectors lie beside them, so that no text tower is needed.
    """
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
                members = {"json": json.dumps(texts).encode(), **layout.pack(tokens)[0]}
                if vectors:
                    every = possible_texts(PictureTexts(**texts))
                    members |= vectors.pack(torch.stack([made_up_vector(text) for text in every]))
                tar.write({"__key__": f"{number:07d}", **members})
    build_index(str(root), kind="features", extra=layout.to_dict() | (vectors.to_dict() if vectors else {}))
    return str(root)


def made_up_vector(text: str) -> torch.Tensor:
    """A text's vector, the sum of its words' random ones."""
    seeds = [zlib.crc32(word.encode()) for word in text.split()]
    return sum((torch.randn(VECTORS.width, generator=torch.Generator().manual_seed(s)) for s in seeds), torch.zeros(1))


@contextmanager
def float16_on_cpu() -> Iterator[None]:
    """A CPU computes in float16, if slowly, though DeepSpeed says that it does not."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    cpu: Any = type(get_accelerator())
    types = [torch.float32, torch.bfloat16, torch.float16]
    with (
        mock.patch.object(cpu, "is_fp16_supported", lambda self: True),
        mock.patch.object(cpu, "supported_dtypes", lambda self: types),
    ):
        yield


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
