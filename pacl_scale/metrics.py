"""Measurements of a run: one JSON object a line, and what a machine can say about itself."""

import json
import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from pacl_scale import storage

REPORTED_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "open_clip_torch",
    "timm",
    "transformers",
    "webdataset",
    "s3fs",
)


class MetricsFile:
    """``metrics.jsonl`` of a run: appended to line by line, read by reports.

    A resumed run starts where its checkpoint was written, so lines of later steps are dropped first: every step
    has one line, whatever happened on the way.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        storage.write_bytes(str(path), "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; ``values`` holds at least ``step``."""
        with storage.explained(str(self.path)), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; a line cut short by a crash is left out."""
    return parse_metrics(path.read_text(encoding="utf-8"))


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """The same from a file's text, wherever it lies."""
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def resident_mb() -> float:
    """Resident memory in MiB of this process, and what its children have besides."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        with suppress(psutil.Error):
            info = child.memory_info()
            total += info.rss - getattr(info, "shared", 0)
    return total / 2**20


def device_mb(device: torch.device) -> float | None:
    """Peak memory allocated on ``device`` in MiB; ``None`` where the device keeps no count (CPU)."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def memory(device: torch.device) -> dict[str, float | None]:
    """Memory of this process and of its device, for a line of measurements."""
    return {"resident_mb": resident_mb(), "device_mb": device_mb(device)}


def environment() -> dict[str, str]:
    """What a reader needs to repeat a run: machine, versions, revision. No variables of the environment."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    }
    for package in REPORTED_PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"revision": revision()}


def revision() -> str:
    """The git revision of the code, with ``+changes`` where files differ from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class Clock:
    """Seconds spent waiting for data and working since the last reading."""

    def __init__(self) -> None:
        self._spent = {"waiting": 0.0, "working": 0.0}
        self._steps = 0

    def waiting(self) -> "Span":
        """A ``with`` block that waits for the next batch."""
        return Span(self._spent, "waiting")

    def working(self) -> "Span":
        """A ``with`` block that computes one step."""
        self._steps += 1
        return Span(self._spent, "working")

    def read(self, pairs_per_step: int, ranks: int = 1, peak_s: float | None = None) -> dict[str, float | None]:
        """Speed and the share of time spent waiting, then start over.

        Args:
            pairs_per_step: of all ranks.
            ranks: how many.
            peak_s: seconds that one pair's arithmetic takes at a device's peak; ``mfu`` is this times pairs per second
                and device.
        """
        total = max(sum(self._spent.values()), 1e-9)
        each = self._steps * pairs_per_step / total / ranks
        result = {
            "pairs_per_s": each * ranks,
            "pairs_per_s_per_rank": each,
            "mfu": None if peak_s is None else each * peak_s,
            "data_wait_share": self._spent["waiting"] / total,
        }
        self.__init__()  # type: ignore[misc]
        return result


class Span:
    """Adds the length of a ``with`` block to one entry of a dictionary."""

    def __init__(self, spent: dict[str, float], what: str) -> None:
        self._spent, self._what = spent, what

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._spent[self._what] += time.perf_counter() - self._start
