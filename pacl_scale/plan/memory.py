"""Bytes on one device during a training step: what stays, and the largest of what comes and goes.

A step has phases that follow one another, so what they need for a while is not added up: the peak is what stays plus
the largest phase. Legend as in :mod:`pacl_scale.plan.work`.
"""

from dataclasses import dataclass

from pacl_scale.kernels import tiled
from pacl_scale.loss import ROW_BLOCK_NUMBERS
from pacl_scale.plan.work import Shapes, Tower

EXACT = 4
"""Bytes of a float32 number: masters, moments, text vectors, similarities."""

TILE_BUFFERS = {"cosine": 3, "mean": 2, "max": 2}


@dataclass(frozen=True)
class Settings:
    """What else than shapes decides memory."""

    number_bytes: int
    """Of the compute dtype."""
    zero_stage: int
    offload_optimizer: bool = False
    shard_towers: bool = False
    on_gpu: bool = True
    """On a GPU the similarity runs in a fused kernel without buffers, and a micro-batch passes the tower at once."""
    pictures_per_pass: int = 8
    """Elsewhere: pictures that pass the tower at once."""


def lasting_bytes(shapes: Shapes, settings: Settings, vision: Tower | None, text: Tower | None) -> dict[str, int]:
    """What a rank holds all through a step, by part."""
    held, world = settings.number_bytes, shapes.world
    numbers = shapes.trainable
    sharded = -(-numbers // world)
    masters = 0 if settings.number_bytes == EXACT and settings.zero_stage == 0 else EXACT
    optimizer = (masters + 2 * EXACT) * (sharded if settings.zero_stage else numbers)
    tower = vision.parameters * held if vision else 0
    if vision and settings.shard_towers:
        tower = tower // world + tower // vision.blocks
    return {
        "vision tower": tower,
        "text tower": text.parameters * held if text else 0,
        "embedder": held * (sharded if settings.zero_stage == 3 else numbers),
        "optimizer": 0 if settings.offload_optimizer else optimizer,
        "patch tokens": shapes.share * _entering(shapes) * held,
        "text vectors": shapes.share * shapes.width * EXACT + shapes.share * 2 * 8,
    }


def _entering(shapes: Shapes) -> int:
    """Frozen numbers of a picture that what is trained begins with."""
    return shapes.tail.tokens * shapes.tail.width if shapes.tail else shapes.patches * shapes.width_in


def phase_bytes(shapes: Shapes, settings: Settings, vision: Tower | None) -> dict[str, int]:
    """What a rank needs for a while, by phase of the step."""
    held = settings.number_bytes
    share, micro, N = shapes.share, shapes.micro, shapes.global_batch
    tokens, D = micro * shapes.patches, shapes.width
    texts = N * D * EXACT
    hidden, embedded = tokens * shapes.hidden * held, tokens * D * held
    table = N * EXACT
    # With accumulation the gradient of the whole share's table is kept while each micro-batch is embedded again.
    kept_tables = 0 if shapes.accumulation == 1 else share * table
    numbers = shapes.trainable
    sharded = -(-numbers // shapes.world)
    # What the gradient of trained blocks waits for, and the chosen ones of the tokens that they put out.
    blocks = micro * (shapes.tail.kept + shapes.patches * shapes.width_in) * held if shapes.tail else 0
    phases = {
        "embedder": texts + blocks + hidden + 3 * embedded + kept_tables,
        "similarity": texts + blocks + hidden + 2 * embedded + _tables(shapes, kept_tables) + _tiles(shapes, settings),
        "gradients": texts + blocks + kept_tables + hidden + _gradients(shapes, settings, embedded),
        "loss": texts + _in_loss(shapes, blocks + hidden + embedded + N * D * held) + _row_blocks(shapes, settings),
        # What ZeRO does not update here is let go of first.
        "update": texts
        + kept_tables
        + _update(shapes, settings)
        + held * (sharded if settings.zero_stage else numbers),
    }
    if shapes.tail:
        # Their gradient begins at the last MLP, whose hidden layer is four times as wide.
        widest = 4 * shapes.tail.tokens * shapes.tail.width
        # Gradients of micro-batches before wait beside those that are made; ZeRO 2 keeps a rank's part of them.
        waiting = (sharded if settings.zero_stage >= 2 else numbers) if shapes.accumulation > 1 else 0
        weights = (numbers + waiting) * held
        phases["trained blocks"] = texts + kept_tables + weights + micro * (shapes.tail.kept + widest) * held
    if vision:
        pictures = micro if settings.on_gpu else min(micro, settings.pictures_per_pass)
        # The widest place of a block: its input, the norm of it, and the MLP's hidden layer before and after GELU.
        phases["vision tower"] = pictures * vision.tokens * vision.width * held * 10
    return phases


def _tables(shapes: Shapes, kept: int) -> int:
    """Similarities of a pass, their gradient, and the lengths of pooled vectors."""
    lengths = shapes.pooling == "cosine"
    return kept + (2 + lengths) * shapes.micro * shapes.global_batch * EXACT


def _in_loss(shapes: Shapes, graph: int) -> int:
    """The table and its gradient; without accumulation, what the embedder's and the similarity's backward wait for."""
    table = shapes.share * shapes.global_batch * EXACT
    if shapes.accumulation > 1:
        return 2 * table
    return graph + (2 + (shapes.pooling == "cosine")) * table


def _row_blocks(shapes: Shapes, settings: Settings) -> int:
    """A few rows of the table at a time: logits, their exponentials and weights, and two masks."""
    numbers = ROW_BLOCK_NUMBERS["cuda" if settings.on_gpu else "cpu"]
    rows = min(shapes.share, max(1, numbers // shapes.global_batch))
    return rows * shapes.global_batch * (3 * EXACT + 2)


def _gradients(shapes: Shapes, settings: Settings, embedded: int) -> int:
    """Of embedded patches and hidden layer, and of the weights: in the engine's bucket, and one as it is made. With
    accumulation those of micro-batches before are kept beside."""
    largest = max(shapes.width_in, shapes.width) * shapes.hidden
    more = shapes.accumulation > 1
    return (2 + more) * embedded + settings.number_bytes * ((1 + more) * shapes.trainable + largest)


def _tiles(shapes: Shapes, settings: Settings) -> int:
    """Unit texts, and the buffers of one worker's tile."""
    T, D, N, held = shapes.patches, shapes.width, shapes.global_batch, settings.number_bytes
    units = N * D * held
    if settings.on_gpu:
        return units
    images, texts = tiled.tile_shape(shapes.micro, T, N, on_cpu=True)
    scores = TILE_BUFFERS[shapes.pooling] * images * texts * T * held
    # Of the images of a tile: unit patches in both types, their gradient and a part of it; their products and its.
    group = images * T * D * (4 * EXACT + (held if held < EXACT else 0))
    if shapes.pooling == "cosine":
        group += images * T * T * (EXACT + 2 * held)
    return units + scores + group


def _update(shapes: Shapes, settings: Settings) -> int:
    """The gradient in float32, and AdamW's two temporaries of the same size."""
    numbers = max(shapes.groups) // (shapes.world if settings.zero_stage else 1)
    return 0 if settings.offload_optimizer else 3 * numbers * EXACT


def peak_bytes(shapes: Shapes, settings: Settings, vision: Tower | None, text: Tower | None) -> int:
    """What stays and the largest phase."""
    return sum(lasting_bytes(shapes, settings, vision, text).values()) + max(
        phase_bytes(shapes, settings, vision).values()
    )
