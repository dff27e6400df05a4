"""What is queued, refused and queued again, with commands of Slurm that only pretend; `test_slurm.py` has real ones."""

import errno
import io
import json
import os
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks

from pacl_scale import batch, claims, config, controller, follow, job, nodes, partition, submit
from pacl_scale.checkpoint import STATE
from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed, UserError
from pacl_scale.nodes import CheckConfig, Facts

CLUSTER = Path(__file__).resolve().parents[1] / "configs" / "clusters" / "example.yaml"
COMMANDS = {
    "srun": "exit 1",
    "sbatch": 'cp "$1" "$HERE/script"; echo "Submitted batch job 7"',
    "sinfo": 'cat "$HERE/nodes"',
    "squeue": 'if [ -e "$HERE/state" ]; then cat "$HERE/state"; '
    'else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scontrol": 'if [ "$2" = hostnames ]; then echo "$3" | tr , "\\n"; exit; fi; '
    'if [ -s "$HERE/silent" ]; then sed -i 1d "$HERE/silent"; '
    'echo "scontrol: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi; '
    'echo "$@" >> "$HERE/asked"; '
    'echo "JobId=7 JobState=PENDING Partition=gpu ExcNodeList=n9 TresPerNode=gres:gpu:8 Comment=a b"',
    "scancel": 'echo "cancel $@" >> "$HERE/asked"',
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands of a pretended Slurm: jobs are in the state that the file ``state`` holds."""
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    large = [f"gpu|up|n{n}|idle|96|900000|gpu:a100:8(S:0-1)|ib,big|2-00:00:00" for n in range(1, 7)]
    small = [f"gpu|up|n{n}|mixed|48|400000|gpu:v100:4|ib|2-00:00:00" for n in range(7, 11)]
    old = [f"old*|down|n{n}|idle|8|64000|(null)|(null)|infinite" for n in (11, 12)]
    (tmp_path / "nodes").write_text("\n".join([*large, *small, *old]) + "\n")
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
    assert partition.gpus_in(gres) == gpus


def test_a_dry_run_prints_the_script_and_queues_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--dry-run",
        "--sbatch.mail-type=END",
        "--gpus-per-node=a100:8",
        "--qos=high",
        "--exclude=n[3-4]",
        "--reservation=r",
        "--signal-seconds=60",
        "--attempts=5",
    ]
    assert submit.main(words_of(here, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"partition=gpu", "account=my-project", "gpus-per-node=a100:8", "ntasks-per-node=8", "nodes=2"} <= asked
    assert {"requeue", "signal=USR2@60", "time=24:00:00", "mem=0", "qos=high", "reservation=r"} <= asked
    assert {"mail-type=END", "exclude='n[3-4]'", "cpus-per-task=12", "open-mode=append"} <= asked
    assert "module load cuda/12.8" in lines
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert any(line.endswith(f"requeue {here / 'run'} --attempts=5 || status=$?") for line in lines)
    assert not (here / "script").exists() and not (here / "run" / "jobs").exists()


def test_a_job_is_queued_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(words_of(here)) == 0
    said = capsys.readouterr().out
    assert "asks     2 nodes x 8 ranks, 8 GPUs a node, 12 cores a rank, partition gpu, time 24:00:00, mem 0" in said
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
        (["--partition=old"], "partition old is not up"),
        (["--nodes=7"], "partition gpu has 6 nodes with 8 GPUs and 96 cores, and 7 are asked for"),
        (["distributed.device=cpu"], "distributed.device is cpu"),
        (["--partition=gpu,fast"], "there is no partition fast"),
        (["--partition=old,gpu", "--constraint=fast"], "partition old is not up; partition gpu has 0 nodes with"),
        (["--gpus-per-node=h100:8"], "partition gpu has 0 nodes with 8 h100 GPUs and 96 cores"),
        (["--gpus-per-node=eight"], "gpus_per_node is a number or a type and a number"),
        (["--time=3-00:00:00"], "partition gpu ends jobs after 2-00:00:00, and 3-00:00:00 is asked for"),
        (["--time=tomorrow"], "no time limit of Slurm"),
        (["--cpus-per-task=16"], "0 nodes with 8 GPUs and 128 cores"),
        (["--mem=1T"], "0 nodes with 8 GPUs, 96 cores and 1T of memory"),
        (["--mem=much"], "no amount of memory"),
        (["--constraint=ib&fast"], "0 nodes with 8 GPUs, 96 cores and the features ib&fast"),
        (["--exclude=n1,n2,n3,n4,n5"], "has 1 nodes with 8 GPUs and 96 cores besides n1,n2,n3,n4,n5, and 2 are"),
        (["--sbatch.array=1-3"], "sbatch.array is not for you to set"),
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


def test_local_has_no_queue(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--cluster=local", "--gpus-per-node=2", "--follow", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("distributed.ranks=2\n"), "one rank a GPU, as in the queue"
    with pytest.raises(UserError, match="takes no --partition"):
        submit.main(["--cluster=local", "--partition=gpu"])
    with pytest.raises(UserError, match="one machine, not 2 nodes"):
        submit.main(["--cluster=local", "--nodes=2"])


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("90", 90), ("90:30", 90.5), ("12:00:00", 720), ("2-00", 2880), ("1-12:30", 2190), ("infinite", float("inf"))],
)
def test_time_limits_are_read_as_slurm_does(limit: str, minutes: float) -> None:
    assert partition.minutes_in(limit) == minutes


@pytest.mark.parametrize(
    ("constraint", "nodes"), [("ib", 10), ("ib&big", 6), ("big|none", 6), ("[rack1|rack2]", 10), ("none", 0)]
)
def test_features_choose_nodes(constraint: str, nodes: int) -> None:
    mine = [node for node in partition.read() if node.partition == "gpu"]
    assert len(partition.fit(mine, partition.Ask(nodes=1, constraint=constraint))) == nodes


def test_nodes_that_are_away_are_waited_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = (here / "nodes").read_text()
    away = known.replace("n1|idle", "n1|drained").replace("n2|idle", "n2|down*")
    (here / "nodes").write_text(away)
    assert submit.main(words_of(here, "--nodes=4")) == 0
    assert "note" not in capsys.readouterr().out, "four are there"
    assert submit.main(words_of(here, "--nodes=6", "global_batch_size=96")) == 0
    said = capsys.readouterr().out
    assert "note     partition gpu has 4 such nodes now (n1 is drained, n2 is down); the job waits for more" in said
    assert submit.main(words_of(here, "--partition=gpu,old", "--nodes=4")) == 0, "one of them can start it"


def test_the_shells_habits_stand_in_for_what_is_not_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "fast")
    monkeypatch.setenv("SBATCH_QOS", "low")
    assert submit.main(words_of(here)) == 0, "the cluster's file names a partition"
    assert "#SBATCH --qos=low" in (here / "script").read_text()
    with pytest.raises(UserError, match="there is no partition fast"):
        submit.main(["--nodes=2", f"run={here / 'run'}", "global_batch_size=64"])


def test_of_many_that_claim_a_run_at_once_one_has_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "state_of", lambda job: "RUNNING")

    def enter(run: Path, number: int, together: threading.Barrier) -> str | None:
        together.wait()
        try:
            return claims.enter(run, str(number)).job
        except UserError as error:
            assert "is RUNNING; wait for it" in str(error)
            return None

    with ThreadPoolExecutor(8) as pool:
        for turn in range(20):
            run, together = here / f"run-{turn}", threading.Barrier(8)
            found = pool.map(enter, [run] * 8, range(8), [together] * 8)
            (winner,) = [job for job in found if job]
            note = claims.read(run)
            assert note is not None and note.job == winner
            assert [file.name for file in (run / "jobs").iterdir()] == ["0001.json"]


def test_a_slower_submitter_takes_its_job_back(here: Path) -> None:
    claim = (
        'mkdir -p "$HERE/run/jobs"; echo \'{"job": "6"}\' > "$HERE/run/jobs/0001.json"; echo RUNNING > "$HERE/state"'
    )
    (here / "bin" / "sbatch").write_text(f"#!/bin/sh\n{claim}\necho Submitted batch job 7\n")
    with pytest.raises(UserError, match="job 6 of run .* is RUNNING"):
        submit.main(words_of(here))
    assert (here / "asked").read_text() == "cancel 7\n"
    assert claims.read(here / "run") == claims.Note("6")


def test_a_training_without_slurm_has_its_run_too(here: Path) -> None:
    run = here / "run"
    with claims.held_here(run), pytest.raises(UserError, match=f"run {run} is trained by process {os.getpid()} on"):
        claims.enter(run, "7")
    with claims.held_here(run):
        pass
    gone = subprocess.Popen(["true"])
    note = claims.read(run)
    assert note is not None and note.over
    claims.update(run, replace(note, over=False))
    with pytest.raises(UserError, match="is trained by process"):
        claims.enter(run, "7")
    gone.wait()
    host = os.uname().nodename
    for job_of_the_dead, is_alive in ((f"local:{host}:{gone.pid}:0", False), ("local:elsewhere:1:0", True)):
        (run / "jobs" / "0009.json").write_text(json.dumps({"job": job_of_the_dead}))
        found = claims.read(run)
        assert found is not None and bool(claims.state_of_note(found)) is is_alive
    with pytest.raises(UserError, match=f"on elsewhere; wait for it or end it, or delete {run / 'jobs'} if it is gone"):
        claims.enter(run, "7")


def test_a_silent_controller_is_asked_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "PAUSE_SECONDS", 0.01)
    (here / "state").write_text("RUNNING")
    (here / "silent").write_text("once\ntwice\n")
    job.claim(here / "run", "7", attempts=2)
    job.requeue(here / "run", "7", attempts=2)
    assert (here / "asked").read_text() == "requeue 7\n" and (here / "silent").read_text() == ""
    monkeypatch.setattr(controller, "PATIENCE_SECONDS", 0.05)
    (here / "silent").write_text("again\n" * 100)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        job.requeue(here / "run", "7", attempts=2)
    (here / "bin" / "scontrol").write_text("#!/bin/sh\necho x >> $HERE/asked\necho Access denied >&2\nexit 1\n")
    (here / "asked").unlink()
    with pytest.raises(UserError, match="Access denied"):
        job.requeue(here / "run", "7", attempts=2)
    assert (here / "asked").read_text() == "x\n", "a refusal is final"


def test_a_disk_without_room_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    saved(run, 4)
    with pytest.raises(UserError, match="config.yaml is empty or damaged"):
        submit.main(words_of(here))

    def no_room(*of: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.link", no_room)
        with pytest.raises(UserError, match="0001.json cannot be written .*No space left"):
            job.claim(run, "7", attempts=1)
        patch.setattr("tempfile.TemporaryFile", no_room)
        with pytest.raises(UserError, match="cannot be written .No space left on device.; make room"):
            nodes.refuse_full(run, CheckConfig(min_disk_gb=0))
    nodes.refuse_full(run, CheckConfig(min_disk_gb=0))
    job.claim(run, "7", attempts=1)
    assert claims.read(run) == claims.Note("7", step=4), "the emptied file is no obstacle"


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
        assert claims.read(run) == claims.Note("7", step=5, fruitless=attempt - 1, attempt=attempt)
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
    assert claims.read(run) == claims.Note("7", step=6, fruitless=0, attempt=4)


def test_requeues_by_others_count_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    for attempt in range(3):
        started(monkeypatch, attempt)
        job.claim(run, "7", attempts=2)
    started(monkeypatch, 3)
    with pytest.raises(RunFailed, match="still that of step 0 after 2 more attempts"):
        job.claim(run, "7", attempts=2)
    job.claim(run, "8", attempts=2)
    assert claims.read(run) == claims.Note("8", attempt=3), "another job starts from naught"


def test_checkpoints_elsewhere_count(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text(f"checkpoint: {{folder: {here / 'elsewhere'}}}")
    (here / "elsewhere" / "00000009").mkdir(parents=True)
    (here / "elsewhere" / "00000009" / STATE).write_text("{}")
    job.claim(here / "run", "7", attempts=1)
    assert json.loads((here / "run" / "jobs" / "0001.json").read_text())["step"] == 9


def test_unfit_nodes_are_excluded_besides_those_that_were(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (run / "slurm").mkdir(parents=True)
    (here / "state").write_text("RUNNING")
    started(monkeypatch, 1)
    nodes.note_unfit(run, "7", {"n2": "too full", "n5": "too slow"})
    monkeypatch.setattr("signal.signal", lambda *of: None)
    job.requeue(run, "7", attempts=2)
    asked = (here / "asked").read_text().splitlines()
    look = "--oneliner show job 7"
    assert asked == [look, "requeue 7", look, "update JobId=7 ExcNodeList=n9,n2,n5"]
    started(monkeypatch, 2)
    assert nodes.unfit_nodes(run, "7") == {}, "another attempt looks anew"


def test_a_job_is_not_kept_off_so_many_nodes_that_it_never_starts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    (here / "state").write_text("RUNNING")
    monkeypatch.setattr("signal.signal", lambda *of: None)
    nodes.note_unfit(run, "7", {"n2": "too full"})
    nodes.note_unfit(run, "7", {"n5": "too slow"})
    said = "without n9, n2, n5 partition gpu has 4 nodes that take jobs, and it needs 5; mend them and submit again"
    with pytest.raises(RunFailed, match=said):
        job.requeue(run, "7", attempts=2, min_nodes=5)
    assert "requeue 7" not in (here / "asked").read_text()
    job.requeue(run, "7", attempts=2, min_nodes=4)
    assert (here / "asked").read_text().splitlines()[-1] == "update JobId=7 ExcNodeList=n9,n2,n5"


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


@pytest.mark.parametrize(
    ("allocated", "tasks", "batch", "usable"), [(8, 8, 4096, 8), (7, 8, 4096, 4), (3, 1, 16, 2), (5, 2, 60, 5)]
)
def test_as_many_nodes_as_share_the_batch_evenly(allocated: int, tasks: int, batch: int, usable: int) -> None:
    assert job.usable_nodes(allocated, tasks, batch) == usable
    with pytest.raises(UserError, match="not a multiple"):
        job.usable_nodes(allocated, 7, 4096)


def test_fewer_nodes_mean_more_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    training = batch.Training(["global_batch_size=64"], CheckConfig(), ranks=8)
    for ranks, added in (("8", []), ("4", ["micro_batch_size=8"]), ("2", ["micro_batch_size=8"])):
        monkeypatch.setenv("SLURM_NTASKS", ranks)
        assert training.sized() == ["global_batch_size=64", *added]
    training = batch.Training(["global_batch_size=60", "micro_batch_size=5"], CheckConfig(), ranks=6)
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
    assert "SIGNALING" not in follow.OVER and "STAGE_OUT" not in follow.OVER, "such a job has something to do"


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
    (here / "run" / "jobs").mkdir(parents=True)
    (here / "run" / "jobs" / "0001.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        claims.read(here / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no Slurm here"):
        controller.state_of("7")
