"""What ``make demo`` runs: the commands of a cluster, one after the other, on an embedded store and two ranks.

Every stage is the command that a user would type, run as a process of its own and printed before it runs. What is
special to the demo is only what stands in for the outside world: the drawn pictures, the web server that serves
them, and the object store.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.layout import REPORT
from pacl_scale import config, log
from pacl_scale.errors import UserError
from pacl_scale.evaluate.rows import Row, read_rows
from pacl_scale.quickstart.scenes import Manifest, SceneConfig, draw_scenes
from pacl_scale.quickstart.store import ObjectStore
from pacl_scale.quickstart.urls import UrlFaults, write_url_list
from pacl_scale.quickstart.web import PictureServer
from pacl_scale.report import write_report

PROG = "python -m pacl_scale.quickstart"
ROOT = Path(__file__).resolve().parents[2]
"""The checkout: its configs/ and data_prep/ are what the demo runs."""

PAIRS = "s3://demo/pairs"
SUMMARY = "summary.json"
logger = log.get_logger("pacl_scale.quickstart")


@dataclass
class QuickstartConfig:
    """The whole pipeline on this machine: draw, download to S3, encode, train, evaluate, report."""

    run: str = "runs/demo"
    """Run directory. One of an earlier demo is replaced."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Training seeds. The first is the run itself; scores of further ones stand beside it in the summary."""

    scenes: SceneConfig = field(default_factory=SceneConfig)
    """The drawn pictures."""

    faults: UrlFaults = field(default_factory=UrlFaults)
    """Dead links, non-images and duplicates in the URL list."""

    train: list[str] = field(default_factory=list)
    """Further overrides for every training command, as in `[steps=100]`."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must name at least one seed, and each only once")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    settings: QuickstartConfig = config.parse(QuickstartConfig, argv, PROG)
    log.configure()
    Pipeline(settings).run()
    return 0


class Pipeline:
    """The stages, their times, and where they put things."""

    def __init__(self, settings: QuickstartConfig) -> None:
        self.settings = settings
        self.folder = Path(settings.run)
        self.scenes = self.folder / "scenes"
        self.features = self.folder / "features"
        self.seconds: dict[str, float] = {}
        self.environment = dict(os.environ)

    def run(self) -> None:
        """Run every stage, write the summary and the report, and print the table.

        Raises:
            UserError: no checkout around the package, a foreign run directory, or a stage that failed.
        """
        if not (ROOT / "configs").is_dir():
            raise UserError("the demo runs from a checkout: its configs/ folder is not beside the package")
        self._clear()
        started = time.monotonic()
        with self._stage("draw"):
            manifest = draw_scenes(self.settings.scenes, self.scenes)
        with ObjectStore(self.folder / "store", buckets=("demo",)) as store:
            self.environment |= store.environment
            with self._stage("download"):
                self._download(manifest)
                report = self._download_report(store)
            with self._stage("encode"):
                self._module(
                    "cache", "--config", "configs/cache/demo.yaml", f"data.root={PAIRS}", f"output={self.features}"
                )
        rows = {seed: self._train_and_evaluate(seed) for seed in self.settings.seeds}
        self.seconds["total"] = round(time.monotonic() - started, 1)
        (self.folder / SUMMARY).write_text(json.dumps(self._summary(rows, report), indent=2), encoding="utf-8")
        stages = {stage: seconds for stage, seconds in self.seconds.items() if stage != "total"}
        runs = {"pacl": str(self.folder), "mean_pooled": str(self.folder / "mean_pooled")}
        page = write_report(str(self.folder / "report.html"), str(self.folder), runs, report, stages)
        print(f"\nreport: {page}")

    def run_of(self, seed: int) -> Path:
        """Run directory of the training with ``seed``."""
        return self.folder if seed == self.settings.seeds[0] else self.folder / f"seed-{seed}"

    def _clear(self) -> None:
        marker = self.folder / "quickstart.yaml"
        if self.folder.exists():
            if any(self.folder.iterdir()) and not marker.exists():
                raise UserError(f"{self.folder} holds something else than a demo; choose another directory with run=")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        marker.write_text(config.to_yaml(self.settings), encoding="utf-8")

    def _download(self, manifest: Manifest) -> None:
        url_list = self.folder / "pairs.tsv"
        with PictureServer(manifest.train_directory) as server:
            lines = write_url_list(manifest, server.url, url_list, self.settings.faults)
            logger.info("URL list written", path=str(url_list), lines=lines, server=server.url)
            script = "data_prep/download.py"
            self._command([script, "--config", "configs/data/demo.yaml", f"url_list={url_list}", f"output={PAIRS}"])

    def _download_report(self, store: ObjectStore) -> dict[str, Any]:
        """The account that the download left in the bucket, kept with the run."""
        bucket, _, prefix = PAIRS.removeprefix("s3://").partition("/")
        content = store.client().get_object(Bucket=bucket, Key=f"{prefix}/{REPORT}")["Body"].read()
        (self.folder / "download.json").write_bytes(content)
        return json.loads(content)

    def _train_and_evaluate(self, seed: int) -> list[Row]:
        run, first = self.run_of(seed), seed == self.settings.seeds[0]
        control = run / "mean_pooled"
        common = [f"seed={seed}", f"data.root={self.features}", *self.settings.train]
        suffix = "" if first else f"_seed_{seed}"
        with self._stage("train" + suffix):
            self._module("train", "--config", "configs/train/demo.yaml", f"run={run}", *common)
        with self._stage("train_mean_pooled" + suffix):
            words = [f"run={control}", "loss.attention_scale=0", *common]
            self._module("train", "--config", "configs/train/demo.yaml", *words)
        with self._stage("evaluate" + suffix):
            words = [f"methods.mean_pooled={control}", f"segmentation.scenes.root={self.scenes / 'test'}"]
            words += [f"retrieval.scene_captions.csv={self.scenes / 'test' / 'captions.csv'}"]
            self._module("evaluate", "--config", "configs/eval/demo.yaml", "--checkpoint", str(run), *words)
        return read_rows(str(run))

    def _module(self, verb: str, *words: str) -> None:
        self._command(["-m", f"pacl_scale.{verb}", *words])

    def _command(self, words: Sequence[str]) -> None:
        print(f"\n$ python {shlex.join(words)}", flush=True)
        # Stages find configs/ and data_prep/ as a user in the checkout does; the run directory may lie elsewhere.
        words = [str(ROOT / word) if word.startswith(("configs/", "data_prep/")) else word for word in words]
        status = subprocess.run([sys.executable, *words], env=self.environment).returncode
        if status:
            raise UserError(f"the command above ended with status {status}; the demo stops here")

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        logger.info("stage done", stage=name, seconds=self.seconds[name])

    def _summary(self, rows: dict[int, list[Row]], report: dict[str, Any]) -> dict[str, Any]:
        by_seed = {str(seed): scores(found) for seed, found in rows.items()}
        return {
            **by_seed[str(self.settings.seeds[0])],
            "by_seed": by_seed,
            "shards": report["shards"],
            "samples": report["samples"],
            "failures": report["failures"],
            "seconds": self.seconds,
        }


def scores(rows: list[Row]) -> dict[str, float]:
    """``<method>_miou`` and ``<method>_pixel_accuracy`` of the segmentation rows, as the summary names them."""
    names = {"majority_class": "majority"}
    found = {}
    for row in rows:
        if row.task == "segmentation":
            name = names.get(row.method, row.method)
            found[f"{name}_miou"] = row.scores["miou"]
            found[f"{name}_pixel_accuracy"] = row.scores["pixel_accuracy"]
    return found
