"""A checkpoint handed on gives what the run gave, and one line loads it."""

from pathlib import Path

import colours
import numpy as np
import pytest
import torch
from PIL import Image

import pacl_scale
from pacl_scale import checkpoint, export
from pacl_scale.errors import UserError
from pacl_scale.evaluate import main as evaluate


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    colours.install(monkeypatch)
    return colours.write_run(tmp_path / "run")


def halves() -> Image.Image:
    picture = Image.new("RGB", (32, 32), colours.RGB["red"])
    picture.paste(colours.RGB["blue"], (0, 16, 32, 32))
    return picture


def test_the_exported_folder_gives_what_the_run_gives(run: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out" / "model")
    assert export.main([str(run), "--output", output]) == 0
    files = sorted(path.name for path in Path(output).iterdir())
    assert files == ["README.md", checkpoint.MODEL, checkpoint.STATE]
    before, after = (pacl_scale.load(str(path), device="cpu", precision="fp32") for path in (run, output))
    words = ["blue", "red"]
    labels = after.segment(halves(), words)
    assert labels[2, 2] == 1
    assert labels[-2, -2] == 0
    assert np.array_equal(labels, before.segment(halves(), words))
    phi = after.similarity([halves(), Image.new("RGB", (16, 16), colours.RGB["green"])], ["green", "red"])
    assert phi.shape == (2, 2)
    assert phi[1, 0] > phi[1, 1]
    assert phi[0, 1] > phi[0, 0]
    assert torch.equal(phi, before.similarity([halves(), Image.new("RGB", (16, 16), (0, 255, 0))], ["green", "red"]))


def test_the_exported_folder_keeps_no_paths_of_the_run(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    export.main([str(run), "--output", str(output)])
    for name in (checkpoint.STATE, "README.md"):
        assert str(run) not in (output / name).read_text()


def test_the_card_says_how_it_was_made_and_what_was_measured(run: Path, tmp_path: Path) -> None:
    root = colours.write_pictures(tmp_path / "pictures")
    words = ["--checkpoint", str(run), "--device", "cpu", f"segmentation.blocks.root={root}"]
    assert evaluate(words) == 0
    output = tmp_path / "model"
    export.main([str(run), "--output", str(output), "--name", "Colours", "--license", "apache-2.0"])
    card = (output / "README.md").read_text()
    assert "# Colours\n" in card
    assert "license: apache-2.0" in card
    assert "| attention scale | 10.0 |" in card
    (line,) = [line for line in card.splitlines() if line.startswith("| blocks") and "| pacl |" in line]
    assert "mIoU " in line
    assert "| 5 |" in line


def test_several_checkpoints_are_averaged(run: Path, tmp_path: Path) -> None:
    other = colours.write_run(tmp_path / "other", right=False, step=9)
    export.main([str(run), str(other), "--output", str(tmp_path / "mean")])
    info = checkpoint.read_state(str(tmp_path / "mean"))
    assert (info["step"], info["averaged"]) == (9, [7, 9])
    weights = checkpoint.read_weights(str(tmp_path / "mean"), info)
    mixed = weights["embedder.skip.weight"][:2, :2]
    torch.testing.assert_close(mixed, torch.full((2, 2), 0.5))
    assert "average of the checkpoints at steps 7, 9" in (tmp_path / "mean" / "README.md").read_text()


def test_strangers_are_not_averaged(run: Path, tmp_path: Path) -> None:
    other = colours.write_run(tmp_path / "other", loss={"attention_scale": 5.0})
    with pytest.raises(UserError, match="cannot be averaged: loss differ"):
        export.main([str(run), str(other), "--output", str(tmp_path / "mean")])
    wider = colours.write_run(tmp_path / "wider", width_out=4)
    with pytest.raises(UserError, match="cannot be averaged: their tensors differ"):
        export.main([str(run), str(wider), "--output", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()


def test_a_run_without_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        export.main([str(tmp_path), "--output", str(tmp_path / "out")])


def test_a_refused_upload_keeps_the_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No such port: the Hub cannot be reached.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    output = tmp_path / "model"
    with pytest.raises(UserError, match="was written, but could not be uploaded to someone/colours"):
        export.main([str(run), "--output", str(output), "--push", "someone/colours"])
    assert (output / checkpoint.MODEL).exists()
