"""A folder of captioned pictures to tars."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from web_farm import draw, encoded

from data_prep.pack import main
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five sound pictures of three kinds, two of them with two captions, and what does not belong."""
    images = tmp_path / "images"
    (images / "more.v2").mkdir(parents=True)
    for number, (name, kind) in enumerate(
        {"a.jpg": "JPEG", "more.v2/b.x.png": "PNG", "c": "WEBP", "d.jpg": "JPEG", "e.jpg": "JPEG"}.items()
    ):
        (images / name).write_bytes(encoded(draw(number), kind))
    (images / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "secret.jpg").write_bytes(encoded(draw(9)))
    rows = [
        'a.jpg,"Two dogs, near a chair ."',
        "more.v2/b.x.png,A cat on a dining table .",
        "a.jpg,A dog with a red ball .",
        "c,",
        "c,An apple .",
        "d.jpg,A horse .",
        "e.jpg,",
        "missing.jpg,A bird .",
        "broken.jpg,A bird .",
        "../secret.jpg,A bird .",
    ]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    return tmp_path


def run(folder: Path, output: str, *more: str) -> int:
    words = ["--images", str(folder / "images"), "--captions", str(folder / "captions.csv"), "--output", output]
    return main([*words, "samples_per_shard=3", *more])


def members(url: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(url))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_pictures_are_packed_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(folder / "out")
    assert run(folder, output) == 0
    first, second = members(f"{output}/00000.tar"), members(f"{output}/00001.tar")
    assert list(first) == [
        f"00000000{n}.{end}" for n, kind in enumerate(["jpg", "png", "webp"]) for end in sorted([kind, "txt", "json"])
    ]
    assert first["000000001.png"] == (folder / "images/more.v2/b.x.png").read_bytes()
    assert first["000000000.txt"] == b"Two dogs, near a chair ."
    meta = json.loads(first["000000000.json"])
    assert meta["captions"] == ["Two dogs, near a chair .", "A dog with a red ball ."]
    assert meta["nouns"] == ["dog", "chair", "ball"]
    assert (meta["image"], meta["width"], meta["height"]) == ("a.jpg", 96, 64)
    assert json.loads(first["000000002.json"])["captions"] == ["An apple ."]
    assert list(second) == ["000000003.jpg", "000000003.json", "000000003.txt"]
    assert [(shard.name, shard.samples) for shard in SampleIndex.load(output).shards] == [
        ("00000.tar", 3),
        ("00001.tar", 1),
    ]
    account = json.loads((folder / "out/pack.json").read_text())
    assert account["pictures"] == 8 and account["samples"] == 4 and account["captions"] == 5
    assert account["left_out"] == {
        "no caption": 1,
        "no such file": 1,
        "not a JPEG, PNG or WebP picture": 1,
        "path leads out of the folder": 1,
    }
    assert "2 shards, indexed" in capsys.readouterr().out


def test_evaluation_pictures_are_left_out(folder: Path) -> None:
    output, listed = folder / "out", folder / "voc.txt"
    listed.write_text(f"sha256:{hashlib.sha256((folder / 'images/d.jpg').read_bytes()).hexdigest()}\n")
    assert run(folder, str(output), "nouns=false", f"exclude=[{listed}]") == 0
    account = json.loads((output / "pack.json").read_text())
    assert (account["samples"], account["left_out"]["evaluation_picture"]) == (3, 1)
    assert run(folder, str(output), "nouns=false") == 2  # another data set


def test_twice_is_once_and_what_is_missing_is_made_again(folder: Path) -> None:
    output = folder / "out"
    assert run(folder, str(output), "nouns=false") == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert run(folder, str(output), "nouns=false") == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == before
    (output / "00001.tar").unlink()
    assert run(folder, str(output), "nouns=false") == 0
    assert {path: path.read_bytes() for path in output.iterdir()} == {path: before[path][1] for path in before}


def test_other_captions_need_another_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(folder / "out")
    assert run(folder, output, "nouns=false") == 0
    assert run(folder, output, "nouns=false", "samples_per_shard=2") == 2
    assert "choose another output" in capsys.readouterr().err
    (folder / "strange").mkdir()
    (folder / "strange/00000.tar").write_bytes(b"precious")
    assert run(folder, str(folder / "strange"), "nouns=false") == 2
    assert (folder / "strange/00000.tar").read_bytes() == b"precious"


@pytest.mark.s3
def test_packs_onto_an_object_store(folder: Path, s3_url: str) -> None:
    assert run(folder, s3_url, "nouns=false") == 0
    picture = Image.open(io.BytesIO(members(f"{s3_url}/00001.tar")["000000003.jpg"]))
    assert picture.size == (96, 64) and len(SampleIndex.load(s3_url)) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "nowhere"}, "no such folder"),
        ({"captions": "nowhere.csv"}, "no such file"),
        ({"image_column": "file"}, "has no column file"),
        ({"samples_per_shard": "0"}, "samples_per_shard"),
        ({"sample_per_shard": "3"}, "sample_per_shard"),
    ],
)
def test_bad_input(folder: Path, change: dict, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = [f"--{key}={folder / value if key in ('images', 'captions') else value}" for key, value in change.items()]
    assert run(folder, str(folder / "out"), *extra) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("image,caption\n", "is empty"), ("image,caption\nx.jpg,a dog\n", "none of the pictures"), ("", "has no column")],
)
def test_captions_that_give_nothing(folder: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "captions.csv").write_text(content)
    assert run(folder, str(folder / "out")) == 2
    assert words in capsys.readouterr().err
    assert not list(folder.glob("out/*"))
