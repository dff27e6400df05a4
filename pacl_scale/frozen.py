"""What training does not train: the towers, as far as the data set does not hold what they would say."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pacl_scale import engine
from pacl_scale.data.stream import PairStream
from pacl_scale.distributed import World
from pacl_scale.encoders import TextEncoder, VisionEncoder, build_text, build_vision
from pacl_scale.encoders.tail import VisionTail
from pacl_scale.encoders.vision import VisionConfig
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.errors import UserError
from pacl_scale.plan.work import Shapes, Tower, step_flops, vision_tail, vision_tower
from pacl_scale.recorders import peak_flops

if TYPE_CHECKING:
    from pacl_scale.train import TrainConfig


@dataclass(frozen=True)
class Frozen:
    """The towers, None for one that is not needed, and what follows from them."""

    vision: VisionEncoder | None
    text: TextEncoder | None
    widths: tuple[int, int]
    """Of patch tokens and of text vectors."""
    made_for: dict[str, Any]
    """What the embedder is made for; an evaluation refuses other towers."""
    look: VisionEncoder | None
    """The vision tower for validation, which puts weights of its own into the tail."""
    vision_cost: Tower | None
    """What a picture costs; None without a vision tower, or where its products cannot be counted."""

    @property
    def tail(self) -> VisionTail | None:
        """The part of the vision tower that is not frozen."""
        return self.vision.tail if isinstance(self.vision, FrozenViT) else None


def frozen_towers(settings: "TrainConfig", stream: PairStream, world: World) -> Frozen:
    """Build what the stream does not deliver, and tell it how a tower wants its pictures. Collective where towers are
    sharded.

    Raises:
        UserError: a tower cannot be had, or is not the one whose vectors the data set holds.
    """
    text = vision = look = cost = None
    if stream.vectors:
        stream.vectors.check_tower(settings.text.named)
        width_out, vectors_of = stream.vectors.width, stream.vectors.tower
    else:
        text = build_text(settings.text, world.device, settings.engine.dtype)
        width_out, vectors_of = text.width, text.fingerprint()
    if stream.features:
        if settings.unfreeze.vision_blocks:
            raise UserError("unfreeze.vision_blocks needs pictures, but the data set holds tokens of the whole tower")
        if settings.vision != VisionConfig():
            # Left alone, it is what the tokens say.
            stream.features.check_encoder(settings.vision.named)
        width_in, tokens_of = stream.width, stream.features.vision
    else:
        shard = engine.shard_of_towers(settings.engine, world)
        place = (world.device, settings.engine.dtype, settings.unfreeze.vision_blocks, shard)
        vision = build_vision(settings.vision, *place)
        cost = vision_tower(vision)
        engine.compile_tower(settings.engine, vision.blocks)
        stream.prepare_pictures_for(vision.preprocess)
        width_in, tokens_of = vision.width, vision.fingerprint()
        look = vision
        if isinstance(vision, FrozenViT) and vision.tail is not None and settings.validate.every_steps:
            look = vision.with_spare_tail()
    made_for = {"width_in": width_in, "width_out": width_out, "towers": {"vision": tokens_of, "text": vectors_of}}
    return Frozen(vision, text, (width_in, width_out), made_for, look, cost)


def peak_seconds_of_a_pair(
    settings: "TrainConfig", frozen: Frozen, stream: PairStream, world: World, accumulation: int
) -> float | None:
    """Seconds that one pair's arithmetic takes at the device's peak (see ``pacl_scale.plan.work``; without the text
    tower); None for a device whose peak is not known, or a tower whose products cannot be counted."""
    peak = peak_flops(settings.record, settings.engine.precision, world.device)
    tokens = stream.features.tokens if stream.features else frozen.vision_cost and frozen.vision_cost.tokens
    if peak is None or not tokens:
        return None
    shapes = Shapes(
        global_batch=settings.global_batch_size,
        world=world.size,
        accumulation=accumulation,
        patches=min(settings.data.patch_sample or tokens, tokens),
        width_in=frozen.widths[0],
        hidden=settings.embedder.hidden or frozen.widths[1],
        width=frozen.widths[1],
        pooling=settings.loss.pooling,
        tail=vision_tail(frozen.vision) if frozen.vision else None,
        text_hidden=settings.unfreeze.hidden(frozen.widths[1]),
    )
    return sum(step_flops(shapes, frozen.vision_cost, None).values()) / shapes.share / peak
