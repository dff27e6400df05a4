"""What is queued and refused, with commands of Slurm that only pretend; `test_slurm.py` has real ones."""

import errno
import io
from pathlib import Path

import pretended_slurm
import pytest
from pretended_slurm import saved

from pacl_scale import batch, claims, config, follow, job, nodes, partition, submit
from pacl_scale.errors import UserError
from pacl_scale.nodes import CheckConfig

CLUSTER = Path(__file__).resolve().parents[1] / "configs" / "clusters" / "example.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pretended Slurm."""
    pretended_slurm.install(tmp_path, monkeypatch)
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


def test_a_slower_submitter_takes_its_job_back(here: Path) -> None:
    claim = (
        'mkdir -p "$HERE/run/jobs"; echo \'{"job": "6"}\' > "$HERE/run/jobs/0001.json"; echo RUNNING > "$HERE/state"'
    )
    (here / "bin" / "sbatch").write_text(f"#!/bin/sh\n{claim}\necho Submitted batch job 7\n")
    with pytest.raises(UserError, match="job 6 of run .* is RUNNING"):
        submit.main(words_of(here))
    assert (here / "asked").read_text() == "cancel 7\n"
    assert claims.read(here / "run") == claims.Note("6")


def test_a_disk_without_room_is_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = here / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    saved(run, 4)
    assert submit.main(words_of(here)) == 0
    (run / "jobs" / "0001.json").unlink()

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


def test_fewer_nodes_mean_more_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    training = batch.Training(["global_batch_size=64"], CheckConfig(), ranks=8)
    for ranks, added in (("8", []), ("4", ["micro_batch_size=8"]), ("2", ["micro_batch_size=8"])):
        monkeypatch.setenv("SLURM_NTASKS", ranks)
        assert training.sized() == ["global_batch_size=64", *added]
    training = batch.Training(["global_batch_size=60", "micro_batch_size=5"], CheckConfig(), ranks=6)
    monkeypatch.setenv("SLURM_NTASKS", "5")
    assert training.sized()[2:] == ["micro_batch_size=4"], "12 pictures a rank are three times 4"


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


def test_a_run_directory_without_room_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("submitit.core.utils.DelayedSubmission.dump", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); nothing was queued"):
        submit.main(words_of(here))
