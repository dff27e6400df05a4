"""The demo's picture set: drawn scenes with captions to train on, and others with exact masks to be judged by.

A scene is a ground (grass, a wall, the night...) with two to four things on it. The test pictures show every
thing in a colour and on a ground in which the training pictures never show it. Training pictures come with a
caption and nothing else; no mask of them is ever made.

    <directory>/train/00000.jpg ...           served by the demo's web server, named by its URL list
    <directory>/test/images/00000.jpg ...     a folder data set for `pacl_scale.evaluate`
    <directory>/test/masks/00000.png ...      index of the class of each pixel
    <directory>/test/classes.yaml             index -> word, groups of classes that are scored apart
    <directory>/test/captions.csv             for retrieval: image,caption
    <directory>/manifest.json                 captions of the training pictures, and what is in each picture
"""

import csv
import dataclasses
import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pacl_scale.cores import usable_cores
from pacl_scale.errors import UserError
from pacl_scale.quickstart.backgrounds import BACKGROUNDS, cut_background
from pacl_scale.quickstart.captions import Thing, write_caption
from pacl_scale.quickstart.paint import COLOURS, TEXTURES, Tile, paint_object
from pacl_scale.quickstart.shapes import KINDS, shape

Array = NDArray[np.floating]
Split = Literal["train", "test"]

SPLITS: tuple[Split, ...] = ("train", "test")
VOID = 255
"""Mask index of pixels that are not scored; the drawn masks have none, every pixel is known."""

CLASSES = (*KINDS, *BACKGROUNDS)
"""Class names in the order of their mask indices: things first, then grounds."""

UNSEEN_WORDS = {
    "boat": "ship",
    "car": "automobile",
    "cup": "mug",
    "cat": "kitten",
    "flower": "blossom",
    "bird": "sparrow",
    "grass": "lawn",
    "sand": "beach",
}
"""Words for some classes that no caption uses: the evaluation asks for these classes by them as well."""

HELD_OUT = 3
"""Colours, and grounds, in which a kind is shown by the test alone."""

TEST_CAPTIONS = 2
"""Captions of each test picture."""

SMALLEST, LARGEST = 0.26, 0.52
"""Span of a thing as a share of the picture's side."""

CLOSENESS = 0.42
"""Centres of two things lie at least so many times the sum of their spans apart; below 0.5 some overlap."""

PICTURES_PER_TASK = 25


@dataclass(frozen=True)
class SceneConfig:
    """The drawn picture set."""

    seed: int = 0
    """Every picture is a function of this seed, its split and its number."""

    train: int = 1800
    """Pictures to train on."""

    test: int = 200
    """Pictures with masks to evaluate on."""

    size: int = 224
    """Side of a picture in pixels."""

    jpeg_quality: int = 90
    """JPEG quality of the pictures, 1 to 95."""

    fewest: int = 2
    """Fewest things in a picture."""

    most: int = 4
    """Most things in a picture."""

    workers: int = 0
    """Processes that draw; 0 takes one for each CPU this process may use."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError("seed cannot be negative")
        if self.train < 1 or self.test < 1:
            raise ValueError("train and test need at least one picture each")
        if not 64 <= self.size <= 1024:
            raise ValueError("size must be 64 to 1024 pixels")
        if not 1 <= self.jpeg_quality <= 95:
            raise ValueError("jpeg_quality must be 1 to 95")
        if not 1 <= self.fewest <= self.most <= 4:
            raise ValueError("fewest and most must be 1 to 4 things, fewest not above most")
        if self.workers < 0:
            raise ValueError("workers cannot be negative")


@dataclass(frozen=True)
class Scene:
    """What is in one picture."""

    name: str
    """File name, as in ``00012.jpg``."""
    ground: str
    things: list[Thing]
    captions: list[str]


@dataclass(frozen=True)
class Manifest:
    """The picture set as it lies on disk."""

    directory: Path
    config: SceneConfig
    train: list[Scene]
    test: list[Scene]

    @property
    def train_directory(self) -> Path:
        """Where the training pictures are."""
        return self.directory / "train"

    @property
    def test_directory(self) -> Path:
        """The folder data set to evaluate on."""
        return self.directory / "test"


@dataclass(frozen=True)
class Combinations:
    """Which colour and which ground each kind is kept away from while training."""

    colours: dict[str, frozenset[str]]
    grounds: dict[str, frozenset[str]]

    def allowed(self, kind: str, split: Split) -> tuple[list[str], list[str]]:
        """Colours and grounds of ``kind`` in a split: the test has just those that the training lacks."""
        wanted = split == "test"
        colours = [colour for colour in COLOURS if (colour in self.colours[kind]) == wanted]
        grounds = [ground for ground in BACKGROUNDS if (ground in self.grounds[kind]) == wanted]
        return colours, grounds


def draw_scenes(config: SceneConfig, directory: str | Path) -> Manifest:
    """Draw the picture set into ``directory``, replacing one that an earlier call left there.

    The result is a function of ``config`` (``workers`` aside) and the versions of numpy and Pillow.

    Raises:
        UserError: ``directory`` holds something else.
    """
    directory = Path(directory)
    _make_room(directory)
    jobs: list[tuple[Split, range]] = [
        (split, range(start, min(start + PICTURES_PER_TASK, count)))
        for split, count in zip(SPLITS, (config.train, config.test), strict=True)
        for start in range(0, count, PICTURES_PER_TASK)
    ]
    scenes: dict[Split, list[Scene]] = {split: [] for split in SPLITS}
    for (split, _), drawn in zip(jobs, _run(partial(_draw_task, config, directory), jobs, config), strict=True):
        scenes[split] += drawn
    manifest = Manifest(directory, config, scenes["train"], scenes["test"])
    _write_test_lists(manifest)
    (directory / "manifest.json").write_text(json.dumps(_as_json(manifest), indent=1))
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    """The picture set that :func:`draw_scenes` left in ``directory``.

    Raises:
        UserError: there is none.
    """
    directory = Path(directory)
    try:
        content = json.loads((directory / "manifest.json").read_text())
        config = SceneConfig(**content["config"])
        splits = {split: [_scene_from_json(scene) for scene in content[split]] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no drawn picture set ({type(error).__name__})") from error
    return Manifest(directory, config, splits["train"], splits["test"])


@lru_cache
def held_out_combinations(seed: int) -> Combinations:
    """For each kind three colours and three grounds, dealt so that none is held out more often than another."""
    rng = np.random.default_rng((seed, len(SPLITS)))
    return Combinations(_deal(list(COLOURS), rng), _deal(list(BACKGROUNDS), rng))


def draw_scene(config: SceneConfig, split: Split, number: int) -> tuple[Image.Image, Image.Image, Scene]:
    """One picture (RGB), its mask (grey, class indices) and what is in it."""
    rng = np.random.default_rng((config.seed, SPLITS.index(split), number))
    combinations = held_out_combinations(config.seed)
    ground = str(rng.choice(list(BACKGROUNDS)))
    things, spans = _arrange(config, combinations, split, ground, rng)
    canvas = cut_background(ground, config.size, (config.seed, SPLITS.index(split)), rng)
    mask = np.full((config.size, config.size), CLASSES.index(ground), np.uint8)
    light = float(rng.uniform(-150, -30))
    for thing, span in zip(things, spans, strict=True):
        tilt = float(rng.uniform(-1, 1)) * shape(thing.kind).tilt
        flip = bool(rng.random() < 0.5)
        tile = paint_object(thing.kind, thing.colour, thing.texture, span, tilt, flip, light, rng)
        _lay_shadow(canvas, tile, thing, span, light)
        lay(canvas, mask, tile, thing)
    _light_scene(canvas, light, rng)
    captions = [write_caption(things, ground, rng) for _ in range(1 if split == "train" else TEST_CAPTIONS)]
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return picture, Image.fromarray(mask), Scene(f"{number:05d}.jpg", ground, things, captions)


def lay(canvas: Array, mask: NDArray[np.uint8], tile: Tile, thing: Thing) -> None:
    """Lay a painted thing over whatever is there, in the picture and in the mask.

    A pixel belongs to the thing if it covers at least half of it; what sticks out of the picture is cut off.
    """
    onto, part = _overlap(len(mask), tile.cover.shape, thing)
    cover = tile.cover[part][..., None]
    canvas[onto] += (tile.rgb[part] - canvas[onto]) * cover
    mask[onto][tile.cover[part] >= 0.5] = CLASSES.index(thing.kind)


def class_list() -> dict[str, object]:
    """What ``classes.yaml`` says: words by mask index, the void index, and the groups that are scored apart."""
    kinds = list(range(len(KINDS)))
    unseen = {CLASSES.index(name): word for name, word in UNSEEN_WORDS.items()}
    return {
        "words": dict(enumerate(CLASSES)),
        "void": VOID,
        "groups": {
            "things": {"classes": kinds},
            "grounds": {"classes": [number for number in range(len(CLASSES)) if number not in kinds]},
            "unseen_words": {"classes": sorted(unseen), "words": dict(sorted(unseen.items()))},
        },
    }


def _deal(names: list[str], rng: np.random.Generator) -> dict[str, frozenset[str]]:
    """``HELD_OUT`` names for each kind: always those dealt least often so far, in random order among equals."""
    dealt = dict.fromkeys(names, 0)
    hands = {}
    for kind in KINDS:
        hand = sorted(rng.permutation(names).tolist(), key=dealt.__getitem__)[:HELD_OUT]
        dealt |= {name: dealt[name] + 1 for name in hand}
        hands[kind] = frozenset(hand)
    return hands


def _arrange(
    config: SceneConfig, combinations: Combinations, split: Split, ground: str, rng: np.random.Generator
) -> tuple[list[Thing], list[float]]:
    """Choose things that may stand on ``ground`` and find places for them; those in front come last."""
    kinds = [kind for kind in KINDS if ground in combinations.allowed(kind, split)[1]]
    count = int(rng.integers(config.fewest, config.most + 1))
    chosen = rng.permutation(kinds)[:count].tolist()
    if count > 1 and rng.random() < 0.2:
        chosen[1] = chosen[0]  # a pair: "two fish"
    things: list[Thing] = []
    spans: list[float] = []
    for kind, (x, y, span) in zip(chosen, _places(len(chosen), config.size, rng), strict=True):
        colours, _ = combinations.allowed(kind, split)
        colour = things[0].colour if things and things[0].kind == kind and rng.random() < 0.6 else rng.choice(colours)
        texture = rng.choice(TEXTURES, p=[0.46, 0.18, 0.18, 0.18])
        size = round(span / config.size, 3)
        things.append(
            Thing(kind, str(colour), str(texture), size, round(x / config.size, 3), round(y / config.size, 3))
        )
        spans.append(span)
    return things, spans


def _places(count: int, size: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre x, centre y and span in pixels of ``count`` things that overlap and stick out only a little."""
    largest = LARGEST if count < 4 else 0.8 * LARGEST
    places: list[tuple[float, float, float]] = []
    spans = (rng.uniform(SMALLEST, largest, count) * size).tolist()
    while len(places) < count:
        span = spans[len(places)]
        for _ in range(40):
            x, y = rng.uniform(0.4 * span, size - 0.4 * span, 2).tolist()
            if all(np.hypot(x - px, y - py) >= CLOSENESS * (span + ps) for px, py, ps in places):
                places.append((x, y, span))
                break
        else:
            # No room: begin again with everything a little smaller.
            places, spans = [], [0.94 * span for span in spans]
    return places


def _lay_shadow(canvas: Array, tile: Tile, thing: Thing, span: float, light: float) -> None:
    """Darken the ground beside the thing, away from the light."""
    blur = max(1, round(span * 0.05))
    cover = np.pad(tile.cover.clip(0, 1) * 255, 3 * blur).astype(np.uint8)
    soft = np.asarray(Image.fromarray(cover).filter(ImageFilter.GaussianBlur(blur)), np.float32) / 255
    reach = span * 0.07 / len(canvas)
    away = np.radians(light + 180)
    moved = dataclasses.replace(thing, x=thing.x + reach * np.cos(away), y=thing.y + reach * np.sin(away))
    onto, part = _overlap(len(canvas), soft.shape, moved)
    canvas[onto] *= 1 - np.float32(0.5) * soft[part][..., None]


def _overlap(size: int, tile: tuple[int, ...], thing: Thing) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where on the canvas a tile around the thing's centre comes to lie, and which part of the tile that is."""
    onto, part = [], []
    for length, centre in zip(tile, (thing.y, thing.x), strict=True):
        start = round(centre * size - length / 2)
        first, last = max(start, 0), min(start + length, size)
        onto.append(slice(first, last))
        part.append(slice(first - start, last - start))
    return (onto[0], onto[1]), (part[0], part[1])


def _light_scene(canvas: Array, light: float, rng: np.random.Generator) -> None:
    """Brighter towards the light, and the grain of a camera."""
    size = len(canvas)
    slope = float(rng.uniform(0.03, 0.14))
    ramp = np.linspace(-slope, slope, size, dtype=np.float32)
    angle = np.radians(light)
    canvas *= (1 + ramp[None, :] * np.float32(np.cos(angle)) + ramp[:, None] * np.float32(np.sin(angle)))[..., None]
    left, top = rng.integers(0, size, 2).tolist()
    canvas += _grain(size)[top : top + size, left : left + size, None]


@lru_cache(maxsize=2)
def _grain(size: int) -> Array:
    """Noise (2 size, 2 size), of which each picture takes another cut: drawing it anew would cost a tenth."""
    return np.float32(2.5) * np.random.default_rng(0).standard_normal((2 * size, 2 * size), np.float32)


def _make_room(directory: Path) -> None:
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / "manifest.json").is_file():
            raise UserError(f"{directory} is not empty and holds no drawn picture set; choose another directory")
        (directory / "manifest.json").unlink()
        for split in SPLITS:
            shutil.rmtree(directory / split, ignore_errors=True)
    for folder in ("train", "test/images", "test/masks"):
        (directory / folder).mkdir(parents=True, exist_ok=True)


def _run(task: "partial[list[Scene]]", jobs: list[tuple[Split, range]], config: SceneConfig) -> Iterator[list[Scene]]:
    processors = usable_cores()
    workers = min(config.workers or processors, len(jobs))
    if workers == 1:
        yield from map(task, jobs)
        return
    # Spawned, not forked: the caller may hold threads (torch, a web server) whose locks a fork would copy.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(task, jobs)


def _draw_task(config: SceneConfig, directory: Path, job: tuple[Split, range]) -> list[Scene]:
    split, numbers = job
    scenes = []
    for number in numbers:
        picture, mask, scene = draw_scene(config, split, number)
        folder = directory / ("train" if split == "train" else "test/images")
        picture.save(folder / scene.name, quality=config.jpeg_quality)
        if split == "test":
            mask.save((directory / "test/masks" / scene.name).with_suffix(".png"))
        scenes.append(scene)
    return scenes


def _write_test_lists(manifest: Manifest) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["image", "caption"])
    writer.writerows((scene.name, caption) for scene in manifest.test for caption in scene.captions)
    (manifest.test_directory / "captions.csv").write_text(lines.getvalue())
    (manifest.test_directory / "classes.yaml").write_text(yaml.safe_dump(class_list(), sort_keys=False))


def _as_json(manifest: Manifest) -> dict[str, object]:
    return {
        "config": dataclasses.asdict(manifest.config),
        "train": [dataclasses.asdict(scene) for scene in manifest.train],
        "test": [dataclasses.asdict(scene) for scene in manifest.test],
    }


def _scene_from_json(values: dict[str, Any]) -> Scene:
    return Scene(**(values | {"things": [Thing(**thing) for thing in values["things"]]}))
