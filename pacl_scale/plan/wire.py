"""Bytes between ranks in a training step, as the collectives are given them, and what of them crosses a link.

Legend as in :mod:`pacl_scale.plan.work`. The loss's part is derived in docs/similarity.md; the engine's is what
DeepSpeed 0.19 sends for a model of a million numbers in two groups, matrices and vectors.
"""

from dataclasses import dataclass
from typing import Literal

from pacl_scale.plan.memory import EXACT, Settings
from pacl_scale.plan.work import Shapes, Tower

Operation = Literal["all_gather", "all_reduce", "reduce_scatter"]

PERSISTENT = 100_000
"""Under ZeRO 3 a parameter of fewer numbers is gathered after the update, a larger one for each micro-batch."""


@dataclass(frozen=True)
class Transfer:
    """One collective of a step."""

    operation: Operation
    purpose: str
    payload: int
    """Bytes of the whole tensor: what is gathered comes out, what is scattered goes in, what is reduced does both."""
    count: int = 1
    """How often in a step."""

    def link_bytes(self, world: int) -> float:
        """Bytes that each rank sends (and receives) for it in rings: a reduction goes round twice."""
        return (2 if self.operation == "all_reduce" else 1) * (world - 1) / world * self.payload * self.count


def transfers(shapes: Shapes, settings: Settings, vision: Tower | None = None) -> list[Transfer]:
    """Everything that ranks exchange in a step that is not logged or saved; nothing for a single rank."""
    if shapes.world == 1:
        return []
    found = [*_of_loss(shapes), *_of_engine(shapes, settings), Transfer("all_reduce", "agreement", 8)]
    if vision and settings.shard_towers:
        gathered = vision.parameters * settings.number_bytes
        found.append(Transfer("all_gather", "vision tower", gathered, shapes.accumulation))
    return found


def _of_loss(shapes: Shapes) -> list[Transfer]:
    N = shapes.global_batch
    # Trained texts are gathered again in the last micro-batch, which carries their gradient back.
    times = shapes.passes if shapes.text_hidden else 1
    found = [
        Transfer("all_gather", "texts", 8 * shapes.world + N * shapes.width * EXACT + N * 8, times),
        Transfer("all_reduce", "columns", N * EXACT + 5 * N * EXACT + 2 * EXACT),
    ]
    if shapes.text_hidden:
        found.append(Transfer("reduce_scatter", "gradients of texts", N * shapes.width * EXACT))
    return found


def _of_engine(shapes: Shapes, settings: Settings) -> list[Transfer]:
    held, micro_batches = settings.number_bytes, shapes.accumulation
    if settings.zero_stage == 3:
        return _of_zero_3(shapes, settings)
    # Stage 2 lets go of a micro-batch's gradients, so it reduces each; the others add them up first.
    reductions = micro_batches if settings.zero_stage == 2 else 1
    found = [Transfer("all_reduce", "gradients", shapes.trainable * held, reductions)]
    if settings.zero_stage:
        # Norms of the groups; in half precision, whether a number overflowed.
        found.append(Transfer("all_reduce", "norms", len(shapes.groups) * EXACT + (held != EXACT)))
        gathered = sum(_padded(numbers, 2 * shapes.world) for numbers in shapes.groups)
        found.append(Transfer("all_gather", "weights", gathered * held))
    elif held == EXACT:
        found.append(Transfer("all_reduce", "norms", EXACT))
    return found


def _of_zero_3(shapes: Shapes, settings: Settings) -> list[Transfer]:
    held, world = settings.number_bytes, shapes.world
    sizes = [shapes.width_in * shapes.hidden, shapes.hidden * shapes.width, shapes.width_in * shapes.width]
    sizes += [shapes.hidden, shapes.width, shapes.width] + [1] * shapes.learn_temperature
    padded = {size: _padded(size, world) for size in sizes}
    small = sum(padded[size] for size in sizes if size < PERSISTENT)
    large = sum(padded[size] for size in sizes if size >= PERSISTENT)
    found = [
        Transfer("reduce_scatter", "gradients", sum(padded[size] for size in sizes) * held, shapes.accumulation),
        Transfer("all_reduce", "norms", 2 * 8),
        Transfer("all_gather", "weights", small * held),
    ]
    if large:
        found.append(Transfer("all_gather", "weights of a micro-batch", large * held, shapes.accumulation))
    return found


def _padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple
