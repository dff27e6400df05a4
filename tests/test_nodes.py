"""The look at the nodes before a training."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pretended_slurm
import pytest
from ranks import run_ranks

from pacl_scale import nodes
from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.nodes import CheckConfig, Facts


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pretended Slurm."""
    pretended_slurm.install(tmp_path, monkeypatch)
    return tmp_path


def test_a_node_that_lost_gpus_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "7")
    nodes.refuse_lost_gpus(here / "run", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(RunFailed, match="node n4 does not fit: torch finds 7 of the 8 GPUs"):
        nodes.refuse_lost_gpus(here / "run", "7")
    assert list(nodes.unfit_nodes(here / "run", "7")) == ["n4"]


def test_the_words_of_the_check_are_written_like_others() -> None:
    words = ["--check.min-disk-gb", "3", "steps=2", "check.timeout_s=9", "--config", "a.yaml"]
    assert nodes.split_words(words) == (
        ["--check.min_disk_gb=3", "--check.timeout_s=9"],
        ["steps=2", "--config", "a.yaml"],
    )
    with pytest.raises(UserError, match="--check.timeout-s needs a value"):
        nodes.split_words(["--check.timeout-s"])


FIT = Facts("n1", disk_gb=100.0, clock_s=1000.0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"disk_gb": 0.1}, "0.10 GB left for temporary files, less than 0.5"),
        ({"clock_s": 1060.0}, r"its clock is \+60 s from the others'"),
        ({"pair_gb_per_s": 0.001}, "0.001 GB/s to its neighbours, less than 0.01"),
    ],
)
def test_the_node_that_stands_out_is_named(changes: dict, why: str) -> None:
    others = [replace(FIT, node=f"n{number}", pair_gb_per_s=1.0) for number in (2, 3, 4)]
    unfit = nodes.judge([replace(FIT, pair_gb_per_s=1.0), *others], CheckConfig())
    assert unfit == {}
    (said,) = nodes.judge([replace(FIT, **changes), *others], CheckConfig()).items()
    assert said[0] == "n1" and re.fullmatch(why, said[1])


def test_when_most_are_slow_it_is_not_the_nodes() -> None:
    slow = [replace(FIT, node=f"n{number}", pair_gb_per_s=0.001) for number in range(3)]
    with pytest.raises(UserError, match="3 of 3 nodes are slower"):
        nodes.judge(slow, CheckConfig())


@pytest.mark.parametrize("size", range(1, 8))
def test_every_node_meets_both_neighbours_one_at_a_time(size: int) -> None:
    rounds = nodes.rounds_of_a_ring(size)
    for edges in rounds:
        met = [node for edge in edges for node in edge]
        assert len(met) == len(set(met))
    if size > 1:
        assert sorted(edge for edges in rounds for edge in edges) == sorted((n, (n + 1) % size) for n in range(size))


def facts_of(world: World, floor: float) -> list[Facts]:
    os.environ["SLURMD_NODENAME"] = ("n1", "n1", "n2")[world.rank]
    return nodes.gather(world, CheckConfig(min_gb_per_s=floor))


@pytest.mark.distributed
@pytest.mark.parametrize(("floor", "is_measured"), [(1e-6, False), (1e6, True)])
def test_ranks_gather_one_entry_a_node(floor: float, is_measured: bool) -> None:
    found = run_ranks(3, facts_of, floor)
    assert [one.node for one in found[0]] == ["n1", "n2"]
    assert all(one.disk_gb > 0 and abs(one.clock_s - time.time()) < 60 for one in found[0])
    assert all((one.pair_gb_per_s is not None and one.pair_gb_per_s > 0) is is_measured for one in found[0])
    assert found[0] == found[1] == found[2], "all judge the same"
