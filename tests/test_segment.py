"""One picture and some words: shares, overlay, legend, and what wrong input gets."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from colours import install as install_towers
from colours import pixels, write_run
from PIL import Image
from pycocotools import mask as coco_masks

from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import overlay
from pacl_scale.segment import SegmentConfig, main, segment_file

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run and a picture whose upper quarter is red and whose rest is blue."""
    install_towers(monkeypatch)
    write_run(tmp_path / "run")
    picture = np.zeros((80, 160, 3), np.uint8)
    picture[:20], picture[20:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shares_and_overlay(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture.png", "red", "blue", "green", "--checkpoint=run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["blue", "red", "green", "picture.segmented.png"]
    shares = [float(line.split()[0]) for line in lines[:3]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[0] == pytest.approx(75, abs=5) and shares[2] == 0
    drawn = pixels(place / "picture.segmented.png")
    assert drawn.shape[1] >= 160 and drawn.shape[0] > 80, "a legend is below the picture"
    # Far from borders and labels: picture and colour in the stated proportion.
    column = (drawn.shape[1] - 160) // 2 + 3
    for row, pixel, colour in ((4, (255, 0, 0), overlay.COLOURS[0]), (70, (0, 0, 255), overlay.COLOURS[1])):
        expected = [0.45 * p + 0.55 * c for p, c in zip(pixel, colour, strict=True)]
        np.testing.assert_allclose(drawn[row, column], expected, atol=1)


def test_legend_shows_each_words_colour(place: Path) -> None:
    segment_file(SegmentConfig("run", "out.png"), "picture.png", ["red", "blue", "green"])
    legend = pixels(place / "out.png")[80:].reshape(-1, 3)
    for colour in overlay.COLOURS[:3]:
        assert (legend == colour).all(axis=1).sum() > 50
    assert not (legend == overlay.COLOURS[3]).all(axis=1).any()


def test_threshold_and_background_leave_pixels_uncoloured(place: Path) -> None:
    _, shares = segment_file(SegmentConfig("run", "a.png", background=["blue"]), "picture.png", ["red"])
    assert shares["red"] == pytest.approx(0.25, abs=0.05)
    assert shares["(none of these)"] == pytest.approx(1 - shares["red"])
    _, shares = segment_file(SegmentConfig("run", "b.png", threshold=0.0), "picture.png", ["red"])
    assert shares["red"] == pytest.approx(0.25, abs=0.1)
    np.testing.assert_array_equal(pixels(place / "a.png")[70, 100], (0, 0, 255))


def test_masks_are_written_as_png_and_run_lengths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "words.txt").write_text("blue\n\n green \n")
    words = ["picture.png", "red", "--words-file", "words.txt", "--checkpoint=run", "--masks", "--output=o.png"]
    assert main(words) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["blue", "red", "green", "o.png"]
    labels = pixels(place / "o.mask.png")
    assert labels.shape == (80, 160) and labels[0, 0] == 0 and labels[79, 159] == 1
    written = json.loads((place / "o.json").read_text())
    assert [entry["word"] for entry in written["words"]] == ["red", "blue", "green"]
    for number, entry in enumerate(written["words"]):
        assert entry["rle"]["size"] == [80, 160]
        values = np.arange(len(entry["rle"]["counts"])) % 2
        decoded = np.repeat(values, entry["rle"]["counts"]).reshape(80, 160, order="F")
        np.testing.assert_array_equal(decoded, labels == number)
    segment_file(SegmentConfig("run", "b.png", background=["blue"], masks=True), "picture.png", ["red"])
    assert set(np.unique(pixels(place / "b.mask.png"))) == {0, 255}


# COCO's tools are of numpy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_have_the_pictures_own_size_and_cocos_tools_read_them(place: Path) -> None:
    drawn = np.zeros((1000, 2000, 3), np.uint8)
    drawn[:250], drawn[250:] = RED, BLUE
    # As a camera stores a picture that was taken upright: turned by a quarter.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(drawn)).save(place / "large.png", exif=exif)
    segment_file(SegmentConfig("run", "o.jpg", masks=True), "large.png", ["red", "blue"])
    labels = pixels(place / "o.mask.png")
    assert labels.shape == (1000, 2000) and labels[0, 0] == 0 and labels[999, 1999] == 1
    written = json.loads((place / "o.json").read_text())
    assert (written["height"], written["width"]) == (1000, 2000)
    for number, entry in enumerate(written["words"]):
        packed = coco_masks.frPyObjects(entry["rle"], *entry["rle"]["size"])
        np.testing.assert_array_equal(coco_masks.decode(packed), labels == number)
    with Image.open(place / "o.jpg") as overlay_picture:
        assert overlay_picture.format == "JPEG" and 1600 <= overlay_picture.width < 1700


def test_every_picture_of_a_folder_is_segmented(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "many").mkdir()
    for name, colour in (("a.jpg", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (40, 40), colour).save(place / "many" / name)
    (place / "many" / "notes.txt").write_text("no picture")
    assert main(["many", "red", "blue", "--checkpoint=run", "--output=out"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("100.0 %  red") and said[3].endswith("100.0 %  blue")
    assert sorted(path.name for path in (place / "out").iterdir()) == ["a.segmented.png", "b.segmented.png"]
    (place / "empty").mkdir()
    Image.new("RGB", (40, 40)).save(place / "many" / "a.png")
    for folder, complaint in (("empty", "has no picture"), ("many", "two pictures of one name")):
        assert run_command(lambda folder=folder: main([folder, "red", "--checkpoint=run"])) == 2
        assert complaint in capsys.readouterr().err


def test_heat_maps_are_bright_where_a_word_fits(place: Path) -> None:
    settings = SegmentConfig("run", "o.png", heat=True, background=["green"])
    segment_file(settings, "picture.png", ["red", "blue"])
    heat = json.loads((place / "o.json").read_text())["heat"]
    assert heat["files"] == {"red": "o.heat-0.png", "blue": "o.heat-1.png"} and heat["low"] < 0 < heat["high"]
    red, blue = (pixels(place / name) for name in heat["files"].values())
    assert red.shape == (80, 160) and red[0, 0] > 200 > 60 > red[79, 159] and blue[79, 159] > 200 > 60 > blue[0, 0]


def test_finer_strides_windows_scales_and_flips_find_the_edge(place: Path) -> None:
    def edge(**settings: object) -> float:
        return segment_file(SegmentConfig("run", "o.png", **settings), "picture.png", ["red", "blue"])[1]["red"]  # type: ignore[arg-type]

    coarse, fine = edge(), edge(stride=1, size=64)
    assert abs(fine - 0.25) <= abs(coarse - 0.25) and fine == pytest.approx(0.25, abs=0.02)
    for settings in ({"size": 64, "window": 32}, {"scales": (1.0, 2.0)}, {"flip": True, "stride": 2}):
        assert edge(**settings) == pytest.approx(0.25, abs=0.06)


def write_video(path: Path, seconds: int = 3, rate: int = 8) -> None:
    """Red above blue at first, and from the second second on blue above red."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(seconds * rate):
            frame = np.zeros((64, 64, 3), np.uint8)
            frame[:32], frame[32:] = (RED, BLUE) if number < rate else (BLUE, RED)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_frames_of_a_video(place: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(place / f"film.{suffix}")
    words = [f"film.{suffix}", "red", "blue", "--checkpoint=run", "--output=out", "--masks=true"]
    assert main(words) == 0
    assert sorted(path.name for path in (place / "out").glob("*.mask.png")) == [
        f"film-{milliseconds:08d}.segmented.mask.png" for milliseconds in (0, 1000, 2000)
    ]
    tops = [pixels(path)[4, 32] for path in sorted((place / "out").glob("*.mask.png"))]
    assert tops == [0, 1, 1], "the word of the upper half"
    assert main([*words[:-2], "--output=more", "--frames_per_second=4"]) == 0
    assert len(list((place / "more").glob("*.segmented.png"))) == 12


def test_what_is_no_video_ends_in_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(place / "whole.mp4")
    (place / "text.mp4").write_text("no video")
    (place / "cut.mkv").write_bytes((place / "whole.mp4").read_bytes()[:300])
    # A playlist under a video's name, which leads to another file.
    (place / "list.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{place}/whole.mp4\n#EXT-X-ENDLIST\n"
    )
    (place / "concat.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    for name in ("text.mp4", "cut.mkv", "list.mp4", "concat.mp4", "absent.mp4", "s3://bucket/film.mp4"):
        assert run_command(lambda name=name: main([name, "red", "blue", "--checkpoint=run"])) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and name in said[0]
    assert not list(place.glob("*.segmented.png"))


def test_one_word_alone_gets_everything_and_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["picture.png", "red", "--checkpoint=run"]) == 0
    said = capsys.readouterr()
    assert "100.0 %  red" in said.out and "one word alone" in said.err


def test_a_turned_photograph_is_segmented_upright(place: Path) -> None:
    with Image.open("picture.png") as picture:
        exif = Image.Exif()
        exif[0x0112] = 6  # a camera held on its side: to be turned by 90 degrees clockwise
        picture.save("turned.jpg", exif=exif, quality=95)
    segment_file(SegmentConfig("run", "turned.png"), "turned.jpg", ["red", "blue"])
    drawn = pixels(place / "turned.png")
    assert drawn.shape[0] > 160
    left = (drawn.shape[1] - 80) // 2
    assert drawn[100, left + 75, 0] > 150 > drawn[100, left + 5, 0], "the red side is now on the right"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.png", "red", "--checkpoint=run"], "nowhere.png: there is no such file"),
        (["text.png", "red", "--checkpoint=run"], "text.png is not a picture"),
        (["picture.png", "red"], "runs/demo"),
        (["picture.png", "red", "--checkpoint=nowhere"], "nowhere"),
        (["picture.png", "red", "red", "--checkpoint=run"], "named once"),
        (["picture.png", "", "red", "--checkpoint=run"], "empty"),
        (["picture.png", "--checkpoint=run"], "word"),
        (["picture.png", "red", "--opacity=2"], "opacity"),
        (["picture.png", "red", "--threshold=2"], "threshold"),
        (["picture.png", "red", "--size=-1"], "size"),
        (["picture.png", "red", "--stride=-1"], "stride"),
        (["picture.png", "red", "--scales=[0]"], "scales"),
        (["picture.png", "red", "--frames_per_second=0"], "frames_per_second"),
        (["picture.png", "red", "--shade=1"], "shade"),
        (["picture.png", "red", "--checkpoint=run", "--output=o.gif"], "must end in .png, .jpg, .jpeg"),
        (["strip.png", "red", "blue", "--checkpoint=run"], "would enter the vision tower as 16 x 480000 pixels"),
    ],
)
def test_wrong_input_ends_in_one_sentence(
    place: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "text.png").write_text("no picture")
    Image.new("RGB", (1, 30000)).save(place / "strip.png")
    assert run_command(lambda: main(words)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and complaint in said[0]
    assert not list(place.glob("*.segmented.png"))


def test_as_a_module_it_exits_with_status_2_and_no_traceback(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pacl_scale.segment", "nowhere.png", "dog"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere.png" in done.stderr


def test_a_word_is_written_inside_its_region() -> None:
    labels = np.full((60, 90), overlay.NOTHING)
    labels[:, :40] = 2  # a block, with a thin tail that its centre of mass must not lead to
    labels[50:53, 40:] = 2
    labels[10:14, 60:64] = 5  # too small for a word
    points = overlay.label_points(labels)
    assert list(points) == [2]
    x, y = points[2]
    assert 10 / 90 < x < 30 / 90 and 10 / 60 < y < 50 / 60


def test_labels_of_a_ring_lie_on_the_ring() -> None:
    ys, xs = np.mgrid[:100, :100]
    radius = np.hypot(xs - 50, ys - 50)
    labels = np.where((radius > 25) & (radius < 45), 1, overlay.NOTHING)
    x, y = overlay.label_points(labels)[1]
    assert labels[round(y * 100), round(x * 100)] == 1


def test_colours_are_many_and_distinct() -> None:
    colours = overlay.colours(40)
    assert len(set(colours)) == 40 and colours[:10] == list(overlay.COLOURS)
    with pytest.raises(UserError):
        segment_file(SegmentConfig("nowhere"), "nowhere.png", ["a"])
