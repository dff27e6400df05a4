"""What README and the documentation tell people to type, run from one end to the other on small data."""

import csv
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import documented
import numpy as np
import pretended_slurm
import pytest
import sweeps
from data_sets import write_pairs
from documented import ROOT, Step, checkout, run, run_alone
from documented_places import BUCKET, LISTS, PHOTOGRAPHS, PICTURES, PLANS, SUBMITTED
from PIL import Image
from web_farm import WebFarm

from pacl_scale import storage
from pacl_scale.data.index import SampleIndex
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.plan import command as plan


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs of noise packed, encoded, trained on, evaluated and handed on, as the quickstart does it."""
    folder = checkout(tmp_path_factory.mktemp("photographs"))
    photos, annotated = folder / "photos", folder / "annotated"
    for place in (photos / "images", annotated / "images", annotated / "masks"):
        place.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for number in range(12):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "images" / f"{number}.jpg")
        rows += [(f"{number}.jpg", f"a dog and a sofa, {number}"), (f"{number}.jpg", f"a cat near a boat, {number}")]
    for name in ("train.csv", "val.csv"):
        with (photos / name).open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    for number in range(2):
        shutil.copy(photos / "images" / f"{number}.jpg", annotated / "images")
        mask = np.full((60, 80), 12 + number, np.uint8)
        mask[:20] = 255
        Image.fromarray(mask).save(annotated / "masks" / f"{number}.png")
    shutil.copy(photos / "images" / "0.jpg", folder / "photo.jpg")
    for step in PHOTOGRAPHS:
        run_alone(step, folder)
    return folder


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.distributed
class TestPhotographsOfYourOwn:
    def test_each_command_leaves_what_its_page_says(self, photographs: Path) -> None:
        assert len(SampleIndex.load(str(photographs / "data/photos/features"))) == 12
        assert {row.task for row in read_rows(str(photographs / "runs/photos"))} == {"retrieval", "segmentation"}
        assert (photographs / "runs/photos/report.html").is_file() and (photographs / "photo.segmented.png").is_file()
        for name in ("pacl-b16", "pacl-b16-average"):
            assert (photographs / name / "model.safetensors").is_file()

    @pytest.mark.parametrize("number", range(2))
    def test_the_snippets_run(self, photographs: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(photographs)
        snippets = [block for block in documented.blocks() if block.language == "python"]
        assert len(snippets) == 2, "parametrise this test by them all"
        names: dict[str, Any] = {"picture": Image.effect_noise((80, 60), 80)}
        exec(compile(snippets[number].text, snippets[number].page, "exec"), names)  # noqa: S102 (what the page says is what is run)
        assert names["labels"].shape == (60, 80)
        assert "scores" not in names or names["scores"].shape == (1, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_trainings_on_pictures(tmp_path: Path) -> None:
    write_pairs(checkout(tmp_path) / "pairs", [12])
    model = sweeps.MODEL | {"vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16}}
    (tmp_path / "small.json").write_text(json.dumps(model))
    voc = tmp_path / "data/voc/VOCdevkit/VOC2012"
    for place in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / place).mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    entries = []
    for name in "ab":
        for place in (voc / "JPEGImages", tmp_path / "images"):
            Image.new("RGB", (40, 30), "red").save(place / f"{name}.jpg")
        Image.fromarray(np.full((30, 40), 12, np.uint8)).save(voc / "SegmentationClass" / f"{name}.png")
        entries.append({"filename": f"{name}.jpg", "split": "test", "sentences": [{"raw": f"{name} dog"}]})
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": entries}))
    for step in PICTURES:
        run_alone(step, tmp_path)
    lines = (tmp_path / "shared/runs/validated/validation.jsonl").read_text().splitlines()
    assert len(lines) == 2


@pytest.mark.slow
@pytest.mark.s3
def test_a_list_onto_a_bucket(s3_url: str, tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (folder / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    Image.effect_noise((64, 64), 80).save(folder / "VOCdevkit/VOC2012/JPEGImages/a.jpg")
    write_pairs(tmp_path / "tars", [2, 3])
    for name in ("00000.tar", "00001.tar"):
        storage.write_bytes(f"{s3_url}/cc3m-wds/{name}", (tmp_path / "tars" / name).read_bytes())
    with WebFarm() as farm:
        kinds = ["ok"] * 5 + ["heals", "missing"]
        rows = [f"a dog near a chair, number {n}\t{farm.url(f'{kind}/{n}.jpg')}\n" for n, kind in enumerate(kinds)]
        (folder / "Train_GCC-training.tsv").write_text("".join(rows))
        for step in LISTS:
            run_alone(Step(step.command, step.more, (*step.instead, (BUCKET, s3_url))), folder)
    assert json.loads(storage.read_bytes(f"{s3_url}/cc3m/report.json"))["got"] == 6
    assert b"<html" in storage.read_bytes(f"{s3_url}/cc3m/report.html")
    assert len(SampleIndex.load(f"{s3_url}/cleaned")) == 6
    assert len(SampleIndex.load(f"{s3_url}/cc3m-wds")) == 5


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, two runs, and a pretended Slurm with eight of the nodes that the examples suppose."""
    pretended_slurm.install(tmp_path, monkeypatch)
    nodes = [f"gpu|up|n{n}|idle|96|900000|gpu:8|ib|2-00:00:00" for n in range(1, 9)]
    (tmp_path / "nodes").write_text("\n".join(nodes) + "\n")
    for name in ("configs", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(tmp_path / "configs/clusters/example.yaml", tmp_path / "configs/clusters/mine.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [command for command in SUBMITTED if "submit" in command])
def test_what_is_submitted_is_accepted(command: str, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = Step(command, ("--dry-run",), (("/shared/", f"{slurm}/shared/"),))
    assert run(step.words) == 0
    said = capsys.readouterr().out
    assert f"#SBATCH --nodes={command.split('--nodes ')[1].split()[0]}\n" in said


@pytest.mark.parametrize("command", [command for command in SUBMITTED if "sweep" in command])
def test_what_is_swept_is_accepted(command: str, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("runs", "shared/runs"):
        (slurm / folder).mkdir(parents=True)
        sweeps.write_runs(slurm / folder, ["paper_b16", "paper_l14", "b16"])
    shared = (("/shared/", f"{slurm}/shared/"),) if "/shared/" in command else ()
    assert run(Step(command, ("--dry-run",), shared).words) == 0
    assert re.search(rf"\b{8 if 'example.yaml' in command else 16}\b.* cells", capsys.readouterr().out)


def test_plans_say_what_their_page_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    # Towers of a hundred million random numbers, of which only the sizes count: built once.
    monkeypatch.setattr(plan, "build_vision", functools.cache(plan.build_vision))
    monkeypatch.setattr(plan, "build_text", functools.cache(plan.build_text))
    for command in PLANS:
        assert run(Step(command).words) == 0
    assert (tmp_path / "plan.svg").is_file() and json.loads((tmp_path / "plan.json").read_text())["gpus"] == 64
    (quoted,) = [b for b in documented.blocks() if b.page == "docs/reproduce.md" and b.language == "text"]
    assert quoted.text in capsys.readouterr().out
