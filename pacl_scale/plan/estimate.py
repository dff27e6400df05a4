"""From counts to time, traffic and money: a step on a number of GPUs, under assumptions that are settings."""

import math
from dataclasses import dataclass, replace
from typing import Any

from pacl_scale.plan import memory, wire, work
from pacl_scale.plan.gpus import Gpu
from pacl_scale.plan.memory import Settings
from pacl_scale.plan.work import Shapes, Tower

GIB = 2**30
SIMILARITY = "similarity"


@dataclass
class Assumptions:
    """What cannot be counted: how near a machine comes to its data sheet, and what surrounds it."""

    tower_efficiency: tuple[float, float] = (0.25, 0.5)
    """Share of the GPU's peak that towers and embedder reach, at worst and at best."""

    similarity_efficiency: tuple[float, float] = (0.1, 0.3)
    """The same for the similarity, whose products are small."""

    network_gb_per_s: float = 50.0
    """What a node sends to others, each direction, 1e9 bytes a second; shared by its GPUs."""

    latency_us: float = 30.0
    """Microseconds that a collective takes for each doubling of the ranks, whatever its size."""

    store_gb_per_s: float = 10.0
    """What the object store gives to all nodes together."""

    store_requests_per_s: float = 5500.0
    """GET requests a second that the store takes (S3's figure for one prefix)."""

    decode_per_s: float = 700.0
    """Pictures that one CPU core decodes and resizes in a second."""

    cores_per_gpu: int = 12
    """CPU cores of a node for each of its GPUs."""

    overhead_gib: float = 2.5
    """Of GPU memory: driver, NCCL, allocator."""

    def __post_init__(self) -> None:
        for low, high in (self.tower_efficiency, self.similarity_efficiency):
            if not 0 < low <= high <= 1:
                raise ValueError("efficiencies are two shares, the worst and the best, above 0 and at most 1")
        rates = (self.network_gb_per_s, self.store_gb_per_s, self.store_requests_per_s, self.decode_per_s)
        if min(*rates, self.cores_per_gpu) <= 0 or min(self.latency_us, self.overhead_gib) < 0:
            raise ValueError("rates must be positive, latency and overhead at least 0")


@dataclass(frozen=True)
class Problem:
    """A training as a plan sees it."""

    shapes: Shapes
    settings: Settings
    precision: str
    vision: Tower | None
    text: Tower | None
    sample_bytes: float
    """Mean length of a sample in its tar."""
    chunk_samples: int
    """Samples of one ranged read."""
    pictures: bool
    """Whether samples are pictures, which have to be decoded."""

    def on(self, world: int) -> "Problem | None":
        """The same global batch on another number of ranks; None where it does not divide."""
        if self.shapes.global_batch % world:
            return None
        share = self.shapes.global_batch // world
        micro = math.gcd(share, self.shapes.micro) if self.shapes.accumulation > 1 else share
        return replace(self, shapes=replace(self.shapes, world=world, accumulation=share // micro))


@dataclass(frozen=True)
class Estimate:
    """One step on one number of GPUs."""

    gpus: int
    parts_s: dict[str, tuple[float, float]]
    """Seconds, at best and at worst, of each resource if it were the only one."""
    memory_bytes: int
    fits: bool
    flops: dict[str, int]
    link_bytes: float

    @property
    def seconds(self) -> tuple[float, float]:
        """At best the slowest resource alone, all others hidden behind it; at worst GPU and network in turn."""
        best = max(low for low, _ in self.parts_s.values())
        beside = [high for name, (_, high) in self.parts_s.items() if name not in ("gpu", "network")]
        return best, max(self.parts_s["gpu"][1] + self.parts_s["network"][1], *beside)

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(self.parts_s, key=lambda name: sum(self.parts_s[name]))


def estimate(problem: Problem, gpu: Gpu, gpus_per_node: int, assumed: Assumptions) -> Estimate:
    """Time and memory of a step."""
    shapes = problem.shapes
    flops = work.step_flops(shapes, problem.vision, problem.text)
    sent = wire.transfers(shapes, problem.settings, problem.vision)
    link_bytes = sum(one.link_bytes(shapes.world) for one in sent)
    read_s, decode_s = _data_seconds(problem, assumed)
    peak = memory.peak_bytes(shapes, problem.settings, problem.vision, problem.text)
    held = peak + int(assumed.overhead_gib * GIB)
    network_s = _network_seconds(shapes, sent, link_bytes, gpu, gpus_per_node, assumed)
    return Estimate(
        gpus=shapes.world,
        parts_s={
            "gpu": _gpu_seconds(problem, flops, gpu, assumed),
            "network": (network_s, network_s),
            "store": (read_s, read_s),
            "decoding": (decode_s, decode_s),
        },
        memory_bytes=held,
        fits=held <= gpu.memory_gib * GIB,
        flops=flops,
        link_bytes=link_bytes,
    )


def _gpu_seconds(problem: Problem, flops: dict[str, int], gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    peak = gpu.peak_flops(problem.precision)
    rest = sum(flops.values()) - flops[SIMILARITY]
    # Memory traffic that no efficiency covers: the update reads and writes its numbers a few times.
    update = 10 * memory.EXACT * problem.shapes.trainable / (gpu.memory_gb_per_s * 1e9)
    low, high = (
        rest / peak / assumed.tower_efficiency[which] + flops[SIMILARITY] / peak / assumed.similarity_efficiency[which]
        for which in (1, 0)
    )
    return low + update, high + update


def _network_seconds(
    shapes: Shapes, sent: list[wire.Transfer], link_bytes: float, gpu: Gpu, gpus_per_node: int, assumed: Assumptions
) -> float:
    if shapes.world == 1:
        return 0.0
    # Rings go through every node once, so it is the whole node's network that a ring may use.
    within = shapes.world <= gpus_per_node
    rate = gpu.link_gb_per_s if within else min(gpu.link_gb_per_s, assumed.network_gb_per_s)
    calls = sum(one.count for one in sent) + 2
    return link_bytes / (rate * 1e9) + calls * assumed.latency_us * 1e-6 * math.log2(shapes.world)


def _data_seconds(problem: Problem, assumed: Assumptions) -> tuple[float, float]:
    """Of the whole global batch from the store, and of a rank's share through its cores."""
    shapes = problem.shapes
    by_bytes = shapes.global_batch * problem.sample_bytes / (assumed.store_gb_per_s * 1e9)
    by_requests = shapes.global_batch / problem.chunk_samples / assumed.store_requests_per_s
    decode = shapes.share / (assumed.decode_per_s * assumed.cores_per_gpu) if problem.pictures else 0.0
    return max(by_bytes, by_requests), decode


def scaling(problem: Problem, gpu: Gpu, gpus_per_node: int, assumed: Assumptions, most: int = 1024) -> list[Estimate]:
    """The same training on 1, 2, 4, ... ``most`` GPUs, as far as its global batch divides."""
    found = []
    world = 1
    while world <= most:
        there = problem.on(world)
        if there:
            found.append(estimate(there, gpu, gpus_per_node, assumed))
        world *= 2
    return found


def as_dict(one: Estimate) -> dict[str, Any]:
    """For JSON."""
    return {
        "gpus": one.gpus,
        "step_s": list(one.seconds),
        "parts_s": {name: list(pair) for name, pair in one.parts_s.items()},
        "limit": one.limit,
        "memory_bytes": one.memory_bytes,
        "fits": one.fits,
        "flops_per_gpu": one.flops,
        "link_bytes_per_gpu": one.link_bytes,
    }
