"""The official data sets' layouts, against small hand-made copies with their traps."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import class_names, main
from pacl_scale.evaluate.classes import NOT_SCORED
from pacl_scale.evaluate.official import LAYOUTS
from pacl_scale.evaluate.pictures import AnnotatedConfig, AnnotatedPictures, check_data, open_annotated


def picture(path: Path, width: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 1), (200, 10, 10)).save(path)


def mask(path: Path, values: list[int], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.fromarray(np.array([values], np.uint8))
    if palette:
        drawn.putpalette([value for value in range(256) for _ in range(3)])
    drawn.save(path)


def lines(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def voc(root: Path) -> None:
    at = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_01", "2007_02", "2007_09"):
        picture(at / "JPEGImages" / f"{name}.jpg")
    mask(at / "SegmentationClass" / "2007_01.png", [0, 1, 20, 255, 15, 0], palette=True)
    mask(at / "SegmentationClass" / "2007_09.png", [0] * 6, palette=True)  # of the training split
    lines(at / "ImageSets" / "Segmentation" / "val.txt", "2007_01\n\n")


def context_converted(root: Path) -> None:
    at = root / "VOC2010"
    picture(at / "JPEGImages" / "a.jpg")
    mask(at / "SegmentationClassContext" / "a.png", [0, 1, 2, 59, 255, 0])
    lines(at / "ImageSets" / "SegmentationContext" / "val.txt", "a\n")


def context_original(root: Path) -> None:
    at = root / "VOCdevkit" / "VOC2010"
    picture(at / "JPEGImages" / "a.jpg")
    lines(at / "ImageSets" / "Main" / "val.txt", "a -1\n")
    (root / "trainval").mkdir()
    # aeroplane, bag, wood; accordion is none of the 59, nor is the last index but one.
    savemat(root / "trainval" / "a.mat", {"LabelMap": np.array([[2, 9, 458, 1, 457, 415]], np.uint16)})


def coco(root: Path) -> None:
    picture(root / "val2017" / "1.jpg")
    mask(root / "stuffthingmaps_trainval2017" / "val2017" / "1.png", [0, 12, 89, 91, 181, 255])
    # The training half beside it is not asked for.
    picture(root / "train2017" / "2.jpg")
    mask(root / "stuffthingmaps_trainval2017" / "train2017" / "2.png", [11] * 6)


def coco_of_mmsegmentation(root: Path) -> None:
    """Its folders, where its converted masks of 0 to 170 lie among the original ones."""
    for name in ("000000000139", "000000000285"):
        picture(root / "images" / "val2017" / f"{name}.jpg")
        mask(root / "annotations" / "val2017" / f"{name}.png", [0, 12, 89, 91, 181, 255])
        mask(root / "annotations" / "val2017" / f"{name}_labelTrainIds.png", [0, 11, 79, 80, 170, 255])


def ade(root: Path) -> None:
    at = root / "ADEChallengeData2016"
    picture(at / "images" / "validation" / "1.jpg")
    picture(at / "images" / "training" / "2.jpg")
    mask(at / "annotations" / "validation" / "1.png", [0, 1, 2, 150, 0, 1])


def cityscapes(root: Path) -> None:
    for city, name in (("frankfurt", "frankfurt_0"), ("ulm", "ulm_0")):
        picture(root / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png")
        mask(root / "gtFine" / "val" / city / f"{name}_gtFine_labelIds.png", [0, 7, 33, 29, 8, 15])
        mask(root / "gtFine" / "val" / city / f"{name}_gtFine_color.png", [7] * 6)


# Layout, its small copy, pictures there, and the class positions that the first mask means.
OUT = NOT_SCORED
COPIES = [
    ("voc_20", voc, 1, [OUT, 0, 19, OUT, 14, OUT]),
    ("voc_21", voc, 1, [20, 0, 19, OUT, 14, 20]),
    ("context_59", context_converted, 1, [OUT, 0, 1, 58, OUT, OUT]),
    ("context_60", context_converted, 1, [59, 0, 1, 58, OUT, 59]),
    ("context_59", context_original, 1, [0, 1, 58, OUT, OUT, 50]),
    ("context_60", context_original, 1, [0, 1, 58, 59, 59, 50]),
    ("coco_stuff_171", coco, 1, [0, 11, 79, 80, 170, OUT]),
    ("coco_object", coco, 1, [0, 11, 79, 80, 80, OUT]),
    ("coco_stuff_171", coco_of_mmsegmentation, 2, [0, 11, 79, 80, 170, OUT]),
    ("ade_150", ade, 1, [OUT, 0, 1, 149, OUT, 0]),
    ("cityscapes_19", cityscapes, 2, [OUT, 0, 18, OUT, 1, OUT]),
]


def opened(layout: str, root: Path | str, **more: bool) -> AnnotatedPictures:
    return open_annotated(AnnotatedConfig(str(root), layout=layout, **({"partial": True} | more)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("layout", "write", "pictures", "positions"), COPIES)
def test_masks_mean_the_official_classes(tmp_path: Path, layout, write, pictures: int, positions: list[int]) -> None:
    write(tmp_path)
    data = opened(layout, tmp_path)
    assert len(data) == pictures
    np.testing.assert_array_equal(data.read(0)[1], [positions])


def test_class_lists_have_the_published_sizes_and_places() -> None:
    sizes = {name: len(layout.classes().words) for name, layout in LAYOUTS.items()}
    assert list(sizes.values()) == [20, 20, 59, 59, 171, 80, 150, 19]
    assert class_names.VOC[15] == "person" and class_names.CONTEXT[59] == "wood" and class_names.ADE[150] == "flag"
    # COCO's category 13 is the stop sign; 92, the first of stuff, the banner; 182 wood.
    assert [class_names.COCO_STUFF[value - 1] for value in (1, 13, 90, 92, 182)] == [
        *("person", "stop sign", "toothbrush", "banner", "wood")
    ]
    assert len(class_names.CONTEXT_OF_459) == 59 == len(set(class_names.CONTEXT_OF_459))
    assert sorted(class_names.CONTEXT_OF_459) == class_names.CONTEXT_OF_459
    assert [n for n in range(91) if n not in class_names.COCO_OBJECT] == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert class_names.CITYSCAPES[24] == "person" and 18 in class_names.CITYSCAPES_VOID


def test_a_value_in_a_gap_of_coco_is_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    mask(tmp_path / "stuffthingmaps_trainval2017" / "val2017" / "1.png", [11] * 6)
    with pytest.raises(UserError, match=r"1\.png.*\[11\]"):
        opened("coco_stuff_171", tmp_path).read(0)


@pytest.mark.parametrize(("layout", "write"), [("ade_150", ade), ("voc_21", voc), ("coco_object", coco)])
def test_archives_are_read_as_downloaded(tmp_path: Path, layout: str, write) -> None:
    write(tmp_path / "there")
    expected = opened(layout, tmp_path / "there").read(0)[1]
    kind = "tar" if layout == "voc_21" else "zip"
    name = {"ade_150": "ADEChallengeData2016", "voc_21": "VOCtrainval_11-May-2012"}
    packed = tmp_path / "packed"
    packed.mkdir()
    if layout == "coco_object":
        for part in ("val2017", "stuffthingmaps_trainval2017"):
            inner = tmp_path / "there" / part if part != "val2017" else tmp_path / "there"
            base = part if part == "val2017" else None
            shutil.make_archive(str(packed / part), "zip", inner, base)
    else:
        top = next((tmp_path / "there").iterdir()).name
        shutil.make_archive(str(packed / name[layout]), kind, tmp_path / "there", top)
    data = opened(layout, packed)
    assert "." in data.record["masks"] and len(data) == 1
    np.testing.assert_array_equal(data.read(0)[1], expected)
    if layout == "ade_150":
        np.testing.assert_array_equal(opened(layout, packed / f"{name[layout]}.zip").read(0)[1], expected)


def test_context_is_read_from_the_archives_of_its_two_sources(tmp_path: Path) -> None:
    context_original(tmp_path / "there")
    (tmp_path / "packed").mkdir()
    for name, kind, inside in (
        ("VOCtrainval_03-May-2010", "tar", "VOCdevkit"),
        ("trainval", "gztar", "trainval"),
    ):
        shutil.make_archive(str(tmp_path / "packed" / name), kind, tmp_path / "there", inside)
    data = opened("context_59", tmp_path / "packed")
    assert data.record["masks"] == "trainval.tar.gz/trainval" and data.name(0) == "a.jpg"
    np.testing.assert_array_equal(data.read(0)[1], [[0, 1, 58, OUT, OUT, 50]])
    shutil.copytree(tmp_path / "there" / "trainval", tmp_path / "packed" / "trainval")
    assert opened("context_59", tmp_path / "packed").record["masks"] == "trainval", "what is unpacked is read first"


def test_a_url_is_read_like_a_folder(tmp_path: Path) -> None:
    ade(tmp_path)
    store = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*.*"):
        store.pipe_file(f"/bucket/{path.relative_to(tmp_path)}", path.read_bytes())
    packed = shutil.make_archive(str(tmp_path / "ADEChallengeData2016"), "zip", tmp_path, "ADEChallengeData2016")
    store.pipe_file("/zipped/ADEChallengeData2016.zip", Path(packed).read_bytes())
    for root in ("memory://bucket", "memory://zipped", "memory://zipped/ADEChallengeData2016.zip"):
        np.testing.assert_array_equal(opened("ade_150", root).read(0)[1], [[OUT, 0, 1, 149, OUT, 0]])


def test_a_damaged_archive_ends_in_a_sentence(tmp_path: Path) -> None:
    context_original(tmp_path / "context")
    shutil.rmtree(tmp_path / "context" / "trainval")
    (tmp_path / "context" / "trainval.tar.gz").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"trainval\.tar\.gz cannot be opened as an archive"):
        opened("context_59", tmp_path / "context")
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"PK half of it")
    with pytest.raises(UserError, match="cannot be opened as an archive"):
        opened("ade_150", tmp_path)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_is_not_there_is_named_with_its_source(tmp_path: Path, layout: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(layout, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path} does not hold {LAYOUTS[layout].title}: expected pictures in {tmp_path}/")
    assert LAYOUTS[layout].get in said


def test_an_incomplete_split_is_refused_unless_asked_for(tmp_path: Path) -> None:
    voc(tmp_path)
    with pytest.raises(UserError, match=r"has 1449 pictures, but .* leads to 1"):
        opened("voc_20", tmp_path, partial=False)
    val = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    val.write_text("2007_01\n2007_02\n2007_09\n")
    with pytest.raises(UserError, match="1 of 3 pictures lack a file, first the mask 2007_02 in .*SegmentationClass;"):
        opened("voc_20", tmp_path, partial=False)
    data = opened("voc_20", tmp_path)
    assert [data.name(n) for n in range(len(data))] == ["2007_01.jpg", "2007_09.jpg"] and data.record["of"] == 1449


def test_a_file_that_is_no_label_map_is_named(tmp_path: Path) -> None:
    context_original(tmp_path)
    (tmp_path / "trainval" / "a.mat").write_bytes(b"nothing of the kind" * 20)
    with pytest.raises(UserError, match=r"a\.mat is no label map"):
        opened("context_59", tmp_path).read(0)


def test_check_data_counts_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cityscapes(tmp_path)
    found = check_data(opened("cityscapes_19", tmp_path), 2)
    assert (found.pictures, found.expected, found.pixels, found.void) == (2, 500, 12, 6)
    assert found.pictures_C.tolist() == [2, 2, *[0] * 16, 2] and found.absent[0] == "building"
    words = [
        f'--segmentation={{"city": {{"root": "{tmp_path}", "layout": "cityscapes_19", "partial": true}}}}',
        "--check-data",
    ]
    assert run_command(lambda: main(words)) == 0
    assert "city: 2 of 500 pictures read, 19 classes; no picture shows building, wall" in capsys.readouterr().out
    (tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_gtFine_labelIds.png").write_bytes(b"cut")
    lines(tmp_path / "gtFine" / "val" / "frankfurt" / "frankfurt_0_gtFine_labelIds.png", "cut too")
    assert run_command(lambda: main(words)) == 2
    printed = capsys.readouterr()
    assert "city: 0 of 500 pictures read" in printed.out and printed.out.count("labelIds.png is not a picture") == 2
    assert "1 of 1 data sets cannot be used" in printed.err
