"""The engine's state: any ZeRO stage, precision and world size restores what any other wrote."""

from itertools import pairwise
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
    model = PACLModel(PatchEmbedder(WIDTH_IN, WIDTH_OUT), LossConfig())
    settings = EngineConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    return engine.start(settings, OptimConfig(lr=0.01), model, world, micro_batch_size=2, accumulation=1), settings


def take_steps(trainer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        engine.set_learning_rate(trainer, 0.01)
        tokens = torch.randn(2, 3, WIDTH_IN, generator=torch.Generator().manual_seed(step))
        patches, scale, _ = trainer(tokens)
        trainer.backward((patches.float() ** 2).mean() * scale)
        trainer.step()


def gather(world: World, stage: int, precision: str, seed: int, steps: int) -> dict[str, dict[str, Tensor]]:
    trainer, settings = start(world, stage, precision, seed)
    take_steps(trainer, 0, steps)
    return engine.gather_state(trainer, settings)


def resume(
    world: World, stage: int, precision: str, half: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    trainer, settings = start(world, stage, precision, seed=1)
    engine.restore_state(trainer, settings, half, STEPS // 2)
    take_steps(trainer, STEPS // 2, STEPS)
    return engine.gather_state(trainer, settings)


def one_rank(world: World) -> dict[str, Any]:
    half = gather(world, 0, "fp32", 0, STEPS // 2)
    trainer, settings = start(world, 1, "fp32", seed=0)
    other = {part: {name: torch.zeros(3, 3) for name in tensors} for part, tensors in half.items()}
    try:
        engine.restore_state(trainer, settings, other, 1)
        refusal = "none"
    except UserError as error:
        refusal = str(error)
    whole = gather(world, 0, "fp32", 0, STEPS)
    return {"fresh": gather(world, 0, "fp32", 0, 0), "half": half, "whole": whole, "refusal": refusal}


def two_ranks(world: World, half: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        found[f"fp32 {stage}"] = resume(world, stage, "fp32", half)
    for stage in (0, 1, 3):
        own_half = gather(world, stage, "bf16", 0, STEPS // 2)
        found[f"bf16 {stage}"] = resume(world, stage, "bf16", own_half), gather(world, stage, "bf16", 0, STEPS)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(1, one_rank)[0]


@pytest.fixture(scope="module")
def together(alone: dict[str, Any]) -> dict[str, Any]:
    """Both ranks of a world of two; starting processes takes longer than what they do, so they do it all."""
    return run_ranks(2, two_ranks, alone["half"])[0]


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], tolerance: float) -> None:
    assert {part: set(tensors) for part, tensors in found.items()} == {part: set(t) for part, t in wanted.items()}
    for part, tensors in wanted.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[part][name], tensor, rtol=tolerance, atol=tolerance, msg=f"{part} {name}")


def test_laying_out_the_state_changes_nothing(alone: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for name, weight in PatchEmbedder(WIDTH_IN, WIDTH_OUT).named_parameters():
        assert torch.equal(alone["fresh"]["master"][f"embedder.{name}"], weight)
        assert not alone["fresh"]["exp_avg"][f"embedder.{name}"].any()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_resumes_what_one_rank_wrote_without_zero(
    stage: int, alone: dict[str, Any], together: dict[str, Any]
) -> None:
    assert_same(together[f"fp32 {stage}"], alone["whole"], 2e-6)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_resumes_bit_for_bit(stage: int, together: dict[str, Any]) -> None:
    resumed, whole = together[f"bf16 {stage}"]
    assert_same(resumed, whole, 0.0)


def test_state_of_another_architecture_is_refused(alone: dict[str, Any]) -> None:
    assert "another architecture" in alone["refusal"]


def steps_with_a_bad_one(world: World) -> dict[str, Any]:
    """Of three steps the second has a finite loss, and a gradient that is infinite on one rank."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            trainer, settings = start(world, stage, precision, seed=0)
            updates, weights = [], []
            for number in range(3):
                weights.append(engine.gather_state(trainer, settings)["master"])
                engine.set_learning_rate(trainer, 0.01)
                tokens = torch.randn(2, 3, WIDTH_IN, generator=torch.Generator().manual_seed(number))
                patches, scale, _ = trainer(tokens)
                if number == 1 and world.rank == 1:
                    patches.register_hook(lambda grad: grad * float("inf"))
                trainer.backward((patches.float() ** 2).mean() * scale)
                trainer.step()
                updates.append(trainer.was_step_applied())
            weights.append(engine.gather_state(trainer, settings)["master"])
            same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(weights)]
            finite = all(tensor.isfinite().all() for tensor in weights[-1].values())
            found[f"{precision} {stage}"] = updates, same, finite
    return found


def test_a_gradient_that_is_not_finite_changes_nothing_in_any_mode() -> None:
    for rank in run_ranks(2, steps_with_a_bad_one):
        for mode, outcome in rank.items():
            assert outcome == ([True, False, True], [False, True, False], True), mode
