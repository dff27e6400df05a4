"""A sweep of sixty cells on a real Slurm of four nodes: one loses power, and five cells cannot succeed."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from sweeps import words_for, write_data, write_runs

from pacl_scale.errors import RunFailed
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.sweep import ledger, main

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RUNS = ["a", "b", "c", "d", "e"]
DATA_SETS = [f"set_{number:02}" for number in range(12)]
BROKEN = DATA_SETS[6]


@pytest.mark.timeout(400)
def test_sixty_cells_a_dying_node_and_five_crashes(
    cluster: Cluster, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    runs = write_runs(tmp_path, RUNS)
    evaluation = write_data(tmp_path, DATA_SETS, BROKEN)
    habits = tmp_path / "cluster.yaml"
    habits.write_text("cpus_per_task: 8  # a whole node\n")
    # Five cells a job are twelve jobs, and an array may have ten.
    words = words_for(tmp_path, runs, evaluation, f"--cluster={habits}", "--job-minutes=5")
    sweep = tmp_path / "sweep"
    stopped: list[str] = []
    trouble = threading.Thread(target=disturb, args=(cluster, sweep, stopped))
    trouble.start()
    try:
        with pytest.raises(RunFailed, match="5 of 60 cells failed") as failed:
            main(words)
    finally:
        trouble.join()
        cluster.power_on("n2")
    assert cluster.field(stopped[0], "Restarts") != "0", "it goes on where it was"
    named = str(failed.value).splitlines()[1:]
    assert len(named) == 5
    for run, line in zip(RUNS, sorted(named), strict=True):
        assert line.startswith(f"  {run}-7-{BROKEN}-fast-")
        assert line.endswith(f"{tmp_path}/data/{BROKEN}/masks/1.png is not a picture")

    folders = sorted((sweep / "cells").iterdir())
    rows = {folder.name: read_rows(str(folder)) for folder in folders}
    assert len(rows) == 60
    measured = sum(any(row.method == "pacl" for row in found) for found in rows.values())
    record_testsuite_property("sweep_rows", measured)
    record_testsuite_property("sweep_named_failures", len(named))
    assert measured == 55
    entries = {folder.name: ledger.read(folder) for folder in folders}
    outcomes = [one.outcome for entry in entries.values() if entry for one in entry.attempts]
    assert outcomes.count("done") == 55 and outcomes.count("refused") == 5
    arrays = {one.job.partition("_")[0] for entry in entries.values() if entry for one in entry.attempts}
    assert len(arrays) >= 2, "twelve jobs are more than one array of ten"
    places = [one.job.partition("_")[2] for entry in entries.values() if entry for one in entry.attempts]
    # A job that is alone in its array has no place.
    assert all(int(place) < 10 for place in places if place)
    assert (sweep / "results.csv").read_text().count("\n") == 1 + 2 * 55, "pacl and untrained, and the heading"

    with pytest.raises(RunFailed, match="5 of 60 cells failed"):
        main(words)
    again = {folder.name: ledger.read(folder) for folder in folders}
    tried = [name for name, entry in again.items() if entry and entry.attempts != entries[name].attempts]  # type: ignore[union-attr]
    record_testsuite_property("sweep_rerun_cells", len(tried))
    assert len(tried) == 5 and all(BROKEN in name for name in tried)


def disturb(cluster: Cluster, sweep: Path, stopped: list[str]) -> None:
    """Switch off a node that works on a cell, and ask a job on another node to stop, as a time limit does."""

    def at_work() -> dict[str, str]:
        files = list(sweep.glob(f"cells/*/{ledger.FILE}"))
        lasts = [one for file in files for one in json.loads(file.read_text())["attempts"][-1:]]
        return {one["node"]: one["job"] for one in lasts if one["outcome"] == "running"}

    until(lambda: "n2" in at_work() and len(at_work()) > 1, 120)
    cluster.power_off("n2")
    until(lambda: bool(set(at_work()) - {"n2"}), 60)
    job = next(job for node, job in at_work().items() if node != "n2")
    cluster.run("scancel", "--signal=USR2", job)
    stopped.append(job)
