"""Speed, memory and exactness of the all-pairs similarity, beside what one would write instead.

    python benchmarks/similarity.py [--quick] [--json FILE] [--plots FOLDER] [--kernels]

``--quick`` takes under a minute on two cores; without it come the sweeps over sizes. ``--kernels`` adds what the
compiler says of the CUDA kernels (no GPU needed). All candidates of a comparison run in one process, in turn.

Legend: B images, T patches an image, N texts, D width.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import CLOCKS, MEBIBYTE, alternate, describe, in_child, median, peak_of, ratio, write

from pacl_scale.kernels import tiled
from pacl_scale.similarity import patch_text_similarity

SIZE = {"B": 64, "T": 196, "N": 4096, "D": 512}
SCALE = 10.0
CHUNK_IMAGES = 8
"""Of the straightforward version in chunks, whose memory ours is compared with: a whole batch would take 8 times it."""
KERNEL_SIZES = tuple((T, dtype) for T in (49, 196, 256, 576, 1024, 4096) for dtype in ("bf16", "fp32"))
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def straightforward(patches: Tensor, texts: Tensor, chunk: int) -> Tensor:
    """The definition, left to automatic differentiation: scores, softmax, weighted sum of patches, cosine."""
    texts = functional.normalize(texts, dim=-1)
    parts = []
    for some in patches.split(chunk):
        units = functional.normalize(some, dim=-1)
        scores = torch.einsum("btd,nd->bnt", units, texts)
        pooled = torch.einsum("bnt,btd->bnd", torch.softmax(SCALE * scores, dim=-1), units)
        parts.append(functional.cosine_similarity(pooled, texts.unsqueeze(0), dim=-1))
    return torch.cat(parts)


def attention_call(patches: Tensor, texts: Tensor) -> Tensor:
    """The same through torch's fused attention: texts are queries, patches are keys and values."""
    units, texts = functional.normalize(patches, dim=-1), functional.normalize(texts, dim=-1)
    queries = texts.unsqueeze(0).expand(len(units), -1, -1)
    pooled = functional.scaled_dot_product_attention(queries, units, units, scale=SCALE)
    return functional.cosine_similarity(pooled, queries, dim=-1)


def own_caption(patches: Tensor, texts: Tensor) -> Tensor:
    """What public re-implementations do, another objective: an image is pooled by its own text alone."""
    units, texts = functional.normalize(patches, dim=-1), functional.normalize(texts, dim=-1)
    scores = torch.einsum("btd,bd->bt", units, texts[: len(units)])
    pooled = torch.einsum("bt,btd->bd", torch.softmax(SCALE * scores, dim=-1), units)
    return functional.normalize(pooled, dim=-1) @ texts.t()


def single_vector(patches: Tensor, texts: Tensor) -> Tensor:
    """CLIP: one vector an image, here the mean of its patches."""
    return functional.normalize(patches.mean(1), dim=-1) @ functional.normalize(texts, dim=-1).t()


def ours(patches: Tensor, texts: Tensor) -> Tensor:
    return patch_text_similarity(patches, texts, attention_scale=SCALE, backend="tiled")


def products(patches: Tensor, texts: Tensor) -> Callable[[], None]:
    """The matrix products of forward and backward alone, in buffers allocated beforehand."""
    (_, T, D), N = patches.shape, len(texts)
    new = partial(torch.empty, dtype=patches.dtype)
    scores, mixed, gram, outer, grad = new(N, T), new(N, T), new(T, T), new(T, T), new(T, D)
    scores.normal_()

    def run() -> None:
        for units in patches.detach():
            for _ in ("forward", "backward"):
                torch.mm(units, units.t(), out=gram)
                torch.mm(texts, units.t(), out=scores)
                torch.mm(scores, gram, out=mixed)
            torch.mm(scores.t(), texts, out=grad)
            torch.mm(mixed.t(), scores, out=outer)
            torch.mm(outer, units, out=grad)

    return run


def make(size: dict[str, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Patches that need a gradient, texts that do not (a frozen text tower), and the gradient of phi."""
    random = torch.Generator().manual_seed(seed)
    patches = torch.randn(size["B"], size["T"], size["D"], generator=random).to(dtype).requires_grad_()
    texts = torch.randn(size["N"], size["D"], generator=random).to(dtype)
    return patches, texts, torch.randn(size["B"], size["N"], generator=random)


def both_ways(function: Callable[[Tensor, Tensor], Tensor], patches: Tensor, texts: Tensor, up: Tensor) -> Tensor:
    patches.grad = None
    phi = function(patches, texts)
    phi.backward(up.to(phi.dtype))
    return phi.detach()


def without_numba(work: Callable[[], Any]) -> None:
    """Do ``work``, forward and backward alike, as where numba is not installed."""
    with mock.patch.object(tiled, "fused_passes_exist", lambda: False):
        work()


def speed(dtype_name: str, rounds: int, deadline_s: float, more: bool, clock: str) -> dict[str, Any]:
    """Seconds and ratios, forward and backward, at the standard size."""
    patches, texts, up = make(SIZE, TYPES[dtype_name])
    small = make({**SIZE, "B": 2, "N": 64}, TYPES[dtype_name])
    both_ways(ours, *small)  # compiles
    both_ways(partial(straightforward, chunk=2), *small)
    candidates: dict[str, Callable[[], Any]] = {
        "bare products": products(patches, texts),
        "tiled": lambda: both_ways(ours, patches, texts, up),
        "autograd, whole batch": lambda: both_ways(partial(straightforward, chunk=SIZE["B"]), patches, texts, up),
        "autograd, chunks": lambda: both_ways(partial(straightforward, chunk=CHUNK_IMAGES), patches, texts, up),
    }
    if more:
        candidates |= {
            "tiled, without numba": lambda: without_numba(lambda: both_ways(ours, patches, texts, up)),
            "autograd, image by image": lambda: both_ways(partial(straightforward, chunk=1), patches, texts, up),
            "autograd, SDPA": lambda: both_ways(attention_call, patches, texts, up),
            "own caption (another objective)": lambda: both_ways(own_caption, patches, texts, up),
            "single vector (CLIP)": lambda: both_ways(single_vector, patches, texts, up),
        }
    seconds = alternate(candidates, rounds, deadline_s, clock, warm=not more)
    return {
        "seconds": median(seconds),
        "rounds": len(seconds["tiled"]),
        "speedup": ratio(seconds, "autograd, whole batch", "tiled"),
        "speedup_over_chunks": ratio(seconds, "autograd, chunks", "tiled"),
        "most_possible": ratio(seconds, "autograd, whole batch", "bare products"),
        "over_bare_products": ratio(seconds, "tiled", "bare products"),
        "speedup_over_others": {
            name: ratio(seconds, name, "tiled") for name in seconds if name not in ("tiled", "bare products")
        },
    }


def extra_memory(what: str, dtype_name: str, size: dict[str, int]) -> int:
    """Peak bytes of a call beyond inputs, phi and the gradient of the patches; only in a process of its own."""
    function = {"tiled": ours, "autograd": partial(straightforward, chunk=CHUNK_IMAGES)}[what]
    both_ways(function, *make({**size, "B": 2, "N": 64}, TYPES[dtype_name]))
    patches, texts, up = make(size, TYPES[dtype_name])
    peak = peak_of(lambda: both_ways(function, patches, texts, up))
    return max(0, peak - patches.numel() * patches.element_size() - 4 * up.numel())


def memory(dtype_name: str, size: dict[str, int]) -> dict[str, float]:
    """Extra megabytes of the straightforward version and of ours."""
    words = "--memory", dtype_name, json.dumps(size)
    found = {what: in_child(__file__, *words, what) for what in ("autograd", "tiled")}
    return {
        "autograd_mib": found["autograd"] / MEBIBYTE,
        "tiled_mib": found["tiled"] / MEBIBYTE,
        "ratio": found["autograd"] / max(1, found["tiled"]),
    }


def exactness(dtype_name: str) -> float:
    """Largest error of phi and of every gradient, relative to its largest number, against float64 eager."""
    worst = 0.0
    for seed, size in enumerate(({"B": 3, "T": 196, "N": 333, "D": 512}, {"B": 5, "T": 49, "N": 65, "D": 64})):
        patches, texts, up = make(size, TYPES[dtype_name], seed)
        results = []
        for backend, dtype in (("tiled", TYPES[dtype_name]), ("eager", torch.float64)):
            p, t = (x.detach().to(dtype).requires_grad_() for x in (patches, texts))
            phi = patch_text_similarity(p, t, attention_scale=SCALE, backend=backend)  # type: ignore[arg-type]
            phi.backward(up.to(phi.dtype))
            results.append((phi.detach(), p.grad, t.grad))
        worst = max([worst, *(relative_error(a, b) for a, b in zip(*results, strict=True))])
    return worst


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).abs().max() / true.double().abs().max()).item()


def compiled_kernels() -> list[dict[str, Any]]:
    """Registers, shared memory and spills of the CUDA kernels for sm_80 and sm_90, as ptxas reports them."""
    from pacl_scale.kernels import triton as kernels

    return [
        compile_kernel(kernels, sweep, capability, T, dtype)
        for capability in (80, 90)
        for T, dtype in KERNEL_SIZES
        for sweep in kernels.SWEEPS
    ]


def compile_kernel(kernels: Any, sweep: str, capability: int, T: int, dtype: str) -> dict[str, Any]:
    """One kernel for one GPU architecture, type and number of patches."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, f"_{sweep}")
    launch = kernels.Launch.of(T)
    sizes = {"BLOCK_T": launch.block_t, "BLOCK_N": launch.block_n, "ROWS": kernels.ROWS, "WIDTH": kernels.WIDTH}
    constants = sizes | {"COSINE": True, "MASKED": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    warps = launch.warps if "BLOCK_T" in constants else kernels.ROW_WARPS
    tables = ("attention", "mixed", "slopes", "weights", "patches", "units", "grads")
    signature = {
        name: "constexpr" if name in constants
        else "i32" if name in ("T", "P", "N", "D", "rows")
        else "fp32" if name in ("floor", "floor_square", "most_inverse")
        else "*u8" if name == "mask"
        else f"*{dtype}" if name in tables
        else "*fp32"
        for name in kernel.arg_names
    }  # fmt: skip
    # What the run time would find out of the arguments: aligned pointers, sizes divisible by 16.
    aligned = [n.startswith("*") or k in ("N", "D") or (k in ("T", "P") and T % 16 == 0) for k, n in signature.items()]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(result.asm["ptx"], encoding="utf-8")
        architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
        ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
        command = [str(ptxas), "-v", f"--gpu-name={architecture}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "kernel": sweep,
        "arch": f"sm_{capability}",
        "type": dtype,
        "T": T,
        "texts": launch.block_n,
        "warps": warps,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "shared_kib": result.metadata.shared / 1024,
        "spill_bytes": sum(map(int, spills)),
    }


def plot(results: dict[str, Any], folder: Path) -> None:
    """Bars of time and of memory, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row, (name, colour) in enumerate((("fp32", "#4477aa"), ("bf16", "#ee6677"))):
        seconds = results[name]["seconds"]
        places = [place + 0.4 * row for place in range(len(seconds))]
        axes[0].barh(places, list(seconds.values()), 0.38, label=name, color=colour)
    axes[0].set_yticks([place + 0.2 for place in range(len(seconds))], list(seconds))
    axes[0].set_xlabel("seconds, forward and backward")
    axes[0].legend(frameon=False)
    for name, colour in (("autograd", "#bbbbbb"), ("tiled", "#228833")):
        heights = [results["memory"][dtype][f"{name}_mib"] for dtype in TYPES]
        axes[1].bar([place + (0.4 if name == "tiled" else 0) for place in range(2)], heights, 0.38,
                    label=name, color=colour)  # fmt: skip
    axes[1].set_xticks([0.2, 1.2], list(TYPES))
    axes[1].set_yscale("log")
    axes[1].set_ylabel("extra peak memory, MiB")
    axes[1].legend(frameon=False)
    figure.suptitle("All-pairs similarity, B=64, T=196, N=4096, D=512")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "similarity.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, help="draw similarity.svg there")
    parser.add_argument("--kernels", action="store_true", help="compile the CUDA kernels and report their resources")
    parser.add_argument("--rounds", type=int, help="how often each candidate is timed (7; quick: 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is timed: see machine.py")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        dtype_name, size, what = arguments.memory
        print(extra_memory(what, dtype_name, json.loads(size)))
        return
    rounds, deadline = (arguments.rounds or 3, 6.0) if arguments.quick else (arguments.rounds or 7, 600.0)
    results: dict[str, Any] = {
        "benchmark": "similarity",
        "quick": arguments.quick,
        "clock": arguments.clock,
        "size": SIZE,
    } | {"machine": describe() | {"numba": importlib.util.find_spec("numba") is not None}}
    for name in TYPES:
        results[name] = speed(name, rounds, deadline, not arguments.quick, arguments.clock)
    results["memory"] = {name: memory(name, SIZE) for name in TYPES}
    errors = {name: exactness(name) for name in TYPES}
    results |= {
        "speedup_bf16": results["bf16"]["speedup"],
        "speedup_fp32": results["fp32"]["speedup"],
        "memory_ratio": min(found["ratio"] for found in results["memory"].values()),
        "over_bare_products": {name: results[name]["over_bare_products"] for name in TYPES},
        "max_rel_error_fp32": errors["fp32"],
        "max_rel_error_bf16": errors["bf16"],
    }
    if not arguments.quick:
        results["large"] = [
            {**size, "tiled_mib": in_child(__file__, "--memory", "bf16", json.dumps(size), "tiled") / MEBIBYTE}
            for size in ({"B": 512, "T": 16, "N": 32768, "D": 512}, {"B": 512, "T": 64, "N": 32768, "D": 512})
        ]
    if arguments.kernels:
        results["kernels"] = compiled_kernels()
    write(results, arguments.json)
    if arguments.plots:
        plot(results, arguments.plots)


if __name__ == "__main__":
    main()
