"""The contrastive loss over all pairs of the global batch, exact for any number of ranks.

Legend: b images and n texts of this rank, N texts of all ranks, D width.

Each rank computes the similarity of its own images with every rank's texts, so rows of the (images x texts) table are
whole where they are, and only texts have crossed the wire. The text-to-image direction needs a log-sum-exp over the
rows of all ranks: one all-reduce of maxima and one of sums, each of a few numbers a text. ``docs/similarity.md`` has
the traffic as a formula, and as counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from pacl_scale.collectives import Gather, all_reduce, counts_of, gather, rank_in, world_size
from pacl_scale.pairs import GlobalTexts, OtherPositives, Pairs
from pacl_scale.similarity import Backend, Pooling, patch_text_similarity

ROW_BLOCK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Logits are made for this many pairs at a time, so that nothing but phi and its gradient is as large as the table;
on a CPU few enough for its cache."""


@dataclass
class LossConfig:
    """The all-pairs similarity and the contrastive loss over it."""

    attention_scale: float = 10.0
    """Inverse temperature of the attention over patches (k); 0 pools all patches alike (the standing control)."""
    pooling: Pooling = "cosine"
    """How patches become one number: cosine of the pooled vector (the paper), mean (not normalised), max (FILIP)."""
    backend: Backend = "auto"
    """Who computes the similarity: auto, eager (small sizes), tiled (any device), triton (CUDA)."""
    temperature: float = 0.07
    """Temperature of the contrastive loss (tau) at the start; similarities are divided by it. CLIP's value."""
    learn_temperature: bool = True
    """Whether the temperature is trained, as CLIP does, or stays as it is."""
    min_temperature: float = 0.01
    """A trained temperature does not fall below this (CLIP's: a logit scale of at most 100)."""
    other_positives: OtherPositives = "ignore"
    """Texts that are true of an image without being its own (a caption that occurs twice, a noun that another picture
    shows too): ignore leaves such pairs out of the loss, target lets them share the target."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all pairs that are not ignored."""

    def __post_init__(self) -> None:
        if not 0.0 < self.min_temperature <= self.temperature:
            raise ValueError("min_temperature must be above 0 and at most temperature")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")


class LogitScale(nn.Module):
    """The inverse temperature 1/tau: a parameter (of its logarithm) if ``config.learn_temperature``, else constant."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.start, self.max_log_scale = -math.log(config.temperature), -math.log(config.min_temperature)
        # What is trained is the distance from the start: an engine may keep it in bfloat16, which near 0 is fine
        # enough, while near the start itself one step of its mantissa would change the scale by more than 1 %.
        # One dimension, because engines that shard parameters do not take a zero-dimensional one.
        self.log_growth = nn.Parameter(torch.zeros(1), requires_grad=config.learn_temperature)

    def forward(self) -> Tensor:
        """The logit scale, a zero-dimensional float32 tensor."""
        log_scale = cast(Tensor, _AtMost.apply(self.start + self.log_growth.float(), self.max_log_scale))
        return log_scale.exp().squeeze(0)


class _AtMost(torch.autograd.Function):
    """``clamp(max=most)`` that a parameter can leave again: above, a gradient that leads back down still passes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, most: float) -> Tensor:
        ctx.above = value > most
        return value.clamp(max=most)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A descent goes against the gradient: a positive one makes the value smaller.
        return torch.where(ctx.above & (grads[0] < 0), 0.0, grads[0]), None


class PACLLoss(nn.Module):
    """Symmetric InfoNCE over the similarity of every image with every text of the global batch.

    The image-to-text term of an image is the cross entropy of its row, the text-to-image term of a text that of its
    column; the loss is the mean of both means. The target of a row is spread evenly over the image's own texts, and
    the target of a column is the image that owns the text. Pairs that are true without being own (known from
    ``text_ids``) are no negatives: see :data:`OtherPositives`.

    Every rank returns the same value, the loss of the global batch. Gradients are scaled such that their **mean** over
    ranks (what DDP and DeepSpeed make) is the gradient that one process would have computed on the whole batch.
    """

    def __init__(self, config: LossConfig | None = None, group: ProcessGroup | None = None) -> None:
        """``group``: the process group of the ranks that share a global batch; default: the default group, if any."""
        super().__init__()
        self.config = config or LossConfig()
        self.group = group

    def forward(
        self,
        patches: Tensor,
        texts: Tensor,
        logit_scale: Tensor | float,
        *,
        text_ids: Tensor | None = None,
        image_text_ids: Tensor | None = None,
        text_owner: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the global batch; called on every rank of the group, with batches of any sizes above 0.

        Args:
            patches: (b, T, D) patch vectors of this rank's images.
            texts: (n, D) vectors of this rank's texts.
            logit_scale: 1/tau, fixed (float) or learned (tensor of one number).
            text_ids: (n,) int64, at least 0, equal for texts that say the same; on all ranks or on none.
            image_text_ids: (b, K) int64, ids of every text that is true of the image, padded with -1.
            text_owner: (n,) int64, which of this rank's images a text belongs to; default: text i to image i.
            patch_mask: (b, T) booleans, true for the patches that count.

        Returns:
            The loss, zero-dimensional.

        Raises:
            ValueError: shapes that do not fit, or a rank without a text (then on every rank).
        """
        gathered = self.gather(texts, text_ids)
        phi = self.similarity(patches, gathered, patch_mask)
        return self.from_similarity(phi, gathered, logit_scale, image_text_ids=image_text_ids, text_owner=text_owner)

    def gather(self, texts: Tensor, text_ids: Tensor | None = None) -> GlobalTexts:
        """All ranks' texts. The gradient comes back by one reduce-scatter, if ``texts`` require one, else by nothing.

        Args and errors: see :meth:`forward`.
        """
        if text_ids is not None and text_ids.shape != texts.shape[:1]:
            raise ValueError(f"text_ids must be of shape {tuple(texts.shape[:1])}, not {tuple(text_ids.shape)}")
        counts = counts_of(texts, self.group)
        if 0 in counts:
            raise ValueError(f"every rank needs at least one text; rank {counts.index(0)} of the group has none")
        start = sum(counts[: rank_in(self.group)])
        vectors = cast(Tensor, Gather.apply(texts, counts, self.group))
        ids = None if text_ids is None else gather(text_ids, counts, self.group)
        return GlobalTexts(vectors, ids, slice(start, start + len(texts)))

    def similarity(self, patches: Tensor, texts: GlobalTexts, patch_mask: Tensor | None = None) -> Tensor:
        """phi (b, N) of images of this rank with the texts of all ranks, by this loss's configuration."""
        return patch_text_similarity(
            patches,
            texts.vectors_ND,
            attention_scale=self.config.attention_scale,
            pooling=self.config.pooling,
            backend=self.config.backend,
            patch_mask=patch_mask,
        )

    def from_similarity(
        self,
        phi: Tensor,
        texts: GlobalTexts,
        logit_scale: Tensor | float,
        *,
        image_text_ids: Tensor | None = None,
        text_owner: Tensor | None = None,
    ) -> Tensor:
        """The loss from phi alone, for exact accumulation over micro-batches.

        Gather the texts of all micro-batches at once, compute ``similarity`` of each micro-batch without a graph,
        concatenate the rows, take this loss's gradient with respect to them, and then run each micro-batch again
        with its rows of that gradient: the result is that of one large batch.

        Args:
            phi: (b, N) similarities of all of this rank's images with all ranks' texts.
            texts: what :meth:`gather` returned.
            logit_scale, image_text_ids, text_owner: see :meth:`forward`.
        """
        pairs = Pairs.build(phi, texts, image_text_ids, text_owner, self.config.other_positives)
        scale = torch.as_tensor(logit_scale, dtype=phi.dtype, device=phi.device).reshape(())
        return cast(Tensor, _CrossEntropy.apply(phi, scale, pairs, self.config.label_smoothing, self.group))


class _CrossEntropy(torch.autograd.Function):
    """The loss and, at the same time, its gradient, a block of rows at a time.

    A row and a column alike have targets Q and included pairs A. Their term is
    log(sum over A of exp l) - (1 - smoothing) * mean of l over Q - smoothing * mean of l over A, for logits l.
    """

    @staticmethod
    def forward(
        ctx: Any, phi_bN: Tensor, scale: Tensor, pairs: Pairs, smoothing: float, group: ProcessGroup | None
    ) -> Tensor:
        rows = _Sums.of_rows(phi_bN, scale, pairs)
        columns = _Sums.of_columns(phi_bN, scale, pairs, group)
        # An image without a text of its own has no target: it serves as a negative only.
        has_text = rows.targets > 0
        row_terms = torch.where(has_text, rows.terms(smoothing), 0.0)
        totals = torch.stack([row_terms.sum(), has_text.to(phi_bN.dtype).sum()])
        all_reduce(totals, ReduceOp.SUM, group)
        images = totals[1]
        row_weights = 0.5 / images * has_text
        column_weights = torch.full_like(columns.targets, 0.5 / phi_bN.shape[1])
        loss = 0.5 * totals[0] / images + (columns.terms(smoothing) * column_weights).sum()
        if any(ctx.needs_input_grad[:2]):
            grads = _gradient(phi_bN, scale, pairs, smoothing, (rows, row_weights), (columns, column_weights))
            # Not by save_for_backward: backward scales them in place, for the table is large and nobody else's.
            ctx.grads, ctx.world_size = grads, world_size(group)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the loss's gradient can be taken once only; compute the loss again")
        (grad_phi, grad_scale), ctx.grads = ctx.grads, None
        # The engine divides by the number of ranks; every rank's rows belong to the one global loss.
        up = grads[0] * ctx.world_size
        return grad_phi.mul_(up), grad_scale * up, None, None, None


@dataclass(frozen=True)
class _Sums:
    """What the cross entropies of a set of rows, or of columns, need of their logits."""

    log_sum: Tensor
    """Log-sum-exp over included pairs."""
    targets: Tensor
    """How many pairs are targets."""
    target_sum: Tensor
    """Sum of the logits of targets."""
    included: Tensor
    """How many pairs are included."""
    included_sum: Tensor
    """Sum of the logits of included pairs."""

    def terms(self, smoothing: float) -> Tensor:
        hard = self.log_sum - (1 - smoothing) * self.target_sum / self.targets
        return hard - smoothing * self.included_sum / self.included

    @staticmethod
    def of_rows(phi_bN: Tensor, scale: Tensor, pairs: Pairs) -> "_Sums":
        parts = []
        for rows in _row_blocks(phi_bN):
            logits, target, left_out = _logits(phi_bN, scale, pairs, rows)
            log_sum = torch.logsumexp(_without(logits, left_out, float("-inf")), 1)
            parts.append(torch.stack([log_sum, *_linear_sums(logits, target, left_out, 1)]))
        return _Sums(*torch.cat(parts, dim=1))

    @staticmethod
    def of_columns(phi_bN: Tensor, scale: Tensor, pairs: Pairs, group: ProcessGroup | None) -> "_Sums":
        highest = phi_bN.new_full((phi_bN.shape[1],), float("-inf"))
        for rows in _row_blocks(phi_bN):
            logits, _, left_out = _logits(phi_bN, scale, pairs, rows)
            highest = torch.maximum(highest, _without(logits, left_out, float("-inf")).amax(0))
        all_reduce(highest, ReduceOp.MAX, group)
        sums = phi_bN.new_zeros(5, phi_bN.shape[1])
        for rows in _row_blocks(phi_bN):
            logits, target, left_out = _logits(phi_bN, scale, pairs, rows)
            exponentials = (_without(logits, left_out, float("-inf")) - highest).exp_().sum(0)
            sums += torch.stack([exponentials, *_linear_sums(logits, target, left_out, 0)])
        all_reduce(sums, ReduceOp.SUM, group)
        return _Sums(highest + sums[0].log(), *sums[1:])


def _gradient(
    phi_bN: Tensor,
    scale: Tensor,
    pairs: Pairs,
    smoothing: float,
    rows_and_weights: tuple[_Sums, Tensor],
    columns_and_weights: tuple[_Sums, Tensor],
) -> tuple[Tensor, Tensor]:
    """Of the global loss, with respect to this rank's phi and, as far as its rows go, to the logit scale."""
    grad_bN, grad_scale = torch.empty_like(phi_bN), torch.zeros_like(scale)
    (row_sums, row_weights), (sums, weights) = rows_and_weights, columns_and_weights
    for rows in _row_blocks(phi_bN):
        logits, target, left_out = _logits(phi_bN, scale, pairs, rows)
        grad = grad_bN[rows].zero_()
        for log_sum, targets, included, weight in (
            (*(x[rows].unsqueeze(1) for x in (row_sums.log_sum, row_sums.targets, row_sums.included, row_weights)),),
            (sums.log_sum, sums.targets, sums.included, weights),
        ):
            # A row without a target has weight 0, and must not turn 0/0 into nan.
            grad += weight * (logits - log_sum).exp_()
            grad -= target * (weight * (1 - smoothing) / targets.clamp(min=1))
            if smoothing:
                grad -= weight * smoothing / included.clamp(min=1)
        if left_out is not None:
            grad.masked_fill_(left_out, 0.0)
        grad_scale += (grad * phi_bN[rows]).sum()
        grad *= scale
    return grad_bN, grad_scale


def _row_blocks(phi_bN: Tensor) -> Iterator[slice]:
    numbers = ROW_BLOCK_NUMBERS["cpu" if phi_bN.device.type == "cpu" else "cuda"]
    step = max(1, numbers // phi_bN.shape[1])
    for start in range(0, len(phi_bN), step):
        yield slice(start, min(start + step, len(phi_bN)))


def _logits(phi_bN: Tensor, scale: Tensor, pairs: Pairs, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    return phi_bN[rows] * scale, *pairs.masks(rows)


def _without(logits: Tensor, left_out: Tensor | None, value: float) -> Tensor:
    return logits if left_out is None else logits.masked_fill(left_out, value)


def _linear_sums(logits: Tensor, target: Tensor, left_out: Tensor | None, axis: int) -> tuple[Tensor, ...]:
    """Number and sum of targets, number and sum of included pairs, along ``axis``."""
    kept = torch.ones_like(target) if left_out is None else ~left_out
    zeroed = _without(logits, left_out, 0.0)
    targets = target.sum(axis).to(logits.dtype), (target * logits).sum(axis)
    return *targets, kept.sum(axis).to(logits.dtype), zeroed.sum(axis)
