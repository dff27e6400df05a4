"""Arithmetic of a training step: the operations of its matrix products, a multiplication and an addition each one.

Legend: b pictures of a rank, N texts of the global batch, T patches, P prefix tokens, D widths, L tokens of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pacl_scale.encoders import TextEncoder, VisionEncoder
from pacl_scale.encoders.vit import FrozenViT


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
class Tail:
    """The last blocks of the vision tower where they are trained."""

    flops: int
    """Operations of one picture, forward."""
    matrices: int
    """Numbers in its matrices."""
    vectors: int
    """Its other trainable numbers."""
    tokens: int
    """That enter it of one picture, with prefix tokens."""
    width: int
    kept: int
    """Numbers that its gradient needs of one picture, all of which forward keeps."""


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
    tail: Tail | None = None
    text_hidden: int | None = None
    """Of the text embedder; None where texts stay as they are."""

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
    def groups(self) -> list[int]:
        """Trainable numbers as the optimizer groups them: matrices and vectors, then those of a tail."""
        hidden, width = self.text_hidden or 0, self.width
        matrices = self.weights + 2 * hidden * width
        vectors = self.hidden + 2 * width + self.learn_temperature + (hidden + width if hidden else 0)
        return [matrices, vectors] + ([self.tail.matrices, self.tail.vectors] if self.tail else [])

    @property
    def trainable(self) -> int:
        """All trainable numbers."""
        return sum(self.groups)

    @property
    def passes(self) -> int:
        """Forward passes of what is trained: with accumulation a first one finds the gradient of the similarities."""
        return 1 if self.accumulation == 1 else 2


def embedder_flops(shapes: Shapes) -> int:
    """Of one rank and step: forward, gradients of weights, and of the hidden layer."""
    tokens = shapes.share * shapes.patches
    forward = 2 * tokens * shapes.weights
    # Frozen tokens need no gradient: only the second layer passes one down.
    down = 2 * tokens * shapes.hidden * shapes.width
    if shapes.tail:
        down += 2 * tokens * shapes.width_in * (shapes.hidden + shapes.width)
    return shapes.passes * forward + forward + down


def tail_flops(shapes: Shapes) -> int:
    """Of one rank and step: every patch passes it, and each product has two in its gradient."""
    return shapes.share * (shapes.passes + 2) * shapes.tail.flops if shapes.tail else 0


def text_embedder_flops(shapes: Shapes) -> int:
    """Of one rank and step. With accumulation all texts pass before, all again in the last micro-batch, and in each
    other one its own."""
    layer = 2 * shapes.share * shapes.width * (shapes.text_hidden or 0)
    before = 2 * layer if shapes.accumulation > 1 else 0
    passes = shapes.share * shapes.accumulation + shapes.share * (shapes.accumulation - 1)
    # Forward 2 layers, gradients of 2 weights and of the hidden layer.
    return before + 5 * layer * passes // (shapes.share * shapes.accumulation)


def similarity_flops(shapes: Shapes) -> int:
    """Of one rank and step: the tiles of all pairs, made in forward and again in backward, and their gradients."""
    T, D, N = shapes.patches, shapes.width, shapes.global_batch
    # Scores of all texts; with normalised pooling the products of patches with each other, and their mix by attention.
    once = 2 * T * D * N
    if shapes.pooling == "cosine":
        once += 2 * T * T * D + 2 * T * T * N
    # Trained texts have a gradient of their own from every score.
    texts = 2 * T * D * N if shapes.text_hidden else 0
    return shapes.share * (shapes.passes * once + 2 * once + texts)


def step_flops(shapes: Shapes, vision: Tower | None, text: Tower | None) -> dict[str, int]:
    """Operations of one rank in one step, by part; a tower whose outputs are cached is None."""
    return {
        "vision tower": shapes.share * vision.flops if vision else 0,
        "text tower": shapes.share * text.flops if text else 0,
        "trained blocks": tail_flops(shapes),
        "text embedder": text_embedder_flops(shapes),
        "embedder": embedder_flops(shapes),
        "similarity": similarity_flops(shapes),
    }


def vision_tower(encoder: VisionEncoder) -> Tower | None:
    """What is frozen of it, counted while one picture passes; None for blocks that are packed for a CPU, whose products
    cannot be seen."""
    parameters = sum(p.numel() for block in encoder.blocks for p in block.parameters())
    if not parameters:
        return None
    side = encoder.preprocess.image_size
    device = next(p.device for block in encoder.blocks for p in block.parameters())
    picture = torch.zeros(1, 3, side, side, device=device)
    cut = isinstance(encoder, FrozenViT) and encoder.tail is not None
    flops = count_flops(lambda: encoder.encode_up_to_tail(picture) if cut else encoder.encode(picture))  # type: ignore[attr-defined]
    return Tower(flops, parameters, (side // encoder.patch_size) ** 2, encoder.width, len(encoder.blocks))


def vision_tail(encoder: VisionEncoder) -> Tail | None:
    """What is trained of it, counted likewise; None where all is frozen."""
    if not isinstance(encoder, FrozenViT) or encoder.tail is None:
        return None
    tail, patches = encoder.tail, (encoder.preprocess.image_size // encoder.patch_size) ** 2
    held = {p.untyped_storage().data_ptr() for p in tail.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    sizes = [p.numel() for p in tail.parameters() if p.ndim >= 2]
    first = next(tail.parameters())
    x_1ND = torch.zeros(1, tail.prefix + patches, tail.width, device=first.device, dtype=first.dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = tail(x_1ND)
    with torch.no_grad():
        flops = count_flops(lambda: tail(x_1ND))
    vectors = sum(p.numel() for p in tail.parameters()) - sum(sizes)
    del output
    return Tail(flops, sum(sizes), vectors, x_1ND.shape[1], tail.width, sum(kept.values()))


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
