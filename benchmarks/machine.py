"""What the benchmarks share: describing the machine, fair timing, and peak memory that is measured, not computed."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pacl_scale.errors import UserError

MEBIBYTE = 1 << 20


def describe() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Wall time is what a user waits. On a machine that others use, processor time of one thread
(``OMP_NUM_THREADS=1``) still compares candidates fairly: with more threads it also counts those that wait."""


def alternate(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    deadline_s: float = float("inf"),
    clock: str = "wall",
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other, round by round, so that a noisy neighbour meets all alike.

    Each round begins with another candidate, so that none always runs in the wake of the same one.
    The first round warms up and is not counted, unless all are ``warm`` already. No round is started after the
    deadline, but one is always counted.
    """
    now = CLOCKS[clock]
    started = time.monotonic()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(1 if warm else 0, rounds + 1):
        if number > 1 and time.monotonic() - started > deadline_s:
            break
        for name in rotated(list(candidates), number):
            run = candidates[name]
            before = now()
            run()
            if number:
                seconds[name].append(now() - before)
    return seconds


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``work`` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        sender.send(work(*arguments))

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise UserError(f"{work.__name__} ended without a result") from error
    finally:
        child.join()


def rotated(names: list[str], by: int) -> list[str]:
    """``names`` from another one on."""
    by %= len(names)
    return names[by:] + names[:by]


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def median(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each candidate."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes by which the process grew at its highest while ``work`` ran, beyond what it held before.

    Linux counts pages that were really touched; the high-water mark is reset first. Call it in a fresh process
    (:func:`in_child`), because memory freed before is used again without growth.
    """
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(0, _memory("VmHWM") - before)


def in_child(script: str, *words: str) -> Any:
    """What ``script`` prints as JSON when run with ``words`` in a process of its own."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(results: dict[str, Any], file: str | None) -> None:
    """Results as JSON to ``file``, or to stdout."""
    text = json.dumps(results, indent=2)
    if file is None:
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _memory(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
