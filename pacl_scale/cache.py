"""Encode every picture and text once: ``python -m pacl_scale.cache data.root=... output=...``.

The frozen towers are most of the cost of a training step; without augmentation they compute the same every epoch. This
writes the patch tokens of every picture, as int8 with a scale a token, bfloat16 or float32, and the vectors of every
text that training can draw for it, in tars with an index like those of the pictures; training reads either. The texts
are copied, so that the result stands alone. With ``patch_tokens=false`` the pictures themselves are copied in place of
tokens, for training that crops and flips them or trains blocks of the vision tower.

The samples are cut, in index order, into shards of ``shard_samples``; rank r of R computes every R-th of them. A shard
appears only when it is complete, so a second start goes on with those that are missing, with any number of ranks.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import webdataset

from pacl_scale import config, distributed, log, storage
from pacl_scale.data.batch import PairBatch
from pacl_scale.data.captions import PictureTexts, possible_texts
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import INDEX_NAME, SampleIndex, build_index, list_shards
from pacl_scale.data.stream import DataConfig, PairStream
from pacl_scale.data.vectors import VectorFormat
from pacl_scale.distributed import DistributedConfig, World
from pacl_scale.encoders import TextEncoder, TextEncoderConfig, VisionConfig, VisionEncoder, build_text, build_vision
from pacl_scale.errors import UserError, run_command

MODULE = "pacl_scale.cache"
PLAN_NAME = "cache.json"
"""Says what the tars beside it are made from, so that two caches are never mixed in one folder."""

logger = log.get_logger(MODULE)


@dataclass
class CacheConfig:
    """Encode every picture and text of a data set once and keep the patch tokens and text vectors."""

    output: str = ""
    """Path or URL of the folder of tars and index to write."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set of pictures, data.root, and how to read it."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """The frozen vision tower."""

    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The frozen text tower."""

    patch_tokens: bool = True
    """Keep patch tokens in place of pictures; false copies the pictures as they are beside their text vectors."""

    text_vectors: bool = True
    """Also keep the vectors of every caption and noun prompt of each picture, as float16: 2 bytes x channels x
    (captions + 7 x nouns) a picture. Training then needs no text tower."""

    dtype: Literal["int8", "bfloat16", "float32"] = "int8"
    """How tokens are kept: int8 with one float16 scale a token, bfloat16 at twice the size, or float32, which loses
    nothing, at four times."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """What the towers compute in."""

    batch_size: int = 64
    """Pictures the vision tower encodes at a time, on each rank."""

    shard_samples: int = 1024
    """Pictures of one tar; a multiple of batch_size. A tar is put together in memory (100 to 200 KB a picture)."""

    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes and devices."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_samples < 1 or self.shard_samples % self.batch_size:
            raise ValueError("shard_samples must be a multiple of batch_size")
        if not (self.patch_tokens or self.text_vectors):
            raise ValueError("patch_tokens and text_vectors are both false: there is nothing to keep")
        if self.data.picture.augments:
            raise ValueError("data.picture: cached tokens are of pictures as they are; crop_share is 1 and flip false")
        if self.data.patch_sample:
            raise ValueError("data.patch_sample: all patches are cached; they are sampled when training reads them")
        if self.data.mix:
            raise ValueError("data.mix: one data set is cached at a time; name it as data.root")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    settings: CacheConfig = config.parse(CacheConfig, words, f"python -m {MODULE}")
    if distributed.needs_launch(settings.distributed):
        return distributed.launch(settings.distributed, MODULE, words)
    with distributed.joined(settings.distributed) as world:
        log.configure(world.rank)
        cache(settings, world)
    return 0


def cache(settings: CacheConfig, world: World) -> SampleIndex | None:
    """Write the data set of patch tokens and text vectors; the main rank returns its index. Collective.

    Raises:
        UserError: nothing to read or nowhere to write, or the output holds something else.
    """
    if not settings.output:
        raise UserError("output is not set; name the folder to write")
    # Each rank makes whole shards of the result, so none shares its batches with another.
    alone = World(0, 1, world.local_rank, world.device)
    with PairStream(settings.data, 0, settings.batch_size, alone, ordered=True) as stream:
        if stream.features:
            raise UserError(f"{settings.data.root} holds patch tokens already")
        precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        vision = tokens = None
        if settings.patch_tokens:
            vision = build_vision(settings.vision, world.device, precision)
            stream.prepare_pictures_for(vision.preprocess)
            tokens = probe_format(vision, settings.dtype)
        stream.undecoded = vision is None
        text = build_text(settings.text, world.device, precision) if settings.text_vectors else None
        kept = vector_format(settings.text, text) if text else None
        layout = Layout(tokens, kept)
        claim_output(settings, layout, stream.indexes[0], world)
        shards = -(-len(stream) // settings.shard_samples)
        names = [f"{number:05d}.tar" for number in range(shards)]
        present = set(list_shards(settings.output))
        missing = [n for n in range(world.rank, shards, world.size) if names[n] not in present]
        for number in log.progress(missing, "cache", unit="shard"):
            start = number * settings.shard_samples
            stop = min(start + settings.shard_samples, len(stream))
            content = write_shard(stream, start, stop, vision, text, layout, world.device)
            storage.write_bytes(storage.join(settings.output, names[number]), content)
        skipped = sum(stream.skipped.values())
    if world.size > 1:
        torch.distributed.barrier()
    if not world.is_main:
        return None
    index = build_index(settings.output, names, kind=layout.kind, extra=layout.to_dict())
    logger.info("cached", output=settings.output, pictures=len(index), shards=shards, skipped_here=skipped)
    return index


@dataclass(frozen=True)
class Layout:
    """What is kept of a sample, and how."""

    tokens: FeatureFormat | None
    """None keeps the pictures."""
    vectors: VectorFormat | None
    """None keeps no text vectors."""

    @property
    def kind(self) -> Literal["features", "pictures"]:
        """Of the index."""
        return "features" if self.tokens else "pictures"

    def to_dict(self) -> dict[str, Any]:
        """For the ``extra`` of an index."""
        parts = [part.to_dict() for part in (self.tokens, self.vectors) if part]
        return {name: value for part in parts for name, value in part.items()}


def vector_format(config: TextEncoderConfig, text: TextEncoder) -> VectorFormat:
    """How this tower's vectors will be kept."""
    return VectorFormat(text.width, text.fingerprint(), config.named)


def probe_format(vision: VisionEncoder, dtype: str) -> FeatureFormat:
    """How this tower's tokens will be kept; one grey picture tells their number."""
    size = vision.preprocess.image_size
    tokens_BTD, grid = vision.encode(torch.zeros(1, 3, size, size))
    return FeatureFormat(tokens_BTD.shape[1], tokens_BTD.shape[2], grid, dtype, vision.fingerprint())


def claim_output(settings: CacheConfig, layout: Layout, source: SampleIndex, world: World) -> None:
    """Write what the output is to hold, or make sure that it is what an earlier start wrote there."""
    url = storage.join(settings.output, PLAN_NAME)
    plan = {"source": settings.data.root, "samples": len(source), "index": source.identity}
    plan |= {"shard_samples": settings.shard_samples, "precision": settings.precision} | layout.to_dict()
    if world.is_main and not storage.exists(url):
        if storage.exists(storage.join(settings.output, INDEX_NAME)):
            raise UserError(f"{settings.output} holds another data set; choose another output")
        storage.write_bytes(url, json.dumps(plan, indent=2).encode())
    if world.size > 1:
        torch.distributed.barrier()
    try:
        found = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is not a cache's plan; choose another output") from error
    changes = config.differences(found, plan) if isinstance(found, dict) else {"all of it": ()}
    if changes:
        raise UserError(f"{settings.output} holds a cache that differs in {', '.join(changes)}; choose another output")


def write_shard(
    stream: PairStream,
    start: int,
    stop: int,
    vision: VisionEncoder | None,
    text: TextEncoder | None,
    layout: Layout,
    device: torch.device,
) -> bytes:
    """A tar of the patch tokens or pictures, texts and text vectors of the samples ``start`` to ``stop``."""
    content = io.BytesIO()
    with webdataset.TarWriter(content, encoder=False, mtime=0) as tar:
        for batch in stream.span(start, stop):
            if len(batch) == 0:
                continue
            vectors = vector_members(batch, text, layout.vectors)
            for row, members in enumerate(picture_members(batch, vision, layout.tokens, device)):
                tar.write({"__key__": batch.keys[row], **text_members(batch, row), **members, **vectors[row]})
    return content.getvalue()


def picture_members(
    batch: PairBatch, vision: VisionEncoder | None, tokens: FeatureFormat | None, device: torch.device
) -> Sequence[Mapping[str, bytes]]:
    """The members that stand for each picture: its patch tokens, or itself."""
    if vision is None or tokens is None:
        return [{extension: content} for extension, content in batch.pictures]
    assert batch.images is not None
    return tokens.pack(vision.encode(batch.images.to(device, non_blocking=True)).tokens)


def vector_members(batch: PairBatch, text: TextEncoder | None, vectors: VectorFormat | None) -> list[dict[str, bytes]]:
    """The member that holds the vectors of each picture's texts; nothing where none are kept."""
    if text is None or vectors is None:
        return [{} for _ in batch.keys]
    pairs = zip(batch.captions, batch.nouns, strict=True)
    texts = [possible_texts(PictureTexts(captions, nouns)) for captions, nouns in pairs]
    # All at once, so that full batches of one length are common.
    all_ND = text.encode([one for each in texts for one in each])
    return [vectors.pack(part_ND) for part_ND in all_ND.split([len(each) for each in texts])]


def text_members(batch: PairBatch, row: int) -> dict[str, bytes]:
    """The captions and nouns of a picture, as the members that hold them."""
    texts = {"captions": batch.captions[row], "nouns": batch.nouns[row]}
    return {"json": json.dumps(texts).encode(), "txt": batch.captions[row][0].encode()}


if __name__ == "__main__":
    sys.exit(run_command(main))
