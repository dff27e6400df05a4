"""The similarity's backends against the definition in float64: values, gradients, masks, extremes, refusals."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pacl_scale.kernels import tiled
from pacl_scale.similarity import attention_entropy, patch_text_similarity

POOLINGS = ("cosine", "mean", "max")


def make(
    B: int, T: int, N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (B, T, D), (N, D), (B, N)
    patches, texts, up = (torch.randn(shape, generator=random) for shape in shapes)
    return patches.to(dtype), texts.to(dtype), up


def run(
    patches: Tensor, texts: Tensor, up: Tensor, backend: str, scale: float = 10.0, **options: Any
) -> tuple[Tensor, ...]:
    """phi, and the gradients of patches, texts and attention scale."""
    patches, texts = patches.clone().requires_grad_(), texts.clone().requires_grad_()
    scale_tensor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    phi = patch_text_similarity(patches, texts, attention_scale=scale_tensor, backend=backend, **options)
    phi.backward(up.to(phi.dtype))
    scale_grad = torch.zeros(()) if scale_tensor.grad is None else scale_tensor.grad
    assert patches.grad is not None and texts.grad is not None
    return phi.detach(), patches.grad, texts.grad, scale_grad


def truth(patches: Tensor, texts: Tensor, up: Tensor, scale: float = 10.0, **options: Any) -> tuple[Tensor, ...]:
    return run(patches.double(), texts.double(), up.double(), "eager", scale, **options)


def assert_close(found: tuple[Tensor, ...], true: tuple[Tensor, ...], tolerance: float) -> None:
    """Largest error relative to the largest number; the scale's gradient, a sum that may cancel, beside phi's."""
    for name, a, b in zip(("phi", "patches", "texts"), found, true, strict=False):
        # Where the true gradient is zero (one patch of one dimension) there is nothing to be relative to.
        largest = b.abs().max().clamp(min=0.1)
        error = ((a.double() - b).abs().max() / largest).item()
        assert error <= tolerance, f"{name}: {error:.2e}"
    assert abs(found[3] - true[3]) <= 10 * tolerance * (true[1].abs().sum() + 1)


def by_hand(patches: Tensor, texts: Tensor, scale: float, pooling: str) -> Tensor:
    """The paper's definition once more, pair by pair, without any tensor operation that the eager backend uses."""
    phi = torch.empty(len(patches), len(texts), dtype=torch.float64)
    for i, image in enumerate(patches.double()):
        for j, text in enumerate(texts.double()):
            scores = [torch.dot(v, text) / v.norm() / text.norm() for v in image]
            weights = [torch.exp(scale * s) for s in scores]
            pooled = sum(a * v / v.norm() for a, v in zip(weights, image, strict=True)) / sum(weights)
            along = torch.dot(pooled, text) / text.norm()
            phi[i, j] = {"cosine": along / pooled.norm(), "mean": along, "max": max(scores)}[pooling]
    return phi


@pytest.mark.parametrize("pooling", POOLINGS)
def test_eager_is_the_definition(pooling: Any) -> None:
    patches, texts, _ = make(3, 5, 4, 6)
    found = patch_text_similarity(patches.double(), texts.double(), pooling=pooling, backend="eager")
    torch.testing.assert_close(found, by_hand(patches, texts, 10.0, pooling), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_eager_gradients_are_the_definitions(pooling: Any) -> None:
    patches, texts, _ = (x.double().requires_grad_() for x in make(2, 3, 3, 4))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=pooling != "max")

    def function(p: Tensor, t: Tensor, k: Tensor) -> Tensor:
        return patch_text_similarity(p, t, attention_scale=k, pooling=pooling, backend="eager")

    assert torch.autograd.gradcheck(function, (patches, texts, scale))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 6), T=st.integers(1, 70), N=st.integers(1, 90), D=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 10.0]), pooling=st.sampled_from(["cosine", "mean"]),
    masked=st.booleans(), fused=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiled_equals_eager_for_any_shape(
    B: int, T: int, N: int, D: int, scale: float, pooling: Any, masked: bool, fused: bool, seed: int
) -> None:
    patches, texts, up = make(B, T, N, D, seed=seed)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    if mask is not None:
        mask[:, 0] = True
    options = {"scale": scale, "pooling": pooling, "patch_mask": mask}
    with small_tiles(), mock.patch.object(tiled, "fused_passes_exist", lambda: fused):
        found = run(patches, texts, up, "tiled", **options)
    true = truth(patches, texts, up, **options)
    # Few dimensions: patches may all but cancel, and then phi turns on their last digits.
    assert_close(found, true, 1e-5 if D > 4 else 1e-3)


def small_tiles() -> Any:
    """Tiles so small that every problem takes several, the last of them not full."""
    return mock.patch.dict(tiled.TILE_NUMBERS, cpu=16 * 60)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_tiled_is_exact_at_the_papers_size(dtype: torch.dtype, tolerance: float, fused: bool) -> None:
    inputs = make(2, 196, 333, 512, dtype)
    with mock.patch.object(tiled, "fused_passes_exist", lambda: fused):
        assert_close(run(*inputs, "tiled"), truth(*inputs), tolerance)


@pytest.mark.parametrize("masked", [True, False])
def test_best_patch_pooling(masked: bool) -> None:
    inputs = make(5, 9, 33, 16)
    mask = (torch.arange(9) < torch.tensor([[9], [1], [4], [8], [2]])) if masked else None
    with small_tiles():
        found = run(*inputs, "tiled", pooling="max", patch_mask=mask)
    assert_close(found, truth(*inputs, pooling="max", patch_mask=mask), 1e-5)


def test_equal_best_patches_share_the_gradient() -> None:
    patches, texts, up = make(2, 1, 3, 8)
    twice = patches.expand(2, 4, 8)
    found = run(twice, texts, up, "tiled", pooling="max")
    torch.testing.assert_close(found[1], run(patches, texts, up, "tiled", pooling="max")[1].expand(2, 4, 8) / 4)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 100.0, -100.0, 1000.0])
def test_extreme_scales_stay_finite(scale: float, dtype: torch.dtype, backend: str) -> None:
    patches, texts, up = make(2, 17, 9, 12, dtype)
    texts[0] = patches[0, 0]
    texts[1] = -patches[0, 0]
    found = run(patches, texts, up, backend, scale)
    assert all(bool(x.isfinite().all()) for x in found)
    assert found[0].abs().max() <= 1.01


def test_scale_zero_pools_all_patches_alike() -> None:
    patches, texts, _ = make(4, 7, 5, 16)
    pooled = functional.normalize(functional.normalize(patches, dim=-1).mean(1), dim=-1)
    found = patch_text_similarity(patches, texts, attention_scale=0.0)
    torch.testing.assert_close(found, pooled @ functional.normalize(texts, dim=-1).t(), rtol=1e-5, atol=1e-6)


def test_one_patch_is_the_plain_cosine() -> None:
    patches, texts, _ = make(4, 1, 5, 16)
    expected = functional.cosine_similarity(patches, texts.unsqueeze(0), dim=-1)
    torch.testing.assert_close(patch_text_similarity(patches, texts), expected, rtol=1e-5, atol=1e-6)


def test_lengths_do_not_matter() -> None:
    patches, texts, _ = make(2, 6, 5, 16)
    longer = patches * torch.linspace(0.01, 50, 12).view(2, 6, 1)
    found = patch_text_similarity(longer, texts * 7)
    torch.testing.assert_close(found, patch_text_similarity(patches, texts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_patches_that_cancel_and_vectors_of_no_length_give_numbers(backend: str) -> None:
    patches, texts, up = make(3, 2, 4, 8)
    patches[0, 1] = -patches[0, 0]
    patches[1] = 0
    texts[0] = 0
    found = run(patches, texts, up, backend, 0.0)
    assert all(bool(x.isfinite().all()) for x in found)
    assert found[0][0].abs().max() < 0.01 and not found[0][1].any() and not found[0][:, 0].any()


def test_masked_patches_have_no_influence_whatever_they_hold() -> None:
    patches, texts, up = make(3, 6, 20, 8)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    poisoned = patches.clone()
    poisoned[:, 4:] = float("nan")
    for backend in ("eager", "tiled"):
        found = run(poisoned, texts, up, backend, patch_mask=mask)
        true = truth(patches[:, :4], texts, up)
        assert not found[1][:, 4:].any()
        assert_close((found[0], found[1][:, :4], *found[2:]), true, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_an_image_is_seen_in_its_row_and_nowhere_else(dtype: torch.dtype) -> None:
    patches, texts, _ = make(3, 6, 20, 8, dtype)
    patches[1, 2, 3] = float("nan")
    phi = patch_text_similarity(patches, texts, backend="tiled")
    assert phi[1].isnan().all() and phi[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_buffers_are_never_read_before_they_are_written(pooling: Any, dtype: torch.dtype) -> None:
    """Fresh memory holds nan here, as it may anywhere."""
    inputs = make(3, 20, 70, 8, dtype)
    with small_tiles():
        expected = run(*inputs, "tiled", pooling=pooling)
        with deterministic_fill():
            found = run(*inputs, "tiled", pooling=pooling)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class deterministic_fill:
    """torch fills uninitialised memory with nan in this mode."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(7, 33, 150, 24, dtype)
    with small_tiles():
        first, second = (run(*inputs, "tiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_do_not_depend_on_threads_beyond_rounding() -> None:
    inputs, before = make(7, 33, 150, 24), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(*inputs, "tiled"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one() -> None:
    patches, texts, up = make(2, 5, 6, 8)
    patches.requires_grad_()
    phi = patch_text_similarity(patches, texts, attention_scale=10.0)
    phi.backward(up)
    assert patches.grad is not None and texts.grad is None
    texts.requires_grad_()
    patch_text_similarity(patches.detach(), texts).backward(up)
    assert texts.grad is not None


def test_autocast_does_not_change_the_products() -> None:
    inputs = make(2, 16, 40, 32)
    expected = run(*inputs, "tiled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {backend: run(*inputs, backend) for backend in ("tiled", "eager")}
    assert all(torch.equal(a, b) for a, b in zip(found["tiled"], expected, strict=True))
    torch.testing.assert_close(found["eager"][0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": torch.zeros(2, 3)}, r"must be \(B, T, D\)"),
        ({"texts": torch.zeros(4, 7)}, r"must be \(B, T, D\)"),
        ({"patches": torch.zeros(0, 3, 8)}, "empty batch"),
        ({"texts": torch.zeros(4, 8, dtype=torch.int64)}, "float type"),
        ({"pooling": "median"}, "pooling must be one of cosine, mean, max"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"patch_mask": torch.ones(2, 4, dtype=torch.bool)}, "patch_mask must be"),
        ({"patch_mask": torch.zeros(2, 3, dtype=torch.bool)}, "without any patch"),
    ],
)
def test_mistakes_are_refused_with_a_sentence(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"patches": torch.randn(2, 3, 8), "texts": torch.randn(4, 8)} | change
    with pytest.raises(ValueError, match=message):
        patch_text_similarity(arguments.pop("patches"), arguments.pop("texts"), **arguments)


def test_triton_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        patch_text_similarity(torch.randn(1, 2, 8), torch.randn(3, 8), backend="triton")


def test_memory_of_a_call_does_not_grow_with_patches() -> None:
    """The largest tensors allocated: nothing of B x T x N numbers, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    patches, texts, up = make(4, 64, 2000, 8)
    patches.requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # The mode sees its own thread only.
    try:
        with small_tiles(), Largest() as largest:
            patch_text_similarity(patches, texts, backend="tiled").backward(up)
    finally:
        torch.set_num_threads(before)
    gram_of_all_images = 4 * 64 * 64
    assert largest.numbers == max(texts.numel(), up.numel(), patches.numel(), gram_of_all_images)


def test_the_entropy_of_attention_is_0_for_one_patch_and_1_for_patches_alike() -> None:
    texts = torch.eye(4)[:2]
    alike = texts.unsqueeze(1).expand(2, 5, 4)
    assert attention_entropy(alike, texts, 10.0) == pytest.approx(1.0)
    one = torch.cat([texts.unsqueeze(1), -texts.unsqueeze(1).expand(2, 4, 4)], dim=1)
    assert attention_entropy(one, texts, 100.0) == pytest.approx(0.0, abs=1e-6)
    assert attention_entropy(one, texts, 0.0) == pytest.approx(1.0)
    assert attention_entropy(one[:, :1], texts, 10.0) == 0.0
