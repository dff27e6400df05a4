"""Who makes the shards: img2dataset's distributors call the same guarded work, in a child that can be killed."""

import builtins
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tasks import make_badly, misbehave
from web_farm import WebFarm

from data_prep import bar
from data_prep.bar import shown
from data_prep.distribute import Supervised, distribute, require
from data_prep.download import main
from data_prep.workers import Outcome
from pacl_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_a_shard_in_a_child_is_done_again_or_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = str(tmp_path / "marker")
    assert Supervised(misbehave, 30)(("dies", marker)) == (True, ("dies", marker))
    assert Supervised(misbehave, 30)(("raises", marker))[0] is False
    assert capsys.readouterr().out.count("ValueError: never works") == 1


@pytest.mark.parametrize("how", ["pyspark", "ray"])
def test_a_missing_package_is_named(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == how:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"pip install 'pacl-scale\[{how}\]'"):
        require(how)
    with pytest.raises(UserError, match="needs the package"):
        list(distribute(how, misbehave, [0], 1, 1.0, list, int, "nowhere"))


@pytest.mark.slow
def test_a_pool_that_lost_a_process_is_replaced_and_a_stuck_shard_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """img2dataset's own pool waits for ever for a process that was killed, and for a shard that hangs."""
    monkeypatch.setattr("data_prep.distribute.LOOK_SECONDS", 0.2)
    work = functools.partial(make_badly, str(tmp_path), {0: "kills its pool", 1: "hangs", 2: "works"})

    def made() -> list[int]:
        return [int(path.stem) for path in tmp_path.glob("*.made")]

    outcomes = distribute("multiprocessing", work, [0, 1, 2], 2, 10.0, made, lambda shard: (1, 1, {}), str(tmp_path))
    assert sorted(outcomes, key=lambda outcome: outcome.task) == [Outcome(n, None, (1, 1, {})) for n in range(3)]
    assert not list(tmp_path.glob("notes/*"))


@pytest.mark.slow
def test_img2datasets_own_processes_with_the_guards(tmp_path: Path) -> None:
    with WebFarm() as farm:
        paths = [f"ok/{n}.jpg" for n in range(6)] + ["toprivate/1", "noai/1"]
        (tmp_path / "pairs.tsv").write_text("".join(f"a dog called {path}\t{farm.url(path)}\n" for path in paths))
        words = ["--config", str(ROOT / "configs/data/demo.yaml"), f"url_list={tmp_path / 'pairs.tsv'}"]
        words += [f"output={tmp_path / 'out'}", "prepare.nouns=false", "fetch.distributor=multiprocessing"]
        assert main([*words, "fetch.processes=1", "fetch.threads=4"]) == 0
        assert farm.agents == {"pacl-scale/0.1.0 (img2dataset)"}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["got"], report["failures"]) == (6, {"private_address": 1, "opt_out": 1})


def test_progress_tells_time_left_rate_and_success(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(bar, "PLAIN_PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(bar.log, "info", lambda event, **values: said.append(values))

    def outcomes() -> Iterator[Outcome]:
        for shard, value in enumerate([(10, 5), None, (10, 10)]):
            time.sleep(0.02)
            yield Outcome(shard, None if value else "it failed", value)

    assert [outcome.task for outcome in shown(outcomes(), 4)] == [0, 1, 2]
    assert [(line["done"], line["total"], line["success"]) for line in said] == [(1, 4, 0.5), (2, 4, 0.5), (3, 4, 0.75)]
    assert 0 < said[-1]["images_per_s"] <= 1000 and said[0]["eta_s"] == 0
