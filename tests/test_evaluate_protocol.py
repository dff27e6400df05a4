"""Windows, strides, scales, mirrored views, synonyms and background rules."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import ColourText, ColourVision, pixels, write_pictures, write_run
from colours import install as install_towers
from PIL import Image

from pacl_scale.encoders import VisionConfig, build_vision
from pacl_scale.errors import UserError
from pacl_scale.evaluate import labels as labels_module
from pacl_scale.evaluate.command import EvaluateConfig, evaluate
from pacl_scale.evaluate.labels import Lattice, View, cells, label_pixels, merged, spread
from pacl_scale.evaluate.pictures import AnnotatedConfig
from pacl_scale.evaluate.protocol import Protocol, TemplateSet, patch_scores, template_set, vectors_for
from pacl_scale.evaluate.views import cropped, prepare, windows

RANDOM = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


def test_own_stride_is_torchs_bilinear_interpolation() -> None:
    maps = noise(3, 4, 6)
    expected = F.interpolate(maps[None], size=(33, 50), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(spread(maps, (33, 50), (64, 96), Lattice(16, 16)), expected)
    # A stride that is nearly the patch size goes the general way; with the same centres it is the same.
    rows = labels_module._places(4, 33, 64, Lattice(16, 16), maps)
    torch.testing.assert_close(rows, ((torch.arange(33, dtype=torch.float64) + 0.5) * 64 / 33 / 16 - 0.5).clamp(0, 3))


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_scores_of_a_smaller_stride_lie_where_their_patches_lie(stride: int) -> None:
    patch, box = 8, (32, 48)
    # The score of a patch is the position of its centre, so that the upsampled map must say where each pixel is.
    rows = torch.arange((box[0] - patch) // stride + 1) * stride + patch / 2
    columns = torch.arange((box[1] - patch) // stride + 1) * stride + patch / 2
    maps = torch.stack([rows[:, None].expand(-1, len(columns)), columns[None].expand(len(rows), -1)])
    found = spread(maps, (64, 96), box, Lattice(patch, stride))
    y, x = (torch.arange(64) + 0.5) / 2, (torch.arange(96) + 0.5) / 2
    torch.testing.assert_close(found[0, :, 5], y.clamp(rows[0], rows[-1]))
    torch.testing.assert_close(found[1, 7], x.clamp(columns[0], columns[-1]))
    nearest = cells(len(rows), 64, box[0], Lattice(patch, stride))
    assert ((rows[nearest] - y.clamp(rows[0], rows[-1])).abs() <= stride / 2 + 1e-6).all()


def test_stride_16_is_plain_and_stride_4_agrees_on_every_fourth_patch() -> None:
    vision = build_vision(VisionConfig(source="timm", model="vit_tiny_patch16_224", weights="random", image_size=64))
    picture = noise(1, 3, 64, 64)
    plain, sixteen = vision.encode(picture), vision.encode(picture, 16)
    assert plain.grid == sixteen.grid == (4, 4) and torch.equal(plain.tokens, sixteen.tokens)
    assert vision.encode(picture, 4).grid == (13, 13)
    # A tower whose patches know nothing of each other sees the same wherever patches coincide.
    colours = ColourVision()
    fine = colours.encode(picture, 1).tokens.view(61, 61, 3)
    torch.testing.assert_close(fine[::4, ::4].reshape(1, -1, 3), colours.encode(picture).tokens)


def test_windows_cover_everything_and_end_at_the_edge() -> None:
    protocol = Protocol(window=32, window_step=24)
    found = windows((48, 80), protocol, 8)
    assert found == [(top, left, (32, 32)) for top in (0, 16) for left in (0, 24, 48)]
    assert windows((16, 40), protocol, 8) == [(0, 0, (16, 32)), (0, 8, (16, 32))]
    assert windows((48, 80), Protocol(), 8) == [(0, 0, (48, 80))]
    assert {left for _, left, _ in windows((32, 96), Protocol(window=32), 8)} == {0, 16, 32, 48, 64}


def test_windows_are_summed_and_divided_by_how_many_cover_a_pixel() -> None:
    lattice, size = Lattice(2, 2), (4, 6)
    left, right = noise(2, 2, 2), noise(2, 2, 2)
    views = [(View(0, size, 0, 0, (4, 4)), left), (View(0, size, 0, 2, (4, 4)), right)]
    found = merged(views, slice(None), size, lattice)
    up = [F.interpolate(m[None], size=(4, 4), mode="bilinear", align_corners=False)[0] for m in (left, right)]
    torch.testing.assert_close(found[:, :, :2], up[0][:, :, :2])
    torch.testing.assert_close(found[:, :, 4:], up[1][:, :, 2:])
    torch.testing.assert_close(found[:, :, 2:4], (up[0][:, :, 2:] + up[1][:, :, :2]) / 2)


def test_scales_and_mirrored_views_are_averaged() -> None:
    lattice, size = Lattice(2, 2), (4, 6)
    plain, mirrored, large = noise(2, 2, 3), noise(2, 2, 3), noise(2, 4, 6)
    views = [
        (View(0, size, 0, 0, size), plain),
        (View(0, size, 0, 0, size, flipped=True), mirrored),
        (View(1, (8, 12), 0, 0, (8, 12)), large),
    ]

    def up(maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps[None], size=(9, 7), mode="bilinear", align_corners=False)[0]

    expected = ((up(plain) + up(mirrored).flip(-1)) / 2 + up(large)) / 2
    torch.testing.assert_close(merged(views, slice(None), (9, 7), lattice), expected)
    torch.testing.assert_close(merged(views, slice(1, 2), (9, 7), lattice), expected[1:])


def test_views_show_the_right_part_of_the_picture() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    truth = np.arange(16 * 32).reshape(16, 32)
    protocol = Protocol(window=16, window_step=16, flip=True, scales=(1.0, 2.0))
    prepared = prepare(7, Image.fromarray(drawn), truth, ColourVision(), protocol)
    assert [(v.scale, v.left, v.flipped) for v in prepared.views[:4]] == [
        *((0, 0, False), (0, 0, True), (0, 16, False), (0, 16, True))
    ]
    assert len(prepared.views) == 4 + 2 * 8 and prepared.views[-1].size == (32, 64)
    torch.testing.assert_close(prepared.inputs[2], torch.from_numpy(drawn[:, 16:]).permute(2, 0, 1) / 255 - 0.5)
    assert torch.equal(prepared.inputs[3], prepared.inputs[2].flip(-1))
    square, inner = cropped(Image.fromarray(drawn), truth, Protocol(crop="centre"))
    np.testing.assert_array_equal(np.asarray(square), drawn[:, 8:24])
    np.testing.assert_array_equal(inner, truth[:, 8:24])


def rule(scores: torch.Tensor, **settings: object) -> torch.Tensor:
    protocol = Protocol(**settings)  # type: ignore[arg-type]
    return label_pixels(lambda portion: scores[portion], len(scores), scores[0].numel(), protocol, background=99)[0]


@pytest.mark.parametrize("portion", [1, 3, 64])
def test_background_rules_against_the_definition(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "CLASSES_AT_ONCE", portion)
    scores = noise(7, 5, 6) * 0.02
    best = scores.argmax(dim=0)
    softmax = (scores.double() * 100).softmax(dim=0)
    entropy = -(softmax * softmax.log()).sum(dim=0)
    for background, threshold, expected in (
        ("cosine", 0.03, scores.amax(dim=0) < 0.03),
        ("probability", 0.6, softmax.amax(dim=0) < 0.6),
        ("entropy", 1.0, entropy > 1.0),
    ):
        assert 0 < expected.sum() < expected.numel(), "the threshold must divide the pixels"
        found = rule(scores, background=background, background_threshold=threshold)
        assert torch.equal(found, torch.where(expected, 99, best)), background
    bits = rule(scores, background="entropy", background_threshold=1.0 / math.log(2), log_base="2")
    assert torch.equal(bits, rule(scores, background="entropy", background_threshold=1.0))
    assert (rule(scores, background="entropy", background_threshold=1.0, background_scale=1.0) == 99).all()
    assert torch.equal(rule(scores), best) and torch.equal(rule(scores, background="words"), best)


def test_synonyms_by_mean_by_best_and_alone() -> None:
    synonyms = [["red", "blue"], ["green"]]
    patch = torch.tensor([[[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]])

    def scores(background: bool = False, **settings: object) -> torch.Tensor:
        protocol = Protocol(templates="none", **settings)  # type: ignore[arg-type]
        vectors = vectors_for(ColourText(), synonyms, protocol, background)
        return patch_scores(patch, vectors, (1, 3))[0, :, 0]

    half = 0.5**0.5
    torch.testing.assert_close(scores()[0], torch.tensor([half, half, 0.014]), atol=0.01, rtol=0)
    torch.testing.assert_close(scores(synonyms="max")[0], torch.tensor([1, 1, 0.01]), atol=0.01, rtol=0)
    torch.testing.assert_close(scores(synonyms="first")[0], torch.tensor([1, 0.01, 0.01]), atol=0.01, rtol=0)
    rest = scores(background=True, background_words=["green", "blue"])
    assert rest.shape == (3, 3)
    torch.testing.assert_close(rest[2], torch.tensor([0.01, 1, 1]), atol=0.01, rtol=0)


def test_template_sets_are_the_published_ones() -> None:
    assert {name: len(template_set(name)) for name in get_args(TemplateSet)} == {
        **{"paper": 7, "imagenet": 80, "single": 1, "none": 1}
    }
    clips = template_set("imagenet")
    assert "a bad photo of a {}." in clips and all(template.count("{}") == 1 for template in clips)
    assert Protocol(templates="imagenet").record()["templates"] == list(clips)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride": -1},
        {"window_step": 8},
        {"scales": ()},
        {"scales": (0.0,)},
        {"background_scale": 0.0},
        {"boundary": 1.0},
        {"background": "words", "background_words": [" "]},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"protocol.{next(iter(wrong)).split('=')[0]}"):
        Protocol(**wrong)


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run and pictures of colour blocks, colour towers installed."""
    install_towers(monkeypatch)
    write_pictures(tmp_path / "data")
    write_run(tmp_path / "run")
    return tmp_path


def rows_of(place: Path, protocol: Protocol, **more: object) -> dict:
    settings = EvaluateConfig(
        str(place / "run"),
        segmentation={"blocks": AnnotatedConfig(str(place / "data"))},
        protocol=protocol,
        examples=0,
        threads=1,
        output=str(place / protocol.name),
        **more,  # type: ignore[arg-type]
    )
    return {row.method: row for row in evaluate(settings)}


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2},
        {"window": 16, "size": 32},
        {"scales": (1.0, 1.5), "flip": True},
        {"stride": 1, "window": 16, "window_step": 8, "size": 24, "flip": True},
        {"templates": "imagenet", "synonyms": "max"},
    ],
)
def test_every_way_of_looking_finds_the_blocks(blocks: Path, settings: dict) -> None:
    rows = rows_of(blocks, Protocol(**settings))
    row = rows["pacl"]
    assert row.scores["miou"] > 0.93
    recorded = {key: row.protocol[key] for key in settings if key != "templates"}
    assert recorded == {
        key: list(v) if isinstance(v, tuple) else v for key, v in settings.items() if key != "templates"
    }
    assert (row.scores["patch_accuracy"] is None) == ("window" in settings)
    assert rows["patch_oracle"].scores["miou"] > 0.9


def with_background(place: Path, grey: int) -> None:
    """A grey strip that no colour word names, which the masks call background."""
    for number in range(5):
        mask = pixels(place / "data" / "masks" / f"{number}.png")
        shown = pixels(place / "data" / "images" / f"{number}.png").copy()
        mask[:, :16], shown[:, :16] = 0, grey
        Image.fromarray(mask).save(place / "data" / "masks" / f"{number}.png")
        Image.fromarray(shown).save(place / "data" / "images" / f"{number}.png")


def test_scored_background_is_a_class_of_its_own(blocks: Path) -> None:
    classes = blocks / "data" / "classes.yaml"
    classes.write_text(classes.read_text() + "score_background: true\n")
    with_background(blocks, 120)
    with pytest.raises(UserError, match="blocks scores background"):
        rows_of(blocks, Protocol())
    rows = rows_of(blocks, Protocol(background="cosine", background_threshold=0.3))
    row = rows["pacl"]
    assert row.scores["classes"] == 4 and row.scores["per_class"][3]["word"] == "background"
    assert row.scores["per_class"][3]["iou"] > 0.8 and row.scores["miou"] > 0.8
    assert row.scores["foreground"]["classes"] == 3 and row.protocol["background_applied"]
    assert rows["patch_oracle"].scores["miou"] > 0.9
    with_background(blocks, 200)  # which "nothing", a text without a colour, fits best
    words = rows_of(blocks, Protocol(name="words", background="words", background_words=["nothing"]))["pacl"]
    assert words.scores["per_class"][3]["iou"] > 0.8


def test_background_on_foreground_data_costs_only_where_it_is_said_to(blocks: Path) -> None:
    everything = Protocol(background="cosine", background_threshold=2.0)
    assert rows_of(blocks, everything)["pacl"].scores["miou"] > 0.95, "the rule is for data that score background"
    always = Protocol(name="always", background="cosine", background_threshold=2.0, background_where="always")
    row = rows_of(blocks, always)["pacl"]
    assert row.scores["miou"] == 0 and row.scores["classes_present"] == 3


def test_a_stride_that_the_tower_cannot_have_is_refused(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: ColourVision, images: torch.Tensor, stride: int | None = None) -> None:
        raise ValueError("too long")

    monkeypatch.setattr(ColourVision, "encode", encode)
    with pytest.raises(UserError, match="protocol.stride=9 does not suit"):
        rows_of(blocks, Protocol(stride=9))
