"""What is queued, refused and queued again, with commands of Slurm that only pretend; `test_slurm.py` has real ones."""

import io
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks

from pacl_scale import config, follow, job, nodes, submit
from pacl_scale.checkpoint import STATE
from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.nodes import CheckConfig, Facts

CLUSTER = Path(__file__).resolve().parents[1] / "configs" / "clusters" / "example.yaml"
COMMANDS = {
    "srun": "exit 1",
    "sbatch": 'cp "$1" "$HERE/script"; echo "Submitted batch job 7"',
    "sinfo": 'echo "gpu|up|6|gpu:a100:8(S:0-1)"; echo "gpu|up|4|gpu:a100:4"; echo "old*|down|2|(null)"',
    "squeue": 'if [ -e "$HERE/state" ]; then cat "$HERE/state"; '
    'else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scontrol": 'echo "$@" >> "$HERE/asked"; echo "JobId=7 JobState=PENDING ExcNodeList=n9 Comment=a b"',
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands of a pretended Slurm: jobs are in the state that the file ``state`` holds."""
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    return tmp_path


def words_of(here: Path, *more: str) -> list[str]:
    return ["--cluster", str(CLUSTER), "--nodes=2", f"run={here / 'run'}", "global_batch_size=64", *more]


def test_words_are_shared_out() -> None:
    words = ["--nodes", "8", "--config", "a.yaml", "--gpus-per-node=4", "steps=3", "--dry-run", "time=1:00:00"]
    own, rest = submit.split_words(words)
    assert own == ["--nodes=8", "--gpus_per_node=4", "--dry_run=true", "--time=1:00:00"]
    assert rest == ["--config", "a.yaml", "steps=3"]
    with pytest.raises(UserError, match="--nodes needs a value"):
        submit.split_words(["--nodes"])


def test_no_key_is_both_the_jobs_and_the_trainings() -> None:
    from pacl_scale.train import TrainConfig

    assert not set(config.to_dict(TrainConfig())) & set(config.to_dict(submit.SubmitConfig()))


@pytest.mark.parametrize(
    ("gres", "gpus"), [("(null)", 0), ("gpu:8", 8), ("gpu:a100:8(S:0-1)", 8), ("shard:3,gpu:h100:4,gpu:2", 6)]
)
def test_gpus_of_a_node_are_counted(gres: str, gpus: int) -> None:
    assert submit.gpus_in(gres) == gpus


def test_a_dry_run_prints_the_script_and_queues_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dry-run", "--qos=high", "--exclude=n[3-4]", "--reservation=r", "--signal-seconds=60", "--attempts=5"]
    assert submit.main(words_of(here, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"partition=gpu", "account=my-project", "gpus-per-node=8", "ntasks-per-node=8", "nodes=2"} <= asked
    assert {"requeue", "signal=USR2@60", "time=24:00:00", "mem=0", "qos=high", "reservation=r"} <= asked
    assert {"exclude='n[3-4]'", "cpus-per-task=12", "open-mode=append"} <= asked
    assert "module load cuda/12.8" in lines
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert any(line.endswith(f"requeue {here / 'run'} --attempts=5 || status=$?") for line in lines)
    assert not (here / "script").exists() and not (here / "run" / "job.json").exists()


def test_a_job_is_queued_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(words_of(here)) == 0
    said = capsys.readouterr().out
    assert "job      7\n" in said and f"run      {here / 'run'}\n" in said and "scancel 7\n" in said
    assert "#SBATCH --gpus-per-node=8" in (here / "script").read_text()
    (here / "state").write_text("PENDING")
    with pytest.raises(UserError, match="job 7 of run .* is PENDING"):
        submit.main(words_of(here))
    (here / "state").unlink()
    assert submit.main(words_of(here)) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["global_batch_size=60"], "not a multiple of 16 ranks"),
        (["--partition=fast"], "there is no partition fast; the cluster has gpu, old"),
        (["--partition=old"], "partition old is down"),
        (["--nodes=7"], "partition gpu has 6 nodes with 8 GPUs, and 7 are asked for"),
        (["distributed.device=cpu"], "distributed.device is cpu"),
        (["--gpus-per-node=0", "distributed.device=cuda"], "no GPUs are asked for"),
        (["--tasks-per-node=16"], "need as many GPUs"),
        (["--nodes=0"], "at least 1"),
        (["optim.lrr=1"], "optim.lrr"),
        (["--cluster=local"], "--cluster local takes no --cluster"),
    ],
)
def test_mistakes_are_refused_before_anything_is_queued(here: Path, more: list[str], said: str) -> None:
    words = words_of(here, "global_batch_size=560" if "--nodes=7" in more else "steps=1", *more)
    with pytest.raises(UserError, match=said):
        submit.main(words)
    assert not (here / "script").exists()


def test_local_is_training_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", "local", "--tasks-per-node=2", "--dry-run", f"run={here / 'run'}"]
    assert submit.main(words) == 0
    assert capsys.readouterr().out.endswith(f"-m pacl_scale.train run={here / 'run'} distributed.ranks=2\n")


def test_local_has_no_queue() -> None:
    with pytest.raises(UserError, match="takes no --gpus-per-node"):
        submit.main(["--cluster=local", "--gpus-per-node=2"])
    with pytest.raises(UserError, match="one machine, not 2 nodes"):
        submit.main(["--cluster=local", "--nodes=2"])


def saved(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / STATE).write_text("{}")


def started(monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    """What Slurm tells a job that it has started so many times before."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))


def test_a_job_without_newer_checkpoints_is_given_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (here / "state").write_text("RUNNING")
    started(monkeypatch, 0)
    job.claim(run, "7", attempts=2)
    saved(run, 5)
    for attempt in range(1, 3):
        job.requeue(run, "7", attempts=2)
        started(monkeypatch, attempt)
        job.claim(run, "7", attempts=2)
        assert job.read(run) == job.Note("7", step=5, fruitless=attempt - 1, attempt=attempt)
    job.requeue(run, "7", attempts=2)
    started(monkeypatch, 3)
    job.claim(run, "7", attempts=2)
    with pytest.raises(RunFailed, match="still that of step 5 after 2 more attempts"):
        job.requeue(run, "7", attempts=2)
    assert (here / "asked").read_text() == 3 * "requeue 7\n"
    saved(run, 6)
    job.requeue(run, "7", attempts=2)
    started(monkeypatch, 4)
    job.claim(run, "7", attempts=2)
    assert job.read(run) == job.Note("7", step=6, fruitless=0, attempt=4)


def test_requeues_by_others_count_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    for attempt in range(3):
        started(monkeypatch, attempt)
        job.claim(run, "7", attempts=2)
    started(monkeypatch, 3)
    with pytest.raises(RunFailed, match="still that of step 0 after 2 more attempts"):
        job.claim(run, "7", attempts=2)
    job.claim(run, "8", attempts=2)
    assert job.read(run) == job.Note("8"), "another job starts from naught"


def test_checkpoints_elsewhere_count(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text(f"checkpoint: {{folder: {here / 'elsewhere'}}}")
    (here / "elsewhere" / "00000009").mkdir(parents=True)
    (here / "elsewhere" / "00000009" / STATE).write_text("{}")
    job.claim(here / "run", "7", attempts=1)
    assert json.loads((here / "run" / "job.json").read_text())["step"] == 9


def test_unfit_nodes_are_excluded_besides_those_that_were(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (run / "slurm").mkdir(parents=True)
    (here / "state").write_text("RUNNING")
    started(monkeypatch, 1)
    nodes.note_unfit(run, "7", {"n2": "too full", "n5": "too slow"})
    monkeypatch.setattr("signal.signal", lambda *of: None)
    job.requeue(run, "7", attempts=2)
    asked = (here / "asked").read_text().splitlines()
    assert asked == ["requeue 7", "--oneliner show job 7", "update JobId=7 ExcNodeList=n9,n2,n5"]
    started(monkeypatch, 2)
    assert nodes.unfit_nodes(run, "7") == {}, "another attempt looks anew"


@pytest.mark.parametrize(
    ("allocated", "tasks", "batch", "usable"), [(8, 8, 4096, 8), (7, 8, 4096, 4), (3, 1, 16, 2), (5, 2, 60, 5)]
)
def test_as_many_nodes_as_share_the_batch_evenly(allocated: int, tasks: int, batch: int, usable: int) -> None:
    assert job.usable_nodes(allocated, tasks, batch) == usable
    with pytest.raises(UserError, match="not a multiple"):
        job.usable_nodes(allocated, 7, 4096)


def test_fewer_nodes_mean_more_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    training = submit.Training(["global_batch_size=64"], CheckConfig(), ranks=8)
    for ranks, added in (("8", []), ("4", ["micro_batch_size=8"]), ("2", ["micro_batch_size=8"])):
        monkeypatch.setenv("SLURM_NTASKS", ranks)
        assert training.sized() == ["global_batch_size=64", *added]
    training = submit.Training(["global_batch_size=60", "micro_batch_size=5"], CheckConfig(), ranks=6)
    monkeypatch.setenv("SLURM_NTASKS", "5")
    assert training.sized()[2:] == ["micro_batch_size=4"], "12 pictures a rank are three times 4"


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


def test_following_shows_what_is_added_until_the_end(here: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.err"
    log.write_text("first\n")
    (here / "state").write_text("COMPLETED")
    shown = io.StringIO()
    assert follow.follow("7", [log, tmp_path / "absent"], shown) == 0
    assert shown.getvalue() == "-- job 7 is COMPLETED\nfirst\n"
    (here / "state").write_text("FAILED")
    assert follow.follow("7", [log], io.StringIO()) == 1
    (here / "state").unlink()
    assert follow.follow("7", [log], shown) == 1 and "job 7 is GONE" in shown.getvalue()


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_a_job_that_somebody_ends_is_not_queued_again(here: Path, state: str) -> None:
    (here / "state").write_text(state)
    job.claim(here / "run", "7", attempts=1)
    job.requeue(here / "run", "7", attempts=1)
    assert not (here / "asked").exists()


def test_the_command_of_batch_scripts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_ID"):
        job.main(["claim", str(here / "run")])
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (here / "state").write_text("RUNNING")
    assert job.main(["claim", str(here / "run")]) == 0
    assert job.main(["claim", str(here / "run")]) == 0
    assert job.main(["requeue", str(here / "run")]) == 0
    assert (here / "asked").read_text() == "requeue 8\n"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    with pytest.raises(UserError, match="job 8 of run"):
        job.main(["claim", str(here / "run")])


def test_a_damaged_note_and_an_absent_slurm_are_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run").mkdir()
    (here / "run" / "job.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        job.read(here / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no Slurm here"):
        job.state_of("7")
