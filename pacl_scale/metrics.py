"""Measurements of a run: one JSON object a line, and what a machine can say about itself."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

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
        partial = path.with_suffix(".part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; ``values`` holds at least ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; a line cut short by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def resident_mb() -> float:
    """Resident memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def device_mb(device: torch.device) -> float | None:
    """Peak memory allocated on ``device`` in MiB; ``None`` where the device keeps no count (CPU)."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


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
