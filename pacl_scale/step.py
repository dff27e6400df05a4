"""One optimizer step on a global batch: frozen towers, embedder, similarity, loss, gradient, update.

Shapes: b pictures on this rank, N texts of all ranks, P prefix tokens, T patches of which n take part, Din / D width of
tokens / text vectors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacl_scale.data.batch import PairBatch
from pacl_scale.encoders import TextEncoder, VisionEncoder
from pacl_scale.encoders.vit import FrozenViT
from pacl_scale.loss import PACLLoss
from pacl_scale.pairs import GlobalTexts
from pacl_scale.similarity import attention_entropy


@dataclass
class MicroBatch:
    """What one forward pass on this rank needs, on its device."""

    tokens: Tensor
    """(b, n, Din) frozen patch tokens in the compute dtype; with a trainable tail (b, P + T, Din), what enters it."""
    texts: Tensor
    """(b, D) float32 text vectors."""
    text_ids: Tensor
    """(b,) int64."""
    image_text_ids: Tensor
    """(b, K) int64, padded with -1."""
    chosen: Tensor | None = None
    """(b, n) int64: which patches that the tail puts out take part; None if all do."""


def encode(
    batch: PairBatch, vision: VisionEncoder | None, text: TextEncoder | None, device: torch.device, size: int
) -> Iterator[MicroBatch]:
    """Run the frozen towers over this rank's share of a global batch, ``size`` pictures at a time."""
    texts = text.encode(batch.texts) if text else batch.text_vectors
    assert texts is not None
    for start in range(0, len(batch.texts), size):
        part = slice(start, start + size)
        tokens, chosen = _tokens(batch, part, vision, device)
        ids, image_ids = batch.text_ids[part].to(device), batch.image_text_ids[part].to(device)
        yield MicroBatch(tokens, texts[part].to(device), ids, image_ids, chosen)


def _tokens(
    batch: PairBatch, part: slice, vision: VisionEncoder | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """What of a micro-batch is frozen, and which patches are still to be chosen from what is made of it."""
    if vision is None:
        assert batch.patches is not None
        return batch.patches[part].to(device, non_blocking=True), None
    assert batch.images is not None
    images = batch.images[part].to(device, non_blocking=True)
    if isinstance(vision, FrozenViT) and vision.tail is not None:
        tokens = vision.encode_up_to_tail(images)
        chosen = batch.chosen(tokens.shape[1] - vision.tail.prefix, part)
        return tokens, None if chosen is None else chosen.to(device)
    tokens = vision.encode(images).tokens
    chosen = batch.chosen(tokens.shape[1], part)
    return tokens if chosen is None else torch.take_along_dim(tokens, chosen.to(device)[:, :, None], dim=1), None


@dataclass
class StepResult:
    """What one optimizer step came to."""

    loss: float
    """Of the global batch, alike on all ranks."""
    logit_scale: float
    updated: bool
    """Whether weights changed: not where the loss is not finite, or where the engine refused the gradient."""
    attention_entropy: float | None
    """See :func:`pacl_scale.similarity.attention_entropy`, over (a micro-batch of) this rank's pairs."""


def train_step(trainer: Any, loss_of: PACLLoss, micro_batches: list[MicroBatch], measure: bool = False) -> StepResult:
    """One optimizer step on the global batch; ``measure`` also looks at the attention.

    With several micro-batches the negatives are still the whole global batch. The gradient of the loss with
    respect to every similarity is taken once, from similarities computed without a graph; then each micro-batch
    is embedded again and that gradient is carried through its own graph. Frozen towers run once either way.
    """
    image_text_ids = torch.cat([micro.image_text_ids for micro in micro_batches])
    whole = len(micro_batches) == 1
    if whole:
        (micro,) = micro_batches
        patches, scale, embedded = trainer(micro.tokens, micro.chosen, micro.texts)
        texts = loss_of.gather(micro.texts if embedded is None else embedded, micro.text_ids)
        phi = loss_of.similarity(patches, texts)
    else:
        patches, scale, texts, phi = without_graph(trainer, loss_of, micro_batches)
        phi.requires_grad_()
        scale.requires_grad_()
    loss = loss_of.from_similarity(phi, texts, scale, image_text_ids=image_text_ids)
    result = StepResult(float(loss.detach()), float(scale.detach()), False, None)
    if measure:
        own = texts.vectors_ND.detach()[texts.own][-len(patches) :]
        result.attention_entropy = attention_entropy(patches.detach(), own, loss_of.config.attention_scale)
    # What a variable holds, the next pass has not got: these are the largest tensors of a step.
    del patches
    if not math.isfinite(result.loss):
        return result
    if whole:
        del phi
        trainer.backward(loss)
        trainer.step()
    else:
        grads = torch.autograd.grad(loss, [phi, scale])
        del phi, loss
        carry_back(trainer, loss_of, micro_batches, texts, *grads)
    result.updated = trainer.was_step_applied()
    return result


@torch.no_grad()
def without_graph(
    trainer: Any, loss_of: PACLLoss, micro_batches: list[MicroBatch]
) -> tuple[Tensor, Tensor, GlobalTexts, Tensor]:
    """Patches of the last micro-batch, logit scale, everybody's texts, and this rank's rows of similarities."""
    vectors, ids = own_texts(micro_batches)
    embedded = trainer.module.embed_texts(vectors)
    texts = loss_of.gather(vectors if embedded is None else embedded, ids)
    tables = []
    for micro in micro_batches:
        patches, scale, _ = trainer.module(micro.tokens, micro.chosen)
        tables.append(loss_of.similarity(patches, texts))
    return patches, scale, texts, torch.cat(tables)


def own_texts(micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Vectors and ids of all texts of this rank."""
    return torch.cat([micro.texts for micro in micro_batches]), torch.cat([micro.text_ids for micro in micro_batches])


def carry_back(
    trainer: Any,
    loss_of: PACLLoss,
    micro_batches: list[MicroBatch],
    texts: GlobalTexts,
    phi_grad: Tensor,
    scale_grad: Tensor,
) -> None:
    """Embed each micro-batch again, with a graph, and carry its rows of the gradient through it."""
    waiting = TextGradient(texts) if trainer.module.text_embedder is not None else None
    last = len(micro_batches) - 1
    shares = phi_grad.split([len(micro.tokens) for micro in micro_batches])
    for number, (micro, share) in enumerate(zip(micro_batches, shares, strict=True)):
        vectors, ids = own_texts(micro_batches) if waiting and number == last else (micro.texts, micro.text_ids)
        patches, micro_scale, embedded = trainer(micro.tokens, micro.chosen, vectors)
        # Every micro-batch sees the same scale, so its gradient is carried in equal parts.
        surrogate = (micro_scale * scale_grad).sum() / len(micro_batches)
        seen = texts
        if waiting and number == last:
            seen = loss_of.gather(embedded, ids)
            surrogate = surrogate + (seen.vectors_ND * waiting.so_far()).sum()
        elif waiting:
            # The engine expects a gradient of every weight from every micro-batch.
            surrogate = surrogate + embedded.sum() * 0.0 + waiting.unit()
        surrogate = surrogate + (loss_of.similarity(patches, seen) * share).sum()
        # DeepSpeed divides by the number of micro-batches; ours are parts of one sum.
        trainer.backward(surrogate * len(micro_batches))
        del patches, surrogate
        trainer.step()


class TextGradient:
    """Of trained texts: what all micro-batches but the last say, which the last one carries to the text embedder."""

    def __init__(self, texts: GlobalTexts) -> None:
        self._vectors_ND = texts.vectors_ND.requires_grad_()
        self._unit = torch.zeros((), device=texts.vectors_ND.device, requires_grad=True)
        self._passes = 0

    def unit(self) -> Tensor:
        """Zero, to be added to each micro-batch's sum: its gradient is the factor that the engine scales by."""
        self._passes += 1
        return self._unit

    def so_far(self) -> Tensor:
        """(N, D) gradient with respect to everybody's texts, of this rank's pictures; without the engine's factor."""
        assert self._vectors_ND.grad is not None and self._unit.grad is not None
        return self._vectors_ND.grad * (self._passes / self._unit.grad)


def gradient_norm(trainer: Any) -> float | None:
    """Norm of the last step's gradient before clipping, as DeepSpeed measured it; ``None`` where it did not."""
    norm = trainer.get_global_grad_norm()
    return None if norm is None else float(norm)
