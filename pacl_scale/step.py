"""One optimizer step on a global batch: frozen towers, embedder, similarity, loss, gradient, update.

Shapes: b pictures on this rank, T patches, Din / D width of tokens / text vectors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacl_scale.data.stream import PairBatch
from pacl_scale.encoders import TextEncoder, VisionEncoder
from pacl_scale.errors import RunFailed
from pacl_scale.loss import GlobalTexts, PACLLoss
from pacl_scale.similarity import attention_entropy


@dataclass
class MicroBatch:
    """What one forward pass on this rank needs, on its device."""

    tokens: Tensor
    """(b, T, Din) frozen patch tokens in the compute dtype."""
    texts: Tensor
    """(b, D) float32 text vectors."""
    text_ids: Tensor
    """(b,) int64."""
    image_text_ids: Tensor
    """(b, K) int64, padded with -1."""


def encode(
    batch: PairBatch, vision: VisionEncoder | None, text: TextEncoder | None, device: torch.device, size: int
) -> Iterator[MicroBatch]:
    """Run the frozen towers over this rank's share of a global batch, ``size`` pictures at a time."""
    texts = text.encode(batch.texts) if text else batch.text_vectors
    assert texts is not None
    for start in range(0, len(batch.texts), size):
        part = slice(start, start + size)
        if vision is None:
            assert batch.patches is not None
            tokens = batch.patches[part].to(device, non_blocking=True)
        else:
            assert batch.images is not None
            tokens = vision.encode(batch.images[part].to(device, non_blocking=True)).tokens
            tokens = batch.sampled(tokens, part)
        ids, image_ids = batch.text_ids[part].to(device), batch.image_text_ids[part].to(device)
        yield MicroBatch(tokens, texts[part].to(device), ids, image_ids)


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
    texts = loss_of.gather(
        torch.cat([micro.texts for micro in micro_batches]), torch.cat([micro.text_ids for micro in micro_batches])
    )
    image_text_ids = torch.cat([micro.image_text_ids for micro in micro_batches])
    whole = len(micro_batches) == 1
    tables = []
    with torch.set_grad_enabled(whole):
        for micro in micro_batches:
            patches, scale = trainer(micro.tokens) if whole else trainer.module(micro.tokens)
            tables.append(loss_of.similarity(patches, texts))
    phi = tables[0] if whole else torch.cat(tables)
    # What a variable holds, the next pass has not got: these are the largest tensors of a step.
    del tables
    if not whole:
        phi.requires_grad_()
        scale.requires_grad_()
    loss = loss_of.from_similarity(phi, texts, scale, image_text_ids=image_text_ids)
    result = StepResult(float(loss.detach()), float(scale.detach()), False, None)
    if measure:
        result.attention_entropy = attention_entropy(
            patches.detach(), micro_batches[-1].texts, loss_of.config.attention_scale
        )
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
    result.updated = updated(trainer)
    return result


def carry_back(
    trainer: Any,
    loss_of: PACLLoss,
    micro_batches: list[MicroBatch],
    texts: GlobalTexts,
    phi_grad: Tensor,
    scale_grad: Tensor,
) -> None:
    """Embed each micro-batch again, with a graph, and carry its rows of the gradient through it."""
    for micro, share in zip(micro_batches, phi_grad.split([len(m.tokens) for m in micro_batches]), strict=True):
        patches, micro_scale = trainer(micro.tokens)
        # Every micro-batch sees the same scale, so its gradient is carried in equal parts.
        surrogate = (loss_of.similarity(patches, texts) * share).sum()
        surrogate = surrogate + (micro_scale * scale_grad).sum() / len(micro_batches)
        # DeepSpeed divides by the number of micro-batches; ours are parts of one sum.
        trainer.backward(surrogate * len(micro_batches))
        del patches, surrogate
        trainer.step()


def updated(trainer: Any) -> bool:
    """Whether the last step changed weights.

    Raises:
        RunFailed: it did, by a gradient that is not finite (in float32, where the engine does not look first).
    """
    norm = gradient_norm(trainer)
    if not trainer.was_step_applied():
        return False
    if norm is not None and not math.isfinite(norm):
        raise RunFailed(f"the gradient's norm is {norm}; start the run again to go on from its newest checkpoint")
    return True


def gradient_norm(trainer: Any) -> float | None:
    """Norm of the last step's gradient before clipping, as DeepSpeed measured it; ``None`` where it did not."""
    norm = trainer.get_global_grad_norm()
    return None if norm is None else float(norm)
