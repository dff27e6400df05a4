"""What Slurm costs, and how the drills on a live cluster go.

    python benchmarks/cluster.py [--quick] [--json FILE]

Starts its own cluster on loopback (as root, with Slurm's daemons installed). The time from ``submit`` to the first step
is measured beside plain ``srun`` of the same training, in turn; then the drills of ``pytest -m slurm`` are run, on the
cluster of their own. ``--quick`` is one round, and of the drills the sweep only. A drill that failed, or an overhead of
five seconds or more, ends it with status 1.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parents[1] / "tests"
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(TESTS))

from machine import describe, write  # noqa: E402
from slurm_cluster import Cluster, missing, slurm_cluster, until  # noqa: E402
from slurm_runs import words_for  # noqa: E402
from training import write_features  # noqa: E402

NODES = 2
MOST_OVERHEAD_S = 5.0
"""From `submit` to the first step, beside plain `srun`."""
FIGURES = ("sweep_rows", "sweep_named_failures", "sweep_rerun_cells")


def first_step(command: list[str], run: Path, cluster: Cluster) -> float:
    """Seconds from the start of a command to the first line of a run's metrics."""
    file = run / "metrics.jsonl"
    started = time.perf_counter()
    with open(run.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | cluster.environment)
    until(lambda: file.exists() and file.stat().st_size > 0, 120, run.with_suffix(".log").read_text)
    seconds = time.perf_counter() - started
    process.wait(120)
    until(lambda: not cluster.run("squeue", "--noheader").strip(), 120)
    return seconds


def overhead(rounds: int) -> dict[str, Any]:
    """Seconds to the first step by ``submit`` and by plain ``srun``, alternating, and the median of the differences."""
    found: dict[str, list[float]] = {"submit": [], "srun": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = write_features(folder / "features")
        with slurm_cluster(folder / "slurm", nodes=NODES) as cluster:
            # The first round warms the page cache up and is not counted.
            for number in range(rounds + 1):
                for way in ("submit", "srun") if number % 2 else ("srun", "submit"):
                    run = folder / f"{way}-{number}" / "run"
                    words = words_for(features, run, steps=2)
                    if way == "submit":
                        command = [sys.executable, "-m", "pacl_scale.submit", f"--nodes={NODES}", "--gpus-per-node=0"]
                    else:
                        command = ["srun", f"--nodes={NODES}", "--ntasks-per-node=1", sys.executable]
                        command += ["-m", "pacl_scale.train"]
                    seconds = first_step([*command, *words], run, cluster)
                    if number:
                        found[way].append(seconds)
    differences = [a - b for a, b in zip(found["submit"], found["srun"], strict=True)]
    return {"submit_overhead_s": statistics.median(differences), "first_step_s": found}


def drills(chosen: str) -> dict[str, Any]:
    """Run the tests marked ``slurm``; name to seconds and outcome, and the figures that they recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slurm", "-p", "no:cacheprovider", str(TESTS)]
        command += [f"--junit-xml={report}", f"--basetemp={folder}/tests", *(["-k", chosen] if chosen else [])]
        done = subprocess.run(command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            tree = ElementTree.parse(report)
        except (OSError, ElementTree.ParseError):
            last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            sys.exit(f"error: pytest wrote no report and ended with status {done.returncode}: {last[0]}")
    results: dict[str, Any] = {"drills": {}}
    for case in tree.iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"seconds": float(case.get("time", "0")), "outcome": bad[0].tag if bad else "passed"}
        why = {"why": str(bad[0].get("message", ""))[:500]} if bad else {}
        results["drills"][case.get("name")] = outcome | why
    for one in tree.iter("property"):
        if one.get("name") in FIGURES:
            results[str(one.get("name"))] = int(str(one.get("value")))
    return results | {"drills_passed": all(one["outcome"] == "passed" for one in results["drills"].values())}


def faults(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [f"{name}: {one['outcome']}" for name, one in results["drills"].items() if one["outcome"] != "passed"]
    found += [] if results["drills"] else ["no drill was run"]
    if results["submit_overhead_s"] >= MOST_OVERHEAD_S:
        found.append(f"submit costs {results['submit_overhead_s']:.1f} s more than srun, not below {MOST_OVERHEAD_S:g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, and the sweep as the only drill")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    arguments = parser.parse_args()
    if why := missing():
        sys.exit(f"error: no Slurm cluster can be started here: {why}")
    results = {"benchmark": "cluster", "quick": arguments.quick, "machine": describe()}
    results |= overhead(1 if arguments.quick else 3)
    results |= drills("sixty" if arguments.quick else "")
    write(results, arguments.json)
    if wrong := faults(results):
        sys.exit("error: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
