"""Cells, packs, results and the runner, on this machine; `test_slurm_sweep.py` has the arrays."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from slurm_cluster import until
from sweeps import grid, signal_cell, words_for, write_checkpoint, write_data, write_runs
from training import settings_for

from pacl_scale import claims, config, log, storage
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.sweep import ledger, main, results
from pacl_scale.sweep.command import SweepConfig, alone, grid_of
from pacl_scale.sweep.runner import Limits, Runner, packed
from pacl_scale.sweep.table import Display
from pacl_scale.sweep.watch import Watch
from pacl_scale.sweep.worker import INTERRUPTIONS, may_try


def test_a_cells_name_holds_all_that_decides_its_figures(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, ["a", "b"])
    evaluation = write_data(tmp_path, ["x", "y"])
    names = [cell.name for cell in grid(tmp_path, evaluation, runs)]
    assert len(set(names)) == 4
    assert names == [cell.name for cell in grid(tmp_path, evaluation, runs)]
    for changes in ({"protocol.size": [48]}, {"precision": ["bf16"]}, {"segmentation.x.limit": [1]}):
        changed = [cell.name for cell in grid(tmp_path, evaluation, runs, settings=changes)]
        assert changed[0] not in names, changes
    quicker = [cell.name for cell in grid(tmp_path, evaluation, runs, settings={"batch_size": [3]})]
    assert quicker == names, "how many pictures pass together changes nothing"
    # A method that is measured beside: its weights count, not its path.
    other = {"methods.other": [runs["b"]]}
    beside = [cell.name for cell in grid(tmp_path, evaluation, {"a": runs["a"]}, settings=other)]
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    moved = {"methods.other": [str(tmp_path / "copy")]}
    assert beside[0] not in names
    assert beside == [cell.name for cell in grid(tmp_path, evaluation, {"a": runs["a"]}, settings=moved)]
    # Other weights under the same step.
    settings = config.parse(type(settings_for("x", "y")), ["--config", str(tmp_path / "a" / "config.yaml")], "test")
    write_checkpoint(tmp_path / "a", 7, settings, {"vision": {}, "text": {}})
    again = [cell.name for cell in grid(tmp_path, evaluation, runs)]
    assert again[0] not in names and again[2:] == names[2:]


def test_the_grid_is_the_product_of_all(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, ["a"], steps=(3, 7))
    evaluation = write_data(tmp_path, ["x", "y", "z"])
    fast = tmp_path / "other.yaml"
    fast.write_text("protocol: {name: other, size: 64}")
    swept = {"protocol.stride": [8, 16], "protocol.flip": [True, False]}
    found = grid(
        tmp_path,
        evaluation,
        runs,
        protocols=[evaluation, str(fast)],
        data_sets=["x", "z"],
        settings=swept,
        every_checkpoint=True,
    )
    assert len(found) == 2 * 2 * 2 * 2 * 2
    assert {cell.labels["step"] for cell in found} == {3, 7}
    assert {cell.labels["samples"] for cell in found} == {48, 112}
    assert {cell.labels["data_set"] for cell in found} == {"x", "z"}
    settings = yaml.safe_load(found[0].settings)
    assert settings["protocol"]["stride"] == 8 and settings["protocol"]["flip"] is True
    with pytest.raises(UserError, match="there is no w; .* has x, y, z"):
        grid(tmp_path, evaluation, runs, data_sets=["w"])
    with pytest.raises(UserError, match="two protocols are named fast"):
        grid(tmp_path, evaluation, runs, protocols=[evaluation, evaluation])


def test_cells_fill_jobs_of_a_stated_length() -> None:
    lengths = {"a": 20.0, "b": 20.0, "c": 30.0, "d": 90.0, "e": 10.0}
    assert packed(lengths, 60) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert packed(dict.fromkeys("abcdefghij", 0.1), 0.3) == [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"], ["j"]]


def entry_of(*outcomes: str, call: str = "now") -> ledger.Entry:
    return ledger.Entry("x", "h", attempts=[ledger.Attempt(call, "1", "n1", 0.0, one) for one in outcomes])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcomes", "may"),
    [
        ([], True),
        (["done"], False),
        (["refused"], False),
        (["failed"], True),
        (["failed", "failed"], False),
        (["failed", "lost", "timeout"], False),
        (["lost"] * INTERRUPTIONS, True),
        (["lost"] * (INTERRUPTIONS + 1), False),
    ],
)
def test_a_cell_is_tried_so_often_in_a_call(outcomes: list[str], may: bool) -> None:
    assert may_try(entry_of(*outcomes), "now", attempts=2) is may
    if outcomes != ["done"]:
        assert may_try(entry_of(*outcomes, call="before"), "now", attempts=2), "another call tries anew"


@pytest.mark.slow
def test_finished_cells_are_not_done_again_and_failures_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_runs(tmp_path, ["a", "b"])
    evaluation = write_data(tmp_path, ["x", "y", "z"], broken="y")
    words = words_for(tmp_path, runs, evaluation, "--cluster=local", "--throttle=2", "--job-minutes=3")
    with pytest.raises(RunFailed, match="2 of 6 cells failed") as failed:
        main(words)
    assert str(failed.value).count("masks/1.png is not a picture") == 2
    sweep = tmp_path / "sweep"
    with (sweep / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["checkpoint"], line["data_set"], line["method"]) for line in lines} == {
        (run, data, method) for run in "ab" for data in "xz" for method in ("pacl", "untrained")
    }
    assert all(0 <= float(line["miou"]) <= 1 and line["step"] == "7" for line in lines)
    table = (sweep / "results.md").read_text()
    value = next(line["miou"] for line in lines if (line["checkpoint"], line["method"]) == ("a", "pacl"))
    assert f"{100 * float(value):.1f}" in next(line for line in table.splitlines() if line.startswith("| a, step 7"))
    assert "\\begin{tabular}{lrr}" in (sweep / "results.tex").read_text()
    assert (sweep / "results.svg").read_bytes().startswith(b"<?xml") and (sweep / "results.png").stat().st_size > 1000

    before = {file: file.stat().st_mtime_ns for file in sweep.glob("cells/*/evals/*.json")}
    assert len(before) == 8
    (gone, *kept) = sorted(before)
    for row in gone.parent.iterdir():
        row.unlink() if row.is_file() else None
    (tmp_path / "data" / "y" / "masks" / "1.png").write_bytes((tmp_path / "data/x/masks/1.png").read_bytes())
    assert main(words) == 0
    after = {file: file.stat().st_mtime_ns for file in sweep.glob("cells/*/evals/*.json")}
    assert len(after) == 12
    untouched = [file for file in kept if file.parent != gone.parent]
    assert untouched and all(after[file] == before[file] for file in untouched)
    assert "published" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_hanging_cell_is_ended_and_a_crashing_one_tried_again(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, ["a"])
    evaluation = write_data(tmp_path, ["hangs"])
    picture = tmp_path / "data" / "hangs" / "images" / "0.png"
    picture.unlink()
    os.mkfifo(picture)  # nobody writes: whoever reads waits
    (cell,) = grid(tmp_path, evaluation, runs)
    hangs = cell.folder(tmp_path / "sweep")
    words = words_for(tmp_path, runs, evaluation, "--cluster=local")
    with pytest.raises(RunFailed, match=r"1 of 1 cells failed[^\0]*not done within 0.05 minutes"):
        main([*words, "--cell-limit-minutes=0.05", "--attempts=1"])
    assert [one.outcome for one in attempts(hangs)] == ["timeout"]

    process = subprocess.Popen([sys.executable, "-m", "pacl_scale.sweep", *words], stderr=-1, text=True)
    for tries in (2, 3):
        until(lambda tries=tries: len(attempts(hangs)) == tries, 90)  # type: ignore[misc]
        until(lambda: signal_cell(hangs, signal.SIGKILL), 60)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "ended by SIGKILL, as when memory runs out" in said
    assert [one.outcome for one in attempts(hangs)] == ["timeout", "failed", "failed"]


def attempts(folder: Path) -> list[ledger.Attempt]:
    entry = ledger.read(folder)
    return entry.attempts if entry else []


@pytest.mark.slow
def test_a_run_is_watched_to_its_end(tmp_path: Path) -> None:
    write_runs(tmp_path, ["a"], steps=(3,))
    evaluation = write_data(tmp_path, ["x"])
    run = tmp_path / "a"
    settings = config.parse(type(settings_for("x", "y")), ["--config", str(run / "config.yaml")], "test")
    settings.steps = 6
    (run / "config.yaml").write_text(config.to_yaml(settings))
    words = [f"--output={tmp_path}/sweep", f"--watch={run}", f'--evaluation=["{evaluation}"]', "--cluster=local"]
    words += ["--poll-seconds=0.3", "--settings={}"]
    # The watch folds at most so often.
    start = "import sys; from pacl_scale.sweep import runner, main; runner.FOLD_SECONDS = 0.0; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", start, *words], stdout=-1, stderr=-1, text=True)
    until(lambda: len(list((tmp_path / "sweep").glob("cells/a-3-*/evals/*-pacl.json"))) == 1, 90)
    until((tmp_path / "sweep" / "results.csv").exists, 60)
    assert process.poll() is None, "the run is not over, and its results are there"
    towers = json.loads((run / "checkpoints" / "00000003" / "state.json").read_text())["towers"]
    write_checkpoint(run, 6, settings, towers)
    printed, said = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert "a, step 3" in printed and "a, step 6" in printed


def watch_of(tmp_path: Path, run: Path) -> Watch:
    settings = SweepConfig(output=str(tmp_path / "sweep"), watch=str(run), evaluation=[write_data(tmp_path, ["x"])])
    settings.watch_minutes, settings.ask_seconds = 1e-9, 1e-9
    watch = grid_of(settings, tmp_path / "sweep")[0]
    assert watch is not None
    return watch


def test_a_watch_ends_with_the_job_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(tmp_path, ["a"], steps=(3,))
    run = tmp_path / "a"
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 3\n", "steps: 6\n", 1))
    states = {"7": "RUNNING"}
    monkeypatch.setattr(claims, "state_of", states.get)
    claims.enter(run, "7")
    watch = watch_of(tmp_path, run)
    assert len(watch.new()) == 1
    assert not watch.is_over(), "its job lives"
    states.clear()
    assert watch.is_over(), "and will save no more"
    (run / "jobs" / "0001.json").unlink()
    assert watch.is_over(), "nothing is known of a job, and nothing came for watch_minutes"
    watch._idle_s = 60
    assert not watch.is_over()


def test_a_copy_that_failed_is_made_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(tmp_path, ["a"], steps=(3,))
    watch = watch_of(tmp_path, tmp_path / "a")
    watch._idle_s = 60

    def no_room(url: str, content: bytes) -> None:
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", no_room)
        assert watch.new() == [] and not watch.is_over()
    assert [cell.labels["step"] for cell in watch.new()] == [3] and watch.is_over()


@pytest.mark.slow
def test_trainings_are_swept_by_the_same_runner(quick_features: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = config.to_dict(settings_for(quick_features, "unused"))
    recipe.write_text(yaml.safe_dump(values))
    words = [f"--output={tmp_path}/sweep", f'--training=["{recipe}"]', "--cluster=local", "--poll-seconds=0.3"]
    words += ['--settings={"optim.lr": [0.01, 0.0001], "seed": [3]}', "--throttle=1"]
    assert main(words) == 0
    with (tmp_path / "sweep" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["optim.lr"] for line in lines} == {"0.01", "0.0001"}
    with pytest.raises(UserError, match="leave checkpoint.folder out"):
        main([*words, "--settings={'checkpoint.folder': ['" + str(tmp_path / "one") + "']}"])
    table = (tmp_path / "sweep" / "results.md").read_text().splitlines()
    assert table[4].split()[1] == "0.01", "the lower loss comes first"
    began = time.monotonic()
    assert main(words) == 0 and time.monotonic() - began < 5, "nothing is trained again"


def test_a_dry_run_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_for(tmp_path, write_runs(tmp_path, ["a"]), write_data(tmp_path, ["x", "y", "z"]), "--dry-run")
    assert main([*words, "--job-minutes=2"]) == 0
    said = capsys.readouterr().out
    assert "3 cells, 0 done; 3 to do in 2 jobs" in said and "job 1: a-7-z-fast-" in said
    assert not (tmp_path / "sweep").exists()


def test_the_table_counts_cells_and_names_failures(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, ["a", "b"])
    found = grid(tmp_path, write_data(tmp_path, ["x", "y"]), runs)
    runner = Runner(tmp_path / "sweep", "evaluate", Limits(1, 60, 10, 60), None)
    runner.add(found)
    for cell, outcome in zip(found, ("running", "failed", "done", "lost"), strict=True):
        entry = runner.entries[cell.name]
        entry.attempts = [ledger.Attempt(runner.call, "1", "n1", 0.0, outcome, "a reason")]
    runner.done.add(found[2].name)
    screen = io.StringIO()
    with Display("paper", Console(file=screen, force_terminal=True, width=150, color_system=None)) as display:
        display.show(runner)
    lines = [line.replace("│", " ").split() for line in screen.getvalue().splitlines()]
    assert ["a", "step", "7,", "fast", "1", "1"] in lines, "one runs, one failed"
    assert ["b", "step", "7,", "fast", "1", "1"] in lines, "one is done, one waits"
    assert ["all", "1", "1", "1", "1"] in lines
    assert [f"{found[1].name}:", "a", "reason"] in lines


def test_two_calls_do_not_work_on_one_sweep(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(UserError, match="another call is at work"), alone(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_other_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*of: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unknown)
    log.configure()
    with alone(tmp_path):
        assert "this file system has no locks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "one of the two"),
        ({"checkpoints": {"a": "b"}, "training": ["c"]}, "one of the two"),
        ({"checkpoints": {"a": "b"}}, "under evaluation"),
        ({"training": ["c"], "data_sets": ["x"]}, "takes no evaluation"),
        ({"training": ["c"], "throttle": 0}, "at least 1"),
        ({"watch": "r", "evaluation": ["e"], "detach": True}, "cannot detach"),
        ({"watch": "r", "evaluation": ["e"], "cluster": "local", "qos": "high"}, "takes no qos"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SweepConfig(**changes)


def test_published_figures_stand_beside_official_data_sets() -> None:
    rows = results.published_rows({"my_voc": "voc_20", "mine": "folder"})
    assert rows[0] == ["PACL (published)", "72.3", "–"]
    assert ["TCL (published)", "77.5", "–"] in rows


def test_a_written_table_has_published_rows_and_a_plot_all_points(tmp_path: Path) -> None:
    same = {"checkpoint": "b16", "protocol": "paper", "settings": "", "method": "pacl"}
    lines: list[dict[str, Any]] = [
        same | {"step": step, "samples": 10 * step, "data_set": data, "layout": layout, "miou": step / 100}
        for step in (3, 7)
        for data, layout in (("voc", "voc_20"), ("mine", "folder"))
    ]
    ((title, head, rows),) = results.evaluation_tables(lines)
    assert rows[:2] == [["b16, step 3", "3.0", "3.0"], ["b16, step 7", "7.0", "7.0"]]
    assert ["PACL (published)", "72.3", "–"] in rows[2:]
    latex = results.as_latex(title, head, rows).splitlines()
    assert "PACL (published) & 72.3 & -- \\\\" in latex
    assert all(line.count(" & ") == 2 for line in latex if line.endswith("\\\\"))
    points = [(30, 3.0), (70, 7.000000000000001)]
    assert results.miou_curves(lines) == {data: {"b16, paper": points} for data in ("voc", "mine")}
    results.plot(tmp_path, "evaluate", lines, {})
    drawn = (tmp_path / "results.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("voc", "mine", "b16, paper", "pictures seen"))


def test_tables_are_escaped() -> None:
    assert results.as_markdown(["a|b"], [["c"]]).startswith("| a\\|b |\n|------|\n| c")
    assert "50\\% \\& x\\_1 \\\\" in results.as_latex("t", ["a"], [["50% & x_1"]])
