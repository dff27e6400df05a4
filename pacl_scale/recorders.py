"""Where a run's measurements go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, torch's profiler.

All are off by default. A run that is stopped and goes on, or is queued again, stays one run in each of them.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pacl_scale.distributed import World
from pacl_scale.errors import UserError, first_line
from pacl_scale.log import get_logger
from pacl_scale.plan.gpus import gpu_of_device

logger = get_logger("pacl_scale.recorders")


@dataclass
class RecordConfig:
    """Where measurements go beside metrics.jsonl."""

    tensorboard: bool = False
    """Write them to <run>/tensorboard as well (extra `tensorboard`)."""

    wandb_project: str | None = None
    """Send them to this project of Weights & Biases as well (extra `wandb`); its own variables (WANDB_API_KEY,
    WANDB_MODE=offline) apply."""

    wandb_entity: str | None = None
    """User or team that the project belongs to."""

    profile_from: int | None = None
    """First step that torch's profiler watches, in each rank; writes <run>/profile/. The first steps of a process
    allocate and compile what later ones find: leave them out."""

    profile_steps: int = 3
    """Steps that it watches."""

    memory_snapshot: bool = False
    """Also keep the history of GPU memory of those steps, for https://pytorch.org/memory_viz."""

    peak_tflops: float | None = None
    """Peak of one device in the compute dtype, for the MFU of a GPU that is not known here."""

    def __post_init__(self) -> None:
        if self.profile_steps < 1 or (self.profile_from is not None and self.profile_from < 1):
            raise ValueError("record.profile_from and profile_steps must be at least 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError("record.peak_tflops must be positive, or null")
        if self.wandb_entity and not self.wandb_project:
            raise ValueError("record.wandb_entity needs record.wandb_project")


class Recorders:
    """The services that the main rank writes to; closed with ``resources``.

    Raises:
        UserError: a package that the settings need is not installed, or its service cannot be reached.
    """

    def __init__(
        self, config: RecordConfig, run: Path, settings: dict[str, Any], resources: ExitStack, first_step: int
    ) -> None:
        self._board = self._wandb = None
        if config.tensorboard:
            self._board = _tensorboard(run / "tensorboard", first_step)
            resources.callback(self._board.close)
        if config.wandb_project:
            self._wandb = _wandb(config, run, settings)
            resources.callback(self._wandb.finish)

    def write(self, values: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, numbers only; ``step`` is its place."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.log(numbers, step=values["step"])


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("record.tensorboard needs a package: pip install 'pacl-scale[tensorboard]'") from error
    # Steps that a killed attempt took after its newest checkpoint are taken again.
    return SummaryWriter(str(folder), purge_step=first_step)


def _wandb(config: RecordConfig, run: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("record.wandb_project needs a package: pip install 'pacl-scale[wandb]'") from error
    try:
        return wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=run.name,
            id=wandb_id(run),
            resume="allow",
            dir=str(run),
            config=settings,
        )
    except wandb.errors.Error as error:
        raise UserError(f"record.wandb_project: Weights & Biases cannot be used ({first_line(error)})") from error


def wandb_id(run: Path) -> str:
    """The run's id over there, the same for every attempt: kept in the run directory once it was made."""
    file = run / "wandb_id"
    if not file.exists():
        chosen = hashlib.blake2b(f"{run.resolve()}/{(run / 'config.yaml').stat().st_mtime_ns}".encode(), digest_size=8)
        file.write_text(chosen.hexdigest(), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class Profile:
    """torch's profiler over some steps of this rank: a trace for chrome://tracing or Perfetto, and a table."""

    def __init__(self, config: RecordConfig, run: Path, world: World, first_step: int) -> None:
        self._config, self._folder, self._world = config, run / "profile", world
        self._from = None if config.profile_from is None else max(config.profile_from, first_step)
        self._profiler: Any = None
        self._snapshot = config.memory_snapshot and world.device.type == "cuda"
        if config.memory_snapshot and not self._snapshot:
            logger.warning("record.memory_snapshot is ignored: there is no GPU")

    def begin(self, step: int) -> None:
        """Before a step."""
        if step != self._from:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, with_flops=True)
        self._profiler.__enter__()
        if self._snapshot:
            torch.cuda.memory._record_memory_history()

    def end(self, step: int) -> None:
        """After a step."""
        if self._profiler is None or self._from is None or step < self._from + self._config.profile_steps - 1:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        name = f"rank-{self._world.rank}"
        profiler.export_chrome_trace(str(self._folder / f"{name}.trace.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self._folder / f"{name}.txt").write_text(table, encoding="utf-8")
        if self._snapshot:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profiled", folder=str(self._folder), steps=self._config.profile_steps)

    def close(self) -> None:
        """Let go of a profiler whose last step did not come."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler = None


def peak_flops(config: RecordConfig, precision: str, device: torch.device) -> float | None:
    """Operations a second that one device reaches at best; None for one that is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops(precision)
