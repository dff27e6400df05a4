"""Checkpoints are whole or passed over."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pacl_scale import checkpoint, storage
from pacl_scale.errors import UserError

STATE = {
    "master": {"embedder.weight": torch.arange(6.0).view(2, 3)},
    "exp_avg": {"embedder.weight": torch.ones(2, 3)},
    "exp_avg_sq": {"embedder.weight": torch.full((2, 3), 2.0)},
}
INFO: dict[str, Any] = {"config": {"seed": 0}, "data": {"seed": 0, "position": 12}}


def save(folder: str, step: int, keep_last: int = 3) -> str:
    return checkpoint.save(folder, step, STATE, INFO, keep_last)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "checkpoints")
        if request.param == "local"
        else request.getfixturevalue("s3_url") + "/checkpoints"
    )


def test_what_was_saved_is_loaded(folder: str) -> None:
    info, state = checkpoint.load(save(folder, 40))
    assert (info["step"], info["data"], info["config"]) == (40, INFO["data"], INFO["config"])
    for part, tensors in STATE.items():
        for name, tensor in tensors.items():
            assert torch.equal(state[part][name], tensor)


def test_newest_is_the_largest_step_and_old_ones_go(folder: str) -> None:
    for step in (5, 9, 100):
        save(folder, step, keep_last=2)
    assert checkpoint.steps_in(folder) == [9, 100]
    assert checkpoint.newest(folder) == storage.join(folder, "00000100")


def test_a_save_cut_short_is_no_checkpoint(folder: str) -> None:
    save(folder, 1)
    storage.write_bytes(storage.join(folder, "00000002", checkpoint.MODEL), b"half")
    assert checkpoint.newest(folder) == storage.join(folder, "00000001")


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_damaged_checkpoint_is_passed_over_aloud(name: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder, 1)
    damaged = save(folder, 2)
    content = storage.read_bytes(storage.join(damaged, name))
    storage.write_bytes(storage.join(damaged, name), content[:-9] + b"\0" * 9)
    assert checkpoint.newest(folder) == storage.join(folder, "00000001")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(damaged)
    assert "passed over" in "".join(capsys.readouterr())


def test_resolve_takes_run_folder_or_checkpoint(tmp_path: Path) -> None:
    path = save(str(tmp_path / "run" / "checkpoints"), 3)
    assert checkpoint.resolve(str(tmp_path / "run")) == checkpoint.resolve(path) == path
    assert checkpoint.resolve(str(tmp_path / "run" / "checkpoints")) == path


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_checkpoint_is_one_sentence(what: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.resolve(str(tmp_path / what))


def test_a_foreign_sidecar_is_refused(tmp_path: Path) -> None:
    (tmp_path / checkpoint.STATE).write_text('{"version": 99}')
    with pytest.raises(UserError, match="not the side-car"):
        checkpoint.read_state(str(tmp_path))


def test_size_is_what_is_trained(tmp_path: Path) -> None:
    path = Path(save(str(tmp_path), 1))
    tensors = sum(t.numel() * t.element_size() for part in STATE.values() for t in part.values())
    written = sum((path / name).stat().st_size for name in (checkpoint.MODEL, checkpoint.OPTIMIZER))
    assert written < tensors + 2000
