"""A download as an array of Slurm jobs on two nodes: by --slurm, and by the batch script."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing, slurm_cluster, until
from web_farm import WebFarm

from data_prep import slurm
from data_prep.download import main
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex
from pacl_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
why_not = missing()
needs_a_cluster = pytest.mark.skipif(why_not is not None, reason=f"no Slurm cluster can be started here: {why_not}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_cluster(folder, nodes=2) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        yield running


def words_for(farm: WebFarm, tmp_path: Path, output: str, kinds: list[str]) -> list[str]:
    url_list = tmp_path / "pairs.tsv"
    url_list.write_text("".join(f"a dog, number {n}\t{farm.url(f'{kind}/{n}.jpg')}\n" for n, kind in enumerate(kinds)))
    words = ["--config", str(ROOT / "configs/data/demo.yaml"), f"url_list={url_list}", f"output={output}"]
    return [*words, "prepare.samples_per_shard=6", "prepare.nouns=false", "fetch.processes=1", "fetch.threads=4"]


def said(folder: Path) -> str:
    """The logs of all jobs."""
    files = [*sorted(folder.glob("slurm/*_log.*")), *sorted(folder.glob("pacl-download-*.log"))]
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)


def array_done(cluster: Cluster, number: str, tasks: int, folder: Path) -> None:
    for task in range(tasks):
        state = cluster.wait(f"{number}_{task}")
        assert state == "COMPLETED", f"{state}\n{said(folder)}"


def report_of(output: str) -> dict:
    return json.loads(storage.read_bytes(f"{output}/report.json"))


@pytest.mark.slurm
@pytest.mark.s3
@pytest.mark.slow
@needs_a_cluster
def test_a_list_is_downloaded_by_jobs_on_two_nodes(
    cluster: Cluster,
    farm: WebFarm,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_for(farm, tmp_path, s3_url, ["ok"] * 20 + ["heals"] * 3 + ["missing"])
    # All the cores of a node, so that two jobs need two nodes.
    more = ["slurm.parts=2", "slurm.cpus_per_task=8", f"slurm.folder={tmp_path / 'slurm'}"]

    assert main([*words, *more, "slurm.dry_run=true", "--slurm"]) == 0
    assert "#SBATCH --requeue" in capsys.readouterr().out and not cluster.run("squeue", "-h")
    assert main([*words, *more, "slurm.partition=nowhere", "--slurm"]) == 2
    assert "there is no partition nowhere; the cluster has main" in capsys.readouterr().err

    # One job prepares, then an array of two.
    assert main([*words, *more, "--slurm"]) == 0
    out = capsys.readouterr().out
    number = next(line.split()[1] for line in out.splitlines() if line.startswith("parts"))
    array_done(cluster, number, 2, tmp_path)
    report = report_of(s3_url)
    assert (report["expected"], report["got"], report["failures"]) == (24, 20, {"http_500": 3, "http_404": 1})
    assert len(SampleIndex.load(s3_url)) == 20
    assert all(farm.requests[f"ok/{n}.jpg"] == 1 for n in range(20))
    assert {cluster.field(f"{number}_{task}", "NodeList") for task in range(2)} == {"n1", "n2"}

    # A retry as jobs: one that plans the round, then the parts.
    assert main(["retry", *words, *more, "retry.backoff_seconds=0.05", "--slurm"]) == 0
    out = capsys.readouterr().out
    number = next(line.split()[1] for line in out.splitlines() if line.startswith("parts"))
    array_done(cluster, number, 2, tmp_path)
    report = report_of(s3_url)
    assert (report["got"], report["retried"], report["failures"]) == (23, 3, {"http_404": 1})


@pytest.mark.slurm
@pytest.mark.slow
@needs_a_cluster
def test_a_job_that_is_asked_to_stop_is_queued_again_and_continues(
    cluster: Cluster, farm: WebFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHECKOUT", str(ROOT))
    monkeypatch.setenv("PYTHON", sys.executable)
    output = tmp_path / "out"
    words = words_for(farm, tmp_path, str(output), ["ok"] * 12 + ["slow"] * 24)
    number = cluster.run("sbatch", "--parsable", "--array=0-1", str(ROOT / "slurm/download.sh"), *words).strip()
    until(lambda: len(list(output.glob("*_stats.json"))) >= 2, 60, lambda: said(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*_stats.json")}
    cluster.run("scancel", "--signal=USR2", f"{number}_0")
    until(lambda: cluster.field(f"{number}_0", "Restarts") == "1", 60, lambda: said(tmp_path))
    array_done(cluster, number, 2, tmp_path)
    assert json.loads((output / "report.json").read_text())["got"] == 36
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before


def test_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([f"output={tmp_path / 'out'}", "url_list=x.tsv", "--slurm"]) == 2
    assert "there is no Slurm here" in capsys.readouterr().err
    for words in (["verify"], ["parts=3"]):
        assert main([*words[:1], f"output={tmp_path / 'out'}", "url_list=x.tsv", "--slurm"]) == 2
        assert "--slurm queues downloads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_batch_script_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = slurm.SlurmConfig(cpus_per_task=16, mem="64G", partition="cpu", folder=str(tmp_path / "logs"))
    executor = slurm.executor_for(settings, "download", after="41")
    script = executor._make_submission_file_text("COMMAND", "")
    for line in ("--cpus-per-task=16", "--mem=64G", "--partition=cpu", "--dependency=afterok:41", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --time" not in script
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no Slurm here"):
        slurm.executor_for(settings, "download")


def test_signals_end_a_job_in_good_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        slurm.end_when_asked()
        for number, status in ((signal.SIGUSR2, 75), (signal.SIGTERM, 143)):
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(number)
            assert ended.value.code == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
