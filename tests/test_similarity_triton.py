"""The CUDA kernels: run by Triton's interpreter on a CPU, and compiled ahead of time for GPUs that are not here."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from pacl_scale.similarity import patch_text_similarity

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# The interpreter is chosen when kernels are defined, so these cases run in a process of their own.
CHECK = """
import itertools, json, sys
import torch
from pacl_scale.kernels import triton as kernels
from pacl_scale.similarity import patch_text_similarity

def run(inputs, backend, dtype, **options):
    patches, texts = (x.to(dtype).clone().requires_grad_() for x in inputs[:2])
    scale = torch.tensor(inputs[3], dtype=torch.float64, requires_grad=True)
    phi = patch_text_similarity(patches, texts, attention_scale=scale, backend=backend, **options)
    phi.backward(inputs[2].to(phi.dtype))
    return phi.detach(), patches.grad, texts.grad, scale.grad

torch.use_deterministic_algorithms(True)  # Fills fresh memory with nan.
worst = {}
cases = itertools.product(
    [(3, 7, 140, 16), (2, 50, 40, 70), (2, 1, 5, 8)], ["cosine", "mean"], [0.0, 10.0], [True],
    [torch.float32, torch.float16, torch.bfloat16],
)
for (B, T, N, D), pooling, scale, masked, dtype in cases:
    random = torch.Generator().manual_seed(B * T)
    inputs = [torch.randn(shape, generator=random) for shape in ((B, T, D), (N, D), (B, N))]
    inputs = [inputs[0].to(dtype), inputs[1].to(dtype), inputs[2], scale]
    mask = torch.rand(B, T, generator=random) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    # Two images a launch at most, so that several launches are made.
    kernels.WORKSPACE_BYTES = 2 * T * N * (4 + 3 * dtype.itemsize)
    found = run(inputs, "triton", dtype, pooling=pooling, patch_mask=mask)
    again = run(inputs, "triton", dtype, pooling=pooling, patch_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, again)), "not the same twice"
    true = run(inputs, "eager", torch.float64, pooling=pooling, patch_mask=mask)
    for name, a, b in zip(("phi", "patches", "texts"), found, true):
        error = ((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)).item()
        key = f"{name} {dtype}"
        worst[key] = max(worst.get(key, 0.0), error) if error == error else float("inf")
    error = abs(found[3] - true[3]).item() / (true[1].abs().sum().item() + 1)
    worst[f"scale {dtype}"] = max(worst.get(f"scale {dtype}", 0.0), error) if error == error else float("inf")
extreme = run([torch.randn(1, 20, 16), torch.randn(9, 16), torch.randn(1, 9), 100.0], "triton", torch.float32)
assert all(x.isfinite().all() for x in extreme), "not finite at scale 100"
# A patch just shorter than the floor was divided by a constant: what lies along it counts.
short = torch.randn(2, 6, 8)
short[0, 0] *= 0.9e-6 / short[0, 0].norm()
inputs = [short, torch.randn(5, 8), torch.randn(2, 5), 3.0]
found, true = (run(inputs, b, d)[1][0, 0].double() for b, d in (("triton", torch.float32), ("eager", torch.float64)))
assert (found - true).abs().max() < 1e-4 * true.abs().max(), (found, true)
print(json.dumps(worst))
"""


def test_interpreted_kernels_equal_the_definition() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 12
    for name, error in errors.items():
        bound = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}[name.rpartition(".")[2]]
        assert error <= bound, (name, error)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels_spill_nothing(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from similarity import compile_kernel

    from pacl_scale.kernels import triton as kernels

    for sweep, T in product(kernels.SWEEPS, (196, 4096)):
        row = compile_kernel(kernels, sweep, capability, T, dtype="bf16")
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255 and row["shared_kib"] <= 160, row


@pytest.mark.parametrize(
    ("patches", "pooling", "reason"),
    [
        (torch.randn(1, 4, 8), "cosine", "need a CUDA device, and the patches are on cpu"),
        (torch.randn(1, 4, 8), "max", "need a CUDA device"),
    ],
)
def test_asking_for_what_cannot_run_says_why(patches: torch.Tensor, pooling: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        patch_text_similarity(patches, torch.randn(3, 8), backend="triton", pooling=pooling)  # type: ignore[arg-type]


def test_limits_of_the_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from pacl_scale.kernels.triton import reason_not_to

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert reason_not_to(torch.zeros(1, 4, 8), "cosine") is None
    assert "max pooling" in (reason_not_to(torch.zeros(1, 4, 8), "max") or "")
    assert "at most 4096 patches" in (reason_not_to(torch.zeros(1, 4097, 8), "cosine") or "")
    assert "not in torch.float64" in (reason_not_to(torch.zeros(1, 4, 8, dtype=torch.float64), "cosine") or "")
