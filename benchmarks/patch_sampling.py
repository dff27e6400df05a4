"""What a random subset of patches costs and loses: the demo's recipe with several numbers of patches a picture.

    python benchmarks/patch_sampling.py RUN [--quick] [--seeds 0 1 2] [--json FILE]

RUN is a finished run of `make demo` (runs/demo): its cached tokens and its drawn test pictures are used. Each number of
patches is trained by the same command with the same seeds, and evaluated by the same command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, write

from pacl_scale import metrics
from pacl_scale.data.features import FeatureFormat
from pacl_scale.data.index import SampleIndex
from pacl_scale.plan.work import Shapes, step_flops

ROOT = Path(__file__).resolve().parents[1]
FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def command(module: str, *words: str) -> None:
    """Run one of the project's commands; its failure is ours."""
    subprocess.run([sys.executable, "-m", f"pacl_scale.{module}", *words], check=True, cwd=ROOT)


def trained(demo: Path, patches: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate with ``patches`` patches a picture and step."""
    run = folder / f"patches-{patches}-{seed}"
    words = ["--config", "configs/train/demo.yaml", f"data.root={demo / 'features'}", f"run={run}", f"steps={steps}"]
    command("train", *words, f"seed={seed}", f"data.patch_sample={patches}", "checkpoint.every_steps=10000")
    output = folder / f"evals-{patches}-{seed}"
    words = ["--config", "configs/eval/demo.yaml", f"methods={{pacl: {run}}}", f"output={output}", "controls=[]"]
    words += [f"segmentation.scenes.root={demo / 'scenes' / 'test'}", "retrieval={}", "examples=0"]
    command("evaluate", *words)
    (row,) = [json.loads(file.read_text()) for file in output.rglob("*.json") if "scores" in file.read_text()]
    lines = metrics.read_metrics(run / "metrics.jsonl")
    return {
        "patches": patches,
        "seed": seed,
        "miou": row["scores"]["miou"],
        "pairs_per_s": median(line["pairs_per_s"] for line in lines[1:]),
        "resident_mb": lines[-1]["resident_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the demo")
    parser.add_argument("--quick", action="store_true", help="two numbers of patches, few steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each number of patches is trained with each")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    arguments = parser.parse_args()
    machine = describe()
    demo = arguments.run.resolve()
    tokens = FeatureFormat.of(SampleIndex.load(str(demo / "features")))
    assert tokens is not None
    fractions = FRACTIONS[:3:2] if arguments.quick else FRACTIONS
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for seed, fraction in product(arguments.seeds, fractions):
            patches = round(tokens.tokens * fraction)
            row = trained(demo, patches, 40 if arguments.quick else 350, seed, Path(name))
            flops = step_flops(Shapes(128, 2, 1, patches, tokens.width, 384, 384), None, None)
            rows.append(row | {"gflop_per_pair": sum(flops.values()) / 64 / 1e9})
    write({"benchmark": "patch_sampling", "quick": arguments.quick, "machine": machine, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
