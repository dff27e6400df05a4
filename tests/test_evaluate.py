"""The whole evaluation on towers whose right answer is known, and what it says to wrong input."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import PATCH, pixels, read_json, write_captions, write_pictures, write_run
from colours import install as install_towers
from PIL import Image

from pacl_scale import config
from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import main
from pacl_scale.evaluate.captioned import CaptionedConfig, open_captioned
from pacl_scale.evaluate.command import EvaluateConfig, evaluate, run_of, table
from pacl_scale.evaluate.compared import Compared
from pacl_scale.evaluate.examples import choose
from pacl_scale.evaluate.pictures import AnnotatedConfig, open_annotated, read_ahead
from pacl_scale.evaluate.rows import Row, by_cell, read_rows
from pacl_scale.report import write_report

CONFIGS = Path(__file__).parents[1] / "configs" / "eval"


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with pictures, captions, a right run `pacl` and a wrong run `mean_pooled`, colour towers installed."""
    install_towers(monkeypatch)
    write_pictures(tmp_path / "data")
    write_captions(tmp_path / "captions")
    write_run(tmp_path / "pacl")
    write_run(tmp_path / "mean_pooled", right=False, loss={"attention_scale": 0.0})
    return tmp_path


def words(place: Path, *more: str) -> list[str]:
    return [
        f"methods.pacl={place / 'pacl'}",
        f"methods.mean_pooled={place / 'mean_pooled'}",
        f'--segmentation={{"blocks": {{"root": "{place / "data"}"}}}}',
        f'--retrieval={{"texts": {{"csv": "{place / "captions" / "val.csv"}"}}}}',
        "examples=1",
        "precision=fp32",
        "threads=1",
        *more,
    ]


def test_rows_tables_and_examples_of_known_towers(colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(colours)) == 0
    rows = {(row.task, row.method): row for row in read_rows(str(colours / "pacl"))}
    pacl = rows["segmentation", "pacl"]
    assert pacl.scores["miou"] > 0.95 and pacl.scores["pixel_accuracy"] > 0.95
    assert pacl.scores["groups"]["warm"]["classes_present"] == 1
    assert pacl.scores["groups"]["other_words"]["miou"] == pytest.approx(pacl.scores["groups"]["warm"]["miou"])
    assert pacl.checkpoint["step"] == 7
    assert rows["segmentation", "mean_pooled"].scores["miou"] < 0.4, "it takes red for green"
    assert rows["segmentation", "patch_oracle"].scores["miou"] == 1
    truth = np.array(pacl.confusion).sum(axis=1)
    majority = rows["segmentation", "majority_class"]
    assert majority.checkpoint["answer"] == ["red", "green", "blue"][truth.argmax()]
    assert majority.scores["pixel_accuracy"] == pytest.approx(truth.max() / truth.sum())
    assert majority.scores["miou"] == pytest.approx(truth.max() / truth.sum() / 3)
    # Void row and background column are not among the pixels scored.
    assert truth.sum() == 3 * 47 * 31 + 2 * 31 * 47
    assert rows["retrieval", "pacl"].scores["image_to_text"]["R@1"] == 1
    assert rows["retrieval", "pacl"].scores["text_to_image"]["R@1"] == 1
    assert rows["retrieval", "mean_pooled"].checkpoint["attention_scale"] == 0
    assert rows["retrieval", "mean_pooled"].scores["text_to_image"]["R@1"] < 0.5

    printed = capsys.readouterr().out
    assert "blocks: 5 pictures, protocol whole" in printed and "R@10 text to picture" in printed
    line = next(line for line in printed.splitlines() if line.startswith("pacl"))
    assert line.split()[1] == f"{100 * pacl.scores['miou']:.1f}"

    (folder,) = (colours / "pacl" / "evals").glob("blocks-whole-*-examples")
    examples = read_json(folder / "examples.json")["examples"]
    assert [example["rank"] for example in examples] == ["best", "median", "worst"]
    assert examples[0]["scores"]["pacl"]["miou"] >= examples[2]["scores"]["pacl"]["miou"]
    for example in examples:
        truth_labels = pixels(folder / example["files"]["truth"])
        said = pixels(folder / example["files"]["pacl"])
        assert set(np.unique(truth_labels)) == {0, 1, 255} and example["truth_words"] == 2
        assert (said == truth_labels)[truth_labels != 255].mean() > 0.9
        assert pixels(folder / example["files"]["strip"]).shape[1] > 5 * truth_labels.shape[1]


def test_each_picture_passes_the_vision_tower_once(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = install_towers(monkeypatch)
    settings = EvaluateConfig(
        methods={"pacl": str(colours / "pacl"), "mean_pooled": str(colours / "mean_pooled")},
        segmentation={"blocks": AnnotatedConfig(str(colours / "data"))},
        examples=0,
        batch_size=2,
        threads=1,
    )
    first = evaluate(settings)
    assert vision.pictures_encoded == 5
    again = evaluate(settings)
    assert [row.confusion for row in first] == [row.confusion for row in again]
    assert [row.scores for row in first] == [row.scores for row in again]


def test_scores_do_not_depend_on_the_batch_size(colours: Path) -> None:
    def confusions(batch_size: int) -> list[list[list[int]] | None]:
        blocks = {"blocks": AnnotatedConfig(str(colours / "data"))}
        settings = EvaluateConfig(str(colours / "pacl"), segmentation=blocks, examples=0, batch_size=batch_size)
        return [row.confusion for row in evaluate(settings)]

    assert confusions(1) == confusions(3) == confusions(64)


def test_untrained_is_the_same_for_a_seed_and_another_for_another(colours: Path) -> None:
    def untrained(seed: int) -> dict:
        texts = {"texts": CaptionedConfig(str(colours / "captions" / "val.csv"))}
        blocks = {"blocks": AnnotatedConfig(str(colours / "data"))}
        rows = evaluate(
            EvaluateConfig(
                str(colours / "pacl"), segmentation=blocks, retrieval=texts, untrained_seed=seed, examples=0, threads=1
            )
        )
        return next(row for row in rows if row.method == "untrained").per_picture

    state = torch.get_rng_state()
    assert untrained(0) == untrained(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
    assert any(untrained(0) != untrained(seed) for seed in (1, 2, 3))


def test_rows_of_other_settings_are_kept_apart(colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = words(colours, "examples=1", "retrieval={}")
    main([*base, "controls=[]", "protocol.size=16"])
    # The tower's own size, said or not said, is one measurement; the other control joins its table.
    main([*base, "controls=[majority_class]"])
    for other in ("protocol.stride=2", "segmentation.blocks.limit=4", "precision=bf16"):
        main([*base, "controls=[]", other])
    write_run(colours / "pacl", right=False, step=9)
    main([*base, "controls=[]"])
    rows = read_rows(str(colours / "pacl"))
    cells = by_cell(rows)
    assert sorted(len(cell) for cell in cells) == [2, 2, 2, 4]
    assert len({row.file_name for row in rows}) == len(rows) == 10
    (large,) = [cell for cell in cells if len(cell) == 4]
    assert sorted((row.method, row.checkpoint.get("step")) for row in large) == [
        *(("majority_class", None), ("mean_pooled", 7), ("pacl", 7), ("pacl", 9))
    ]
    assert len(list((colours / "pacl" / "evals").glob("*-examples"))) == 5
    assert {row.protocol["stride"] for cell in cells for row in cell[:1]} == {PATCH, 2}
    assert table(rows).count("blocks: ") == 4

    page = Path(write_report(str(colours / "r.html"), str(colours / "pacl"), {})).read_text()
    assert page.count("<h3>Outlines: blocks, ") == 4 and page.count("<h3>Outlines: blocks, 4 of 5 pictures,") == 1
    assert page.count("patches of 4 every 2") == 1 and page.count("PACL, step 9") >= 1
    capsys.readouterr()


def test_a_row_holds_all_that_its_figure_hangs_on(colours: Path) -> None:
    main(words(colours, "protocol.window=30", "protocol.size=32", "examples=0"))
    row, found = (
        next(r for r in read_rows(str(colours / "pacl")) if r.task == t) for t in ("segmentation", "retrieval")
    )
    protocol = {key: row.protocol[key] for key in ("size", "window", "window_step", "stride", "patch_size")}
    assert protocol == {"size": 32, "window": 32, "window_step": 16, "stride": PATCH, "patch_size": PATCH}
    assert row.protocol["mean"] == [0.5, 0.5, 0.5] and "bilinear" in row.protocol["filter"]
    assert row.data["classes"] == [[1, ["red"]], [2, ["green"]], [3, ["blue"]]] and row.data["background"] == 0
    assert row.data["groups"]["other_words"]["words"] == [[1, ["crimson"]]]
    assert row.towers["fingerprints"]["vision"] == {"colours": True} and row.towers["precision"] == "float32"
    assert row.software["torch"].startswith(torch.__version__.split("+")[0])
    assert len(row.checkpoint["weights"]) == 16 and found.protocol["size"] == 16
    again = Row(**json.loads(json.dumps(dataclasses.asdict(row))))
    assert again.cell == row.cell and again.name == row.name, "the same before and after it was written"


def test_wrong_settings_of_a_later_data_set_are_found_before_the_first(colours: Path) -> None:
    shutil.copytree(colours / "data", colours / "other")
    classes = colours / "other" / "classes.yaml"
    classes.write_text(classes.read_text() + "score_background: true\n")
    more = f'--segmentation={{"blocks": {{"root": "{colours / "data"}"}}, "other": {{"root": "{colours / "other"}"}}}}'
    with pytest.raises(UserError, match="other scores background"):
        main(words(colours, more))
    assert not (colours / "pacl" / "evals").exists()


def test_an_interrupted_retrieval_goes_on_and_parts_add_up(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"texts": CaptionedConfig(str(colours / "captions" / "val.csv"))}
    runs = {"pacl": str(colours / "pacl"), "mean_pooled": str(colours / "mean_pooled")}

    def measured(output: str, **more: Any) -> list[Row]:
        output = str(colours / output)
        settings = EvaluateConfig(methods=runs, retrieval=texts, output=output, batch_size=1, threads=1, **more)
        return evaluate(settings)

    whole = [row.scores for row in measured("whole")]
    real, calls = Compared.add, [0]

    def interrupted(self: Compared, phi: Any) -> None:
        real(self, phi)
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Compared, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measured("cut")
    kept = sorted((colours / "cut" / "evals" / "progress").rglob("*.f32"))
    assert len(kept) == 3 and {file.stat().st_size for file in kept} == {2 * 6 * 4}
    kept[0].write_bytes(kept[0].read_bytes()[:-5])  # the power went in the middle of a line
    vision = install_towers(monkeypatch)
    assert [row.scores for row in measured("cut")] == whole and vision.pictures_encoded == 2
    assert not list((colours / "cut" / "evals").rglob("*.f32"))

    assert measured("shared", part=1, parts=2) == []
    assert [row.scores for row in measured("shared", part=0, parts=2)] == whole


def test_rows_are_written_as_each_data_set_is_done(colours: Path) -> None:
    shutil.copytree(colours / "captions", colours / "late")
    (colours / "late" / "images" / "red.png").write_text("no picture")
    two = {name: {"csv": str(colours / folder / "val.csv")} for name, folder in (("a", "captions"), ("b", "late"))}
    with pytest.raises(UserError, match="cannot be used"):
        main(words(colours, f"--retrieval={json.dumps(two)}", "examples=0"))
    assert {row.data_set for row in read_rows(str(colours / "pacl"))} == {"blocks", "a"}


def test_an_output_elsewhere_leaves_the_run_alone(colours: Path) -> None:
    main(words(colours, f"output={colours / 'elsewhere'}", "segmentation.blocks.limit=2", "examples=0"))
    assert not (colours / "pacl" / "evals").exists()
    assert {row.pictures for row in read_rows(str(colours / "elsewhere"))} == {2, 3}


def test_checkpoint_key_is_method_pacl() -> None:
    blocks = {"blocks": AnnotatedConfig("somewhere")}
    settings = EvaluateConfig(checkpoint="a", methods={"pacl": "b", "other": "c"}, segmentation=blocks)
    assert settings.methods == {"pacl": "a", "other": "c"}
    assert run_of("runs/a/checkpoints/00000007") == "runs/a"
    assert run_of("runs/a/checkpoints/") == "runs/a"
    assert run_of("runs/a") == "runs/a"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["shade=3"], "shade"),
        (["batch_size=0"], "batch_size"),
        (["controls=[psychic]"], "psychic"),
        (["methods.untrained=x"], "name of a control"),
        (["protocol.name=a/b"], "protocol.name"),
        (["retrieval.blocks.csv=x.csv"], "two tasks have"),
        (["segmentation.blocks.limit=-1"], "limit"),
        (["device=cuda"], "no usable CUDA"),
        (["methods.pacl=/nowhere"], "/nowhere"),
        (["segmentation.blocks.root=/nowhere"], "/nowhere/images: there is no such folder"),
        (["retrieval.texts.csv=/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_wrong_settings_end_in_one_sentence(
    colours: Path, more: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if more == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run_command(lambda: main(words(colours, *more))) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and complaint in said[0]
    assert not (colours / "pacl" / "evals").exists()


def test_no_data_set_or_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        EvaluateConfig(segmentation={"a": AnnotatedConfig("x")})
    with pytest.raises(UserError, match="data set"):
        main(["checkpoint=x"])


def test_a_checkpoint_of_another_architecture_is_refused(colours: Path) -> None:
    write_run(colours / "wide", width_out=4)
    with pytest.raises(UserError, match="another architecture"):
        main(words(colours, f"methods.pacl={colours / 'wide'}"))
    write_run(colours / "other_tower", image_size=64)
    with pytest.raises(UserError, match="another vision tower"):
        main(words(colours, f"methods.mean_pooled={colours / 'other_tower'}"))
    write_run(colours / "other_tokens", towers={"vision": {"colours": False}, "text": {"colours": True}})
    with pytest.raises(UserError, match=r"another vision tower \(colours differ\)"):
        main(words(colours, f"methods.pacl={colours / 'other_tokens'}"))


def test_a_damaged_checkpoint_is_refused(colours: Path) -> None:
    weights = colours / "pacl" / "checkpoints" / "00000007" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError):
        main(words(colours))


def _no_picture(data: Path) -> None:
    (data / "images" / "1.png").write_text("not a picture")


def _cut_picture(data: Path) -> None:
    content = (data / "images" / "1.png").read_bytes()
    (data / "images" / "1.png").write_bytes(content[: len(content) // 2])


def _mask_of_other_size(data: Path) -> None:
    Image.new("L", (3, 3)).save(data / "masks" / "1.png")


def _colour_mask(data: Path) -> None:
    Image.new("RGB", (48, 32)).save(data / "masks" / "1.png")


def _unknown_index(data: Path) -> None:
    Image.new("L", (48, 32), 9).save(data / "masks" / "1.png")


def _mask_alone(data: Path) -> None:
    (data / "images" / "1.png").unlink()


def _no_masks(data: Path) -> None:
    shutil.rmtree(data / "masks")
    (data / "masks").mkdir()


def _no_classes(data: Path) -> None:
    (data / "classes.yaml").unlink()


def _two_of_a_name(data: Path) -> None:
    Image.new("RGB", (48, 32)).save(data / "images" / "1.jpg")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_no_picture, "images/1.png is not a picture"),
        (_cut_picture, "images/1.png cannot be read"),
        (_mask_of_other_size, "differ in size"),
        (_colour_mask, "no index mask"),
        (_unknown_index, r"masks/1.png.*\[9\]"),
        (_mask_alone, "1 of 5 masks have no picture"),
        (_no_masks, "has no PNG mask"),
        (_no_classes, "classes.yaml"),
        (_two_of_a_name, "two files named 1"),
    ],
)
def test_a_damaged_data_set_ends_in_a_sentence_and_no_rows(colours: Path, damage, complaint: str) -> None:
    damage(colours / "data")
    with pytest.raises(UserError, match=complaint):
        main(words(colours))
    assert not (colours / "pacl" / "evals").exists()


def test_masks_of_one_bit_are_index_masks(colours: Path) -> None:
    Image.new("1", (32, 48), 1).save(colours / "data" / "masks" / "0.png")
    assert (open_annotated(AnnotatedConfig(str(colours / "data"))).read(0)[1] == 0).all()


def test_a_strip_that_would_fill_the_tower_is_refused(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1, 30000)).save(colours / "data" / "images" / "1.png")
    Image.new("L", (1, 30000), 1).save(colours / "data" / "masks" / "1.png")
    vision = install_towers(monkeypatch)
    with pytest.raises(UserError, match=r"^1\.png \(1 x 30000 pixels\) would enter .* 480000 patches at a time"):
        main(words(colours, "batch_size=1"))
    assert vision.pictures_encoded < 5


def test_pictures_without_a_mask_are_left_out_and_counted(colours: Path) -> None:
    (colours / "data" / "masks" / "0.png").unlink()
    data = open_annotated(AnnotatedConfig(str(colours / "data")))
    assert len(data) == 4 and data.record["without_mask"] == 1 and data.name(0) == "1.png"


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pacl_scale.evaluate.pictures.MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="million pixels"):
        open_annotated(AnnotatedConfig(str(colours / "data"))).read(0)


def test_captions_are_read_as_csv(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    table.write_text('image,caption\na.jpg,"one, two"\nb.jpg,same\na.jpg,same\n\nb.jpg,\n')
    data = open_captioned(CaptionedConfig(str(table)))
    assert data.texts == ["one, two", "same"]
    assert data.true_IN.tolist() == [[True, True], [False, True]]
    assert data.addresses[1] == str(tmp_path / "images" / "b.jpg")
    for content, complaint in (("file,text\na,b\n", "needs the columns"), ("image,caption\na,b\n", "at least two")):
        table.write_text(content)
        with pytest.raises(UserError, match=complaint):
            open_captioned(CaptionedConfig(str(table)))
    table.write_bytes(b"image,caption\n\xff\xfe,x\n")
    with pytest.raises(UserError, match="UTF-8"):
        open_captioned(CaptionedConfig(str(table)))


def test_captions_of_coco_and_flickr_are_read_as_they_come(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 7, "file_name": "000007.jpg"}, {"id": 3, "file_name": "000003.jpg"}],
        "annotations": [
            {"id": 12, "image_id": 3, "caption": "third"},
            {"id": 10, "image_id": 7, "caption": "first "},
            {"id": 11, "image_id": 3, "caption": "second"},
        ],
    }
    sentences = [{"raw": f"caption {n}", "tokens": []} for n in range(7)]
    karpathy = {
        "dataset": "coco",
        "images": [
            {"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": sentences},
            {"filepath": "train2014", "filename": "b.jpg", "split": "restval", "sentences": sentences},
            {"filename": "c.jpg", "split": "test", "sentences": [{"raw": "other"}]},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "karpathy.json").write_text(json.dumps(karpathy))
    (tmp_path / "flickr.token").write_text("1.jpg#0\tA dog # 5 .\n1.jpg#1\tA hound .\n\n2.jpg#0\tA cat .\n")

    data = open_captioned(CaptionedConfig(coco=str(tmp_path / "coco.json"), pictures="val2017"))
    assert data.addresses == ["val2017/000007.jpg", "val2017/000003.jpg"]
    assert data.texts == ["first", "second", "third"] and data.true_IN.tolist() == [
        [True, False, False],
        [False, True, True],
    ]
    data = open_captioned(CaptionedConfig(karpathy=str(tmp_path / "karpathy.json"), captions_per_picture=5))
    assert data.addresses == [f"{tmp_path}/images/val2014/a.jpg", f"{tmp_path}/images/c.jpg"]
    assert data.texts == [*(f"caption {n}" for n in range(5)), "other"]
    assert data.record == {"layout": "karpathy", "split": "test", "of": 2, "captions_per_picture": 5}
    data = open_captioned(CaptionedConfig(tokens=str(tmp_path / "flickr.token")))
    assert data.addresses[1].endswith("images/2.jpg") and data.texts[0] == "A dog # 5 ."


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        ("coco", "[1, 2]", "form of coco"),
        ("coco", '{"images": [{"id": 1, "file_name": "../../secret"}], "annotations": []}', "no picture's name"),
        ("karpathy", '{"images": [{"split": "val"}]}', "no picture of the split 'test'"),
        ("karpathy", '{"images": [{"split": "test", "filename": "/etc/x", "sentences": []}]}', "no picture's name"),
        ("tokens", "a.jpg a dog", "a line begins 'a.jpg a dog'"),
        ("tokens", "../a.jpg#0\ta dog", "no picture's name"),
        ("coco", "no JSON", "form of coco"),
    ],
)
def test_files_of_captions_of_another_form_are_refused(tmp_path: Path, kind: str, content: str, complaint: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=complaint):
        open_captioned(CaptionedConfig(**{kind: str(tmp_path / "file")}))


def test_one_file_of_captions_is_named() -> None:
    for files in ({}, {"csv": "a", "coco": "b"}):
        with pytest.raises(ValueError, match="name one file of captions"):
            CaptionedConfig(**files)


def test_retrieval_pools_patches_with_the_checkpoints_own_attention(colours: Path) -> None:
    # One quarter of the first picture is pure red, all of the second is a dull red: what is nearer to "red"
    # depends on whether the patches that fit are attended to, or all alike.
    images = colours / "two" / "images"
    images.mkdir(parents=True)
    patches = np.full((16, 16, 3), (0, 0, 255), np.uint8)
    patches[:4] = (255, 0, 0)
    Image.fromarray(patches).save(images / "quarter.png")
    Image.new("RGB", (16, 16), (153, 0, 102)).save(images / "dull.png")
    (colours / "two" / "val.csv").write_text("image,caption\nquarter.png,red\ndull.png,green\n")
    found = {}
    for scale in (50.0, 0.0):
        run = write_run(colours / f"scale{scale:.0f}", loss={"attention_scale": scale})
        two = {"two": CaptionedConfig(str(colours / "two" / "val.csv"))}
        rows = evaluate(EvaluateConfig(str(run), retrieval=two, controls=[], precision="fp32", threads=1))
        found[scale] = rows[0].scores["text_to_image"]["R@1"]
    assert found[50.0] > found[0.0]


def test_a_captioned_picture_that_is_none_is_named(colours: Path) -> None:
    (colours / "captions" / "images" / "red.png").write_text("no picture")
    with pytest.raises(UserError, match=r"red\.png cannot be used: not a picture"):
        main(words(colours, "examples=0"))


def test_reading_ahead_keeps_the_order_and_passes_faults_on() -> None:
    assert list(read_ahead(range(50), lambda number: number * 2, 3)) == list(range(0, 100, 2))

    def read(number: int) -> int:
        if number == 7:
            raise UserError("seven")
        return number

    reader = read_ahead(range(50), read, 2)
    assert [next(reader) for _ in range(7)] == list(range(7))
    with pytest.raises(UserError, match="seven"):
        next(reader)


def test_best_median_and_worst_are_chosen_by_score_and_never_twice() -> None:
    scores = {f"{n}.jpg": {"miou": n / 10, "classes": 1} for n in range(9)}
    scores["none.jpg"] = {"miou": None, "classes": 0}
    scores["full.jpg"] = {"miou": 0.8, "classes": 3}
    row = Row("segmentation", "d", {"name": "p"}, "m", {}, {}, 11, {}, per_picture=scores)
    assert choose(row, 1) == [("best", "full.jpg"), ("median", "5.jpg"), ("worst", "0.jpg")]
    chosen = choose(row, 9)
    assert len(chosen) == len(set(chosen)) == 9
    row.per_picture = {"a.jpg": scores["1.jpg"]}
    assert choose(row, 3) == []


def test_a_file_that_is_no_row_is_named(tmp_path: Path) -> None:
    assert read_rows(str(tmp_path)) == []
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"x\.json is no row"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    settings = config.parse(EvaluateConfig, [f"--config={path}", "--checkpoint=somewhere"], "evaluate")
    is_protocol = path.stem.startswith("protocol_")
    assert is_protocol != bool(settings.segmentation or settings.retrieval or settings.classification)
    assert not is_protocol or settings.protocol.name == path.stem.removeprefix("protocol_")
