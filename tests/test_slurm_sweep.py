"""A sweep of sixty cells on a real Slurm of four nodes: one loses power, and five cells are made to crash."""

import json
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from sweeps import signal_cell, words_for, write_data, write_runs

from pacl_scale.errors import RunFailed
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.sweep import ledger, main

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

DATA_SETS = [f"set_{number:02}" for number in range(12)]
HANGING = DATA_SETS[0]
CRASHES = {
    "a": (None, "not done within 0.5 minutes"),
    "b": (signal.SIGKILL, "ended by SIGKILL, as when memory runs out"),
    "c": (signal.SIGABRT, "ended by SIGABRT"),
    "d": (signal.SIGSEGV, "ended by SIGSEGV"),
    "e": (signal.SIGINT, "interrupted"),
}
"""How the hanging cell of each run is made to end (without a signal: by its time limit), and what is said of it."""


@pytest.mark.timeout(900)
def test_sixty_cells_a_dying_node_and_five_crashes(
    cluster: Cluster, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    runs = write_runs(tmp_path, list(CRASHES))
    evaluation = write_data(tmp_path, DATA_SETS, hanging=HANGING)
    habits = tmp_path / "cluster.yaml"
    habits.write_text("cpus_per_task: 8  # a whole node\n")
    # Five cells a job are twelve jobs, and an array may have ten.
    words = words_for(tmp_path, runs, evaluation, f"--cluster={habits}", "--job-minutes=5")
    words += ["--cell-limit-minutes=0.5"]
    sweep = tmp_path / "sweep"
    trouble = Trouble(cluster, sweep)
    try:
        with trouble, pytest.raises(RunFailed, match="5 of 60 cells failed") as failed:
            main(words)
    finally:
        cluster.power_on(trouble.dead)
    assert cluster.field(trouble.stopped, "Restarts") != "0", "it goes on where it was"
    named = sorted(str(failed.value).splitlines()[1:])
    assert len(named) == 5
    for (run, (_, why)), line in zip(CRASHES.items(), named, strict=True):
        assert line.startswith(f"  {run}-7-{HANGING}-fast-") and line.endswith(f": {why}")

    folders = sorted((sweep / "cells").iterdir())
    rows = {folder.name: read_rows(str(folder)) for folder in folders if HANGING not in folder.name}
    measured = sum(any(row.method == "pacl" for row in found) for found in rows.values())
    record_testsuite_property("sweep_rows", measured)
    record_testsuite_property("sweep_named_failures", len(named))
    assert len(folders) == 60 and measured == 55
    entries = {folder.name: entry for folder in folders if (entry := ledger.read(folder))}
    attempts = [one for entry in entries.values() for one in entry.attempts]
    outcomes = [one.outcome for one in attempts]
    assert outcomes.count("done") == 55
    tried = [sum(one.outcome in ledger.FAILURES for one in entry.attempts) for entry in entries.values()]
    assert sorted(tried) == 55 * [0] + 5 * [2], "each is tried twice"
    # The job that is asked to stop may lose its cell too.
    assert trouble.dead in {one.node for one in attempts if one.outcome == "lost"}, "the dead node took a cell along"
    arrays = {one.job.partition("_")[0] for one in attempts}
    assert len(arrays) >= 2, "twelve jobs are more than one array of ten"
    places = [one.job.partition("_")[2] for one in attempts]
    # A job that is alone in its array has no place.
    assert all(int(place) < 10 for place in places if place)
    assert (sweep / "results.csv").read_text().count("\n") == 1 + 2 * 55, "pacl and untrained, and the heading"

    with Trouble(cluster, sweep, only_kill=True), pytest.raises(RunFailed, match="5 of 60 cells failed"):
        main([*words, "--attempts=1"])
    again = {folder.name: entry for folder in folders if (entry := ledger.read(folder))}
    redone = [name for name, entry in again.items() if entry.attempts != entries[name].attempts]
    record_testsuite_property("sweep_rerun_cells", len(redone))
    assert len(redone) == 5 and all(HANGING in name for name in redone)


class Trouble:
    """What befalls a sweep for the length of a ``with`` block.

    The node that works on the first cell that hangs loses power, a job on another one is asked to stop as at a time
    limit, and from then on cells that hang are ended as :data:`CRASHES` says; or all of them are killed.
    """

    def __init__(self, cluster: Cluster, sweep: Path, only_kill: bool = False) -> None:
        self.cluster, self.sweep, self.only_kill = cluster, sweep, only_kill
        self.dead = self.stopped = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Trouble":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if not self.only_kill:
            until(lambda: bool(self._to_be_killed()), 120)
            self.dead = self._to_be_killed()[0]
            self.cluster.power_off(self.dead)
            until(self._stop_another, 240)
        ended = set()
        while not self._over.wait(0.2):
            for cell, one in self._at_work():
                number = signal.SIGKILL if self.only_kill else CRASHES[cell[0]][0]
                attempt = (cell, one["started"])
                is_due = HANGING in cell and one["node"] != self.dead and attempt not in ended
                # Once an attempt: a second signal would meet a process that says why it ends.
                if is_due and number and signal_cell(self.sweep / "cells" / cell, number):
                    ended.add(attempt)

    def _stop_another(self) -> bool:
        """Whether a job on another node could be asked to stop; Slurm may say that it can not be altered now."""
        for _, one in self._at_work():
            if one["node"] != self.dead:
                with suppress(RuntimeError):
                    self.cluster.run("scancel", "--signal=USR2", one["job"])
                    self.stopped = one["job"]
                    return True
        return False

    def _to_be_killed(self) -> list[str]:
        """Nodes on which a cell hangs that a signal will end."""
        return [one["node"] for cell, one in self._at_work() if HANGING in cell and CRASHES[cell[0]][0]]

    def _at_work(self) -> list[tuple[str, dict[str, str]]]:
        """Cells that are worked on, and the newest attempt at each."""
        files = sorted(self.sweep.glob(f"cells/*/{ledger.FILE}"))
        lasts = [(file.parent.name, one) for file in files for one in json.loads(file.read_text())["attempts"][-1:]]
        return [(cell, one) for cell, one in lasts if one["outcome"] == "running"]
