"""What may go wrong while ranks train together: one is asked to stop, a loss is not a number, a peer is gone."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from pacl_scale.distributed import World
from pacl_scale.errors import RunFailed, UserError
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
        count: of earlier attempts.
    """

    def __init__(self, folder: Path, world: World, most_in_a_row: int, count: int = 0) -> None:
        self.count = count
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
        tensors = {"tokens": tokens.detach().cpu().contiguous(), "texts": texts.detach().cpu().contiguous()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {"keys": json.dumps(keys), "guilty": json.dumps(guilty), "loss": str(loss)})
        except (OSError, SafetensorError) as error:
            # The others wait for this rank; what is kept for inspection is not worth the run.
            logger.warning("a bad batch was not kept", path=str(path), why=str(error))
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
    """Turn what a collective raises when a rank is gone into one sentence, which names that rank if it can be told.

    A rank that ends by itself leaves word of why, and those that notice leave word that they are there: who has left
    none is gone.

    Raises:
        UserError: another rank ended by one; all ranks then say the same.
        RunFailed: another rank is gone.
    """
    words = Words(world)
    try:
        yield
    except (UserError, RunFailed) as error:
        words.leave(f"{'user' if isinstance(error, UserError) else 'failed'}:{error}")
        raise
    except RuntimeError as error:
        if world.size == 1 or not _of_a_collective(error):
            words.leave(f"failed:{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            raise
        words.leave(HERE)
        found = words.all()
        for rank, word in found.items():
            kind, _, why = word.partition(":")
            if kind == "user":
                raise UserError(f"rank {rank}: {why}") from error
        ended = "; ".join(
            f"rank {rank} ended: {word.partition(':')[2]}" for rank, word in found.items() if word != HERE
        )
        silent = ", ".join(str(rank) for rank in range(world.size) if rank not in found)
        lost = ended or (f"no word from rank {silent}" if silent else str(error).splitlines()[0])
        raise RunFailed(
            f"rank {world.rank} lost another rank in step {progress.step} (while {progress.doing}); {lost}; "
            "start the run again and it resumes from its newest checkpoint"
        ) from error


HERE = "here"


class Words:
    """What each rank last had to say, in the store that the ranks met in; it outlives the connections between them."""

    def __init__(self, world: World, patience_s: float = 3.0) -> None:
        self._world, self._patience_s = world, patience_s
        self._store: Any = None
        if world.size > 1:
            self._store = dist.PrefixStore("last-words", dist.distributed_c10d._get_default_store())

    def leave(self, word: str) -> None:
        """Say one thing; nothing happens where the store is gone with the rank that kept it."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set(str(self._world.rank), word)

    def all(self) -> dict[int, str]:
        """What every rank said, by rank; waits a little for those that notice later."""
        found: dict[int, str] = {}
        end = time.monotonic() + self._patience_s
        while len(found) < self._world.size and time.monotonic() < end:
            for rank in range(self._world.size):
                with suppress(RuntimeError):
                    if rank not in found and self._store.check([str(rank)]):
                        found[rank] = self._store.get(str(rank)).decode()
            time.sleep(0.05)
        return found


@dataclass
class Progress:
    """Where the loop is, for messages."""

    step: int = 0
    doing: str = "starting"


def _of_a_collective(error: RuntimeError) -> bool:
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("gloo", "nccl", "connection", "timed out")
    )
