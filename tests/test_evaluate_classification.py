"""Zero-shot classification: each layout with its traps, scores against torchmetrics, going on after an interruption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import label_sets
import numpy as np
import pytest
import torch
import torchmetrics
from colours import install as install_towers
from colours import write_run
from PIL import Image

from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import main
from pacl_scale.evaluate.classification import Answers, scores_of
from pacl_scale.evaluate.command import EvaluateConfig, evaluate
from pacl_scale.evaluate.labelled import KNOWN, LabelledConfig, open_labelled
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.report import write_report


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_towers(monkeypatch)
    write_run(tmp_path / "run")
    write_run(tmp_path / "wrong", right=False)
    return tmp_path


def settings(place: Path, data: LabelledConfig, **others: object) -> EvaluateConfig:
    values = {"controls": ["majority_class"], "precision": "fp32", "threads": 1} | others
    return EvaluateConfig(str(place / "run"), classification={"colours": data}, **values)  # type: ignore[arg-type]


def test_rows_table_and_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = label_sets.folders(place / "data", each=3)
    words = [
        f"methods.pacl={place / 'run'}",
        f"methods.mean_pooled={place / 'wrong'}",
        f'--classification={{"colours": {{"root": "{data}", "templates": "single"}}}}',
        "threads=1",
    ]
    assert main(words) == 0
    rows = {row.method: row for row in read_rows(str(place / "run"))}
    assert set(rows) == {"pacl", "mean_pooled", "untrained", "majority_class"}
    assert rows["pacl"].scores["top1"] == 1 and rows["pacl"].scores["top5"] is None
    assert rows["mean_pooled"].scores["top1"] == pytest.approx(1 / 3), "it takes red for green and green for red"
    assert rows["majority_class"].scores["top1"] == pytest.approx(1 / 3)
    assert rows["majority_class"].checkpoint == {"answer": "blue"}
    assert rows["pacl"].protocol["templates"] == ["a photo of a {}."]
    assert rows["mean_pooled"].confusion == [[3, 0, 0], [0, 0, 3], [0, 3, 0]], "in the order blue, green, red"
    printed = capsys.readouterr().out
    assert "colours: 9 pictures, protocol classification" in printed and "mean per class" in printed
    page = Path(write_report(str(place / "r.html"), str(place / "run"), {})).read_text()
    assert "Naming pictures: colours" in page and "33.3" in page


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("food101", label_sets.food),
        ("pets", label_sets.pets),
        ("dtd", label_sets.textures),
        ("aircraft", label_sets.planes),
        ("cifar10", label_sets.cifar),
    ],
)
def test_layouts_as_they_are_downloaded(
    place: Path, layout: str, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(place / "data", monkeypatch) if layout == "cifar10" else make(place / "data")
    config = LabelledConfig(str(root), layout, partial=True)  # type: ignore[arg-type]
    data = open_labelled(config)
    for number in range(len(data)):
        picture, label = data.read(number)
        colour = np.asarray(picture)[16, 16].argmax()
        assert ["red", "green", "blue"][colour] in data.words[label].lower(), "the label is of the picture"
    assert data.record["of"] == KNOWN[layout].pictures and data.templates and all("{}" in t for t in data.templates)
    rows = evaluate(settings(place, config))
    assert rows[0].scores["top1"] == 1 or layout == "pets", "its names are capitalised, which the tower cannot read"
    with pytest.raises(UserError, match=f"{layout} has {KNOWN[layout].pictures} pictures"):
        open_labelled(LabelledConfig(str(root), layout))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("imagenet", label_sets.imagenet),
        ("imagenet_a", label_sets.imagenet_a),
        ("imagenet_r", label_sets.imagenet_r),
        ("imagenet_sketch", label_sets.synsets),
        ("objectnet", label_sets.objects),
        ("cifar100", label_sets.hundred),
        ("cars", label_sets.cars),
        ("caltech101", label_sets.caltech),
        ("flowers", label_sets.flowers),
        ("stl10", label_sets.stl),
        ("eurosat", label_sets.satellite),
    ],
)
def test_pictures_have_the_word_of_their_class(
    place: Path, layout: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place / "data"
    needs_checksums = layout in ("cifar100", "flowers", "stl10")
    words = make(root, monkeypatch) if needs_checksums else make(root)
    data = open_labelled(LabelledConfig(str(root), layout, partial=True))  # type: ignore[arg-type]
    assert data.record["of"] == KNOWN[layout].pictures and data.templates
    found: dict[str, set[str]] = {}
    for number in range(len(data)):
        picture, label = data.read(number)
        pixels = np.asarray(picture)[picture.height // 2, picture.width // 2]
        if pixels.max() > 200:
            found.setdefault(["red", "green", "blue"][pixels.argmax()], set()).add(data.words[label])
    assert {word: found[word] for word in words} == {word: {name} for word, name in words.items()}
    if KNOWN[layout].by_folder:
        folder = next(path.parent for path in root.rglob("*") if path.suffix in (".jpg", ".JPEG"))
        shutil.rmtree(next(path for path in folder.parent.iterdir() if path.name[0] not in "AB"))
        with pytest.raises(UserError, match=f"{layout} has .* classes, but .* leads to"):
            open_labelled(LabelledConfig(str(root), layout, partial=True))  # type: ignore[arg-type]


def test_imagenet_v2_folders_are_numbers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_benchmark.datasets import imagenetv2

    root = label_sets.second_imagenet(place / "data")
    monkeypatch.setattr(imagenetv2.requests, "get", lambda *words, **_: pytest.fail("a download"))
    with pytest.raises(UserError, match="leads to 3"):
        open_labelled(LabelledConfig(str(root), "imagenet_v2"))
    data = open_labelled(LabelledConfig(str(root), "imagenet_v2", partial=True))
    assert data.record["of"] == 10000 == imagenetv2.V2_DATASET_SIZE
    assert len(data.words) == 1000
    assert [data.read(n)[1] for n in range(3)] == [0, 10, 2]


def test_a_missing_class_folder_would_shift_all_others(place: Path) -> None:
    root = label_sets.folders(place / "data")
    config = LabelledConfig(str(root), "imagenet_r", partial=True)
    with pytest.raises(UserError, match="imagenet_r has 200 classes, but .* leads to 3 folders"):
        open_labelled(config)


@pytest.mark.parametrize("layout", sorted(KNOWN))
def test_what_is_not_there_is_never_fetched(place: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_benchmark.datasets import builder

    monkeypatch.setattr(builder, "call", lambda *words, **_: pytest.fail(f"a shell ran {words}"))
    monkeypatch.setattr("socket.create_connection", lambda *words, **_: pytest.fail("a connection"))
    (place / "empty").mkdir()
    for root in (place / "absent", place / "empty"):
        with pytest.raises(UserError) as found:
            open_labelled(LabelledConfig(str(root), layout, partial=True))  # type: ignore[arg-type]
        assert "get " in str(found.value) or "classes, but" in str(found.value)
    first = KNOWN[layout].needs[0]
    assert first == "." or f"expected {place / 'empty' / first}" in str(found.value)


def test_an_interrupted_evaluation_goes_on_and_parts_add_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = LabelledConfig(str(label_sets.folders(place / "data", each=4)))
    whole = evaluate(settings(place, data))
    read = open_labelled(data).__class__.read

    def fails(self: object, number: int) -> object:
        if number == 7:
            raise KeyboardInterrupt
        return read(self, number)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(open_labelled(data).__class__, "read", fails)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(place, data, batch_size=2))
    (line_file,) = (place / "run" / "evals" / "progress").glob("*/*.jsonl")
    done = len(line_file.read_text().splitlines())
    assert 0 < done < 12
    vision = install_towers(monkeypatch)
    again = evaluate(settings(place, data, batch_size=2))
    assert vision.pictures_encoded == 12 - done
    assert [row.scores for row in again] == [row.scores for row in whole]
    assert evaluate(settings(place, data, part=1, parts=2)) == []
    shared = evaluate(settings(place, data, part=0, parts=2))
    assert [row.scores for row in shared] == [row.scores for row in whole]


def test_scores_agree_with_torchmetrics() -> None:
    random = np.random.default_rng(0)
    order = np.argsort(random.random((300, 8)), axis=1)[:, :5]
    true = random.integers(0, 7, 300)
    answers = {str(n): Answers(int(true[n]), order[n].tolist()) for n in range(300)}
    scores, confusion = scores_of(answers, [f"word{n}" for n in range(8)])
    ranks = torch.zeros(300, 8)
    ranks.scatter_(1, torch.from_numpy(order), torch.arange(8, 3, -1).float().expand(300, 5))
    target = torch.from_numpy(true)

    def theirs(top: int, average: str = "micro") -> float:
        return float(torchmetrics.Accuracy("multiclass", num_classes=8, top_k=top, average=average)(ranks, target))

    assert scores["top1"] == pytest.approx(theirs(1)) and scores["top5"] == pytest.approx(theirs(5))
    per_class = [np.mean(order[true == c, 0] == c) for c in range(7)]
    assert scores["mean_per_class"] == pytest.approx(np.mean(per_class)), "an absent class does not count"
    assert scores["per_class"][7]["accuracy"] is None and scores["classes_present"] == 7
    assert np.array(confusion).sum() == 300 and np.trace(np.array(confusion)) == round(300 * scores["top1"])
    low, high = scores["intervals"]["top1"]
    assert low < scores["top1"] < high and high - low < 0.12


def test_a_limit_is_spread_over_the_data_set(place: Path) -> None:
    data = open_labelled(LabelledConfig(str(label_sets.folders(place / "data", each=10)), limit=6))
    assert [data.read(n)[1] for n in range(6)] == [0, 0, 1, 1, 2, 2]


def test_wrong_input_ends_in_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = label_sets.folders(place / "one", names=["red"], shown=["red"])
    bad = label_sets.folders(place / "bad")
    (bad / "blue" / "0.jpg").write_text("no picture")
    (place / "none").mkdir()
    for root, complaint in ((one, "one class alone"), (bad, "picture 0 of folder"), (place / "none", "folder of pict")):
        words = [f"--checkpoint={place / 'run'}", f'--classification={{"colours": {{"root": "{root}"}}}}', "threads=1"]
        assert run_command(lambda words=words: main(words)) == 2
        assert complaint in capsys.readouterr().err
    with pytest.raises(ValueError, match="two tasks"):
        EvaluateConfig("run", classification={"a": LabelledConfig("x")}, retrieval={"a": json.loads("{}")})


def test_check_data_reads_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = label_sets.folders(place / "data")
    main([f'--classification={{"colours": {{"root": "{root}"}}}}', "check_data=true"])
    assert "colours: 6 of 6 pictures read, 3 classes, none absent" in capsys.readouterr().out
    Image.new("RGB", (4, 4)).save(root / "blue" / "9.png")
    (root / "blue" / "9.png").write_bytes((root / "blue" / "9.png").read_bytes()[:40])
    with pytest.raises(UserError, match="1 of 1 data sets"):
        main([f'--classification={{"colours": {{"root": "{root}"}}}}', "--check-data"])
    assert "6 of 7 pictures read" in (printed := capsys.readouterr().out) and "picture 2 of folder" in printed
