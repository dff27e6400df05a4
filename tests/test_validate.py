"""Evaluation while training goes on, the best checkpoint, and the recorders beside metrics.jsonl."""

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from colours import RGB, ColourText, ColourVision, write_captions, write_pictures
from data_sets import write_tar
from PIL import Image
from ranks import run_ranks

from pacl_scale import checkpoint, frozen, metrics, recorders
from pacl_scale.checkpoint import CheckpointConfig
from pacl_scale.config import parse
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig
from pacl_scale.distributed import World
from pacl_scale.engine import EngineConfig
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig
from pacl_scale.evaluate.pictures import AnnotatedConfig
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.optim import OptimConfig
from pacl_scale.recorders import RecordConfig
from pacl_scale.signals import StopRequest
from pacl_scale.train import TrainConfig, train
from pacl_scale.validate import ValidateConfig

pytestmark = pytest.mark.distributed

STEPS = 12


def write_colours(root: Path) -> str:
    """Pictures of one colour each, and what they are."""
    root.mkdir()
    samples = []
    for number in range(24):
        word = list(RGB)[number % 3]
        content = io.BytesIO()
        Image.new("RGB", (16, 16), RGB[word]).save(content, "PNG")
        samples.append({"__key__": f"{number:04d}", "png": content.getvalue(), "txt": f"something {word}".encode()})
    write_tar(root / "00000.tar", samples)
    build_index(str(root))
    return str(root)


def settings_of(folder: Path, name: str, **changes: Any) -> TrainConfig:
    validate = ValidateConfig(
        every_steps=4,
        segmentation=AnnotatedConfig(root=str(folder / "pictures"), limit=3),
        retrieval=CaptionedConfig(csv=str(folder / "captions" / "val.csv")),
        protocol=Protocol(background="none"),
        examples=1,
        **changes.pop("validate", {}),
    )
    return TrainConfig(
        run=str(folder / name),
        steps=STEPS,
        global_batch_size=12,
        log_every=2,
        data=DataConfig(root=str(folder / "pairs")),
        optim=OptimConfig(lr=0.02, warmup_steps=1),
        engine=EngineConfig(zero_stage=1, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=1),
        validate=validate,
        **changes,
    )


def train_all(world: World, runs: list[TrainConfig]) -> None:
    """Train with towers that see colours; a run called "again" is stopped after its fifth step and goes on."""
    vision, text = ColourVision(), ColourText()
    with (
        mock.patch.object(frozen, "build_vision", lambda *_: vision),
        mock.patch.object(frozen, "build_text", lambda *_: text),
    ):
        for settings in runs:
            if settings.run.endswith("again"):
                assert not train(settings, world, AfterSteps(5))
            assert train(settings, world)


class AfterSteps(StopRequest):
    """A request to stop that comes after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        self.name = "SIGUSR1"
        return self.left < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    write_colours(folder / "pairs")
    # Background is nobody's colour, so it is not among the classes.
    pictures = write_pictures(folder / "pictures")
    (pictures / "classes.yaml").write_text("words: {1: red, 2: green, 3: blue}\nvoid: [0, 255]\n")
    write_captions(folder / "captions")
    records = RecordConfig(tensorboard=True, wandb_project="tests", profile_from=3, profile_steps=2, peak_tflops=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        run_ranks(
            2,
            train_all,
            [
                settings_of(folder, "plain"),
                settings_of(folder, "recorded", record=records, validate={"best_by": "image_to_text_R@1"}),
                settings_of(folder, "again", record=RecordConfig(tensorboard=True)),
            ],
        )
    return folder


def test_figures_are_written_every_so_many_steps_with_drawings(folder: Path) -> None:
    lines = metrics.read_metrics(folder / "plain" / "validation.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[-1]["miou"] > lines[0]["miou"] + 0.2
    assert set(lines[0]) == {"step", "miou"} | {
        f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    found = [path.relative_to(folder / "plain" / "evals" / "00000012") for path in
             (folder / "plain" / "evals" / "00000012").rglob("*.png")]  # fmt: skip
    assert found


def test_the_best_checkpoint_stays(folder: Path) -> None:
    lines = metrics.read_metrics(folder / "plain" / "validation.jsonl")
    best = max(lines, key=lambda line: line["miou"])
    first = next(line["step"] for line in lines if line["miou"] == best["miou"])
    note = json.loads((folder / "plain" / "checkpoints" / "best.json").read_text())
    assert note == {"step": first, "figure": "miou", "value": best["miou"]}
    assert set(checkpoint.steps_in(str(folder / "plain" / "checkpoints"))) == {first, STEPS}


def test_looking_on_does_not_change_what_is_learned(folder: Path, tmp_path: Path) -> None:
    blind = settings_of(folder, "blind")
    blind.validate = ValidateConfig()
    run_ranks(2, train_all, [blind])
    losses = [[line["loss"] for line in metrics.read_metrics(folder / run / "metrics.jsonl")]
              for run in ("blind", "plain", "recorded", "again")]  # fmt: skip
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_a_run_that_went_on_is_one_run_everywhere(folder: Path) -> None:
    assert (folder / "again" / "train.1.log").exists()
    lines = metrics.read_metrics(folder / "again" / "validation.jsonl")
    assert lines == metrics.read_metrics(folder / "plain" / "validation.jsonl")
    assert (folder / "again" / "checkpoints" / "best.json").read_text() == (
        folder / "plain" / "checkpoints" / "best.json"
    ).read_text()


def test_recorders_have_what_the_file_has(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "recorded"
    lines = metrics.read_metrics(run / "metrics.jsonl")
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert [event.step for event in board.Scalars("validation/miou")] == [4, 8, 12]
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert offline.name.endswith(recorders.wandb_id(run))


def test_profiles_of_each_rank(folder: Path) -> None:
    for rank in range(2):
        trace = json.loads((folder / "recorded" / "profile" / f"rank-{rank}.trace.json").read_text())
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
        assert "aten::mm" in (folder / "recorded" / "profile" / f"rank-{rank}.txt").read_text()


def test_speed_a_rank_and_share_of_the_peak(folder: Path) -> None:
    (*_, line) = metrics.read_metrics(folder / "recorded" / "metrics.jsonl")
    assert line["pairs_per_s_per_rank"] == pytest.approx(line["pairs_per_s"] / 2)
    # A tower without blocks cannot be counted, so there is no share to tell.
    assert line["mfu"] is None


def test_mfu_is_arithmetic_over_time_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = metrics.Clock()
    now = iter([0.0, 2.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    with clock.working():
        pass
    found = clock.read(100, ranks=4, peak_s=0.01)
    # 100 pairs in 2 s are 12.5 a second and rank; each would take 0.01 s at the peak.
    assert found == {"pairs_per_s": 50.0, "pairs_per_s_per_rank": 12.5, "mfu": 0.125, "data_wait_share": 0.0}
    assert recorders.peak_flops(RecordConfig(peak_tflops=2.0), "bf16", torch.device("cpu")) == 2e12
    assert recorders.peak_flops(RecordConfig(), "bf16", torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validate.every_steps=5"], "needs validate.segmentation"),
        (["record.wandb_entity=me"], "needs record.wandb_project"),
        (["record.profile_from=0"], "at least 1"),
        (["validate.every_steps=5", "validate.retrieval.csv=x.csv", "engine.shard_towers=true"], "exclude each other"),
    ],
)
def test_mistakes_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(TrainConfig, words, "train")


def test_a_figure_that_there_is_not_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no beauty; there are miou, image_to_text_R@1"):
        settings_of(folder, "no-such-figure", validate={"best_by": "beauty"})
