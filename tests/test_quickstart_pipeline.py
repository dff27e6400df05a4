"""`make demo` in small: every stage for real, on few pictures and few steps."""

import json
from pathlib import Path

import pytest

from pacl_scale.errors import UserError
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.metrics import read_metrics
from pacl_scale.quickstart import main
from pacl_scale.quickstart.urls import UrlFaults

PICTURES, STEPS = 40, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "demo with a blank"
    words = [f"run={folder}", f"scenes.train={PICTURES}", "scenes.test=4", "scenes.workers=1"]
    overrides = [f"steps={STEPS}", "global_batch_size=16", "optim.warmup_steps=1", "data.patch_sample=8"]
    assert main([*words, f"train={json.dumps(overrides)}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.distributed
@pytest.mark.weights
class TestSmallDemo:
    def test_the_summary_accounts_for_every_line_of_the_list(self, run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        faults = UrlFaults()
        assert summary["samples"] == PICTURES
        assert sum(summary["failures"].values()) == faults.missing + faults.gone + faults.pages
        assert summary["shards"] == 1
        stages = {"draw", "download", "encode", "train", "train_mean_pooled", "evaluate", "total"}
        assert stages <= summary["seconds"].keys()

    def test_the_summary_names_the_methods_of_the_table(self, run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        rows = {row.method: row for row in read_rows(str(run)) if row.task == "segmentation"}
        for method, name in (("pacl", "pacl"), ("mean_pooled", "mean_pooled"), ("untrained", "untrained")):
            assert summary[f"{name}_miou"] == rows[method].scores["miou"]
        assert summary["majority_miou"] == rows["majority_class"].scores["miou"]

    def test_both_trainings_ran_on_the_same_budget(self, run: Path) -> None:
        for folder, scale in ((run, "attention_scale: 10.0"), (run / "mean_pooled", "attention_scale: 0.0")):
            assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == STEPS
            assert scale in (folder / "config.yaml").read_text()

    def test_the_report_needs_nothing_else(self, run: Path) -> None:
        page = (run / "report.html").read_text()
        assert "<svg" in page
        assert "data:image/" in page
        assert 'src="http' not in page

    def test_no_secret_is_left_behind(self, run: Path) -> None:
        texts = [
            path.read_text(errors="replace") for path in run.rglob("*") if path.suffix in (".yaml", ".json", ".log")
        ]
        assert texts
        assert not any("AWS_SECRET" in text or "MINIO_ROOT_PASSWORD" in text for text in texts)


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        main([f"run={tmp_path}"])
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("seeds", ["[]", "[1, 1]"])
def test_impossible_seeds_are_refused(seeds: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seeds"):
        main([f"run={tmp_path / 'run'}", f"seeds={seeds}"])
