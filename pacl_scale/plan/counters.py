"""What a training step really does, counted while it runs: what the plan's closed forms are held against."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pacl_scale import engine, health, step
from pacl_scale.distributed import World
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import Placement, Preprocess
from pacl_scale.encoders.from_timm import parts_of
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.engine import EngineConfig
from pacl_scale.loss import LossConfig, PACLLoss
from pacl_scale.model import PACLModel, build_embedder
from pacl_scale.optim import OptimConfig
from pacl_scale.plan import memory, wire, work
from pacl_scale.plan.memory import Settings
from pacl_scale.plan.work import Shapes
from pacl_scale.unfreeze import TextEmbedder

COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_reduce",
)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that came into being while it is on, in this thread: ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for thing in gc.get_objects():
            if type(thing) in (Tensor, torch.nn.Parameter):
                self._known.add(thing.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


@contextmanager
def sent_bytes() -> Iterator[Counter[str]]:
    """Bytes by operation of what this rank exchanges, counted as :class:`pacl_scale.plan.wire.Transfer` does.

    DeepSpeed remembers torch's functions when it starts, so this has to be on by then.
    """
    found: Counter[str] = Counter()
    inside = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if not inside:
                # What is gathered comes out, what is scattered goes in, what is reduced does both.
                place, names = (
                    (1, ("input",)) if name.startswith("reduce_scatter") else (0, ("output_tensor", "tensor"))
                )
                whole = args[place] if len(args) > place else next(options[n] for n in names if n in options)
                operation = name.removesuffix("_into_tensor").removesuffix("_single").removesuffix("_tensor")
                found[operation] += whole.numel() * whole.element_size()
            # Old names call new ones.
            inside += 1
            try:
                return real(*args, **options)
            finally:
                inside -= 1

        return call

    wrapped = {name: counted(name, getattr(distributed, name)) for name in COLLECTIVES if hasattr(distributed, name)}
    with ExitStack() as patches:
        for name, replacement in wrapped.items():
            patches.enter_context(mock.patch.object(distributed, name, replacement))
        yield found


def counted_steps(world: World, cells: list[tuple[Shapes, EngineConfig]]) -> list[dict[str, Any]]:
    """Take a step of each cell on made-up tokens; what was counted beside what the plan says, by name.

    Collective; in a process that has not imported DeepSpeed yet, on a CPU with one thread.
    """
    torch.set_num_threads(1)
    with sent_bytes() as sent:
        return [_counted_step(world, shapes, settings, sent) for shapes, settings in cells]


def _counted_step(world: World, shapes: Shapes, settings: EngineConfig, sent: Counter[str]) -> dict[str, Any]:
    tower = tower_for(shapes.width_in) if shapes.tail else None
    loss = LossConfig(pooling=shapes.pooling, learn_temperature=shapes.learn_temperature)  # type: ignore[arg-type]
    embedder = build_embedder(EmbedderConfig(shapes.hidden), shapes.width_in, shapes.width)
    texts = TextEmbedder(shapes.width, shapes.text_hidden) if shapes.text_hidden else None
    model = PACLModel(embedder, loss, tower.tail if tower else None, texts, 0.1)
    trainer = engine.start(settings, OptimConfig(), model, world, shapes.micro, shapes.accumulation)
    loss_of = PACLLoss(loss)
    ids = torch.arange(shapes.micro)
    random = torch.Generator().manual_seed(world.rank)
    tokens = shapes.tail.tokens if shapes.tail else shapes.patches
    chosen = torch.arange(shapes.patches).expand(shapes.micro, -1) if shapes.tail else None
    batches = [
        step.MicroBatch(
            torch.randn(shapes.micro, tokens, shapes.width_in, generator=random).to(settings.dtype),
            torch.randn(shapes.micro, shapes.width, generator=random),
            ids,
            ids.unsqueeze(1),
            chosen,
        )
        for _ in range(shapes.accumulation)
    ]

    def take() -> None:
        step.train_step(trainer, loss_of, batches)
        health.agree(world, stop=False, save=False)

    engine.set_learning_rate(trainer, 1e-4)
    # The first steps allocate what later ones find.
    take()
    take()
    sent.clear()
    take()
    # A single rank's engine talks to itself.
    found: dict[str, Any] = {f"sent {name}": value for name, value in sent.items() if world.size > 1}
    with LiveBytes() as live:
        take()
    found |= {"peak": live.peak, "flops": work.count_flops(take)}
    planned = Settings(settings.dtype.itemsize, settings.zero_stage, settings.offload_optimizer, on_gpu=False)
    said: Counter[str] = Counter()
    for one in wire.transfers(shapes, planned):
        said[f"sent {one.operation}"] += one.payload * one.count
    phases = memory.phase_bytes(shapes, planned, None)
    wanted: dict[str, Any] = dict(said) | {
        "peak": max(phases.values()),
        "flops": sum(work.step_flops(shapes, None, None).values()),
    }
    if settings.zero_stage == 3:
        # What stage 3 holds for a while is its own affair: it is not planned for.
        del found["peak"], wanted["peak"]
    return {"counted": found, "planned": wanted}


def tower_for(width: int) -> FrozenViT:
    """A small vision tower of tokens of ``width`` channels whose last block is trained."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"img_size": 112, "embed_dim": width, "num_heads": 2, "depth": 2}
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **settings)
    size = Preprocess(image_size=112, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return FrozenViT(parts_of(model, -1, True), size, {}, Placement(torch.device("cpu"), torch.float32, 1))


def largest_error(found: list[dict[str, Any]]) -> float:
    """The largest difference of plan and count, as a share of the count."""
    return max(
        abs(cell["planned"].get(name, 0) / value - 1) for cell in found for name, value in cell["counted"].items()
    )
