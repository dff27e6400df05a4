"""Checkpoints are whole or passed over."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pacl_scale import checkpoint, storage
from pacl_scale.errors import RunFailed, UserError

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


def test_checkpoints_kept_for_good_stay(folder: str) -> None:
    for step in (10, 15, 20, 25, 30):
        checkpoint.save(folder, step, STATE, INFO, keep_last=1, keep_every=10)
    assert checkpoint.steps_in(folder) == [10, 20, 30]


def test_a_writer_goes_on_while_it_writes_and_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = checkpoint.Writer(str(tmp_path / "checkpoints"), checkpoint.CheckpointConfig())
    store_is_back = threading.Event()
    write = storage.write_bytes

    def slow(url: str, content: bytes) -> None:
        assert store_is_back.wait(10)
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", slow)
    writer.save(1, STATE, INFO)
    assert checkpoint.steps_in(writer.folder) == []
    store_is_back.set()
    writer.save(2, STATE, INFO)
    writer.wait()
    assert checkpoint.steps_in(writer.folder) == [1, 2]

    def refuse(url: str, content: bytes) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    writer.save(3, STATE, INFO)
    with pytest.raises(UserError, match="no space left"):
        writer.close()


def test_a_save_is_due_when_minutes_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    writer = checkpoint.Writer(str(tmp_path), checkpoint.CheckpointConfig(every_minutes=5))
    now += 299
    assert not writer.minutes_passed()
    now += 1
    assert writer.minutes_passed()
    writer.save(1, STATE, INFO)
    assert not writer.minutes_passed()
    writer.close()
    never = checkpoint.Writer(str(tmp_path), checkpoint.CheckpointConfig())
    now += 1e9
    assert not never.minutes_passed()


def test_writes_that_a_store_refuses_are_given_up_aloud_until_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    writer = checkpoint.Writer(str(tmp_path / "checkpoints"), checkpoint.CheckpointConfig())
    write, down = storage.write_bytes, True

    def perhaps(url: str, content: bytes) -> None:
        if down:
            raise storage.StoreUnavailable("the store did not answer")
        write(url, content)

    monkeypatch.setattr(storage, "write_bytes", perhaps)
    for step in range(1, checkpoint.MOST_LOST + 1):
        writer.save(step, STATE, INFO)
    with pytest.raises(RunFailed, match="did not answer"):
        writer.save(9, STATE, INFO)

    writer.save(10, STATE, INFO)
    with pytest.raises(RunFailed, match="did not answer"):
        writer.wait()
    down = False
    writer.save(11, STATE, INFO)
    writer.close()
    assert checkpoint.steps_in(writer.folder) == [11]


def test_a_later_step_that_was_passed_over_does_not_cost_a_good_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    storage.write_bytes(storage.join(save(folder, 300), checkpoint.MODEL), b"damaged")
    good = save(folder, 150, keep_last=1)
    assert checkpoint.newest(folder) == good


def test_checkpoints_none_of_which_can_be_used_are_not_begun_again_from(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    for step in (1, 2):
        storage.write_bytes(storage.join(save(folder, step), checkpoint.MODEL), b"damaged")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoint.newest(folder)


def test_the_best_one_stays_until_a_better_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    writer = checkpoint.Writer(str(tmp_path / "checkpoints"), checkpoint.CheckpointConfig(keep_last=1))
    noted: list[int] = []
    writer.save(1, STATE, INFO, lambda: noted.append(1))
    writer.wait()
    write = storage.write_bytes

    def refuse(url: str, content: bytes) -> None:
        raise storage.StoreUnavailable("the store did not answer")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    writer.save(2, STATE, INFO, lambda: noted.append(2))
    with pytest.raises(RunFailed):
        writer.wait()
    monkeypatch.setattr(storage, "write_bytes", write)
    writer.save(3, STATE, INFO)
    writer.close()
    assert (checkpoint.steps_in(writer.folder), noted) == ([1, 3], [1])
