"""Counts, class lists and protocols against torchmetrics and naive loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from pacl_scale.errors import UserError
from pacl_scale.evaluate import labels as labels_module
from pacl_scale.evaluate.classes import NOT_SCORED, ClassGroup, ClassList, read_class_list
from pacl_scale.evaluate.counts import Confusion, per_class_table
from pacl_scale.evaluate.labels import label_pixels
from pacl_scale.evaluate.protocol import Protocol, class_vectors
from pacl_scale.evaluate.retrieval import recalls
from pacl_scale.evaluate.segmentation import oracle_labels

C = 5
SHAPE = (12, 9)
truths = arrays.arrays(np.int64, SHAPE, elements=st.integers(NOT_SCORED, C - 1))
predictions = arrays.arrays(np.int64, SHAPE, elements=st.integers(0, C - 1))


@settings(max_examples=60, deadline=None)
@given(truths, predictions)
def test_counts_are_those_of_a_loop_over_pixels(truth: np.ndarray, predicted: np.ndarray) -> None:
    expected = np.zeros((C, C), np.int64)
    for true, said in zip(truth.flat, predicted.flat, strict=True):
        if true != NOT_SCORED:
            expected[true, said] += 1
    counts = Confusion.of(truth, predicted, C).counts_CC
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)


@settings(max_examples=40, deadline=None)
@given(truths, predictions)
def test_scores_agree_with_torchmetrics(truth: np.ndarray, predicted: np.ndarray) -> None:
    if (truth == NOT_SCORED).all():
        return
    confusion = Confusion.of(truth, predicted, C)
    said, true = torch.from_numpy(predicted), torch.from_numpy(truth)
    options = {"num_classes": C, "ignore_index": NOT_SCORED}
    present = confusion.truth_C > 0
    iou = MulticlassJaccardIndex(average="none", **options)(said, true).numpy()
    accuracy = MulticlassAccuracy(average="none", **options)(said, true).numpy()
    np.testing.assert_allclose(confusion.iou_C()[present], iou[present], rtol=1e-6)
    np.testing.assert_allclose(confusion.accuracy_C()[present], accuracy[present], rtol=1e-6)
    assert np.isnan(confusion.iou_C()[~present]).all()
    assert confusion.miou() == pytest.approx(iou[present].mean())
    micro = MulticlassAccuracy(average="micro", **options)(said, true)
    assert confusion.pixel_accuracy() == pytest.approx(float(micro))


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(-1, C, (8, *SHAPE)), random.integers(0, C, (8, *SHAPE))
    whole = Confusion.of(truth, predicted, C)
    ranks = [Confusion.of(truth[rank::3], predicted[rank::3], C) for rank in range(3)]
    np.testing.assert_array_equal((ranks[0] + ranks[1] + ranks[2]).counts_CC, whole.counts_CC)


def test_scores_of_a_picture_worked_out_by_hand() -> None:
    # Truth: three pixels of 0, one of 1. Said: 0 0 1 1. Class 2 is in nobody's picture.
    counts = Confusion.of(np.array([[0, 0, 0, 1, NOT_SCORED]]), np.array([[0, 0, 1, 1, 2]]), 3)
    assert counts.miou() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert counts.pixel_accuracy() == pytest.approx(3 / 4)
    assert counts.mean_class_accuracy() == pytest.approx((2 / 3 + 1) / 2)
    assert counts.miou([1]) == pytest.approx(1 / 2)
    assert counts.pixel_accuracy([1]) == 1
    assert counts.miou([2]) is None
    classes = ClassList(words={0: "a", 1: ["b", "bee"], 7: "c"})
    table = per_class_table(counts, classes, np.array([1, 1, 0]))
    assert [entry["iou"] for entry in table] == [pytest.approx(2 / 3), 0.5, None]
    assert [(entry["word"], entry["index"], entry["truth_pixels"]) for entry in table] == [
        ("a", 0, 3),
        ("b", 1, 1),
        ("c", 7, 0),
    ]


def test_a_class_predicted_but_not_there_costs_the_true_class_and_adds_no_zero() -> None:
    counts = Confusion.of(np.zeros((1, 4), int), np.array([[0, 0, 0, 1]]), 2)
    assert counts.miou() == pytest.approx(3 / 4)
    assert Confusion.empty(2).miou() is None


@pytest.mark.parametrize("portion", [1, 2, 64])
def test_upsampling_in_portions_is_upsampling_at_once(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(scores[None], size=(33, 21), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(labels_module, "CLASSES_AT_ONCE", portion)
    labels, best = label_pixels(
        lambda some: torch.nn.functional.interpolate(scores[None, some], size=(33, 21), mode="bilinear")[0],
        7,
        33 * 21,
        Protocol(),
    )
    torch.testing.assert_close(labels, whole.argmax(0))
    torch.testing.assert_close(best, whole.amax(0))


def test_large_pictures_are_upsampled_few_classes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
    portions: list[int] = []

    def portion_of(classes: slice) -> torch.Tensor:
        portions.append(len(scores[classes]))
        return scores[classes]

    best, largest = scores.argmax(0), []
    for values in (1, 48 * 7, 48 * 1000):
        monkeypatch.setattr(labels_module, "VALUES_AT_ONCE", values)
        portions.clear()
        for background in ("cosine", "entropy"):
            rule = Protocol(background=background, background_threshold=-9.0 if background == "cosine" else 99.0)
            torch.testing.assert_close(label_pixels(portion_of, 40, 48, rule, background=40)[0], best)
        assert sum(portions) == 2 * 40
        largest.append(max(portions))
    assert largest == [1, 7, 32]


def test_oracle_is_the_majority_of_each_patch() -> None:
    truth = np.zeros((8, 8), np.int64)
    truth[:4, :4] = 1
    truth[0, 0] = 2  # a lone pixel is lost in its patch
    truth[:, 4:] = NOT_SCORED
    labels = oracle_labels(truth, (2, 2), 3)
    assert labels.shape == (8, 8)
    assert labels[0, 0] == 1 and labels[7, 0] == 0 and 2 not in labels
    np.testing.assert_array_equal(oracle_labels(truth, (8, 8), 3)[:, :4], truth[:, :4])

    # Empty patches vote for nothing, so they cannot outvote a lone patch at its corner.
    truth[:, 4:], truth[4:] = NOT_SCORED, NOT_SCORED
    assert (oracle_labels(truth, (2, 2), 3)[:4, :4] == 1).all()


def test_void_background_and_classes_become_positions() -> None:
    classes = ClassList(words={3: "cat", 1: "dog"}, void=255, background=0)
    mask = np.array([[0, 1], [3, 255]], np.uint8)
    np.testing.assert_array_equal(classes.positions(mask, "m.png"), [[NOT_SCORED, 0], [1, NOT_SCORED]])
    with pytest.raises(UserError, match=r"m\.png.*\[2\]"):
        classes.positions(np.array([[2]], np.uint8), "m.png")
    with pytest.raises(UserError, match="indices from -1 to 2147483647"):
        classes.positions(np.array([[-1, 2**31 - 1]], np.int32), "m.png")
    wide = ClassList(words={1: "a", 458: "b"}, void=None)
    np.testing.assert_array_equal(wide.positions(np.array([[458, 1]], np.int32), "m.png"), [[1, 0]])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"words": {1: "dog"}}, "at least two"),
        ({"words": {1: "dog", 255: "cat"}}, "void"),
        ({"words": {0: "dog", 1: "cat"}, "background": 0}, "background"),
        ({"words": {1: "dog", 2: "dog"}}, "names both"),
        ({"words": {1: "dog", 2: []}}, "no word"),
        ({"words": {1: "dog", 2: "cat"}, "groups": {"g": ClassGroup([9])}}, "no classes"),
        ({"words": {1: "dog", 2: "cat"}, "groups": {"g": ClassGroup([1], {1: "cat"})}}, "names both"),
    ],
)
def test_class_lists_that_contradict_themselves_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClassList(**settings)


def test_a_class_list_from_yaml_has_word_sets() -> None:
    text = b"""
words: {1: boat, 2: [cat, kitten], 5: car}
groups:
  kinds: {classes: [1, 5]}
  unseen_words: {classes: [1], words: {1: ship}}
"""
    classes = read_class_list(text, "c.yaml")
    assert classes.word_sets() == [None, "unseen_words"]
    assert classes.synonyms() == [["boat"], ["cat", "kitten"], ["car"]]
    assert classes.synonyms("unseen_words") == [["ship"], ["cat", "kitten"], ["car"]]
    assert classes.members("kinds") == [0, 2]
    for broken in (
        *(b"words: [", b"[1]", b"", b"words: {1: a, 2: b}\nshade: red", b"words: {x: a, y: b}", b"words: [a, b]"),
        *(b"words: {1: a, 2: b}\nvoid: x", b"words: {1: a, 2: yes}", b"words: {1: a, 2: b}\ngroups: {g: {classes: 1}}"),
    ):
        with pytest.raises(UserError, match=r"c\.yaml is no class list"):
            read_class_list(broken, "c.yaml")


class Letters:
    """Texts to vectors that a test can foresee: the count of each letter a to d."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[text.count(letter) for letter in "abcd"] for text in texts], dtype=torch.float32)


def test_class_vectors_average_synonyms_of_unit_length() -> None:
    vectors = class_vectors(Letters(), [["a"], ["bbbb", "c"]], Protocol(templates="none"))  # type: ignore[arg-type]
    half = 0.5**0.5
    torch.testing.assert_close(vectors, torch.tensor([[1.0, 0, 0, 0], [0, half, half, 0]]))
    assert vectors.norm(dim=1).allclose(torch.ones(2))
    prompted = class_vectors(Letters(), [["a"], ["bbbb"]], Protocol(templates="paper"))  # type: ignore[arg-type]
    assert not prompted.allclose(class_vectors(Letters(), [["a"], ["bbbb"]], Protocol(templates="single")))  # type: ignore[arg-type]


def test_input_sizes_are_whole_patches() -> None:
    assert Protocol(resize="short").input_size(375, 500, 224, 14) == (224, 294)
    assert Protocol(resize="short", size=448).input_size(500, 375, 224, 16) == (592, 448)
    assert Protocol(resize="square").input_size(375, 500, 224, 14) == (224, 224)
    assert Protocol(size=5).input_size(10, 10, 224, 14) == (14, 14)
    with pytest.raises(ValueError, match="name"):
        Protocol(name="a/b")
    assert Protocol().record()["templates"][0] == "itap of a {}."


def test_recalls_by_hand_and_by_a_loop() -> None:
    phi = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]])
    true = torch.tensor([[True, False, False], [False, True, True]])
    found = recalls(phi, true)
    # A wrong text (0.8) is ahead of the second picture's best true one (0.3), a wrong picture of the third text.
    assert found["image_to_text"]["R@1"] == 0.5 and found["image_to_text"]["R@5"] == 1
    assert found["text_to_image"]["R@1"] == pytest.approx(2 / 3)

    random = torch.Generator().manual_seed(1)
    phi, owner = torch.randn(30, 90, generator=random), torch.arange(90) // 3
    true = owner[None] == torch.arange(30)[:, None]
    found = recalls(phi, true)
    for k in (1, 5, 10):
        to_text = [bool(true[i, phi[i].topk(k).indices].any()) for i in range(30)]
        to_image = [owner[n].item() in phi[:, n].topk(k).indices.tolist() for n in range(90)]
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(np.mean(to_text))
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(np.mean(to_image))


def test_a_model_that_scores_everything_alike_finds_nothing() -> None:
    found = recalls(torch.zeros(20, 20), torch.eye(20, dtype=torch.bool))
    assert found["image_to_text"] == found["text_to_image"] == {"R@1": 0, "R@5": 0, "R@10": 0}
