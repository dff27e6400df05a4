"""What only a GPU can show: the CUDA kernels on it, and training there beside training on the CPU.

Skipped where there is none. Every training is a process of its own, as ZeRO 3 changes torch for good.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset
from torch import Tensor
from training import curve, settings_for

from pacl_scale import checkpoint, config, metrics
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig
from pacl_scale.distributed import DistributedConfig
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_vision
from pacl_scale.engine import EngineConfig
from pacl_scale.recorders import RecordConfig
from pacl_scale.similarity import patch_text_similarity
from pacl_scale.train import TrainConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

SMALL_VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize("pooling", ["cosine", "mean"])
@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [
        ((3, 196, 333, 512), torch.float32, 1e-5),
        ((3, 196, 333, 512), torch.bfloat16, 2e-2),
        ((3, 196, 333, 512), torch.float16, 5e-3),
        ((2, 49, 70, 384), torch.bfloat16, 2e-2),
        ((2, 1, 5, 8), torch.float32, 1e-5),
        ((2, 256, 100, 768), torch.float32, 1e-5),
        ((2, 577, 65, 768), torch.bfloat16, 2e-2),
        ((2, 1024, 65, 512), torch.float32, 1e-5),
    ],
)
def test_kernels_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype, bound: float, pooling: str) -> None:
    B, T, N, D = shape
    random = torch.Generator("cuda").manual_seed(T)
    draw = [torch.randn(size, generator=random, device="cuda") for size in ((B, T, D), (N, D), (B, N))]
    mask = torch.rand(B, T, generator=random, device="cuda") < 0.7
    mask[:, 0] = True
    found, again = (similarity_and_gradients(draw, dtype, "triton", pooling, mask) for _ in range(2))
    true = similarity_and_gradients(
        [draw[0].to(dtype), draw[1].to(dtype), draw[2]], torch.float64, "eager", pooling, mask
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not the same bits twice"
    for name, a, b in zip(("phi", "patches", "texts"), found, true, strict=False):
        assert (a.double() - b).abs().max() <= bound * b.abs().max().clamp(min=0.1), name
    assert abs(found[3] - true[3]).item() <= bound * (true[1].abs().sum().item() + 1)


def similarity_and_gradients(
    draw: list[Tensor], dtype: torch.dtype, backend: Any, pooling: Any, mask: Tensor
) -> tuple[Tensor, ...]:
    patches, texts = (x.to(dtype).clone().requires_grad_() for x in draw[:2])
    scale = torch.tensor(10.0, dtype=torch.float64, device="cuda", requires_grad=True)
    phi = patch_text_similarity(
        patches, texts, attention_scale=scale, backend=backend, pooling=pooling, patch_mask=mask
    )  # fmt: skip
    phi.backward(draw[2].to(phi.dtype))
    assert patches.grad is not None and texts.grad is not None and scale.grad is not None
    return phi.detach(), patches.grad, texts.grad, scale.grad


def test_zero_stages_and_the_cpu_give_one_curve(quick_features: str, tmp_path: Path) -> None:
    runs = {f"zero{stage}": EngineConfig(stage, "fp32") for stage in range(4)}
    settings = [settings_for(quick_features, tmp_path / name, engine=engine) for name, engine in runs.items()]
    micro = settings_for(quick_features, tmp_path / "micro", engine=EngineConfig(2, "fp32"), micro_batch_size=4)
    offload = EngineConfig(2, "fp32", offload_optimizer=True)
    offloaded = settings_for(quick_features, tmp_path / "offloaded", engine=offload)
    on_cpu = settings_for(quick_features, tmp_path / "cpu", distributed=DistributedConfig(device="cpu"))
    train_all([*settings, micro, offloaded, on_cpu])
    true = curve(tmp_path / "cpu")
    for name in (*runs, "micro", "offloaded"):
        assert curve(tmp_path / name) == pytest.approx(true, rel=1e-4), name
    assert all(line["device_mb"] > 0 for line in metrics.read_metrics(tmp_path / "zero2" / "metrics.jsonl"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision: Any, quick_features: str, tmp_path: Path) -> None:
    engine = EngineConfig(1, precision, loss_scale_power=8)
    settings = settings_for(quick_features, tmp_path / "run", engine=engine)
    train_all([settings])
    whole = curve(tmp_path / "run")
    assert whole[-1] < whole[0]
    folder = str(tmp_path / "run" / "checkpoints")
    last = checkpoint.steps_in(folder)[-1]
    _, wanted = checkpoint.load(checkpoint.resolve(str(tmp_path / "run")))
    shutil.rmtree(Path(checkpoint.resolve(str(tmp_path / "run"))))
    assert checkpoint.steps_in(folder)[-1] < last
    train_all([settings])
    assert curve(tmp_path / "run") == whole
    _, found = checkpoint.load(checkpoint.resolve(str(tmp_path / "run")))
    for part, tensors in wanted.items():
        assert all(torch.equal(found[part][name], tensor) for name, tensor in tensors.items()), part


def test_pictures_pass_towers_on_the_gpu_compiled_or_not(tmp_path: Path) -> None:
    model = tmp_path / "small.json"
    model.write_text(json.dumps(SMALL_VIT))
    changes: dict[str, Any] = {
        "data": DataConfig(root=write_pictures(tmp_path / "pictures")),
        "vision": VisionConfig(model=str(model), weights="random"),
        "text": TextEncoderConfig(model=str(model), weights="random"),
        "record": RecordConfig(profile_from=3, profile_steps=2, memory_snapshot=True),
    }
    plain = settings_for("", tmp_path / "plain", **changes, engine=EngineConfig(1, "bf16"))
    compiled = settings_for(
        "", tmp_path / "compiled", **changes, engine=EngineConfig(1, "bf16", compile_towers="inductor")
    )
    train_all([plain, compiled])
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=2e-2)
    lines = metrics.read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert all(line["device_mb"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert list((tmp_path / "plain").rglob("*.pickle")), "the memory snapshot"


@pytest.mark.parametrize("stride", [16, 4])
def test_tokens_are_those_of_the_cpu(stride: int, tmp_path: Path) -> None:
    model = tmp_path / "small.json"
    model.write_text(json.dumps(SMALL_VIT))
    pictures = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    config_ = VisionConfig(model=str(model), weights="random")
    there, here = (build_vision(config_, device).encode(pictures, stride) for device in ("cuda", "cpu"))
    assert there.grid == here.grid
    assert (there.tokens.cpu() - here.tokens).abs().max() <= 1e-4 * here.tokens.abs().max()


def train_all(every: list[TrainConfig]) -> None:
    """The command, once for each, side by side."""
    waiting = []
    for settings in every:
        file = Path(settings.run).with_suffix(".yaml")
        file.write_text(config.to_yaml(settings), encoding="utf-8")
        words = [sys.executable, "-m", "pacl_scale.train", "--config", str(file)]
        waiting.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=dict(os.environ)))
    for process in waiting:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


def write_pictures(root: Path, count: int = 48) -> str:
    """JPEGs of 96 px of one colour each, whose captions name it."""
    random = np.random.default_rng(0)
    root.mkdir()
    with webdataset.TarWriter(str(root / "00000.tar"), encoder=False) as tar:
        for number in range(count):
            kind = number % 3
            pixels = random.integers(0, 80, (96, 96, 3), dtype=np.uint8)
            pixels[..., kind] += 150
            texts = {"captions": [f"a {('red', 'green', 'blue')[kind]} square"], "nouns": []}
            tar.write(
                {"__key__": f"{number:07d}", "jpg": simplejpeg.encode_jpeg(pixels), "json": json.dumps(texts).encode()}
            )
    build_index(str(root))
    return str(root)
