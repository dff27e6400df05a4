"""Arithmetic of a training step: the operations of its matrix products, a multiplication and an addition each one.

Legend: b pictures of a rank, N texts of the global batch, T patches, P prefix tokens, D widths, L tokens of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pacl_scale.encoders import TextEncoder, VisionEncoder


@dataclass(frozen=True)
class Tower:
    """A frozen transformer by what its cost depends on."""

    flops: int
    """Operations of one input."""
    parameters: int
    tokens: int
    """Of one input, without prefix tokens."""
    width: int
    blocks: int


@dataclass(frozen=True)
class Shapes:
    """The sizes that everything about a step follows from."""

    global_batch: int
    world: int
    accumulation: int
    patches: int
    """T: patches of a picture that enter the similarity."""
    width_in: int
    """Of the vision tower's tokens."""
    hidden: int
    """Of the embedder."""
    width: int
    """D: of text vectors and embedded patches."""
    pooling: str = "cosine"
    learn_temperature: bool = True

    @property
    def share(self) -> int:
        """Pictures of one rank in a step."""
        return self.global_batch // self.world

    @property
    def micro(self) -> int:
        """Pictures of one forward pass."""
        return self.share // self.accumulation

    @property
    def weights(self) -> int:
        """Numbers in the embedder's matrices."""
        return self.width_in * self.hidden + self.hidden * self.width + self.width_in * self.width

    @property
    def trainable(self) -> int:
        """Trainable numbers: matrices, biases, the logit scale."""
        return self.weights + self.hidden + 2 * self.width + self.learn_temperature


def embedder_flops(shapes: Shapes) -> int:
    """Of one rank and step: forward (twice with accumulation), gradients of weights, and of the hidden layer."""
    tokens = shapes.share * shapes.patches
    forward = 2 * tokens * shapes.weights
    passes = 1 if shapes.accumulation == 1 else 2
    # The tokens themselves are frozen: only the second layer passes a gradient down.
    return passes * forward + forward + 2 * tokens * shapes.hidden * shapes.width


def similarity_flops(shapes: Shapes) -> int:
    """Of one rank and step: the tiles of all pairs, made in forward and again in backward, and their gradients."""
    T, D, N = shapes.patches, shapes.width, shapes.global_batch
    # Scores of all texts; with normalised pooling the products of patches with each other, and their mix by attention.
    once = 2 * T * D * N
    if shapes.pooling == "cosine":
        once += 2 * T * T * D + 2 * T * T * N
    forward = once * (1 if shapes.accumulation == 1 else 2)
    return shapes.share * (forward + 2 * once)


def step_flops(shapes: Shapes, vision: Tower | None, text: Tower | None) -> dict[str, int]:
    """Operations of one rank in one step, by part; a tower whose outputs are cached is None."""
    return {
        "vision tower": shapes.share * vision.flops if vision else 0,
        "text tower": shapes.share * text.flops if text else 0,
        "embedder": embedder_flops(shapes),
        "similarity": similarity_flops(shapes),
    }


def vision_tower(encoder: VisionEncoder) -> Tower | None:
    """Counted while one picture passes; None for blocks that are packed for a CPU, whose products cannot be seen."""
    parameters = sum(p.numel() for block in encoder.blocks for p in block.parameters())
    if not parameters:
        return None
    side = encoder.preprocess.image_size
    device = next(p.device for block in encoder.blocks for p in block.parameters())
    picture = torch.zeros(1, 3, side, side, device=device)
    flops = count_flops(lambda: encoder.encode(picture))
    return Tower(flops, parameters, (side // encoder.patch_size) ** 2, encoder.width, len(encoder.blocks))


def text_tower(encoder: TextEncoder, words: int) -> Tower:
    """Counted while texts of ``words`` short words pass, as full a batch as the encoder takes."""
    parameters = sum(p.numel() for p in encoder.module.parameters())
    flops = count_flops(lambda: encoder.encode([" ".join(["dog"] * words)]))
    return Tower(flops // encoder.batch_size, parameters, words, encoder.width, 1)


def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attention that ``call`` runs in this thread."""
    # torch has no formula for attention that is fused; made of plain products, it has the same ones.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()
