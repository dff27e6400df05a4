"""What may go wrong while ranks train together: one is asked to stop, a loss is not a number, a peer is gone."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed
from pacl_scale.log import get_logger

logger = get_logger("pacl_scale.health")


@dataclass(frozen=True)
class Agreement:
    """What the ranks agreed to do after a step: what any of them wanted."""

    stop: bool
    save: bool


def agree(world: World, stop: bool, save: bool) -> Agreement:
    """All ranks' wishes joined; collective, one all-reduce of two numbers."""
    wishes = torch.tensor([stop, save], dtype=torch.float32, device=world.device)
    if world.size > 1:
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
    stop, save = wishes.bool().tolist()
    return Agreement(stop, save)


def told_by_main(world: World, value: Any) -> Any:
    """The main rank's ``value``, plain data, on every rank; collective."""
    told = [value]
    if world.size > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]


class BadSteps:
    """Steps without an update because loss or gradient was not finite: counted, saved for inspection, limited.

    Args:
        folder: where batches go, one file a rank and step.
        most_in_a_row: after so many the run ends.
    """

    def __init__(self, folder: Path, world: World, most_in_a_row: int) -> None:
        self.count = 0
        self._in_a_row = 0
        self._folder, self._world, self._most = folder, world, most_in_a_row

    def good(self) -> None:
        """The step was an ordinary one."""
        self._in_a_row = 0

    def bad(self, step: int, loss: float, keys: list[str], tokens: Tensor, texts: Tensor) -> None:
        """Note a step without an update. Collective: every rank calls it with its own part of the batch.

        Args:
            step: its number.
            loss: the global loss, alike on all ranks; finite where the gradient was at fault.
            keys: b keys of this rank's samples.
            tokens, texts: (b, T, Din) patch tokens and (b, D) text vectors.

        Raises:
            RunFailed: too many in a row; names ranks and samples at fault as far as they can be told.
        """
        self.count += 1
        self._in_a_row += 1
        sound = (torch.isfinite(tokens).flatten(1).all(1) & torch.isfinite(texts).all(1)).tolist()
        guilty = [key for key, fine in zip(keys, sound, strict=True) if not fine]
        path = self._folder / f"bad-step-{step:08d}-rank-{self._world.rank}.safetensors"
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {"tokens": tokens.detach().cpu().contiguous(), "texts": texts.detach().cpu().contiguous()}
        save_file(tensors, path, {"keys": json.dumps(keys), "guilty": json.dumps(guilty), "loss": str(loss)})
        found: list[Any] = [guilty]
        if self._world.size > 1:
            found = [None] * self._world.size
            dist.all_gather_object(found, guilty)
        named = {rank: keys for rank, keys in enumerate(found) if keys}
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        logger.warning("step skipped", step=step, why=what, in_a_row=self._in_a_row, samples=named or "none by itself")
        if self._in_a_row >= self._most:
            whose = "; ".join(f"rank {rank}: samples {', '.join(keys[:5])}" for rank, keys in named.items())
            raise RunFailed(
                f"{what} at step {step}, the {self._in_a_row}th step in a row without an update "
                f"({whose or 'no sample is at fault by itself: lower optim.lr'}); the batches are in {self._folder}"
            )


@contextmanager
def lost_peers_named(world: World, progress: "Progress") -> Iterator[None]:
    """Turn what a collective raises when a rank is gone into one sentence: :class:`RunFailed`."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _of_a_collective(error):
            raise
        raise RunFailed(
            f"rank {world.rank} lost another rank in step {progress.step} (while {progress.doing}); "
            f"start the run again and it resumes from its newest checkpoint ({str(error).splitlines()[0]})"
        ) from error


@dataclass
class Progress:
    """Where the loop is, for messages."""

    step: int = 0
    doing: str = "starting"


def set_collective_timeout(minutes: float) -> None:
    """How long collectives may take from now on, in all ranks of the default group."""
    dist.set_timeout(timedelta(minutes=minutes))


def _of_a_collective(error: RuntimeError) -> bool:
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("gloo", "nccl", "connection", "timed out")
    )
