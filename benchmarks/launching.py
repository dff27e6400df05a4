"""What loading data costs the thread that launches GPU work: threads of the rank beside a process of its own.

    python benchmarks/launching.py [--quick] [--json FILE]

A step on a GPU is thousands of launches, at each of which Python's lock is let go and taken again. Here, where there is
no GPU, an addition of 64 numbers stands for a launch: it costs as much, and lets go of the lock as well. Between two
batches of 64 pictures come 1,000 of them. Rounds of all candidates take turns. One thread decodes, so that a core is
left for the launching.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from gpu import write_pictures
from machine import describe, write
from opening import PREPROCESS

from pacl_scale.data.stream import DataConfig, PairStream

BATCH, LAUNCHES = 64, 1000


def launches(count: int) -> float:
    """Seconds of so many."""
    numbers, started = torch.zeros(64), time.perf_counter()
    for _ in range(count):
        torch.add(numbers, 1.0)
    return time.perf_counter() - started


def loading(root: Path, own_process: bool, seconds: float) -> dict[str, float]:
    """Microseconds a launch, and pictures a second, while batches are taken as fast as they come."""
    data = DataConfig(root=str(root), decode_threads=1, own_process=own_process)
    with PairStream(data, 0, BATCH) as stream:
        stream.prepare_pictures_for(PREPROCESS)
        batches = iter(stream)
        for _ in range(4):
            next(batches)
        spent, count, used, started = 0.0, 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            spent += launches(LAUNCHES)
            next(batches)
            count += 1
        wall, used = time.perf_counter() - started, time.process_time() - used
    return {
        "us_a_launch": spent / count / LAUNCHES * 1e6,
        "pictures_per_s": count * BATCH / wall,
        "rank_cpu_ms_a_batch": used / count * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, seconds = (3, 2.0) if arguments.quick else (7, 4.0)
    found: dict[str, list[dict[str, float]]] = {"nothing": [], "threads": [], "own process": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "pictures"
        write_pictures(root, 2048)
        for _ in range(rounds):
            found["nothing"].append({"us_a_launch": launches(20 * LAUNCHES) / 20 / LAUNCHES * 1e6})
            found["threads"].append(loading(root, False, seconds))
            found["own process"].append(loading(root, True, seconds))
    results: dict[str, Any] = {"benchmark": "launching", "quick": arguments.quick, "machine": describe()}
    for way, rows in found.items():
        results[way] = {key: round(median([row[key] for row in rows]), 2) for key in rows[0]}
    write(results, arguments.json)


if __name__ == "__main__":
    main()
