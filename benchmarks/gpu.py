"""What one GPU gives: the similarity's kernels beside other ways, a training step by parts, and the plan beside a run.

    python benchmarks/gpu.py [--quick] [--json FILE] [--parts similarity sizes step run sampling] [--device cpu]

Pictures are drawn, towers have random weights: neither changes the time. ``--json`` is written anew after each part.
``--device cpu`` runs the same at small sizes, to try the script where there is no GPU.

Legend: B images, T patches an image, N texts, D width.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from engine import Parts, watched
from machine import MEBIBYTE, describe, write
from similarity import SCALE, attention_call, both_ways, own_caption, single_vector, straightforward

from pacl_scale import engine, metrics
from pacl_scale import step as step_room
from pacl_scale.data.index import build_index
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.distributed import DistributedConfig, joined
from pacl_scale.embedder import EmbedderConfig
from pacl_scale.encoders import TextEncoderConfig, VisionConfig, build_text, build_vision
from pacl_scale.engine import EngineConfig
from pacl_scale.loss import LossConfig, PACLLoss
from pacl_scale.model import PACLModel, build_embedder
from pacl_scale.optim import OptimConfig
from pacl_scale.plan.gpus import gpu_of_device
from pacl_scale.plan.work import Shapes, similarity_flops
from pacl_scale.similarity import patch_text_similarity

ROOT = Path(__file__).resolve().parents[1]
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = ["--config", "configs/train/paper_b16.yaml", "vision.weights=random", "text.weights=random"]


@dataclass(frozen=True)
class Sizes:
    """Of everything here."""

    device: torch.device
    share: dict[str, int]
    """A rank's share of the paper's batch on 8 x 8 GPUs: B, T, N, D."""
    patches: tuple[int, ...]
    batches: tuple[int, ...]
    """Global batches of a step on this one GPU."""
    pictures: int
    steps: int

    @staticmethod
    def of(device: str, quick: bool) -> "Sizes":
        """For a GPU, or small for a CPU."""
        if device == "cpu":
            return Sizes(torch.device("cpu"), dict(B=2, T=49, N=64, D=64), (49,), (4,), 16, 3)
        batches = (1024,) if quick else (512, 1024, 2048)
        place, share = torch.device("cuda"), dict(B=64, T=196, N=4096, D=512)
        return Sizes(place, share, (49, 196, 256, 576, 1024), batches, 16384, 20 if quick else 40)


def ours(patches: Tensor, texts: Tensor, backend: Any = "auto") -> Tensor:
    return patch_text_similarity(patches, texts, attention_scale=SCALE, backend=backend)


def make(size: dict[str, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Patches that need a gradient, texts that do not, and the gradient of phi."""
    random = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=device)
    patches = draw(size["B"], size["T"], size["D"]).to(dtype).requires_grad_()
    return patches, draw(size["N"], size["D"]).to(dtype), draw(size["B"], size["N"])


def timed(call: Callable[[], Any], device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of a call, those that the GPU worked, and the most memory needed beyond what was there."""
    call()
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - started}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begun < seconds and len(times) < 100):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return {"seconds": median(times), "busy_seconds": busy(call), "extra_mib": extra / MEBIBYTE}


def busy(call: Callable[[], Any], calls: int = 5) -> float:
    """Seconds of a call in which the GPU works: what remains of it where launches are hidden behind other work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / calls / 1e6


def products(patches: Tensor, texts: Tensor) -> Callable[[], None]:
    """The matrix products of forward and backward alone, all images at once."""
    units = patches.detach()
    (B, T, _), N = units.shape, len(texts)
    scores = torch.randn(B, T, N, dtype=units.dtype, device=units.device)

    def run() -> None:
        gram = torch.bmm(units, units.transpose(1, 2))
        for _ in ("forward", "backward"):
            torch.matmul(units, texts.t())
            torch.bmm(gram, scores)
        torch.matmul(scores, texts)
        torch.bmm(torch.bmm(scores, scores.transpose(1, 2)), units)

    return run


def similarity(sizes: Sizes) -> dict[str, Any]:
    """Forward and backward at a rank's share of the paper's batch, beside what one would write instead."""
    results: dict[str, Any] = {"size": sizes.share}
    for name, dtype in TYPES.items():
        patches, texts, up = make(sizes.share, dtype, sizes.device)
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": ours,
            "tiled": partial(ours, backend="tiled"),
            "autograd, whole batch": partial(straightforward, chunk=sizes.share["B"]),
            "autograd, chunks of 8": partial(straightforward, chunk=8),
            "autograd, SDPA": attention_call,
            "own caption (another objective)": own_caption,
            "single vector (CLIP)": single_vector,
        }
        calls = {what: partial(both_ways, way, patches, texts, up) for what, way in ways.items()}
        if sizes.device.type == "cuda":
            compiled = torch.compile(partial(straightforward, chunk=sizes.share["B"]))
            calls["autograd, compiled"] = partial(both_ways, compiled, patches, texts, up)
        calls["bare products"] = products(patches, texts)
        found = {what: timed(call, sizes.device) for what, call in calls.items()}
        flops = similarity_flops(shapes_of(sizes.share))
        results[name] = found | {"ours_tflops": flops / found["ours"]["seconds"] / 1e12}
    return results


def shapes_of(size: dict[str, int]) -> Shapes:
    """A rank's share among as many as there are texts."""
    return Shapes(size["N"], size["N"] // size["B"], 1, size["T"], size["D"], size["D"], size["D"])


def over_sizes(sizes: Sizes) -> list[dict[str, Any]]:
    """Ours beside the definition in chunks, over numbers of patches."""
    rows = []
    for T in sizes.patches:
        size = sizes.share | {"T": T}
        for name, dtype in TYPES.items():
            patches, texts, up = make(size, dtype, sizes.device)
            found = timed(partial(both_ways, ours, patches, texts, up), sizes.device, 0.3)
            chunks = timed(partial(both_ways, partial(straightforward, chunk=8), patches, texts, up), sizes.device, 0.3)
            flops = similarity_flops(shapes_of(size))
            rows.append(
                {
                    "T": T,
                    "type": name,
                    "tflops": flops / found["seconds"] / 1e12,
                    "ours": found,
                    "autograd, chunks of 8": chunks,
                }
            )
    return rows


def step_by_parts(sizes: Sizes, root: Path) -> list[dict[str, Any]]:
    """Seconds by part of a step of the paper's recipe, the GPU waited for after each part."""
    rows = []
    with joined(DistributedConfig(device=sizes.device.type)) as world:
        vision = build_vision(VisionConfig(weights="random"), world.device, torch.bfloat16)
        text = build_text(TextEncoderConfig(weights="random"), world.device, torch.bfloat16)
        model = PACLModel(build_embedder(EmbedderConfig(), vision.width, text.width), LossConfig()).to(world.device)
        trainer = engine.start(EngineConfig(2, "bf16"), OptimConfig(), model, world, sizes.batches[0], 1)
        engine.set_learning_rate(trainer, 1e-4)
        for batch in sizes.batches:
            rows.append(
                {"global_batch": batch, "seconds": one_batch_by_parts(batch, root, world, vision, text, trainer)}
            )
    return rows


def one_batch_by_parts(batch: int, root: Path, world: Any, vision: Any, text: Any, trainer: Any) -> dict[str, float]:
    parts, loss_of, steps = SyncedParts(world.device), PACLLoss(), 6
    with PairStream(DataConfig(root=str(root)), 0, batch, world) as stream:
        stream.prepare_pictures_for(vision.preprocess)
        batches = iter(stream)
        fetch = parts.counted("data", lambda: next(batches))

        def step() -> None:
            micros = list(step_room.encode(fetch(), vision, text, world.device, batch))
            step_room.train_step(trainer, loss_of, micros)

        for _ in range(2):
            step()
        parts.seconds.clear()
        with watched(parts, vision, trainer, loss_of):
            embed, text.encode = text.encode, parts.counted("text tower", text.encode)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            parts.wait()
            total = time.perf_counter() - started
            text.encode = embed
    seconds = {name: value / steps for name, value in parts.seconds.items()}
    return seconds | {"rest": total / steps - sum(seconds.values()), "whole": total / steps}


class SyncedParts(Parts):
    """The GPU is waited for before and after each part, so that its time is the part's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def waited(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.wait()
            return result

        counted = super().counted(name, waited)

        def call(*args: Any, **options: Any) -> Any:
            self.wait()
            return counted(*args, **options)

        return call


def run(sizes: Sizes, root: Path, folder: Path, *words: str, batch: int | None = None) -> dict[str, Any]:
    """The training command with the paper's recipe on this GPU, and what the plan says of it."""
    batch = batch or sizes.batches[-1]
    gpu = gpu_of_device(torch.cuda.get_device_name()) if sizes.device.type == "cuda" else None
    gpu_name = gpu.name if gpu else "h100"
    name = "run-" + "-".join([str(batch), *(word.replace("=", "-") for word in words)])
    keys = [*RECIPE, f"data.root={root}", f"run={folder / name}", f"steps={sizes.steps}", f"global_batch_size={batch}"]
    keys += ["log_every=1", "checkpoint.every_steps=100000", f"distributed.device={sizes.device.type}", *words]
    command("train", *keys)
    plan = folder / f"{name}.plan.json"
    command("plan", *keys, "--nodes", "1", "--gpus-per-node", "1", "--gpu", gpu_name, "--json", str(plan))
    planned = json.loads(plan.read_text())
    lines = metrics.read_metrics(folder / name / "metrics.jsonl")[5:] or metrics.read_metrics(
        folder / name / "metrics.jsonl"
    )
    held = sum(value for part, value in planned["memory_bytes"].items() if "assumed" not in part)
    return {
        "global_batch": batch,
        "keys": list(words),
        "pairs_per_s": median(line["pairs_per_s"] for line in lines),
        "mfu": median(line["mfu"] or 0.0 for line in lines) if "mfu" in lines[0] else None,
        "data_wait_share": median(line["data_wait_share"] for line in lines),
        "device_mb": lines[-1]["device_mb"],
        "resident_mb": lines[-1]["resident_mb"],
        "last_line": lines[-1],
        "planned": {
            "pairs_per_s": [batch / seconds for seconds in planned["step"]["step_s"][::-1]],
            "step": planned["step"],
            "memory_mib": held / MEBIBYTE,
        },
    }


def command(module: str, *words: str) -> None:
    """Run one of the project's commands as a process by itself; its failure is ours."""
    # A process group that this process had joined would be its own, too.
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    done = subprocess.run(
        [sys.executable, "-m", f"pacl_scale.{module}", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{module} {' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def write_shard(root: Path, shard: int, pictures: int) -> None:
    """JPEGs of 256 px with the fineness of photographs (some 20 KB), and captions all of them different."""
    random = np.random.default_rng(shard)
    words = ["dog", "boat", "tree", "cup", "street", "red", "old", "wooden", "small", "man", "near", "under", "with"]
    with webdataset.TarWriter(str(root / f"{shard:05d}.tar"), encoder=False) as tar:
        for number in range(pictures):
            coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            pixels = coarse // 2 + random.integers(0, 60, (256, 256, 3), dtype=np.uint8)
            caption = " ".join([*random.choice(words, 8), str(shard), str(number)])
            texts = json.dumps({"captions": [caption], "nouns": []}).encode()
            jpeg = simplejpeg.encode_jpeg(pixels, quality=85)
            tar.write({"__key__": f"{shard:05d}{number:05d}", "jpg": jpeg, "json": texts})


def write_pictures(root: Path, count: int) -> None:
    """An indexed data set."""
    root.mkdir()
    shards = max(1, count // 1024)
    with Pool() as pool:
        pool.starmap(write_shard, [(root, shard, count // shards) for shard in range(shards)])
    build_index(str(root))


def main() -> None:
    every = ("similarity", "sizes", "step", "run", "sampling")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one batch size, few steps")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="what is measured")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; --device cpu tries the script at small sizes")
    sizes = Sizes.of(arguments.device, arguments.quick)
    results: dict[str, Any] = {"benchmark": "gpu", "quick": arguments.quick, "machine": describe()}
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(name) / "pictures"
        write_pictures(root, sizes.pictures)
        parts: dict[str, Callable[[], Any]] = {
            "similarity": lambda: similarity(sizes),
            "sizes": lambda: over_sizes(sizes),
            "step": lambda: step_by_parts(sizes, root),
            "run": lambda: [run(sizes, root, folder, batch=batch) for batch in sizes.batches],
            "sampling": lambda: [run(sizes, root, folder, f"data.patch_sample={n}") for n in (98, 49)],
        }
        for part in arguments.parts:
            results[part] = parts[part]()
            print(part, "done", file=sys.stderr, flush=True)
            if arguments.json:
                write(results, arguments.json)
    write(results, arguments.json)


if __name__ == "__main__":
    main()
