"""The command: a training's configuration and a cluster in, what it will need out."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pacl_scale import config, log
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import SampleIndex
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.encoders import build_text, build_vision
from pacl_scale.encoders.weights import RANDOM
from pacl_scale.errors import UserError
from pacl_scale.plan import memory, wire
from pacl_scale.plan.estimate import GIB, Assumptions, Estimate, Problem, as_dict, estimate, scaling
from pacl_scale.plan.gpus import Gpu, gpu_named
from pacl_scale.plan.memory import Settings
from pacl_scale.plan.work import Shapes, text_tower, vision_tail, vision_tower
from pacl_scale.train import TrainConfig, accumulation_of

PROG = "python -m pacl_scale.plan"


@dataclass
class PlanConfig(TrainConfig):
    """What a training will need: memory, traffic, time, money. Takes every key of a training beside its own."""

    nodes: int = 1
    """Nodes of the cluster."""

    gpus_per_node: int = 8
    """GPUs of each node."""

    gpu: str = "a100"
    """Kind of GPU: v100, a10g, l4, l40s, a100-40, a100, h100, h200, b200, mi300x."""

    samples: int | None = None
    """Samples of the data set; null reads its index, or takes 30 million where no data set is named."""

    sample_kb: float | None = None
    """Mean size of a sample in its tar, 1e3 bytes; null reads the index, or takes 30, a picture of 256 pixels."""

    text_tokens: int = 16
    """Words of a text, for the text tower's share."""

    assume: Assumptions = field(default_factory=Assumptions)
    """What cannot be counted."""

    gpu_hour_price: float | None = None
    """Price of one GPU for one hour, in any currency."""

    storage_price: float | None = None
    """Price of 1e9 bytes stored for a month."""

    plot: str | None = None
    """Write a picture of the scaling from 1 to 1,024 GPUs there (SVG or PNG)."""

    json: str | None = None
    """Write everything there as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.nodes, self.gpus_per_node, self.text_tokens) < 1:
            raise ValueError("nodes, gpus_per_node and text_tokens must be at least 1")


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data set."""

    samples: int
    sample_bytes: float
    tokens: FeatureFormat | None
    vectors: VectorFormat | None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    settings: PlanConfig = config.parse(PlanConfig, [_with_underscores(word) for word in given], PROG)
    log.configure()
    plan = make_plan(settings)
    if settings.json:
        Path(settings.json).write_text(json.dumps(plan.to_dict(), indent=2), encoding="utf-8")
    if settings.plot:
        from pacl_scale.plan.picture import draw

        draw(plan.scaling, gpu_named(settings.gpu).name, settings.steps, Path(settings.plot))
    plan.say(Console(highlight=False, soft_wrap=True))
    return 0


@dataclass(frozen=True)
class Plan:
    """A training on a cluster."""

    settings: PlanConfig
    data: DataFacts
    gpu: Gpu
    problem: Problem
    here: Estimate
    scaling: list[Estimate]

    @property
    def hours(self) -> tuple[float, float]:
        """Of the whole run."""
        best, worst = self.here.seconds
        return best * self.settings.steps / 3600, worst * self.settings.steps / 3600

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on a GPU by part; what comes and goes is the largest phase of the step."""
        parts = memory.lasting_bytes(self.problem.shapes, self.problem.settings, self.problem.vision, self.problem.text)
        phases = memory.phase_bytes(self.problem.shapes, self.problem.settings, self.problem.vision)
        phase = max(phases, key=lambda name: phases[name])
        overhead = int(self.settings.assume.overhead_gib * GIB)
        return {**parts, f"while in phase {phase}": phases[phase], "driver and libraries (assumed)": overhead}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        sent = wire.transfers(self.problem.shapes, self.problem.settings, self.problem.vision)
        return {
            "gpu": self.gpu.name,
            "gpus": self.here.gpus,
            "samples": self.data.samples,
            "epochs": self.settings.steps * self.settings.global_batch_size / self.data.samples,
            "memory_bytes": self.memory,
            "transfers": [{**vars(one)} for one in sent],
            "step": as_dict(self.here),
            "hours": list(self.hours),
            "gpu_hours": [hours * self.here.gpus for hours in self.hours],
            "storage_bytes": self.data.samples * self.data.sample_bytes,
            "scaling": [as_dict(one) for one in self.scaling],
        }

    def say(self, out: Console) -> None:
        """Print it for a person."""
        one, settings = self.here, self.settings
        low, high = one.seconds
        pairs = [settings.global_batch_size / seconds for seconds in (high, low)]
        out.print(
            f"{settings.steps:,} steps of {settings.global_batch_size:,} pairs on {settings.nodes} x "
            f"{settings.gpus_per_node} {self.gpu.name}: {self.problem.shapes.share:,} pairs a GPU, "
            f"{self.problem.shapes.accumulation} micro-batches, {self.problem.shapes.patches} patches a picture"
        )
        out.print(_table("memory of a GPU", ["MiB"], [[k, f"{v / 2**20:,.0f}"] for k, v in self.memory.items() if v]))
        total = f"{one.memory_bytes / GIB:.1f} of {self.gpu.memory_gib:.0f} GiB"
        out.print(f"memory in all: {total}" + ("" if one.fits else ": it does not fit"))
        out.print(
            _table("arithmetic of a GPU", ["TFLOP a step"], [[k, f"{v / 1e12:,.3f}"] for k, v in one.flops.items()])
        )
        sent = [
            [f"{t.operation} of {t.purpose}", f"{t.payload / 1e6:,.3f}", str(t.count)]
            for t in wire.transfers(self.problem.shapes, self.problem.settings, self.problem.vision)
        ]
        if sent:
            out.print(_table("between GPUs", ["MB", "times a step"], sent))
        rows = [[name, f"{a * 1e3:,.2f}", f"{b * 1e3:,.2f}"] for name, (a, b) in one.parts_s.items()]
        out.print(_table("time of a step", ["ms, best", "ms, worst"], rows))
        out.print(f"a step takes {low * 1e3:,.1f} to {high * 1e3:,.1f} ms; {one.limit} limits first")
        rate = pairs[1] * self.data.sample_bytes / 1e9
        requests = pairs[1] / self.problem.chunk_samples
        out.print(
            f"{pairs[0]:,.0f} to {pairs[1]:,.0f} pairs/s; at the faster pace the store gives {rate:.2f} GB/s in "
            f"{requests:,.0f} requests/s"
        )
        if self.problem.pictures:
            cores = math.ceil(pairs[1] / settings.assume.decode_per_s)
            out.print(f"{cores:,} CPU cores decode ({settings.assume.cores_per_gpu * one.gpus:,} are there)")
        epoch = [self.data.samples / rate / 3600 for rate in (pairs[1], pairs[0])]
        out.print(f"an epoch of {self.data.samples:,} samples takes {epoch[0]:.2f} to {epoch[1]:.2f} h")
        hours = self.hours
        out.print(
            f"the run takes {hours[0]:.1f} to {hours[1]:.1f} h, {hours[0] * one.gpus:,.0f} to "
            f"{hours[1] * one.gpus:,.0f} GPU-hours"
            + _price(settings.gpu_hour_price, [each * one.gpus for each in hours])
        )
        stored = self.data.samples * self.data.sample_bytes / 1e9
        out.print(f"the data set fills {stored:,.0f} GB" + _price(settings.storage_price, [stored], " a month"))


def make_plan(settings: PlanConfig) -> Plan:
    """Count and estimate.

    Raises:
        UserError: an unknown GPU, a batch that does not divide, an index or a tower that cannot be had.
    """
    gpu = gpu_named(settings.gpu)
    world = settings.nodes * settings.gpus_per_node
    accumulation = accumulation_of(settings, world)
    data = facts_of(settings)
    problem = problem_of(settings, data, world, accumulation)
    assumed = settings.assume
    here = estimate(problem, gpu, settings.gpus_per_node, assumed)
    return Plan(settings, data, gpu, problem, here, scaling(problem, gpu, settings.gpus_per_node, assumed))


def facts_of(settings: PlanConfig) -> DataFacts:
    """From the index of the data set, if one is named, and from what the settings say instead."""
    roots = list(settings.data.weights) if settings.data.root or settings.data.mix else []
    indexes = [SampleIndex.load(root) for root in roots]
    samples = settings.samples or sum(len(index) for index in indexes) or 30_000_000
    lengths = sum(int(index.length.sum()) for index in indexes)
    found = sum(len(index) for index in indexes)
    sample_bytes = 1e3 * settings.sample_kb if settings.sample_kb else lengths / found if found else 30e3
    first = indexes[0] if indexes else None
    tokens = FeatureFormat.of(first) if first else None
    vectors = VectorFormat.of(first) if first and settings.data.text.cached_vectors else None
    return DataFacts(samples, sample_bytes, tokens, vectors)


def problem_of(settings: PlanConfig, data: DataFacts, world: int, accumulation: int) -> Problem:
    """Shapes of the towers (built with random weights: their sizes are what counts) and of the step."""
    text = None
    if not data.vectors:
        chosen = settings.text
        encoder = build_text(replace(chosen, weights=RANDOM) if chosen.source != "package" else chosen)
        text = text_tower(encoder, settings.text_tokens)
    vision = tail = None
    if data.tokens and settings.unfreeze.vision_blocks:
        raise UserError("unfreeze.vision_blocks needs pictures, but the data set holds tokens of the whole tower")
    if not data.tokens:
        picture = settings.vision
        tower = build_vision(
            replace(picture, weights=RANDOM) if picture.source != "package" else picture,
            trainable_blocks=settings.unfreeze.vision_blocks,
        )
        vision, tail = vision_tower(tower), vision_tail(tower)
        if vision is None:
            raise UserError("the blocks of this vision tower cannot be counted; plan with engine.precision=fp32")
    patches = vision.tokens if vision else data.tokens.tokens if data.tokens else 0
    width = text.width if text else data.vectors.width if data.vectors else 0
    shapes = Shapes(
        global_batch=settings.global_batch_size,
        world=world,
        accumulation=accumulation,
        patches=min(settings.data.patch_sample or patches, patches),
        width_in=vision.width if vision else data.tokens.width if data.tokens else 0,
        hidden=settings.embedder.hidden or width,
        width=width,
        pooling=settings.loss.pooling,
        learn_temperature=settings.loss.learn_temperature,
        tail=tail,
        text_hidden=settings.unfreeze.hidden(width),
    )
    return Problem(
        shapes=shapes,
        settings=settings_of(settings),
        precision=settings.engine.precision,
        vision=vision,
        text=text,
        sample_bytes=data.sample_bytes,
        chunk_samples=settings.data.read.chunk_samples,
        pictures=data.tokens is None,
    )


def settings_of(settings: TrainConfig, on_gpu: bool = True) -> Settings:
    """What of the engine decides memory and traffic."""
    engine = settings.engine
    size = torch.tensor([], dtype=engine.dtype).element_size()
    return Settings(size, engine.zero_stage, engine.offload_optimizer, engine.shard_towers, on_gpu)


def _with_underscores(word: str) -> str:
    """``--gpus-per-node`` is ``--gpus_per_node``; the values of words stay as they are."""
    key, equals, value = word.partition("=")
    own = {f"--{one.name.replace('_', '-')}" for one in fields(PlanConfig)}
    return (key.replace("-", "_").replace("__", "--", 1) if key in own else key) + equals + value


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _price(price: float | None, amounts: Sequence[float], per: str = "") -> str:
    if price is None:
        return ""
    return ", at a price of " + " to ".join(f"{amount * price:,.0f}" for amount in amounts) + per
