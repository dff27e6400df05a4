"""What is asked of a real Slurm and what it gives: ranks, GPUs, partitions, the script for evaluations."""

import re
import sys
from pathlib import Path

import pytest
from documented_places import ON_SLURM
from slurm_cluster import Cluster
from slurm_runs import SCRIPT, said, words_for
from sweeps import write_data, write_runs

from pacl_scale import claims, config, evaluate, submit
from pacl_scale.errors import UserError
from pacl_scale.evaluate.rows import read_rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_ranks_and_gpus_are_those_that_slurm_gives(cluster: Cluster) -> None:
    program = """
import os
from pacl_scale.distributed import slurm_ranks
found = slurm_ranks(os.environ)
print(*(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")),
      os.uname().nodename, os.environ["CUDA_VISIBLE_DEVICES"])
"""
    command = ["srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", sys.executable, "-c", program]
    lines = sorted(cluster.run(*command).splitlines())
    assert lines == [
        "0 4 0 2 n1 n1 0,1",
        "1 4 1 2 n1 n1 0,1",
        "2 4 0 2 n1 n2 0,1",
        "3 4 1 2 n1 n2 0,1",
    ]


def test_gpus_reach_slurm_as_they_are_asked_for_and_a_node_without_them_is_named(
    cluster: Cluster, features: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*words_for(features, run, global_batch_size=12), "distributed.device=auto"]
    assert (
        submit.main(["--nodes=3", "--gpus-per-node=a100:2", "--cpus-per-task=2", "--sbatch.comment=drill", *words]) == 0
    )
    note = claims.read(run)
    assert note is not None
    asked = {name: cluster.field(note.job, name) for name in ("NumTasks", "CPUs/Task", "TresPerNode", "Comment")}
    assert asked == {"NumTasks": "6", "CPUs/Task": "2", "TresPerNode": "gres:gpu:a100:2", "Comment": "drill"}
    # The devices are pretended, so torch finds none: every rank has said where it is, and its node does not fit.
    assert cluster.wait(note.job) == "FAILED"
    places = re.findall(r"task rank=(\d) node=n(\d) local_rank=(\d) CUDA_VISIBLE_DEVICES=([\d,]*)", said(run))
    assert sorted((rank, local, seen) for rank, _, local, seen in places) == [
        (str(rank), str(rank % 2), "0,1") for rank in range(6)
    ]
    assert len({node for _, node, _, _ in places}) == 3
    assert "does not fit: torch finds 0 of the 2 GPUs that Slurm gave" in said(run)
    assert "partition main has 1 nodes that take jobs, and it needs 3; mend them and submit again" in said(run)


def test_an_evaluation_is_shared_among_tasks(cluster: Cluster, tmp_path: Path) -> None:
    run = write_runs(tmp_path, ["a"])["a"]
    evaluation = write_data(tmp_path, ["x"])
    words = ["--config", evaluation, "--checkpoint", run]
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-task=0"]
    command += [f"--output={tmp_path}/pacl-%j.log", f"--export=ALL,PYTHON={sys.executable}"]
    number = cluster.run(*command, str(SCRIPT.with_name("eval.sh")), *words).strip()
    assert evaluate.main([*words, f"--output={tmp_path}/alone"]) == 0
    assert cluster.wait(number) == "COMPLETED", said(Path(run))
    assert all(f"counts part {part} of 2" in said(Path(run)) for part in range(2))
    shared, alone = ({row.method: row for row in read_rows(str(folder))} for folder in (run, tmp_path / "alone"))
    assert shared.keys() == alone.keys() and shared["pacl"].pictures == 2
    assert all(shared[name].scores == alone[name].scores for name in alone)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=5"], "partition main has 4 nodes with 2 GPUs and 2 cores, and 5 are asked for"),
        (["--gpus-per-node=8"], "partition main has 0 nodes with 8 GPUs"),
        (["--partition=fast"], "there is no partition fast; the cluster has main, short, urgent"),
        (["--partition=main,fast"], "there is no partition fast"),
        (["--partition=short", "--nodes=1", "--time=6"], "partition short ends jobs after 5:00, and 6 is asked for"),
        (["--gpus-per-node=h100:2"], "partition main has 0 nodes with 2 h100 GPUs and 2 cores"),
        (["--cpus-per-task=5"], "partition main has 0 nodes with 2 GPUs and 10 cores"),
        (["--mem=8G"], "partition main has 0 nodes with 2 GPUs, 2 cores and 8G of memory"),
        (["--constraint=ib&big"], "partition main has 0 nodes with 2 GPUs, 2 cores and the features ib&big"),
        (["--exclude=n[1-2]", "--nodes=3"], r"main has 2 nodes with 2 GPUs and 2 cores besides n\[1-2\], and 3 are"),
    ],
)
def test_what_the_partition_cannot_run_is_refused(cluster: Cluster, words: list[str], said: str) -> None:
    settings = config.parse(submit.SubmitConfig, ["--gpus_per_node=2", *submit.split_words(words)[0]], "test")
    with pytest.raises(UserError, match=said):
        submit.check_partition(settings)


def test_what_the_partition_can_run_is_not_refused(cluster: Cluster) -> None:
    words = ["--gpus_per_node=a100:2", "--nodes=3", "--mem=4G", "--constraint=ib", "--exclude=n1", "--time=1-00:00:00"]
    settings = config.parse(submit.SubmitConfig, [*words, "--partition=short,main"], "test")
    assert submit.check_partition(settings) == []
    cluster.run("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=test")
    try:
        said = submit.check_partition(settings)
    finally:
        cluster.run("scontrol", "update", "NodeName=n4", "State=RESUME")
    assert said == ["partition main has 2 such nodes now (n4 is drained); the job waits for more"]


@pytest.mark.parametrize("command", ON_SLURM)
def test_what_the_documentation_asks_has_an_answer(command: str, cluster: Cluster) -> None:
    said = cluster.run("bash", "-c", command)
    assert all(word in said for word in (("main", "gpu:") if "sinfo" in command else ("MaxArraySize", "KillWait")))
