"""The loss: against its definition written out, and over several ranks against one process."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, distributed
from torch.nn import functional

from pacl_scale import collectives
from pacl_scale import loss as loss_module
from pacl_scale.distributed import World
from pacl_scale.loss import LogitScale, LossConfig, PACLLoss

IMAGES, PATCHES, WIDTH = 12, 5, 8


def make(images: int = IMAGES, texts: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A global batch in float64, with texts that say the same and images of which several texts are true."""
    random = torch.Generator().manual_seed(seed)
    n = images if texts is None else texts
    kinds = max(2, n // 2)
    owner = torch.arange(images) if texts is None else torch.randint(0, images, (n,), generator=random)
    return {
        "patches": torch.randn(images, PATCHES, WIDTH, generator=random, dtype=torch.float64),
        "texts": torch.randn(n, WIDTH, generator=random, dtype=torch.float64),
        "text_ids": torch.randint(0, kinds, (n,), generator=random),
        "image_text_ids": torch.randint(-1, kinds, (images, 3), generator=random),
        "text_owner": owner,
    }


def by_hand(phi: Tensor, scale: Tensor, batch: dict[str, Tensor], config: LossConfig) -> Tensor:
    """The loss as its docstring defines it, row by row and column by column."""
    logits, (images, n) = phi * scale, phi.shape
    own = torch.zeros(images, n, dtype=torch.bool)
    own[batch["text_owner"], torch.arange(n)] = True
    true = own.clone()
    for i in range(images):
        known = {int(k) for k in batch["image_text_ids"][i] if k >= 0} | set(batch["text_ids"][own[i]].tolist())
        true[i] |= torch.tensor([int(k) in known for k in batch["text_ids"]])
    target = true if config.other_positives == "target" else own
    kept = torch.ones_like(true) if config.other_positives == "target" else own | ~true
    rows = [_term(logits[i], target[i], kept[i], config) for i in range(images) if target[i].any()]
    columns = [_term(logits[:, j], target[:, j], kept[:, j], config) for j in range(n)]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2


def _term(logits: Tensor, target: Tensor, kept: Tensor, config: LossConfig) -> Tensor:
    log_probabilities = logits - logits[kept].logsumexp(0)
    hard, even = log_probabilities[target].mean(), log_probabilities[kept].mean()
    return -(1 - config.label_smoothing) * hard - config.label_smoothing * even


def gradients(batch: dict[str, Tensor], config: LossConfig, function: Any = None) -> tuple[Tensor, ...]:
    """Loss and the gradients of patches, texts and logit scale; ``function`` computes it from phi, or else the loss."""
    patches, texts = (batch[name].clone().requires_grad_() for name in ("patches", "texts"))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss_of, ids = PACLLoss(config), {name: batch[name] for name in ("text_ids", "image_text_ids", "text_owner")}
    if function is None:
        value = loss_of(patches, texts, scale, **ids)
    else:
        value = function(loss_of.similarity(patches, loss_of.gather(texts)), scale)
    value.backward()
    assert patches.grad is not None and texts.grad is not None and scale.grad is not None
    return value.detach(), patches.grad, texts.grad, scale.grad


CONFIGS = [
    LossConfig(),
    LossConfig(other_positives="target"),
    LossConfig(label_smoothing=0.1),
    LossConfig(other_positives="target", label_smoothing=0.2, pooling="mean"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("texts", [None, 17])
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_value_and_gradients_are_the_definitions(config: LossConfig, texts: int | None, block: int) -> None:
    batch = make(texts=texts)
    with mock.patch.dict(loss_module.ROW_BLOCK_NUMBERS, cpu=block):
        found = gradients(batch, config)
    expected = gradients(batch, config, lambda phi, scale: by_hand(phi, scale, batch, config))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_without_ids_it_is_clips_loss() -> None:
    batch = make()
    scale, patches, texts = torch.tensor(7.0, dtype=torch.float64), batch["patches"], batch["texts"]
    loss_of = PACLLoss()
    logits = loss_of.similarity(patches, loss_of.gather(texts)) * scale
    labels = torch.arange(IMAGES)
    expected = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.t(), labels)) / 2
    torch.testing.assert_close(loss_of(patches, texts, scale), expected)


def test_a_caption_that_occurs_twice_is_no_negative() -> None:
    batch = make()
    batch["texts"][1] = batch["texts"][0]
    apart = PACLLoss()(batch["patches"], batch["texts"], 20.0, text_ids=torch.arange(IMAGES))
    same = torch.arange(IMAGES)
    same[1] = 0
    assert PACLLoss()(batch["patches"], batch["texts"], 20.0, text_ids=same) < apart


@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
def test_extreme_logit_scales_stay_finite(scale: float) -> None:
    patches, texts = make()["patches"].float().requires_grad_(), make()["texts"].float()
    value = PACLLoss()(patches, texts, scale)
    value.backward()
    assert value.isfinite() and patches.grad is not None and patches.grad.isfinite().all()


def test_twice_the_same_bits() -> None:
    first, second = (gradients(make(), LossConfig(label_smoothing=0.1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_is_given_out_once() -> None:
    batch = make()
    value = PACLLoss()(batch["patches"].requires_grad_(), batch["texts"], 5.0)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        value.backward()


@settings(max_examples=15, deadline=None)
@given(accumulation=st.sampled_from([1, 2, 3, 4, 6]), seed=st.integers(0, 50))
def test_accumulation_is_one_large_batch(accumulation: int, seed: int) -> None:
    batch, config = make(seed=seed), LossConfig(label_smoothing=0.05)
    found = accumulated(PACLLoss(config), batch, accumulation)
    for a, b in zip(found, gradients(batch, config), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def accumulated(loss_of: PACLLoss, batch: dict[str, Tensor], accumulation: int) -> tuple[Tensor, ...]:
    """Value and gradients by micro-batches, as the docstring of ``from_similarity`` says."""
    patches, texts = (batch[name].clone().requires_grad_() for name in ("patches", "texts"))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    gathered = loss_of.gather(texts, batch["text_ids"])
    micro = patches.tensor_split(accumulation)
    with torch.no_grad():
        phi = torch.cat([loss_of.similarity(some, gathered) for some in micro])
    phi.requires_grad_()
    ids = {name: batch[name] for name in ("image_text_ids", "text_owner")}
    value = loss_of.from_similarity(phi, gathered, scale, **ids)
    value.backward()
    assert phi.grad is not None
    for some, up in zip(micro, phi.grad.tensor_split(accumulation), strict=True):
        loss_of.similarity(some, gathered).backward(up, retain_graph=True)
    assert patches.grad is not None and texts.grad is not None and scale.grad is not None
    return value.detach(), patches.grad, texts.grad, scale.grad


def part(batch: dict[str, Tensor], cuts: list[int], rank: int) -> dict[str, Tensor]:
    """A rank's images and its texts, which are those of its images."""
    own = slice(cuts[rank], cuts[rank + 1])
    mine = {name: values[own].clone() for name, values in batch.items()}
    return mine | {"text_owner": torch.arange(cuts[rank + 1] - cuts[rank])}


CUTS = {2: ([0, 6, 12], [0, 5, 12]), 4: ([0, 3, 6, 9, 12], [0, 2, 5, 7, 12])}
"""Where the global batch is cut for so many ranks: evenly, and not."""


def on_a_rank(world: World) -> dict[str, Any]:
    """All that is to be seen on one rank, in one start of the ranks, for starting them is what takes time."""
    return {
        "results": [all_ways(world, cuts) for cuts in CUTS[world.size]],
        "bytes": [bytes_of_a_step(world, trainable) for trainable in (False, True)],
        "sentence": sentence_of_an_empty_rank(world),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of 2, and each of 4 ranks saw."""
    return run_ranks(request.param, on_a_rank)


def all_ways(world: World, cuts: list[int]) -> list[tuple[Tensor, ...]]:
    """Value and gradients for each configuration, by forward and by micro-batches."""
    results = []
    for config in CONFIGS:
        mine = part(make(), cuts, world.rank)
        results += [gradients(mine, config), accumulated(PACLLoss(config), mine, 2)]
    return results


def bytes_of_a_step(world: World, trainable_texts: bool) -> dict[str, int]:
    """Bytes of what came out of gathers, went into scatters and was reduced."""
    bytes_of: dict[str, int] = {}

    def counting(name: str, whole_argument: int) -> Any:
        real = getattr(distributed, name)

        def call(*args: Any, **options: Any) -> Any:
            whole = args[whole_argument]
            bytes_of[name] = bytes_of.get(name, 0) + whole.numel() * whole.element_size()
            return real(*args, **options)

        return call

    gather, scatter = collectives.ALL_GATHER, collectives.REDUCE_SCATTER
    wrapped = {gather: counting(gather, 0), scatter: counting(scatter, 1), "all_reduce": counting("all_reduce", 0)}
    mine = part(make(), CUTS[world.size][0], world.rank)
    texts = mine["texts"].float().requires_grad_(trainable_texts)
    patches = mine["patches"].float().requires_grad_()
    with mock.patch.multiple(distributed, **wrapped):
        PACLLoss()(patches, texts, 7.0, text_ids=mine["text_ids"]).backward()
    return {"gather": bytes_of[gather], "reduce": bytes_of["all_reduce"], "scatter": bytes_of.get(scatter, 0)}


def sentence_of_an_empty_rank(world: World) -> str:
    mine = part(make(), [0, IMAGES, *[IMAGES] * (world.size - 1)], world.rank)
    with pytest.raises(ValueError) as caught:
        PACLLoss()(mine["patches"], mine["texts"], 1.0)
    return str(caught.value)


@pytest.mark.distributed
def test_ranks_agree_with_one_process(ranks: list[dict[str, Any]]) -> None:
    """Even and uneven batches; gradients averaged over ranks, as the engine does."""
    size = len(ranks)
    truths = [gradients(make(), config) for config in CONFIGS for _ in ("forward", "micro-batches")]
    for split, cuts in enumerate(CUTS[size]):
        for number, (value, patches, texts, scale) in enumerate(truths):
            found = [rank["results"][split][number] for rank in ranks]
            for rank, (own_value, own_patches, own_texts, _) in enumerate(found):
                own = slice(cuts[rank], cuts[rank + 1])
                torch.testing.assert_close(own_value, value, rtol=1e-10, atol=0)
                torch.testing.assert_close(own_patches / size, patches[own], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(own_texts / size, texts[own], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(sum(results[3] for results in found) / size, scale)


@pytest.mark.distributed
def test_only_texts_and_a_few_numbers_a_text_are_sent(ranks: list[dict[str, Any]]) -> None:
    vectors = IMAGES * WIDTH * 4
    for rank in ranks:
        for trainable_texts, found in zip((False, True), rank["bytes"], strict=True):
            # Texts, their ids, and how many each rank has; then maxima, sums and two totals.
            assert found["gather"] == vectors + IMAGES * 8 + len(ranks) * 8
            assert found["reduce"] == 4 * (IMAGES + 5 * IMAGES + 2)
            assert found["scatter"] == (vectors if trainable_texts else 0)


@pytest.mark.distributed
def test_a_rank_without_texts_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    expected = "every rank needs at least one text; rank 1 of the group has none"
    assert [rank["sentence"] for rank in ranks] == [expected] * len(ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": torch.zeros(5, WIDTH)}, "5 texts for 12 images need text_owner"),
        ({"text_owner": torch.full((IMAGES,), IMAGES)}, "text_owner must give one of 12 images"),
        ({"text_owner": torch.zeros(3, dtype=torch.int64)}, "text_owner must give one of 12 images"),
        ({"text_ids": torch.zeros(3, dtype=torch.int64)}, r"text_ids must be of shape \(12,\)"),
        ({"image_text_ids": torch.zeros(IMAGES, 2, dtype=torch.int64)}, "need text_ids beside them"),
    ],
)
def test_mistakes_are_refused_with_a_sentence(change: dict[str, Tensor], message: str) -> None:
    arguments = {"patches": make()["patches"].float(), "texts": make()["texts"].float()} | change
    with pytest.raises(ValueError, match=message):
        PACLLoss()(arguments.pop("patches"), arguments.pop("texts"), 1.0, **arguments)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": 0.005}, {"min_temperature": -1.0}, {"label_smoothing": 1.0}]
)
def test_impossible_configurations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature|label_smoothing"):
        LossConfig(**wrong)  # type: ignore[arg-type]


def test_logit_scale_starts_at_the_temperature_and_has_a_limit() -> None:
    scale = LogitScale(LossConfig(temperature=0.05, min_temperature=0.02))
    assert scale().item() == pytest.approx(20.0) and scale().requires_grad and scale().shape == ()
    with torch.no_grad():
        scale.log_growth += 10
    assert scale().item() == pytest.approx(50.0)
    # From above the limit a step that asks for less leads back; one that asks for more does not lead further away.
    scale.log_growth.data.fill_(5.0)
    scale().backward()
    assert scale.log_growth.grad is not None and scale.log_growth.grad > 0
    scale.log_growth.grad = None
    (-scale()).backward()
    assert scale.log_growth.grad == 0
    fixed = LogitScale(LossConfig(learn_temperature=False))
    assert not fixed().requires_grad and fixed().item() == pytest.approx(1 / 0.07)
