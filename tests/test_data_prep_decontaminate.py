"""Evaluation pictures are kept out of a data set: as the same file, and resized or recompressed."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from web_farm import WebFarm, draw, encoded

from data_prep import decontaminate
from data_prep.causes import FetchError
from data_prep.decontaminate import perceptual_hash, read_lists
from data_prep.download import main
from pacl_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZE = (400, 300)


def listed(tmp_path: Path, *lines: str) -> tuple[str, ...]:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
    path.write_text("\n".join(lines))
    return (str(path),)


def bits_between(one: bytes, other: bytes) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


def test_a_copy_has_nearly_the_same_hash_and_others_have_not() -> None:
    originals = [encoded(draw(number, SIZE)) for number in range(12)]
    for number, original in enumerate(originals):
        picture = Image.open(io.BytesIO(original))
        copies = [encoded(picture, quality=40), encoded(picture.resize((160, 120))), encoded(picture, "PNG")]
        copies += [encoded(picture.convert("L")), encoded(picture.convert("CMYK"))]
        assert max(bits_between(original, copy) for copy in copies) <= 4
        assert min(bits_between(original, other) for at, other in enumerate(originals) if at != number) > 12


def test_a_rotated_copy_is_judged_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = draw(3, SIZE)
    lying = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert bits_between(encoded(upright), lying) <= 4


def test_the_command_lists_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    content = encoded(draw(1, SIZE))
    (images / "deeper" / "1.JPG").write_bytes(content)
    (images / "2.png").write_bytes(b"no picture")
    (images / "notes.txt").write_text("x")
    out = tmp_path / "list.txt"
    kinds = "kinds=[sha256,md5,phash]"
    assert decontaminate.main([f"images={images}", f"output={out}", kinds]) == 0
    assert "1 pictures listed, 1 files were none" in capsys.readouterr().out
    assert out.read_text().splitlines() == [
        f"sha256:{hashlib.sha256(content).hexdigest()}\tdeeper/1.JPG",
        f"md5:{hashlib.md5(content).hexdigest()}\tdeeper/1.JPG",
        f"phash:{perceptual_hash(content):016x}\tdeeper/1.JPG",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert decontaminate.main([f"images={images}", f"output={tmp_path / 'other.txt'}"]) == 2
    assert "cannot be read (Input/output error)" in capsys.readouterr().err
    (images / "deeper" / "1.JPG").unlink()
    for words, reason in (
        ([f"images={images}"], "holds no picture"),
        ([f"images={tmp_path / 'x'}"], "no such folder"),
        ([f"images={images}", "kinds=[crc]"], "choose among"),
    ):
        assert decontaminate.main([*words, f"output={tmp_path / 'other.txt'}"]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "other.txt").exists()


def test_lists_find_what_they_name(tmp_path: Path) -> None:
    content, other = encoded(draw(1, SIZE)), encoded(draw(2, SIZE))
    smaller = encoded(draw(1, SIZE).resize((200, 150)))
    md5, sha256 = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    near = listed(tmp_path, "# VOC", "", f"PHASH:{perceptual_hash(content):016X}\tvoc/1.jpg")
    for urls in (listed(tmp_path, f"md5:{md5}"), listed(tmp_path, f"sha256:{sha256}\tvoc/1.jpg"), near):
        with pytest.raises(FetchError, match="evaluation_picture: .*1"):
            read_lists(urls, 4).check(content)
        read_lists(urls, 4).check(other)
    with pytest.raises(FetchError, match="bits from voc/1.jpg"):
        read_lists(near, 4).check(smaller)
    off_by_three = listed(tmp_path, f"phash:{perceptual_hash(content) ^ 0b10011:016x}\tvoc/1.jpg")
    with pytest.raises(FetchError, match="3 bits from voc/1.jpg"):
        read_lists(off_by_three, 3).check(content)
    read_lists(off_by_three, 2).check(content)
    read_lists(near, 0).check(encoded(draw(1, SIZE).rotate(5)))


@pytest.mark.parametrize("line", ["sha256:abc", "md5:" + "0" * 64, "0" * 64, "phash:" + "g" * 16, "sha1:" + "0" * 40])
def test_a_line_that_is_no_hash(line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: .* is no hash"):
        read_lists(listed(tmp_path, "phash:" + "0" * 16, line), 4)


def test_the_order_of_lists_does_not_matter(tmp_path: Path) -> None:
    one, two = "phash:" + "0" * 16, "phash:" + "1" * 16
    together = decontaminate.describe_lists(listed(tmp_path, one, two))
    assert together == decontaminate.describe_lists([*listed(tmp_path, two), *listed(tmp_path, one, two)])
    assert together["phash"] == 2
    assert together != decontaminate.describe_lists(listed(tmp_path, one))


@pytest.mark.slow
def test_evaluation_pictures_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    # The farm serves pictures of 96 x 64; one is listed as it is, one larger and recompressed.
    (images / "1.jpg").write_bytes(encoded(draw(1)))
    (images / "2.jpg").write_bytes(encoded(draw(2).resize((480, 320), Image.Resampling.BICUBIC), quality=60))
    exclude = tmp_path / "voc.txt"
    assert decontaminate.main([f"images={images}", f"output={exclude}"]) == 0
    with WebFarm() as farm:
        rows = [f"a dog, number {n}\t{farm.url(f'ok/{n}.jpg')}\n" for n in range(8)]
        (tmp_path / "pairs.tsv").write_text("".join(rows))
        words = ["--config", str(ROOT / "configs/data/demo.yaml"), f"url_list={tmp_path / 'pairs.tsv'}"]
        words += [f"output={tmp_path / 'out'}", "prepare.samples_per_shard=10", "prepare.nouns=false"]
        assert main([*words, f"fetch.exclude=[{exclude}]"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["got"], report["failures"]) == (6, {"evaluation_picture": 2})
    (tmp_path / "out" / "00000_stats.json").unlink()
    capsys.readouterr()
    assert main(words) == 2
    assert "holds pictures made with fetch.exclude=" in capsys.readouterr().err
