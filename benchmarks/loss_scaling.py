"""The distributed loss: exact for any world and accumulation, its traffic as counted, its memory beside CLIP's.

    python benchmarks/loss_scaling.py [--quick] [--json FILE] [--plots FOLDER]

Ranks are processes on this machine that talk gloo on loopback. Legend: B global batch, T patches, D width.
"""

import argparse
import json
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, distributed

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import MEBIBYTE, describe, in_child, peak_of, write

from pacl_scale.loss import LossConfig, PACLLoss

WORLDS = (1, 2, 4, 8)
ACCUMULATIONS = (1, 2, 4)
BATCH, PATCHES, WIDTH = 64, 49, 128
MEMORY_SIZES = {
    "quick": ((1024, 49, 512), (4096, 8, 64)),
    "all": ((1024, 8, 64), (1024, 49, 512), (1024, 196, 512), (4096, 49, 512), (4096, 8, 64), (8192, 8, 64),
            (16384, 8, 64)),
}  # fmt: skip
"""Global batch, patches and width. The largest batches have small pictures, for the sake of time: the table of
similarities, which both losses have, is what counts there."""
COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_reduce",
)


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """A global batch with captions that occur twice and pictures of which several texts are true."""
    random = torch.Generator().manual_seed(0)
    return {
        "patches": torch.randn(BATCH, PATCHES, WIDTH, generator=random).to(dtype),
        "texts": torch.randn(BATCH, WIDTH, generator=random).to(dtype),
        "text_ids": torch.randint(0, BATCH * 3 // 4, (BATCH,), generator=random),
        "image_text_ids": torch.randint(-1, BATCH * 3 // 4, (BATCH, 2), generator=random),
    }


def one_process() -> tuple[Tensor, ...]:
    """Loss and gradients of the whole batch at once, in float64, by the eager backend."""
    whole = batch(torch.float64)
    patches, texts = whole["patches"].requires_grad_(), whole["texts"].requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    ids = {name: whole[name] for name in ("text_ids", "image_text_ids")}
    loss = PACLLoss(LossConfig(backend="eager"))(patches, texts, scale, **ids)
    loss.backward()
    return tuple(x for x in (loss.detach(), patches.grad, texts.grad, scale.grad) if x is not None)


def accumulated(loss_of: PACLLoss, rank: int, world: int, accumulation: int) -> tuple[Tensor, ...]:
    """This rank's loss and gradients, one micro-batch at a time, scaled as the engine's averaging does."""
    whole = batch(torch.float32)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    patches, texts = whole["patches"][own].requires_grad_(), whole["texts"][own].requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    gathered = loss_of.gather(texts, whole["text_ids"][own])
    micro = patches.detach().split(len(patches) // accumulation)
    with torch.no_grad():
        phi = torch.cat([loss_of.similarity(some, gathered) for some in micro])
    phi.requires_grad_()
    loss = loss_of.from_similarity(phi, gathered, scale, image_text_ids=whole["image_text_ids"][own])
    loss.backward()
    assert phi.grad is not None
    grads = []
    for some, up in zip(micro, phi.grad.split(len(patches) // accumulation), strict=True):
        some = some.clone().requires_grad_()
        loss_of.similarity(some, gathered).backward(up, retain_graph=True)
        grads.append(some.grad)
    assert texts.grad is not None and scale.grad is not None
    return loss.detach(), torch.cat(grads) / world, texts.grad / world, scale.grad / world  # type: ignore[arg-type]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the bytes of every tensor that this rank gets from, or reduces with, the other ranks."""
    bytes_of: Counter[str] = Counter()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
            # What is gathered, is what comes out; what is scattered, what goes in; what is reduced, either.
            whole = args[0] if name.startswith("reduce_scatter") else tensor
            bytes_of[name.split("_in")[0].removesuffix("_single").removesuffix("_tensor")] += (
                whole.numel() * whole.element_size()
            )
            return real(tensor, *args, **options)

        return call

    wrappers = {name: wrap(name, getattr(distributed, name)) for name in COLLECTIVES if hasattr(distributed, name)}
    with mock.patch.multiple(distributed, **wrappers):
        yield bytes_of


def formula(world: int, trainable_texts: bool) -> dict[str, int]:
    """Bytes of a step by the derivation in docs/similarity.md, for float32 texts with identifiers."""
    return {
        "all_gather": 8 * world + BATCH * WIDTH * 4 + BATCH * 8,
        "all_reduce": BATCH * 4 + 5 * BATCH * 4 + 2 * 4,
        **({"reduce_scatter": BATCH * WIDTH * 4} if trainable_texts else {}),
    }


def traffic(group: Any, rank: int, world: int) -> dict[str, Any]:
    """Counted bytes of a step with frozen and with trainable texts, and of gathering patches too."""
    whole = batch(torch.float32)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    found: dict[str, Any] = {}
    for name in ("frozen", "trainable"):
        patches = whole["patches"][own].requires_grad_()
        texts = whole["texts"][own].requires_grad_(name == "trainable")
        with counted() as bytes_of:
            PACLLoss(LossConfig(backend="tiled"), group)(
                patches, texts, 20.0, text_ids=whole["text_ids"][own]
            ).backward()
        found[name] = dict(bytes_of)
    with counted() as bytes_of:
        for values in (whole["patches"], whole["texts"]):
            distributed.all_gather(list(torch.empty_like(values).chunk(world)), values[own].contiguous(), group=group)
    everything = (whole["patches"].numel() + whole["texts"].numel()) * 4
    return found | {"gather_everything": everything}


def rank_main(rank: int, port: int, queue: Any) -> None:
    """One of the processes: all worlds in turn, each as a group of the first ranks."""
    torch.set_num_threads(1)
    # Before there is a group: with one, the loss would be that of all ranks.
    true, rows = one_process() if rank == 0 else None, []
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=max(WORLDS),
        timeout=timedelta(seconds=120),
    )
    for world in WORLDS:
        group = distributed.new_group(list(range(world)))
        if rank >= world:
            continue
        loss_of = PACLLoss(LossConfig(backend="tiled"), group)
        for accumulation in ACCUMULATIONS:
            accumulated(loss_of, rank, world, accumulation)  # compiles
            started = time.perf_counter()
            loss, patches, texts, scale = accumulated(loss_of, rank, world, accumulation)
            seconds = time.perf_counter() - started
            parts: list[Any] = [None] * world
            distributed.all_gather_object(parts, (loss, patches, texts, scale), group=group)
            if true is not None:
                losses, patch_parts, text_parts, scales = zip(*parts, strict=True)
                whole = torch.stack(losses), torch.cat(patch_parts), torch.cat(text_parts), torch.stack(scales).sum()
                errors = [
                    ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(whole, true, strict=True)
                ]
                rows.append({"world": world, "accumulation": accumulation, "max_rel_error": max(errors),
                             "seconds": seconds})  # fmt: skip
        if world > 1:
            counts = traffic(group, rank, world)
            if rank == 0:
                rows.append({"world": world, "traffic": counts, "formula": {
                    "frozen": formula(world, False), "trainable": formula(world, True)}})  # fmt: skip
    if rank == 0:
        queue.put(rows)
    distributed.barrier()
    distributed.destroy_process_group()


def distributed_part() -> list[dict[str, Any]]:
    """Exactness and traffic, in eight processes."""
    # Forked before torch has started a thread here, the ranks need not import it again eight times over.
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=rank_main, args=(rank, port, queue), daemon=True) for rank in range(max(WORLDS))]
    for process in ranks:
        process.start()
    while queue.empty() and all(process.exitcode in (None, 0) for process in ranks):
        time.sleep(0.05)
    if queue.empty():
        for process in ranks:
            process.kill()
        raise SystemExit("a rank failed; its error stands above")
    rows = queue.get()
    for process in ranks:
        process.join()
    return rows


def step_memory(what: str, size: int, patches: int, width: int) -> int:
    """Peak bytes of a step in one process, beyond inputs and their gradients; only in a process of its own."""
    step = {"pacl": pacl_step, "clip": clip_step}[what]
    step(8, patches, width)()
    run = step(size, patches, width)
    gradient = size * width * 4 * (patches if what == "pacl" else 1)
    return max(0, peak_of(run) - gradient)


def pacl_step(size: int, patches: int, width: int) -> Callable[[], Any]:
    images = torch.randn(size, patches, width).requires_grad_()
    texts = torch.randn(size, width)
    return lambda: PACLLoss()(images, texts, 20.0).backward()


def clip_step(size: int, _: int, width: int) -> Callable[[], Any]:
    from open_clip.loss import ClipLoss

    images = torch.randn(size, width).requires_grad_()
    texts = torch.nn.functional.normalize(torch.randn(size, width), dim=-1)
    scale = torch.tensor(20.0)

    def run() -> None:
        loss = ClipLoss()(torch.nn.functional.normalize(images, dim=-1), texts, scale)
        loss.backward()

    return run


def memory_part(quick: bool) -> list[dict[str, Any]]:
    """PACL's and CLIP's peak memory at equal global batch: medians, for a few MiB come and go between processes."""
    rows = []
    for size, patches, width in MEMORY_SIZES["quick" if quick else "all"]:
        words = [json.dumps([what, size, patches, width]) for what in ("pacl", "clip")]
        repeats = 1 if quick else 3
        pacl, clip = (median(in_child(__file__, "--memory", word) for _ in range(repeats)) for word in words)
        rows.append({"global_batch": size, "patches": patches, "width": width, "pacl_mib": pacl / MEBIBYTE,
                     "clip_mib": clip / MEBIBYTE, "ratio": pacl / clip})  # fmt: skip
    return rows


def plot(results: dict[str, Any], folder: Path) -> None:
    """Traffic by world size, and memory by global batch, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = [row for row in results["rows"] if "traffic" in row]
    worlds = [str(row["world"]) for row in rows]
    for name, colour in (("frozen", "#228833"), ("trainable", "#4477aa")):
        axes[0].plot(worlds, [sum(row["traffic"][name].values()) / 1024 for row in rows], "o-", label=f"texts {name}",
                     color=colour)  # fmt: skip
    axes[0].plot(worlds, [row["traffic"]["gather_everything"] / 1024 for row in rows], "s--", label="patches too",
                 color="#bbbbbb")  # fmt: skip
    axes[0].set(yscale="log", xlabel="ranks", ylabel="KiB a rank and step")
    axes[0].legend(frameon=False)
    small = [row for row in results["memory"] if row["width"] == 64]
    for name, colour in (("clip_mib", "#bbbbbb"), ("pacl_mib", "#228833")):
        axes[1].plot([row["global_batch"] for row in small], [row[name] for row in small], "o-",
                     label=name.split("_")[0].upper(), color=colour)  # fmt: skip
    axes[1].set(
        xscale="log", yscale="log", xlabel="global batch, 8 patches of width 64", ylabel="extra peak memory, MiB"
    )
    axes[1].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "loss_scaling.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="draw loss_scaling.svg there")
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(step_memory(*arguments.memory))
        return
    rows = distributed_part()
    memory = memory_part(arguments.quick)
    counted_rows = [row for row in rows if "traffic" in row]
    results = {
        "benchmark": "loss_scaling",
        "quick": arguments.quick,
        "machine": describe(),
        "world_sizes": list(WORLDS),
        "accumulations": list(ACCUMULATIONS),
        "max_rel_error": max(row["max_rel_error"] for row in rows if "max_rel_error" in row),
        "bytes_over_formula": max(
            sum(row["traffic"][kind].values()) / sum(row["formula"][kind].values())
            for row in counted_rows
            for kind in ("frozen", "trainable")
        ),
        "gather_everything_over_ours": max(
            row["traffic"]["gather_everything"] / sum(row["traffic"]["frozen"].values()) for row in counted_rows
        ),
        "pacl_over_clip_memory": max(row["ratio"] for row in memory),
        "memory": memory,
        "rows": rows,
    }
    assert math.isfinite(results["max_rel_error"])
    write(results, arguments.json)
    if arguments.plots:
        plot(results, arguments.plots)


if __name__ == "__main__":
    main()
