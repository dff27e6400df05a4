"""Signals, lost ranks and bad numbers: the run ends with a sentence, loses nothing, and goes on as if uninterrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from training import TOKENS, VECTORS, WIDTH, curve, settings_for, write_features

from pacl_scale import checkpoint, config, engine, health, metrics
from pacl_scale.data.stream import DataConfig
from pacl_scale.distributed import World
from pacl_scale.embedder import PatchEmbedder
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import EXIT_FAILED, EXIT_REQUEUE, RunFailed, UserError
from pacl_scale.loss import LossConfig
from pacl_scale.model import PACLModel
from pacl_scale.optim import OptimConfig
from pacl_scale.train import TrainConfig, train

pytestmark = pytest.mark.distributed

STEPS = 150


def settings_of(features: str, run: Path, **changes: Any) -> TrainConfig:
    values = {"steps": STEPS, "engine": EngineConfig(2, "bf16"), "checkpoint": checkpoint.CheckpointConfig(50)}
    return settings_for(features, run, **(values | changes))


class Command:
    """Training with two ranks as a user starts it, in a process of its own."""

    def __init__(self, settings: TrainConfig) -> None:
        self.run = Path(settings.run)
        self.run.parent.mkdir(parents=True, exist_ok=True)
        file = self.run.with_suffix(".yaml")
        file.write_text(config.to_yaml(settings), encoding="utf-8")
        words = ["--config", str(file), "distributed.ranks=2", "distributed.device=cpu"]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pacl_scale.train", *words], stderr=subprocess.PIPE, text=True, env=environment
        )

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return sorted((p for p in children if p.environ().get("RANK")), key=lambda p: p.environ()["RANK"])

    def wait_for_step(self, step: int) -> None:
        file, deadline = self.run / "metrics.jsonl", time.monotonic() + 60
        while not (file.exists() and len(metrics.read_metrics(file)) >= step):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[1]
            time.sleep(0.05)

    def end(self, timeout: float = 60) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=timeout)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(quick_features: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, on_a_rank, settings_of(quick_features, run))
    return curve(run)


def on_a_rank(world: World, settings: TrainConfig) -> bool:
    return train(settings, world)


def test_signals_and_kills_do_not_change_the_curve(
    quick_features: str, undisturbed: list[float], tmp_path: Path
) -> None:
    settings = settings_of(quick_features, tmp_path / "run")
    folder = str(tmp_path / "run" / "checkpoints")

    command = Command(settings)
    command.wait_for_step(5)
    command.process.send_signal(signal.SIGTERM)
    status, said = command.end()
    assert status == EXIT_REQUEUE, said
    (stopped,) = checkpoint.steps_in(folder)
    assert 5 <= stopped < 50
    assert "stopped" in (tmp_path / "run" / "train.0.log").read_text()

    command = Command(settings)
    command.wait_for_step(stopped + 5)
    command.ranks()[1].send_signal(signal.SIGUSR2)
    status, said = command.end()
    assert status == EXIT_REQUEUE, said
    assert checkpoint.steps_in(folder)[-1] > stopped

    command = Command(settings)
    command.wait_for_step(checkpoint.steps_in(folder)[-1] + 5)
    command.ranks()[1].kill()
    began = time.monotonic()
    status, said = command.end()
    assert status not in (0, EXIT_REQUEUE)
    assert time.monotonic() - began < 40
    assert "rank 0 lost another rank in step" in said

    status, said = Command(settings).end(timeout=120)
    assert status == 0, said
    assert curve(tmp_path / "run") == undisturbed


def test_a_step_that_is_not_finite_is_skipped_counted_and_kept(tmp_path: Path) -> None:
    data = DataConfig(root=write_features(tmp_path / "data", poisoned=(7,), vectors=VECTORS))
    # Without ZeRO, in float32, DeepSpeed itself would not refuse such a gradient.
    changes = {"data": data, "engine": EngineConfig(0, "fp32")}
    settings = settings_of(data.root, tmp_path / "run", **changes, steps=9, max_bad_steps=2)
    assert run_ranks(2, on_a_rank, settings) == [True, True]
    lines = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    # 48 samples are three steps, so one in three is bad; what follows it is sound.
    assert lines[-1]["bad_steps"] == 3
    losses = [line["loss"] for line in lines]
    assert sum(loss != loss for loss in losses) == 3
    assert checkpoint.read_state(checkpoint.resolve(str(tmp_path / "run")))["updates"] == 6
    files = sorted((tmp_path / "run" / "bad").iterdir())
    assert len(files) == 6
    guilty = []
    for file in files:
        with safe_open(file, "pt") as saved:
            guilty += json.loads(saved.metadata()["guilty"])
            assert saved.get_tensor("tokens").shape == (8, TOKENS, WIDTH)
    assert guilty == ["0000007"] * 3


def test_too_many_bad_steps_in_a_row_name_rank_and_sample(tmp_path: Path) -> None:
    data = DataConfig(root=write_features(tmp_path / "data", poisoned=(3,), vectors=VECTORS))
    settings = settings_of(data.root, tmp_path / "run", data=data, steps=9, max_bad_steps=1)
    status, said = Command(settings).end()
    assert status == EXIT_FAILED
    assert "the loss is nan at step" in said
    assert "samples 0000003" in said
    assert str(tmp_path / "run" / "bad") in said


def agree_on_a_rank(world: World) -> list[tuple[bool, bool]]:
    wishes = [(False, False), (world.rank == 1, False), (False, world.rank == 0)]
    found = [health.agree(world, *wish) for wish in wishes]
    return [(agreed.stop, agreed.save) for agreed in found]


def test_what_one_rank_wants_all_do() -> None:
    assert run_ranks(2, agree_on_a_rank) == [[(False, False), (True, False), (False, True)]] * 2


def wait_for_a_late_rank(world: World) -> str:
    engine.set_collective_timeout(None, 2 / 60)
    if world.rank == 1:
        time.sleep(6)
        return ""
    try:
        with health.lost_peers_named(world, health.Progress(7, "computing")):
            health.agree(world, False, False)
    except RunFailed as error:
        return str(error)
    return "nothing was raised"


def test_after_the_first_step_a_missing_rank_is_given_up_soon() -> None:
    began = time.monotonic()
    said, _ = run_ranks(2, wait_for_a_late_rank)
    assert "rank 0 lost another rank in step 7 (while computing); no word from rank 1" in said
    assert time.monotonic() - began < 60


def end_by_itself(world: World, why: type[Exception]) -> str:
    try:
        with health.lost_peers_named(world, health.Progress(7, "computing")):
            if world.rank == 1:
                raise why("shard 3 was replaced")
            # As leaving the group does: the other rank's connection breaks, or is never made.
            engine.set_collective_timeout(None, 2 / 60)
            health.agree(world, False, False)
    except (RunFailed, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_what_ended_another_rank_is_said_by_all() -> None:
    said, own = run_ranks(2, end_by_itself, UserError)
    assert (said, own) == ("UserError: rank 1: shard 3 was replaced", "UserError: shard 3 was replaced")
    said, _ = run_ranks(2, end_by_itself, RunFailed)
    assert said.startswith("RunFailed: rank 0 lost another rank") and "rank 1 ended: shard 3 was replaced" in said


def deepspeeds_timeout(world: World) -> list[float]:
    model = PACLModel(PatchEmbedder(4, 4), LossConfig())
    trainer = engine.start(EngineConfig(1, "fp32"), OptimConfig(), model, world, 1, 1)
    engine.set_collective_timeout(trainer, 2 / 60)
    if world.rank == 1:
        time.sleep(6)
        return []
    began = time.monotonic()
    try:
        trainer(torch.zeros(1, 1, 4))[0].sum().backward()
        torch.distributed.all_reduce(torch.zeros(1), group=trainer.seq_data_parallel_group)
    except RuntimeError:
        return [time.monotonic() - began]
    return []


def test_deepspeeds_own_group_has_the_same_time_out() -> None:
    (waited,), _ = run_ranks(2, deepspeeds_timeout)
    assert waited < 5
