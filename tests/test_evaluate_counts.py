"""Boundary IoU, patch accuracy, confidence intervals, and counts that survive interruption and division."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import ColourVision, write_pictures, write_run
from colours import install as install_towers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pacl_scale.errors import UserError
from pacl_scale.evaluate import progress as progress_module
from pacl_scale.evaluate.boundaries import band, boundary_counts, boundary_iou
from pacl_scale.evaluate.classes import NOT_SCORED, ClassList
from pacl_scale.evaluate.command import EvaluateConfig, evaluate
from pacl_scale.evaluate.counts import Confusion
from pacl_scale.evaluate.intervals import intervals, mean_per_class_interval
from pacl_scale.evaluate.labels import Lattice
from pacl_scale.evaluate.pictures import AnnotatedConfig
from pacl_scale.evaluate.progress import Progress
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.rows import Row
from pacl_scale.evaluate.segmentation import oracle_labels
from pacl_scale.evaluate.tallies import PictureCounts, Tally, majority, scores_of, sparse

C = 3
maps = arrays.arrays(np.int64, (9, 12), elements=st.integers(NOT_SCORED, C - 1))


def naive_band(labels: np.ndarray, distance: int) -> np.ndarray:
    found = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        for dy in range(-distance, distance + 1):
            for dx in range(-distance, distance + 1):
                inside = 0 <= y + dy < labels.shape[0] and 0 <= x + dx < labels.shape[1]
                found[y, x] |= not inside or labels[y + dy, x + dx] != labels[y, x]
    return found


@settings(max_examples=20, deadline=None)
@given(maps, maps, st.sampled_from([0.02, 0.15]))
def test_boundary_counts_are_those_of_a_loop(truth: np.ndarray, predicted: np.ndarray, share: float) -> None:
    predicted = np.abs(predicted)
    distance = max(1, round(share * (9**2 + 12**2) ** 0.5))
    said = np.where(truth == NOT_SCORED, NOT_SCORED, predicted)
    np.testing.assert_array_equal(band(truth, distance), naive_band(truth, distance))
    expected = np.zeros((3, C), np.int64)
    for c in range(C):
        in_truth = naive_band(truth, distance) & (truth == c)
        in_said = naive_band(said, distance) & (said == c)
        expected[:, c] = (in_truth & in_said).sum(), in_truth.sum(), in_said.sum()
    np.testing.assert_array_equal(boundary_counts(truth, predicted, C, share), expected)


@pytest.mark.parametrize("distance", [1, 2])
def test_bands_of_single_edges_and_pixels_are_those_of_a_loop(distance: int) -> None:
    """Where nearly everything is one label, one pixel too few or too many shows."""
    rows, columns = np.mgrid[:9, :12]
    shapes = [columns < edge for edge in range(1, 12)] + [rows < edge for edge in range(1, 9)]
    shapes += [(rows == y) & (columns == x) for y, x in np.ndindex(9, 12)]
    for labels in (shape.astype(np.int64) for shape in shapes):
        np.testing.assert_array_equal(band(labels, distance), naive_band(labels, distance))


def test_boundary_iou_sees_a_shifted_outline_that_iou_forgives() -> None:
    truth = np.zeros((100, 100), np.int64)
    truth[20:80, 20:80] = 1
    shifted = np.roll(truth, 2, axis=1)
    iou = Confusion.of(truth, shifted, 2).iou_C()[1]
    boundary = boundary_iou(boundary_counts(truth, shifted, 2, 0.02))[1]
    assert iou > 0.9 and boundary < 0.75
    assert boundary_iou(boundary_counts(truth, truth, 3, 0.02))[:2].tolist() == [1, 1]
    assert np.isnan(boundary_iou(boundary_counts(truth, truth, 3, 0.02))[2])


def naive_miou(counts_P3C: np.ndarray) -> float:
    hits, truth, predicted = counts_P3C.sum(axis=0)
    return float(np.mean([h / (t + p - h) for h, t, p in zip(hits, truth, predicted, strict=True) if t]))


def test_intervals_are_those_of_a_loop_over_draws() -> None:
    random = np.random.default_rng(3)
    truth = random.integers(0, 50, (20, 4))
    truth[:, 3] *= random.random(20) < 0.15
    hits = (truth * random.random((20, 4))).astype(np.int64)
    counts = np.stack([hits, truth, hits + random.integers(0, 9, (20, 4))], axis=1)
    mious = np.array([naive_miou(one[None]) for one in counts])
    found = intervals(counts, mious, draws=2000)
    draws = [naive_miou(counts[random.integers(0, 20, 20)]) for _ in range(2000)]
    np.testing.assert_allclose(found["miou"], np.percentile(draws, [2.5, 97.5]), atol=0.015)
    means = [mious[random.integers(0, 20, 20)].mean() for _ in range(2000)]
    np.testing.assert_allclose(found["miou_per_picture"], np.percentile(means, [2.5, 97.5]), atol=0.015)
    assert found["miou"][0] < naive_miou(counts) < found["miou"][1]
    assert found == intervals(counts, mious, draws=2000)
    # Counts along outlines are scored as all counts are, and patches as pixels of one class are.
    both = intervals(counts, bands_P3C=counts[:, :, :2], patches_P2=counts[:, :2, 0], draws=2000)
    alone = intervals(counts[:, :, :2], draws=2000)
    assert both["boundary_iou"] == alone["miou"]
    shares = [counts[drawn, 0, 0].sum() / counts[drawn, 1, 0].sum() for drawn in random.integers(0, 20, (2000, 20))]
    np.testing.assert_allclose(both["patch_accuracy"], np.percentile(shares, [2.5, 97.5]), atol=0.015)
    assert mean_per_class_interval(np.array([5, 0]), np.array([5, 5]))[0] == pytest.approx(0.5, abs=0.001)
    same = intervals(np.repeat(counts[:1], 9, axis=0), np.repeat(mious[:1], 9))
    assert same["pixel_accuracy"] == pytest.approx([hits[0].sum() / truth[0].sum()] * 2)
    assert intervals(counts[:0], mious[:0])["miou"] is None


def test_a_tally_of_pictures_gives_the_scores_of_their_sum() -> None:
    random = np.random.default_rng(0)
    classes = ClassList(words={1: "a", 2: "b", 3: "c"}, background=0, score_background=True)
    tally, total = Tally(), Confusion.empty(4)
    for number in range(5):
        matrix = Confusion(random.integers(0, 9, (4, 4)))
        total = total + matrix
        tally.pictures[f"{number}"] = PictureCounts({"": sparse(matrix)}, patches=[number, 10])
    expected = [
        [np.diag(m.counts_CC), m.truth_C, m.predicted_C] for m in (c.matrix(4) for c in tally.pictures.values())
    ]
    np.testing.assert_array_equal(tally.sums(4), expected)
    scores = scores_of(tally, classes, 4)
    assert scores["foreground"]["intervals"]["miou"][0] <= scores["foreground"]["miou"]
    assert scores["miou"] == total.miou() and scores["foreground"]["miou"] == total.miou([0, 1, 2])
    assert scores["patch_accuracy"] == 10 / 50 and scores["boundary_iou"] is None
    assert scores["per_class"][3]["word"] == "background" and scores["per_class"][3]["pictures"] == 5
    guess, answer = majority(tally, 4)
    assert answer == total.truth_C.argmax()
    assert guess.total(4).pixel_accuracy() == pytest.approx(total.truth_C.max() / total.truth_C.sum())


def test_oracle_of_overlapping_patches_asks_the_nearest() -> None:
    truth = np.zeros((8, 8), np.int64)
    truth[:, 4:] = 1
    # Patches of 4 pixels every 2: centres at 2, 4 and 6; the middle one is nearest to columns 3 and 4.
    labels = oracle_labels(truth, (3, 3), 2, (8, 8), Lattice(4, 2))
    assert (labels[:, :4] == 0).all() and (labels[:, 5:] == 1).all()


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run and seven pictures of colour blocks, colour towers installed."""
    install_towers(monkeypatch)
    write_pictures(tmp_path / "data", count=7)
    write_run(tmp_path / "run")
    return tmp_path


def rows_of(place: Path, output: str, **more: object) -> list[Row]:
    data = {"blocks": AnnotatedConfig(str(place / "data"))}
    words = {"examples": 0, "threads": 1, "batch_size": 1, "output": str(place / output), **more}
    return evaluate(EvaluateConfig(str(place / "run"), segmentation=data, **words))  # type: ignore[arg-type]


def figures(rows: list[Row]) -> str:
    return json.dumps([[row.method, row.scores, row.per_picture, row.confusion, row.checkpoint] for row in rows])


def test_patch_accuracy_is_that_of_the_patches(blocks: Path) -> None:
    rows = {row.method: row for row in rows_of(blocks, "out")}
    # Blocks end between patches, so every patch has one colour and the tower reads it.
    assert rows["pacl"].scores["patch_accuracy"] == 1
    write_run(blocks / "wrong", right=False)
    wrong = {row.method: row for row in rows_of(blocks, "out", methods={"wrong": str(blocks / "wrong")})}["wrong"]
    # It takes red for green: of fourteen equal blocks the blue ones are right.
    blue = sum(2 in (number % 3, (number + 1) % 3) for number in range(7))
    assert wrong.scores["patch_accuracy"] == pytest.approx(blue / 14, abs=1e-3)
    assert rows["patch_oracle"].scores["patch_accuracy"] is None
    low, high = rows["pacl"].scores["intervals"]["miou"]
    assert low <= rows["pacl"].scores["miou"] <= high
    assert rows["pacl"].data["layout"] == "folder" and rows["pacl"].data["void"] == 255


def test_patch_accuracy_knows_no_windows_and_no_background(blocks: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).save(blocks / "data" / "images" / "0.png")
    Image.new("L", (32, 32), 1).save(blocks / "data" / "masks" / "0.png")
    windows = rows_of(blocks, "out", protocol=Protocol(window=32, size=32), controls=[])[0]
    assert windows.scores["patch_accuracy"] is None, "not that of the square pictures that fit into one window"
    # "red" wins as a word for the background too, where it does so on pixels, and there alone.
    rule = Protocol(background="words", background_words=["red"], background_where="always", templates="none")
    row = rows_of(blocks, "out", protocol=rule, controls=[])[0]
    assert row.scores["patch_accuracy"] == 1


def test_another_part_may_forget_in_the_middle(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(blocks, "out", part=0, parts=2) == []
    real = Path.read_bytes

    def gone(self: Path) -> bytes:
        if self.name == "0of2.jsonl":
            self.unlink(missing_ok=True)
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert rows_of(blocks, "out", part=1, parts=2) == [], "the one that forgot has written the rows"


def test_an_interrupted_evaluation_goes_on_at_the_next_picture(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = install_towers(monkeypatch)
    whole = figures(rows_of(blocks, "whole"))
    assert vision.pictures_encoded == 7 and not list((blocks / "whole" / "evals").rglob("*.jsonl"))
    real, count = Progress.add, [0]

    def interrupted(self: Progress, name: str, counts: progress_module.Counts) -> None:
        real(self, name, counts)
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows_of(blocks, "cut")
    monkeypatch.setattr(Progress, "add", real)
    (kept,) = (blocks / "cut" / "evals" / "progress").rglob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 3
    kept.write_bytes(kept.read_bytes() + b'["4.png", {"pa')  # the power went in the middle of a line
    fresh = install_towers(monkeypatch)
    assert figures(rows_of(blocks, "cut")) == whole
    assert fresh.pictures_encoded == 4, "only the pictures that were not counted pass the tower"
    assert not list((blocks / "cut" / "evals").rglob("*.jsonl"))


def test_other_settings_do_not_find_the_counts(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "forget", lambda self: None)
    first = figures(rows_of(blocks, "out"))
    again = install_towers(monkeypatch)
    assert figures(rows_of(blocks, "out")) == first and again.pictures_encoded == 0
    # Other weights at the same place and step, as after a training that was done anew, if only in parts of a tower.
    shutil.rmtree(blocks / "run" / "checkpoints")
    write_run(blocks / "run", beside={"tail.weight": torch.ones(2)})
    assert figures(rows_of(blocks, "out")) != first and again.pictures_encoded == 7
    again.pictures_encoded = 0
    shutil.rmtree(blocks / "run" / "checkpoints")
    write_run(blocks / "run", right=False)
    assert figures(rows_of(blocks, "out")) != first
    assert again.pictures_encoded == 7


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_parts_add_up_to_the_whole_bit_by_bit(blocks: Path, parts: int) -> None:
    whole = rows_of(blocks, "whole")
    results = [rows_of(blocks, "shared", part=part, parts=parts) for part in range(parts)]
    (found,) = [rows for rows in results if rows]
    assert results.index(found) == min(parts, 7) - 1, "the one that finishes last has the rows"
    assert figures(found) == figures(whole) == figures(rows_of(blocks, "again"))


def test_parts_need_a_folder_and_a_number(blocks: Path) -> None:
    with pytest.raises(ValueError, match="part counts from 0"):
        EvaluateConfig("x", segmentation={"a": AnnotatedConfig("x")}, part=2, parts=2)
    with pytest.raises(UserError, match="folder all of them see"):
        Progress.open("memory://bucket/run", {}, 0, 2)
    assert Progress.open("memory://bucket/run", {}, 0, 1).remaining(["a", "b"]) == [0, 1]


def test_small_strides_pass_the_tower_in_small_batches(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = ColourVision.encode

    def encode(self: ColourVision, images: torch.Tensor, stride: int | None = None):
        sizes.append(len(images))
        return real(self, images, stride)

    monkeypatch.setattr(ColourVision, "encode", encode)
    monkeypatch.setattr("pacl_scale.evaluate.segmentation.TOKENS_AT_ONCE", 60)
    rows_of(blocks, "out", batch_size=16)
    assert max(sizes) == 2, "pictures of 4 x 6 patches go two by two"
