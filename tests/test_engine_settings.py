"""fp16 with loss scaling, offload to the CPU, sharded and compiled towers: other ways to the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training import curve, float16_on_cpu, settings_for

from pacl_scale import checkpoint, engine, metrics
from pacl_scale.distributed import World
from pacl_scale.encoders import VisionConfig, build_vision
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import UserError
from pacl_scale.signals import StopRequest
from pacl_scale.train import TrainConfig, train

pytestmark = [pytest.mark.distributed, pytest.mark.weights]


def train_all(world: World, runs: list[TrainConfig]) -> None:
    """Train; a run called "resumed" is stopped at once and goes on."""
    stop_at_once = StopRequest()
    stop_at_once.name = "SIGUSR1"
    with float16_on_cpu():
        for settings in runs:
            if not train(settings, world, stop_at_once if settings.run.endswith("resumed") else None):
                assert train(settings, world)


@pytest.fixture(scope="module")
def runs(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe in several precisions and places; starting ranks takes longer than the runs."""
    folder = tmp_path_factory.mktemp("runs")
    doubled = EngineConfig(2, "fp16", loss_scale_power=8, loss_scale_window=3)
    run_ranks(
        2,
        train_all,
        [
            settings_for(quick_features, folder / "fp32"),
            settings_for(quick_features, folder / "offload", engine=EngineConfig(1, "fp32", offload_optimizer=True)),
            settings_for(quick_features, folder / "fp16", engine=EngineConfig(1, "fp16", loss_scale_power=10)),
            settings_for(quick_features, folder / "doubled", engine=doubled),
            settings_for(quick_features, folder / "doubled-resumed", engine=doubled),
            settings_for(
                quick_features, folder / "too-large", engine=EngineConfig(1, "fp16", loss_scale_power=28), steps=20
            ),
        ],
    )
    return folder


def test_an_offloaded_optimizer_gives_the_same_curve(runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / "offload"), curve(runs / "fp32"), rtol=2e-5)


def test_fp16_stays_near(runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / "fp16"), curve(runs / "fp32"), rtol=2e-3)
    assert curve(runs / "fp16") != curve(runs / "fp32")


def test_fp16_resumes_bit_for_bit_with_its_loss_scale(runs: Path) -> None:
    assert curve(runs / "doubled-resumed") == curve(runs / "doubled")
    names = ("doubled", "doubled-resumed")
    whole, again = (checkpoint.read_state(checkpoint.resolve(str(runs / name))) for name in names)
    assert whole["loss_scaler"] == again["loss_scaler"]
    # Doubled by then, so what was resumed is not what a run begins with.
    assert whole["loss_scaler"]["cur_scale"] > 2**8


def test_a_loss_scale_that_is_too_large_finds_itself(runs: Path) -> None:
    lines = metrics.read_metrics(runs / "too-large" / "metrics.jsonl")
    assert lines[0]["overflows"] > 0
    assert lines[-1]["overflows"] < len(lines)
    assert lines[-1]["loss_scale"] < 2**28
    assert lines[-1]["bad_steps"] == 0
    assert checkpoint.read_state(checkpoint.resolve(str(runs / "too-large")))["updates"] == 20 - lines[-1]["overflows"]


def tokens_of(world: World) -> dict[str, torch.Tensor]:
    config = VisionConfig(source="timm", model="vit_tiny_patch16_224", weights="random", image_size=32)
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, settings in {
        "plain": EngineConfig(precision="fp32"),
        "sharded": EngineConfig(precision="fp32", shard_towers=True),
        "half sharded": EngineConfig(precision="bf16", shard_towers=True),
        "compiled": EngineConfig(precision="fp32", compile_towers="aot_eager"),
    }.items():
        tower = build_vision(config, world.device, settings.dtype, shard=engine.shard_of_towers(settings, world))
        engine.compile_tower(settings, tower.blocks)
        # Twice: a block that was gathered for one pass has to let go of it before the next.
        tower.encode(pictures)
        found[name] = tower.encode(pictures).tokens
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in tower.blocks[0].parameters())
        found[f"{name} numbers"] = torch.tensor(held)
    return found


def test_sharded_and_compiled_towers_give_the_same_tokens() -> None:
    for found in run_ranks(2, tokens_of):
        torch.testing.assert_close(found["sharded"], found["plain"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["compiled"], found["plain"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["half sharded"].float(), found["plain"], rtol=0.1, atol=0.1)
        assert found["sharded numbers"] <= found["plain numbers"] // 2 + 1


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="needs engine.zero_stage"):
        EngineConfig(0, offload_optimizer=True)
    with pytest.raises(ValueError, match="fp16 needs"):
        EngineConfig(0, "fp16")
    with pytest.raises(ValueError, match="exclude each other"):
        EngineConfig(shard_towers=True, compile_towers="inductor")
    with pytest.raises(UserError, match="no backend 'nonsense'"):
        engine.compile_tower(EngineConfig(compile_towers="nonsense"), [])
