"""The engine's state: any ZeRO stage, precision and world size restores what any other wrote."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from pacl_scale import engine
from pacl_scale.distributed import World
from pacl_scale.embedder import PatchEmbedder
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import UserError
from pacl_scale.loss import LossConfig
from pacl_scale.model import PACLModel
from pacl_scale.optim import OptimConfig

pytestmark = pytest.mark.distributed

WIDTH_IN, WIDTH_OUT, STEPS = 7, 5, 4


def start(world: World, stage: int, precision: str, seed: int) -> tuple[Any, EngineConfig]:
    torch.manual_seed(seed)
    model = PACLModel(PatchEmbedder(WIDTH_IN, WIDTH_OUT), LossConfig(learn_logit_scale=True))
    settings = EngineConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    return engine.start(settings, OptimConfig(lr=0.01), model, world, micro_batch_size=2, accumulation=1), settings


def take_steps(trainer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        engine.set_learning_rate(trainer, 0.01)
        tokens = torch.randn(2, 3, WIDTH_IN, generator=torch.Generator().manual_seed(step))
        patches, scale = trainer(tokens)
        trainer.backward((patches.float() ** 2).mean() * scale)
        trainer.step()


def train_and_gather(world: World, stage: int, precision: str, steps: int) -> dict[str, dict[str, Tensor]]:
    trainer, settings = start(world, stage, precision, seed=0)
    take_steps(trainer, 0, steps)
    return engine.gather_state(trainer, settings)


def restore_and_go_on(
    world: World, stage: int, precision: str, state: dict[str, dict[str, Tensor]], first: int, last: int
) -> dict[str, dict[str, Tensor]]:
    trainer, settings = start(world, stage, precision, seed=1)
    engine.restore_state(trainer, settings, state, first)
    take_steps(trainer, first, last)
    return engine.gather_state(trainer, settings)


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    assert {part: set(tensors) for part, tensors in found.items()} == {part: set(t) for part, t in wanted.items()}
    for part, tensors in wanted.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[part][name], tensor, rtol=tolerance, atol=tolerance, msg=f"{part} {name}")


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, dict[str, Tensor]]]:
    """States after STEPS // 2 and after STEPS steps of one rank in float32 without ZeRO."""
    (half,) = run_ranks(1, train_and_gather, 0, "fp32", STEPS // 2)
    (whole,) = run_ranks(1, train_and_gather, 0, "fp32", STEPS)
    return {"half": half, "whole": whole}


def test_laying_out_the_state_changes_nothing() -> None:
    (state,) = run_ranks(1, train_and_gather, 0, "fp32", 0)
    torch.manual_seed(0)
    fresh = PatchEmbedder(WIDTH_IN, WIDTH_OUT)
    for name, weight in fresh.named_parameters():
        assert torch.equal(state["master"][f"embedder.{name}"], weight)
        assert not state["exp_avg"][f"embedder.{name}"].any()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_world_resumes_the_same_checkpoint(stage: int, uninterrupted: Any) -> None:
    for state in run_ranks(2, restore_and_go_on, stage, "fp32", uninterrupted["half"], STEPS // 2, STEPS):
        assert_same(state, uninterrupted["whole"], 2e-6)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_resumes_bit_for_bit(stage: int) -> None:
    half = run_ranks(2, train_and_gather, stage, "bf16", STEPS // 2)[0]
    whole = run_ranks(2, train_and_gather, stage, "bf16", STEPS)[0]
    resumed = run_ranks(2, restore_and_go_on, stage, "bf16", half, STEPS // 2, STEPS)[0]
    assert_same(resumed, whole, 0.0)


def restore_wrong(world: World, state: dict[str, dict[str, Tensor]]) -> str:
    trainer, settings = start(world, 1, "fp32", seed=0)
    state = {part: {name: torch.zeros(3, 3) for name in tensors} for part, tensors in state.items()}
    with pytest.raises(UserError, match="another architecture"):
        engine.restore_state(trainer, settings, state, 1)
    return "refused"


def test_state_of_another_architecture_is_refused(uninterrupted: Any) -> None:
    assert run_ranks(1, restore_wrong, uninterrupted["half"]) == ["refused"]
