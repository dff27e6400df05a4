"""How a sweep's jobs are queued, taken up and given GPUs and memory; no job is really run."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import grid, write_data, write_runs

from pacl_scale import partition
from pacl_scale.errors import UserError
from pacl_scale.submit import SubmitConfig
from pacl_scale.sweep import ledger, worker
from pacl_scale.sweep.queues import LocalQueue, of_one_task
from pacl_scale.sweep.runner import Limits, Runner, read_jobs
from pacl_scale.sweep.worker import Pack


class FakeQueue:
    """A queue of which only so much is known: which jobs live, and what was queued beside which."""

    def __init__(self, arrays: list[int], room: int) -> None:
        self.arrays, self.room = arrays, room
        self.living: set[str] = set()
        self.calls: list[tuple[int, list[str]]] = []

    def submit(self, packs: list, minutes: int, others: list[str]) -> Iterator[list[str]]:
        self.calls.append((len(packs), others))
        for number, size in enumerate(self.arrays):
            if size == 0:
                raise UserError("sbatch refuses the sweep's jobs")
            yield [f"{len(self.calls)}{number}_{place}" for place in range(size)]

    def has_room(self, jobs: int) -> bool:
        return jobs < self.room

    def alive(self, soon: bool) -> set[str]:
        return self.living


def runner_of(tmp_path: Path, queue: Any) -> Runner:
    runs = write_runs(tmp_path, ["a"])
    runner = Runner(tmp_path / "sweep", "evaluate", Limits(2, 1, 1, 60), queue)
    runner.add(grid(tmp_path, write_data(tmp_path, ["x", "y", "z"]), runs))
    return runner


def test_an_array_that_was_queued_is_known_when_the_next_is_refused(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, FakeQueue([2, 0], room=9))
    with pytest.raises(UserError, match="refuses"):
        runner.submit(list(runner.cells))
    assert [job.name for job in read_jobs(tmp_path / "sweep")] == ["10_0", "10_1"]


def test_what_fails_is_queued_again_only_where_the_throttle_lets_it(tmp_path: Path) -> None:
    queue = FakeQueue([3], room=2)
    runner = runner_of(tmp_path, queue)
    runner.submit(list(runner.cells))
    queue.living = set(runner.jobs)
    names = list(runner.cells)
    crashed = runner.cells[names[0]].folder(runner.folder)
    ledger.end(crashed, ledger.begin(crashed, runner.call, "10_0", "n1"), "failed", "a crash")
    queue.living.discard("10_0")

    class Enough(Exception):
        pass

    class Looks:
        left = 3

        def show(self, runner: Runner) -> None:
            self.left -= 1
            if self.left == 0:
                raise Enough

    queue.arrays = [1]
    with pytest.raises(Enough):
        runner.run(Looks(), 0, None, False, lambda: None)  # type: ignore[arg-type]
    assert len(queue.calls) == 1, "two jobs live, and two may"
    queue.living.discard("10_1")
    with pytest.raises(Enough):
        display = Looks()
        display.left = 3
        runner.run(display, 0, None, False, lambda: None)  # type: ignore[arg-type]
    assert queue.calls[1:] == [(2, ["10_2"])]


def test_a_job_that_nobody_noted_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = FakeQueue([1], room=9)
    runner = runner_of(tmp_path, queue)
    name = next(iter(runner.cells))
    folder = runner.cells[name].folder(runner.folder)
    ledger.begin(folder, "earlier", "55_0", "n1")
    queue.living = {"55_0"}
    runner.look()
    assert runner.jobs["55_0"].cells == [name] and name in runner.owned()
    monkeypatch.setattr(worker, "state_of", lambda job: "RUNNING" if job == "55_0" else None)
    entry = ledger.read(folder)
    assert entry is not None
    assert worker.is_elsewhere(entry, "56_0"), "another job leaves it alone"
    assert not worker.is_elsewhere(entry, "55_0"), "that job itself, started again, does not"
    monkeypatch.setattr(worker, "state_of", lambda job: None)
    assert not worker.is_elsewhere(entry, "56_0")
    queue.living = set()
    runner.look()
    runner.look()
    found = ledger.read(folder)
    assert found is not None and found.last is not None and found.last.outcome == "lost"


def test_local_jobs_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = [Pack(str(tmp_path / f"{n}.json"), str(tmp_path), [], "evaluate", "x", 1, 1.0) for n in range(3)]
    real = subprocess.Popen
    seen = []

    def waiting(command: list[str], env: dict[str, str], **more: Any) -> Any:
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return real(["sleep", "600"], **more)

    monkeypatch.setattr(subprocess, "Popen", waiting)
    queue = LocalQueue(16, 2, ["4", "5", "6", "7", "8"])
    (names,) = queue.submit(packs, 1, [])
    assert queue.alive(True) == set(names) and seen == ["4,5", "6,7"], "the third waits for a pair"
    process = queue._running[names[0]][0]
    process.kill()
    process.wait()
    queue.alive(True)
    assert seen[2:] == ["4,5"]
    queue.close()
    with pytest.raises(UserError, match="2 GPUs a job are asked for, and this machine has 1"):
        LocalQueue(16, 2, ["4"])


@pytest.mark.parametrize(("gpus", "mem", "share"), [(1, "0", "112500M"), (2, "800G", "204800M"), (0, "0", "112500M")])
def test_a_sweeps_jobs_take_their_share_of_a_node(
    gpus: int, mem: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "gpu*|up|n1|idle|96|900000|gpu:a100:8|ib|2-00:00:00"
    monkeypatch.setattr("pacl_scale.partition.ask_slurm", lambda *words: line)
    habits = SubmitConfig(cpus_per_task=12, mem=mem, gpus_per_node="a100:8", time="2-00:00:00", nodes=4)
    one = of_one_task(habits, gpus)
    assert (one.mem, one.nodes, one.time, one.cpus_per_task) == (share, 1, None, 12)
    assert one.gpus_per_node == (f"a100:{gpus}" if gpus else 0)
    assert partition.limit_of(None) == 2880


def test_a_cell_saves_within_what_slurm_gives() -> None:
    assert [worker.save_seconds(given) for given in (300, 100, 30)] == [120, 80, 15]
