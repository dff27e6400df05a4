"""What ``make demo`` runs: the commands of a cluster, one after the other, on an embedded store and two ranks.

Every stage is the command that a user would type, run as a process of its own and printed before it runs. What is
special to the demo is only what stands in for the outside world: the drawn pictures, the web server that serves
them, and the object store. A demo that was interrupted goes on at the stage it was in.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.layout import REPORT
from pacl_scale import config, log
from pacl_scale.errors import UserError
from pacl_scale.evaluate.rows import Row, read_rows
from pacl_scale.quickstart.scenes import SceneConfig, draw_scenes, read_manifest
from pacl_scale.quickstart.store import ObjectStore
from pacl_scale.quickstart.urls import UrlFaults, write_url_list
from pacl_scale.quickstart.web import PictureServer
from pacl_scale.report import write_report
from pacl_scale.storage import FULL, explained, write_bytes

PROG = "python -m pacl_scale.quickstart"
ROOT = Path(__file__).resolve().parents[2]
"""Where data_prep/ is: the checkout, or the folder that a wheel was installed to."""

PAIRS = "s3://demo/pairs"
SUMMARY = "summary.json"
SETTINGS = "quickstart.yaml"
STAGES = "stages.json"
DOWNLOAD = "download.json"
PATIENCE_S = 15.0
"""How long after Ctrl-C a stage may take to end its own processes."""
logger = log.get_logger("pacl_scale.quickstart")


@dataclass
class QuickstartConfig:
    """The whole pipeline on this machine: draw, download to S3, encode, train, evaluate, report."""

    run: str = "runs/demo"
    """Run directory. An unfinished demo of the same settings goes on there, any other is replaced."""

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
            UserError: a foreign run directory, one that cannot be written, or a stage that failed.
        """
        with explained(str(self.folder)):
            self._open()
        self._stage("draw", lambda: draw_scenes(self.settings.scenes, self.scenes))
        with ExitStack() as resources:
            if "download" not in self.seconds:
                # The web server of an unfinished one had another port: its list is another list.
                shutil.rmtree(self.folder / "store", ignore_errors=True)
            if not {"download", "encode"} <= self.seconds.keys():
                store = resources.enter_context(ObjectStore(self.folder / "store", buckets=("demo",)))
                self.environment |= store.environment
                self._stage("download", lambda: self._download(store))
                words = ["--config", "configs/cache/demo.yaml", f"data.root={PAIRS}", f"output={self.features}"]
                self._stage("encode", lambda: self._module("cache", *words))
        rows = {seed: self._train_and_evaluate(seed) for seed in self.settings.seeds}
        report = json.loads((self.folder / DOWNLOAD).read_text(encoding="utf-8"))
        runs = {"pacl": str(self.folder), "mean_pooled": str(self.folder / "mean_pooled")}
        page = write_report(str(self.folder / "report.html"), str(self.folder), runs, report, self.seconds)
        # Last of all: a demo with a summary is a finished one.
        write_bytes(str(self.folder / SUMMARY), json.dumps(self._summary(rows, report), indent=2).encode())
        print(f"\nreport: {page}")

    def run_of(self, seed: int) -> Path:
        """Run directory of the training with ``seed``."""
        return self.folder if seed == self.settings.seeds[0] else self.folder / f"seed-{seed}"

    def _open(self) -> None:
        """Go on with the unfinished demo that is in the run directory, or begin there anew."""
        marker, stages, wanted = self.folder / SETTINGS, self.folder / STAGES, config.to_yaml(self.settings)
        if self.folder.exists():
            if any(self.folder.iterdir()) and not marker.exists():
                raise UserError(f"{self.folder} holds something else than a demo; choose another directory with run=")
            is_unfinished = stages.exists() and not (self.folder / SUMMARY).exists()
            if is_unfinished and marker.read_text(encoding="utf-8") == wanted:
                self.seconds = json.loads(stages.read_text(encoding="utf-8"))
                print(f"going on with the unfinished demo in {self.folder} (delete it to begin anew)", flush=True)
                return
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        marker.write_text(wanted, encoding="utf-8")

    def _download(self, store: ObjectStore) -> None:
        manifest = read_manifest(self.scenes)
        url_list = self.folder / "pairs.tsv"
        with PictureServer(manifest.train_directory) as server:
            lines = write_url_list(manifest, server.url, url_list, self.settings.faults)
            logger.info("URL list written", path=str(url_list), lines=lines, server=server.url)
            script = "data_prep/download.py"
            self._command([script, "--config", "configs/data/demo.yaml", f"url_list={url_list}", f"output={PAIRS}"])
        # The account that the download left in the bucket is kept with the run.
        bucket, _, prefix = PAIRS.removeprefix("s3://").partition("/")
        content = store.client().get_object(Bucket=bucket, Key=f"{prefix}/{REPORT}")["Body"].read()
        (self.folder / DOWNLOAD).write_bytes(content)

    def _train_and_evaluate(self, seed: int) -> list[Row]:
        run, first = self.run_of(seed), seed == self.settings.seeds[0]
        control = run / "mean_pooled"
        common = [f"seed={seed}", f"data.root={self.features}", *self.settings.train]
        suffix = "" if first else f"_seed_{seed}"
        train = ["train", "--config", "configs/train/demo.yaml"]
        self._stage("train" + suffix, lambda: self._module(*train, f"run={run}", *common))
        words = [f"run={control}", "loss.attention_scale=0", *common]
        self._stage("train_mean_pooled" + suffix, lambda: self._module(*train, *words))
        judged = [f"methods.mean_pooled={control}", f"segmentation.scenes.root={self.scenes / 'test'}"]
        judged += [f"retrieval.scene_captions.csv={self.scenes / 'test' / 'captions.csv'}"]
        evaluate = ["evaluate", "--config", "configs/eval/demo.yaml", "--checkpoint", str(run)]
        self._stage("evaluate" + suffix, lambda: self._module(*evaluate, *judged))
        return read_rows(str(run))

    def _module(self, verb: str, *words: str) -> None:
        self._command(["-m", f"pacl_scale.{verb}", *words])

    def _command(self, words: Sequence[str]) -> None:
        print(f"\n$ python {shlex.join(words)}", flush=True)
        # Stages find data_prep/ as a user in the checkout does; the run directory may lie elsewhere.
        words = [str(ROOT / word) if word.startswith("data_prep/") else word for word in words]
        process = subprocess.Popen([sys.executable, *words], env=self.environment)
        try:
            status = process.wait()
        except BaseException:
            # Ctrl-C reached the stage as well, and it ends its own processes first.
            end(process)
            raise
        if status:
            raise UserError(
                f"the command above ended with status {status}, for the reason it gives; the same command goes on here"
            )

    def _stage(self, name: str, work: Callable[[], object]) -> None:
        """Do ``work`` unless an interrupted call has done it."""
        if name in self.seconds:
            logger.info("stage was done before", stage=name, seconds=self.seconds[name])
            return
        started = time.monotonic()
        try:
            work()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(f"{self.folder} cannot be written ({error.strerror}); make room and start again") from error
        self.seconds[name] = round(time.monotonic() - started, 1)
        write_bytes(str(self.folder / STAGES), json.dumps(self.seconds).encode())
        logger.info("stage done", stage=name, seconds=self.seconds[name])

    def _summary(self, rows: dict[int, list[Row]], report: dict[str, Any]) -> dict[str, Any]:
        by_seed = {str(seed): scores(found) for seed, found in rows.items()}
        return {
            **by_seed[str(self.settings.seeds[0])],
            "by_seed": by_seed,
            "shards": report["shards"],
            "samples": report["samples"],
            "failures": report["failures"],
            "seconds": self.seconds | {"total": round(sum(self.seconds.values()), 1)},
        }


def end(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a stage that was interrupted; end it if it does not end by itself."""
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


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
