"""The plan: its counts are those of real steps on 1 to 8 ranks; its command says what a run will need."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from pacl_scale import config
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_text, build_vision
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import UserError
from pacl_scale.plan import command, main, work
from pacl_scale.plan.command import PlanConfig, make_plan
from pacl_scale.plan.counters import counted_steps, tower_for
from pacl_scale.plan.estimate import Assumptions
from pacl_scale.plan.gpus import GPUS, gpu_named, gpu_of_device
from pacl_scale.plan.work import Shapes
from pacl_scale.train import TrainConfig

PICTURES = 128


def cells(world: int) -> list[tuple[Shapes, EngineConfig]]:
    """Shapes whose peak lies in different phases, and every ZeRO stage; 3 comes last, it changes the process."""
    large = {"global_batch": PICTURES, "world": world, "patches": 49, "width_in": 96, "hidden": 64, "width": 64}
    small = {"global_batch": 64, "world": world, "patches": 4, "width_in": 400, "hidden": 350, "width": 350}
    table = {"global_batch": 1024, "world": world, "patches": 8, "width_in": 32, "hidden": 32, "width": 32}
    unfrozen = {"tail": work.vision_tail(tower_for(96)), "text_hidden": 48}
    tail = {"global_batch": 64, "world": world, "patches": 16, "width_in": 96, "hidden": 64, "width": 64, **unfrozen}
    return [
        (Shapes(**large, accumulation=1), EngineConfig(1, "bf16")),
        (Shapes(**large, accumulation=4, pooling="mean"), EngineConfig(2, "fp32")),
        (Shapes(**table, accumulation=1), EngineConfig(0, "fp32")),
        (Shapes(**small, accumulation=2, learn_temperature=False), EngineConfig(1, "bf16")),
        (Shapes(**tail, accumulation=1), EngineConfig(1, "bf16")),
        (Shapes(**tail, accumulation=2), EngineConfig(2, "fp32")),
        (Shapes(**small, accumulation=2), EngineConfig(3, "bf16")),
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_counts_are_those_of_real_steps(world: int) -> None:
    (found, *_) = run_ranks(world, counted_steps, cells(world))
    for (shapes, settings), cell in zip(cells(world), found, strict=True):
        for name, value in cell["counted"].items():
            assert cell["planned"][name] == pytest.approx(value, rel=0.05), (world, shapes, settings, name)
        assert cell["counted"].keys() == cell["planned"].keys()
        # What a step holds for a while under stage 3 is not planned for.
        assert ("peak" in cell["counted"]) == (settings.zero_stage != 3)


def plan_of(*words: str) -> command.Plan:
    return make_plan(config.parse(PlanConfig, words, "plan"))


TINY = (
    "vision.source=timm",
    "vision.model=vit_tiny_patch16_224",
    "vision.image_size=64",
    "text.source=package",
    "text.model=all-minilm-l6-v2",
    "global_batch_size=1024",
)


@pytest.mark.weights
def test_towers_are_counted_as_their_layers_say() -> None:
    vision = work.vision_tower(
        build_vision(VisionConfig(source="timm", model="vit_tiny_patch16_224", weights="random"))
    )
    assert vision is not None
    tokens, width = 197, 192
    blocks = 12 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    assert vision.flops == blocks + 2 * 196 * width * 3 * 16**2
    assert (vision.tokens, vision.width, vision.blocks) == (196, width, 12)
    text = work.text_tower(build_text(TextEncoderConfig(source="package", model="all-minilm-l6-v2")), 10)
    # 6 layers of 12 x 384^2 numbers, 16 tokens once padded.
    assert text.flops == pytest.approx(6 * (2 * 16 * 12 * 384**2 + 4 * 16**2 * 384), rel=0.02)


@pytest.mark.weights
def test_more_gpus_take_less_time_until_something_else_limits() -> None:
    plan = plan_of(*TINY, "gpu=v100", "nodes=2")
    seconds = [one.seconds for one in plan.scaling]
    assert [one.gpus for one in plan.scaling] == [2**n for n in range(11)]
    assert all(best <= worst for best, worst in seconds)
    assert all(later[1] <= earlier[1] * 1.001 for earlier, later in zip(seconds, seconds[1:], strict=False))
    assert plan.scaling[0].limit in ("gpu", "decoding")
    assert plan.scaling[-1].limit == "store"
    assert plan.here.gpus == 16
    assert sum(plan.memory.values()) == plan.here.memory_bytes
    faster = plan_of(*TINY, "gpu=h100", "nodes=2")
    assert faster.here.parts_s["gpu"] < plan.here.parts_s["gpu"]


@pytest.mark.weights
def test_accumulation_costs_time_and_saves_memory() -> None:
    whole, parts = (plan_of(*TINY, "gpu=a10g", "nodes=1", f"micro_batch_size={micro}") for micro in (128, 8))
    assert parts.here.memory_bytes < whole.here.memory_bytes
    assert sum(parts.here.flops.values()) > sum(whole.here.flops.values())
    assert parts.problem.shapes.accumulation == 16


@pytest.mark.weights
def test_cached_tokens_need_no_towers(quick_features: str) -> None:
    plan = plan_of(f"data.root={quick_features}", "global_batch_size=16", "text.source=package",
                   "text.model=all-minilm-l6-v2", "gpus_per_node=2")  # fmt: skip
    assert plan.problem.vision is None and plan.problem.text is None
    assert plan.data.samples == 48
    assert "decoding" not in plan.here.limit
    assert plan.here.parts_s["decoding"] == (0.0, 0.0)


@pytest.mark.weights
def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--nodes", "4", "--gpus-per-node", "8", "--gpu", "h100", "--gpu-hour-price", "2"]
    words += ["--json", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "plan.svg"), "steps=36000"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for what in (
        "memory of a GPU",
        "between GPUs",
        "limits first",
        "GPU-hours, at a price of",
        "data set fills 900 GB",
    ):
        assert what in said
    written: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    assert written["gpus"] == 32
    assert written["gpu_hours"][0] == pytest.approx(32 * 36000 / 3600 * written["step"]["step_s"][0])
    assert "<svg" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=abacus"], "no figures for 'abacus'"),
        (["nodes=3"], "not a multiple"),
        (["data.root=/nowhere"], "index"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(*words)


def test_gpus_are_known_by_what_the_driver_calls_them() -> None:
    assert gpu_of_device("NVIDIA A100-SXM4-40GB") is GPUS["a100-40"]
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of_device("NVIDIA L40S") is GPUS["l40s"]
    assert gpu_of_device("an abacus") is None
    assert gpu_named("H200").peak_flops("bf16") == 989e12


def test_assumptions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="efficiencies"):
        Assumptions(tower_efficiency=(0.5, 0.2))
    assert set(config.to_dict(TrainConfig())) < set(config.to_dict(PlanConfig()))
