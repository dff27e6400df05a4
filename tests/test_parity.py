"""One seed is one loss curve: over ZeRO stages, worlds and precisions, and over changes of the code."""

from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from training import curve, settings_for

from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.distributed import World
from pacl_scale.engine import EngineConfig
from pacl_scale.train import TrainConfig, train

pytestmark = pytest.mark.distributed

STEPS = 50
GOLDEN = {1: 4.84314, 2: 5.27172, 5: 4.84537, 10: 3.04539, 20: 3.02153, 30: 2.33001, 40: 2.34898, 50: 2.3981}
"""Loss of some steps of the recipe in float32, as first recorded. A change that moves it changes what is learned."""

CELLS = {
    1: [(0, "fp32"), (1, "fp32"), (2, "bf16")],
    2: [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (3, "fp32")],
    4: [(0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")],
}
"""World -> ZeRO stages and precisions; 3 comes last, for it replaces torch's linear function for the whole process."""

FP32 = [(world, stage) for world, cells in CELLS.items() for stage, precision in cells if precision == "fp32"]
BF16 = [(world, stage) for world, cells in CELLS.items() for stage, precision in cells if precision == "bf16"]


def train_all(world: World, runs: list[TrainConfig]) -> None:
    for settings in runs:
        train(settings, world)


@pytest.fixture(scope="module")
def runs(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for world, cells in CELLS.items():
        recipes = [
            settings_for(
                quick_features,
                folder / f"{world}-{stage}-{precision}",
                steps=STEPS,
                engine=EngineConfig(stage, precision),  # type: ignore[arg-type]
                checkpoint=CheckpointConfig(STEPS),
            )
            for stage, precision in cells
        ]
        run_ranks(world, train_all, recipes)
    return folder


def test_the_curve_is_the_golden_one(runs: Path) -> None:
    losses = curve(runs / "1-0-fp32")
    np.testing.assert_allclose([losses[step - 1] for step in GOLDEN], list(GOLDEN.values()), rtol=1e-4)


@pytest.mark.parametrize(("world", "stage"), FP32[1:])
def test_stages_and_worlds_agree_in_float32(world: int, stage: int, runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / f"{world}-{stage}-fp32"), curve(runs / "1-0-fp32"), rtol=1e-5)


@pytest.mark.parametrize(("world", "stage"), BF16)
def test_bf16_stays_within_its_bound(world: int, stage: int, runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / f"{world}-{stage}-bf16"), curve(runs / "1-0-fp32"), rtol=1e-2)
