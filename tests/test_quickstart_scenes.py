"""The drawn picture set: exact masks, true captions, and a test that the training says nothing about."""

import hashlib
import re
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedConfig, open_captioned
from pacl_scale.evaluate.pictures import AnnotatedConfig, open_annotated
from pacl_scale.quickstart import scenes
from pacl_scale.quickstart.backgrounds import BACKGROUNDS, cut_background, plate
from pacl_scale.quickstart.captions import GROUND_PHRASES, Thing, plural, write_caption
from pacl_scale.quickstart.paint import COLOURS, TEXTURES, paint_object
from pacl_scale.quickstart.scenes import (
    CLASSES,
    UNSEEN_WORDS,
    Manifest,
    SceneConfig,
    draw_scene,
    draw_scenes,
    held_out_combinations,
    lay,
    read_manifest,
)
from pacl_scale.quickstart.shapes import HOLE, KINDS, OWN_PAINTS, PAINTS, shape
from pacl_scale.quickstart.urls import UrlFaults, write_url_list
from pacl_scale.quickstart.web import PictureServer

SMALL = SceneConfig(train=30, test=30, size=112, workers=1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return draw_scenes(SMALL, tmp_path_factory.mktemp("scenes"))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def random_things(rng: np.random.Generator, count: int) -> list[Thing]:
    kinds = rng.choice(list(KINDS), count, replace=bool(rng.random() < 0.5)).tolist()
    return [
        Thing(kind, str(rng.choice(list(COLOURS))), str(rng.choice(TEXTURES)), *rng.random(3).tolist())
        for kind in kinds
    ]


def random_captions(count: int) -> list[tuple[str, list[Thing], str]]:
    rng = np.random.default_rng(5)
    found = []
    for _ in range(count):
        things, ground = random_things(rng, int(rng.integers(2, 5))), str(rng.choice(list(BACKGROUNDS)))
        found.append((write_caption(things, ground, rng), things, ground))
    return found


def words_of(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption.lower()))


def names(kind: str) -> set[str]:
    return {kind, plural(kind)}


# --- the set on disk ---------------------------------------------------------------------------------------


def test_layout_on_disk(drawn: Manifest) -> None:
    names_of_train = [f"{number:05d}.jpg" for number in range(30)]
    assert sorted(path.name for path in drawn.train_directory.iterdir()) == names_of_train
    assert sorted(path.name for path in (drawn.test_directory / "images").iterdir()) == names_of_train
    assert [scene.name for scene in drawn.train] == names_of_train
    for scene in drawn.test:
        with Image.open(drawn.test_directory / "images" / scene.name) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (112, 112))


def test_manifest_is_read_back(drawn: Manifest) -> None:
    assert read_manifest(drawn.directory) == drawn


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no drawn picture set"):
        read_manifest(tmp_path)


def test_pictures_depend_on_the_seed_and_not_on_the_workers(drawn: Manifest, tmp_path: Path) -> None:
    again = draw_scenes(SceneConfig(train=30, test=30, size=112, workers=2), tmp_path / "again")
    assert digests(again.directory) == digests(drawn.directory)
    assert again.train == drawn.train
    other, _, _ = draw_scene(SceneConfig(seed=1, size=112), "train", 0)
    same, _, _ = draw_scene(SMALL, "train", 0)
    assert not np.array_equal(np.asarray(other), np.asarray(same))


def test_a_smaller_set_leaves_nothing_of_a_larger_one(tmp_path: Path) -> None:
    draw_scenes(SceneConfig(train=3, test=3, size=64, workers=1), tmp_path)
    draw_scenes(SceneConfig(train=2, test=1, size=64, workers=1), tmp_path)
    assert len(list((tmp_path / "train").iterdir())) == 2
    assert len(list((tmp_path / "test" / "masks").iterdir())) == 1


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="choose another directory"):
        draw_scenes(SMALL, tmp_path)
    assert (tmp_path / "train" / "mine.jpg").read_bytes() == b"mine"


def test_evaluation_reads_the_test_split(drawn: Manifest) -> None:
    data = open_annotated(AnnotatedConfig(root=str(drawn.test_directory)))
    assert len(data) == 30
    assert data.classes.names == list(CLASSES)
    assert set(data.classes.groups) == {"things", "grounds", "unseen_words"}
    picture, positions_HW = data.read(0)
    assert positions_HW.shape == (picture.height, picture.width)
    asked_for = dict(zip(CLASSES, data.classes.synonyms("unseen_words"), strict=True))
    assert asked_for["boat"] == ["ship"] and asked_for["fish"] == ["fish"]
    captioned = open_captioned(CaptionedConfig(csv=str(drawn.test_directory / "captions.csv")))
    assert len(captioned.addresses) == 30
    assert captioned.texts[0] == drawn.test[0].captions[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"train": 0},
        {"test": 0},
        {"size": 20},
        {"jpeg_quality": 0},
        {"fewest": 3, "most": 2},
        {"most": 5},
        {"workers": -1},
    ],
)
def test_impossible_configurations_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SceneConfig(**wrong)  # type: ignore[arg-type]


# --- masks -------------------------------------------------------------------------------------------------


def test_mask_has_the_classes_of_the_scene_and_no_others(drawn: Manifest) -> None:
    for scene in drawn.test:
        mask = np.asarray(Image.open(drawn.test_directory / "masks" / scene.name.replace("jpg", "png")))
        assert mask.shape == (112, 112) and mask.dtype == np.uint8
        expected = {scene.ground, *(thing.kind for thing in scene.things)}
        assert {CLASSES[index] for index in np.unique(mask)} == expected


def test_every_thing_can_be_seen() -> None:
    shares, smallest = [], []
    for number in range(60):
        _, mask, scene = draw_scene(SceneConfig(), "train", number)
        counts = Counter(np.asarray(mask).ravel().tolist())
        for thing in scene.things:
            if [other.kind for other in scene.things].count(thing.kind) == 1:
                smallest.append(counts[CLASSES.index(thing.kind)])
        shares.append(1 - counts[CLASSES.index(scene.ground)] / 224**2)
    # A patch of the vision tower has 196 pixels.
    assert min(smallest) > 196
    assert 0.1 < np.mean(shares) < 0.4


def test_mask_is_where_the_thing_is() -> None:
    """Bright things on the night: within the mask it is bright, outside it is dark."""
    found = 0
    config = SceneConfig(fewest=1, most=2)
    for number in range(400):
        rng = np.random.default_rng((config.seed, 0, number))
        if rng.choice(list(BACKGROUNDS)) != "night":  # the scene's first draw: skip the others cheaply
            continue
        picture, mask, scene = draw_scene(config, "train", number)
        bright = [t for t in scene.things if t.colour in ("yellow", "white", "pink")]
        if len(bright) < len(scene.things) or any(t.kind in ("umbrella", "rocket", "cat", "car") for t in bright):
            continue
        found += 1
        luminance = np.asarray(picture.convert("L"), np.float32)
        inside = np.asarray(mask) != CLASSES.index("night")
        assert np.median(luminance[inside]) > 140
        assert np.mean(luminance[~inside] > 110) < 0.02
        assert np.mean(luminance[inside] < 60) < 0.12
    assert found >= 4


def test_a_thing_in_front_hides_what_lies_behind_and_is_cut_at_the_border() -> None:
    canvas, mask = np.zeros((64, 64, 3), np.float32), np.full((64, 64), CLASSES.index("night"), np.uint8)
    heart, apple = Thing("heart", "red", "plain", 0.5, 0.5, 0.5), Thing("apple", "green", "plain", 0.5, 0.9, 0.5)
    covers: dict[str, int] = {}
    for thing in (heart, apple):
        tile = paint_object(thing.kind, thing.colour, "plain", 40, 0, False, -120, np.random.default_rng(0))
        covers[thing.kind] = int((tile.cover >= 0.5).sum())
        lay(canvas, mask, tile, thing)
    counts = Counter(np.asarray(CLASSES)[mask].ravel().tolist())
    assert 0.55 * covers["apple"] < counts["apple"] < 0.75 * covers["apple"], "about a third is cut off"
    assert 0.5 * covers["heart"] < counts["heart"] < covers["heart"], "some of it is hidden"
    red, green = canvas[mask == CLASSES.index("heart")], canvas[mask == CLASSES.index("apple")]
    assert (red[:, 0] > red[:, 1]).mean() > 0.95
    assert (green[:, 1] > green[:, 0]).mean() > 0.8
    assert (canvas[mask == CLASSES.index("night")].max(axis=1) < 140).all()


def test_mask_holds_the_pixels_that_are_covered_by_half_or_more() -> None:
    tile = paint_object("heart", "red", "plain", 40, 15, False, -120, np.random.default_rng(0))
    for x, y in ((0.5, 0.5), (0.05, 0.5), (0.5, 0.98), (1.0, 0.0)):
        canvas, mask = np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)
        lay(canvas, mask, tile, Thing("heart", "red", "plain", 0.6, x, y))
        height, width = tile.cover.shape
        whole = np.zeros((64 + 2 * height, 64 + 2 * width), bool)  # room for what sticks out
        top, left = height + round(y * 64 - height / 2), width + round(x * 64 - width / 2)
        whole[top : top + height, left : left + width] = tile.cover >= 0.5
        expected = whole[height:-height, width:-width]
        assert np.array_equal(mask == CLASSES.index("heart"), expected)
        assert (canvas[expected].max(axis=1) > 50).all()


def test_splits_are_cut_from_different_plates(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def spy(name: str, size: int, plate_seed: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        used.append(plate_seed)
        return cut_background(name, size, plate_seed, rng)

    monkeypatch.setattr(scenes, "cut_background", spy)
    for seed, split in ((0, "train"), (0, "test"), (1, "train")):
        draw_scene(SceneConfig(size=64, seed=seed), split, 0)  # type: ignore[arg-type]
    assert len(set(used)) == 3


# --- shapes and paint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shape_fits_its_box_and_uses_known_paints(kind: str) -> None:
    parts = shape(kind).parts
    corners = np.concatenate([part.points for part in parts if part.paint != HOLE])
    extent = corners.max(axis=0) - corners.min(axis=0)
    assert np.isfinite(corners).all()
    assert extent.max() == pytest.approx(2)
    assert corners.max() <= 1 + 1e-9 and corners.min() >= -1 - 1e-9
    assert {part.paint for part in parts} <= {*PAINTS, *OWN_PAINTS, HOLE}
    assert any(part.paint == "main" for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_things_have_the_colour_they_are_called_by(kind: str) -> None:
    """Of all pixels whose colour is the object's own, most are nearest to the colour's name."""
    own = {}
    for colour in COLOURS:
        tile = paint_object(kind, colour, "plain", 90, 0, False, -120, np.random.default_rng(0))
        assert tile.rgb.shape == (*tile.cover.shape, 3)
        assert tile.cover.max() > 0.99 and tile.cover.min() == 0
        own[colour] = tile.rgb[tile.cover > 0.9]
    # What does not change with the colour belongs to the kind (wheels, trunks): leave it out.
    changing = np.ptp(np.stack(list(own.values())), axis=0).max(axis=1) > 60
    assert changing.mean() > 0.3, "so little of it is in its own colour that the colour cannot be told"
    palette = np.array(list(COLOURS.values()), np.float32)
    for number, (colour, pixels) in enumerate(own.items()):
        distance = ((np.median(pixels[changing], axis=0) - palette) ** 2).sum(axis=1)
        assert distance.argmin() == number, f"a {colour} {kind} looks {list(COLOURS)[distance.argmin()]}"


def test_textures_can_be_seen() -> None:
    painted = {
        texture: paint_object("heart", "blue", texture, 90, 0, False, -120, np.random.default_rng(0)).rgb
        for texture in TEXTURES
    }
    for texture in TEXTURES[1:]:
        assert np.abs(painted[texture] - painted["plain"]).mean() > 10


@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_training_and_test_have_different_plates(ground: str) -> None:
    train, test = np.asarray(plate(ground, (0, 0, 0))), np.asarray(plate(ground, (0, 1, 0)))
    assert train.shape == test.shape and not np.array_equal(train, test)
    assert train.std() > 3, "a ground without any texture"


# --- combinations and words --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_held_out_combinations_are_spread_evenly(seed: int) -> None:
    combinations = held_out_combinations(seed)
    for kind in KINDS:
        assert len(combinations.colours[kind]) == len(combinations.grounds[kind]) == 3
        for seen, unseen in zip(combinations.allowed(kind, "train"), combinations.allowed(kind, "test"), strict=True):
            assert not set(seen) & set(unseen)
    by_ground = Counter(ground for kind in KINDS for ground in combinations.grounds[kind])
    by_colour = Counter(colour for kind in KINDS for colour in combinations.colours[kind])
    assert set(by_ground) == set(BACKGROUNDS) and set(by_ground.values()) == {8}
    assert set(by_colour) == set(COLOURS) and set(by_colour.values()) == {7, 8}


def test_training_and_test_share_no_combination() -> None:
    config = SceneConfig(size=64)
    seen: dict[str, set[tuple[str, str]]] = {"train": set(), "test": set()}
    for split in ("train", "test"):
        for number in range(120):
            _, _, scene = draw_scene(config, split, number)  # type: ignore[arg-type]
            for thing in scene.things:
                seen[split] |= {(thing.kind, thing.colour), (thing.kind, scene.ground)}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) > 150 and len(seen["test"]) > 60


def test_unseen_words_are_in_no_caption_and_class_words_are() -> None:
    vocabulary = Counter(word for caption, _, _ in random_captions(3000) for word in words_of(caption))
    for word in UNSEEN_WORDS.values():
        assert vocabulary[word] == 0 and vocabulary[f"{word}s"] == 0
    for name in CLASSES:
        assert vocabulary[name] + vocabulary[plural(name)] > 20
    assert not set(UNSEEN_WORDS.values()) & set(CLASSES)


def test_captions_name_only_what_is_there() -> None:
    for caption, things, ground in random_captions(1500):
        said = words_of(caption)
        there = {name for thing in things for name in names(thing.kind)}
        assert not said & ({name for kind in KINDS for name in names(kind)} - there), caption
        assert not said & (set(BACKGROUNDS) - {ground}), caption
        assert said & there, caption


def test_captions_give_things_their_own_colours_and_textures() -> None:
    checked = 0
    for caption, things, _ in random_captions(1500):
        said = caption.lower()
        for thing in things:
            twins = [other for other in things if other.kind == thing.kind]
            found = re.search(rf"((?:\w+ ){{0,2}}){thing.kind}\b", said)
            if len(twins) > 1 or found is None:
                continue
            before = set(found.group(1).split())
            # Words of the thing before this one may be within reach: "and", "the", "a" end them.
            for end in ("a", "an", "the", "one", "and"):
                if end in found.group(1).split():
                    before = set(found.group(1).rsplit(f"{end} ", 1)[-1].split())
            assert before & set(COLOURS) <= {thing.colour}, caption
            assert before & set(TEXTURES) <= {thing.texture}, caption
            checked += bool(before & set(COLOURS))
    assert checked > 500


def test_captions_tell_left_from_right_and_above_from_below() -> None:
    checked = 0
    for caption, things, _ in random_captions(4000):
        found = re.search(r"^(.*?) (to the left of|to the right of|above|below) (.*)$", caption.lower().rstrip("."))
        if found is None or found.group(2) == "above" and "above the water" in caption.lower():
            continue
        sides = []
        for words in (found.group(1), found.group(3)):
            here = [thing for thing in things if names(thing.kind) & words_of(words)]
            sides.append(here[0] if len(here) == 1 else None)
        first, second = sides
        if first is None or second is None:
            continue
        true = {
            "to the left of": first.x < second.x,
            "to the right of": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }
        assert true[found.group(2)], caption
        checked += 1
    assert checked > 200


def test_captions_mention_some_things_but_not_all() -> None:
    mentioned, total, grounds, forms = 0, 0, 0, set()
    captions = random_captions(2000)
    for caption, things, ground in captions:
        kinds = {thing.kind for thing in things}
        mentioned += sum(bool(names(kind) & words_of(caption)) for kind in kinds)
        total += len(kinds)
        grounds += ground in words_of(caption)
        forms.add(re.sub("|".join([*KINDS, *COLOURS, *TEXTURES]), "", caption)[:12])
    assert 0.5 < mentioned / total < 0.8
    assert 0.5 < grounds / len(captions) < 0.8
    assert len(forms) > 100, "captions are built all alike"


def test_captions_are_tidy_english() -> None:
    for caption, _, _ in random_captions(1500):
        assert caption == " ".join(caption.split()) and "\t" not in caption
        assert not re.search(r" [,.]|\b(a|an) (a|an|the|two|one)\b|\ba [aeiou]\w|\ban [^aeiou]", caption.lower()), (
            caption
        )
        assert caption.endswith(".") == caption[0].isupper() or caption.startswith("I "), caption


def test_every_ground_phrase_says_its_ground() -> None:
    assert set(GROUND_PHRASES) == set(BACKGROUNDS)
    for ground, phrases in GROUND_PHRASES.items():
        assert all(words_of(phrase) & set(BACKGROUNDS) == {ground} for phrase in phrases)


# --- the URL list ------------------------------------------------------------------------------------------


def test_url_list_leads_to_what_it_promises(drawn: Manifest, tmp_path: Path) -> None:
    faults = UrlFaults(missing=3, gone=2, pages=4, duplicates=5)
    with PictureServer(drawn.train_directory) as server:
        count = write_url_list(drawn, server.url, tmp_path / "list.tsv", faults)
        rows = [line.split("\t") for line in (tmp_path / "list.tsv").read_text().splitlines()]
        assert count == len(rows) == 30 + 3 + 2 + 4 + 5
        assert all(len(row) == 2 for row in rows)
        for _, url in rows:
            with open_or_error(url) as answer:
                answer.read()
    assert server.statuses == {200: 30 + 5 + 4, 404: 3, 410: 2}
    assert Counter(Counter(url for _, url in rows).values()) == {1: 30 + 3 + 2 + 4 - 5, 2: 5}
    own = {scene.name: scene.captions[0] for scene in drawn.train}
    for caption, url in rows:
        name = url.rsplit("/", 1)[-1]
        if url.count("/") == 3:
            assert caption == own[name]


def open_or_error(url: str):  # type: ignore[no-untyped-def]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(url, timeout=10)
    except urllib.error.HTTPError as error:
        return error


def test_url_list_is_the_same_for_the_same_seed(drawn: Manifest, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_url_list(drawn, "http://127.0.0.1:1", tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() != (tmp_path / "c").read_text()


def test_negative_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        UrlFaults(gone=-1)
