"""Trained blocks of the vision tower and a trained text embedder: exact as the embedder is, used wherever it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import write_pairs
from PIL import Image
from ranks import run_ranks
from training import curve, float16_on_cpu

import pacl_scale
from pacl_scale import checkpoint
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.data.stream import DataConfig
from pacl_scale.distributed import World
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_vision
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig
from pacl_scale.evaluate.methods import load_methods
from pacl_scale.export import ExportConfig, export
from pacl_scale.optim import OptimConfig
from pacl_scale.train import TrainConfig, train
from pacl_scale.unfreeze import UnfreezeConfig
from pacl_scale.validate import ValidateConfig

STEPS = 5
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
UNFROZEN = UnfreezeConfig(vision_blocks=2, text_embedder=True, tower_lr_share=0.5)


def settings_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    model = str(folder / "clip.json")
    values: dict[str, Any] = {
        "run": str(folder / name),
        "steps": STEPS,
        "global_batch_size": 8,
        "log_every": 1,
        "data": DataConfig(root=str(folder / "pairs"), patch_sample=3),
        "vision": VisionConfig(model=model, weights="random"),
        "text": TextEncoderConfig(model=model, weights="random"),
        "optim": OptimConfig(lr=0.01, warmup_steps=1),
        "engine": EngineConfig(1, "fp32"),
        "checkpoint": CheckpointConfig(every_steps=2),
        "unfreeze": UNFROZEN,
    }
    return TrainConfig(**(values | changes))


def train_all(world: World, runs: list[TrainConfig]) -> None:
    with float16_on_cpu():
        for settings in runs:
            assert train(settings, world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfrozen")
    write_pairs(folder / "pairs", [16, 8])
    (folder / "clip.json").write_text(json.dumps(CLIP))
    look = ValidateConfig(every_steps=3, retrieval=CaptionedConfig(csv=str(folder / "captions" / "val.csv")))
    (folder / "captions" / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 9, 99)).save(folder / "captions" / "images" / f"{number}.png")
        lines.append(f"{number}.png,thing {number}")
    (folder / "captions" / "val.csv").write_text("\n".join(lines) + "\n")
    one = [
        settings_of(folder, "whole"),
        settings_of(folder, "looked-at", validate=look),
        settings_of(folder, "micro", micro_batch_size=2),
        settings_of(folder, "frozen", unfreeze=UnfreezeConfig()),
        settings_of(folder, "half", steps=4),
    ]
    run_ranks(1, train_all, one)
    (folder / "half" / "checkpoints" / "00000004" / checkpoint.STATE).unlink()
    two = [
        settings_of(folder, "two", engine=EngineConfig(2, "fp32")),
        settings_of(folder, "two-micro", micro_batch_size=2),
        settings_of(folder, "half", steps=4, engine=EngineConfig(0, "fp32")),
        settings_of(folder, "fp16", micro_batch_size=2, engine=EngineConfig(2, "fp16", loss_scale_power=8)),
        settings_of(folder, "three", engine=EngineConfig(3, "fp32")),
        settings_of(folder, "three-micro", micro_batch_size=2, engine=EngineConfig(3, "fp32")),
    ]
    run_ranks(2, train_all, two)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("other", ["micro", "two", "two-micro", "three", "three-micro", "looked-at"])
def test_ranks_micro_batches_and_stages_do_not_change_the_curve(other: str, runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / other), curve(runs / "whole"), rtol=2e-5)
    whole, others = (checkpoint.load(checkpoint.resolve(str(runs / name)))[1]["master"] for name in ("whole", other))
    for name, weight in whole.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.distributed
def test_another_stage_and_world_goes_on(runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / "half")[:2], curve(runs / "whole")[:2], rtol=2e-5)
    assert len(curve(runs / "half")) == 4


@pytest.mark.distributed
def test_the_loss_scale_of_fp16_does_not_reach_the_texts(runs: Path) -> None:
    np.testing.assert_allclose(curve(runs / "fp16"), curve(runs / "whole"), rtol=2e-2)


@pytest.mark.distributed
def test_everything_that_is_unfrozen_learns(runs: Path) -> None:
    assert curve(runs / "whole")[-1] < curve(runs / "frozen")[-1]
    _, first = checkpoint.load(str(runs / "half" / "checkpoints" / "00000002"))
    _, last = checkpoint.load(checkpoint.resolve(str(runs / "half")))
    still = [name for name, weight in first["master"].items() if torch.equal(weight, last["master"][name])]
    assert still == []
    names = set(last["master"])
    assert any(name.startswith("tail.blocks.1.") for name in names) and "text_embedder.linear2.weight" in names
    assert not any(name.startswith("tail.blocks.2.") for name in names)
    assert not any(
        name.startswith(("tail.", "text")) for name in checkpoint.load(_newest(runs / "frozen"))[1]["master"]
    )


@pytest.mark.distributed
def test_an_evaluation_uses_what_was_trained(runs: Path) -> None:
    run = _newest(runs / "whole")
    weights = checkpoint.load(run)[1]["master"]
    model = vision_of(runs)
    towers, (method,) = load_methods({"pacl": run}, None, torch.device("cpu"), torch.float32)
    tower = build_vision(model, trainable_blocks=UNFROZEN.vision_blocks)
    assert isinstance(tower, FrozenViT) and tower.tail is not None
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Once by hand: the frozen blocks, then the trained ones.
    tower.tail.load_state_dict({n.removeprefix("tail."): w for n, w in weights.items() if n.startswith("tail.")})
    by_hand = tower.tail(tower.encode_up_to_tail(pictures))
    torch.testing.assert_close(towers.vision.encode(pictures).tokens, by_hand)
    assert not torch.allclose(build_vision(model).encode(pictures).tokens, by_hand)
    texts = towers.text.encode(["a dog", "a boat"])
    frozen = load_methods({"pacl": _newest(runs / "frozen")}, None, torch.device("cpu"), torch.float32)[0]
    assert not torch.allclose(texts, torch.nn.functional.normalize(frozen.text.encode(["a dog", "a boat"]), dim=-1))
    assert towers.config["unfreeze"]["vision_blocks"] == 2 and "unfreeze" not in frozen.config
    assert method.embed(by_hand.detach()).shape == (2, 4, 24)


@pytest.mark.distributed
def test_bfloat16_takes_the_trained_blocks_too(runs: Path) -> None:
    exact, rough = (
        load_methods({"pacl": _newest(runs / "whole")}, None, torch.device("cpu"), dtype)[0].vision
        for dtype in (torch.float32, torch.bfloat16)
    )
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        rough.encode(pictures).tokens.float(), exact.encode(pictures).tokens, rtol=0.05, atol=0.05
    )


@pytest.mark.distributed
def test_what_is_exported_is_the_same_model(runs: Path, tmp_path: Path) -> None:
    export([str(runs / "whole")], ExportConfig(output=str(tmp_path / "model")))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    handed_on, own = (pacl_scale.load(str(path), "cpu", "fp32") for path in (tmp_path / "model", runs / "whole"))
    assert torch.equal(handed_on.similarity([picture], ["a dog"]), own.similarity([picture], ["a dog"]))
    frozen = pacl_scale.load(str(runs / "frozen"), "cpu", "fp32")
    assert not torch.allclose(frozen.similarity([picture], ["a dog"]), own.similarity([picture], ["a dog"]))


@pytest.mark.distributed
def test_towers_that_differ_are_not_compared_in_one_pass(runs: Path) -> None:
    both = {"pacl": str(runs / "frozen"), "more": str(runs / "whole")}
    with pytest.raises(UserError, match="evaluate it by itself"):
        load_methods(both, None, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="as they came"):
        load_methods({"pacl": str(runs / "whole")}, None, torch.device("cpu"), torch.float32, ["clip"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vision_blocks": -1}, "vision_blocks"),
        ({"text_hidden": 0}, "text_hidden"),
        ({"tower_lr_share": 0.0}, "tower_lr_share"),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        UnfreezeConfig(**wrong)


def test_towers_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.json").write_text(json.dumps(CLIP))
    with pytest.raises(UserError, match="at most 2 of its 3 blocks"):
        build_vision(VisionConfig(model=str(tmp_path / "clip.json"), weights="random"), trainable_blocks=3)
    other = VisionConfig(source="timm", model="eva02_tiny_patch14_224", weights="random")
    with pytest.raises(UserError, match="no plain vision transformer"):
        build_vision(other, trainable_blocks=1)


@pytest.mark.distributed
def test_cached_tokens_have_no_blocks_to_train(quick_features: str, tmp_path: Path) -> None:
    text = TextEncoderConfig(source="package", model="all-minilm-l6-v2")
    settings = settings_of(tmp_path, "run", data=DataConfig(root=quick_features), text=text)
    with pytest.raises(RuntimeError, match="tokens of the whole tower"):
        run_ranks(1, train_all, [settings])


def vision_of(folder: Path) -> VisionConfig:
    return VisionConfig(model=str(folder / "clip.json"), weights="random")


def _newest(run: Path) -> str:
    return checkpoint.resolve(str(run))
