"""Annotated pictures: folders of ``images/*.jpg`` beside ``masks/*.png``, or an official data set's own layout."""

import io
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pacl_scale import storage
from pacl_scale.data.decode import FORMATS
from pacl_scale.errors import UserError
from pacl_scale.evaluate import places
from pacl_scale.evaluate.classes import NOT_SCORED, ClassList, read_class_list
from pacl_scale.evaluate.official import LAYOUTS, find_pairs, read_raw_context
from pacl_scale.log import get_logger

log = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few bytes can ask for any amount of memory."""


@dataclass
class AnnotatedConfig:
    """Pictures with masks: a folder of one's own, or an official data set."""

    root: str
    """Folder, URL, or zip or tar file that holds the data set."""

    layout: Literal[
        "folder",
        "voc_20",
        "voc_21",
        "context_59",
        "context_60",
        "coco_stuff_171",
        "coco_object",
        "ade_150",
        "cityscapes_19",
    ] = "folder"
    """"folder": the keys `pictures`, `masks` and `classes` say what is where. Otherwise an official data set as it is
    downloaded, with its own class list and validation split."""

    partial: bool = False
    """Of an official data set, measure on the pictures that are there, however few; the row says how many."""

    pictures: str = "images"
    """Folder of the pictures below `root`; those without a mask are left out."""

    masks: str = "masks"
    """Folder of PNG masks below `root`: palette or grey, the pixel's value is the index of its class."""

    classes: ClassList | None = None
    """Which index is which class; if not given, `classes.yaml` in `root` says it with the same keys, or an official
    data set's own list is taken."""

    limit: int = 0
    """Only the first so many pictures in the order of their names; 0 takes all."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError("limit cannot be negative")


@dataclass
class AnnotatedPictures:
    """The pairs of a data set, in the order of their names, and what their masks mean."""

    pairs: list[tuple[str, str]]
    """Address of the picture, address of its mask."""

    classes: ClassList
    raw_context: bool = False
    """Masks are PASCAL-Context's MATLAB files."""

    record: dict[str, Any] = field(default_factory=dict)
    """Where the pictures come from, for the rows."""

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, number: int) -> str:
        """File name of a picture; unique within each official data set too."""
        return posixpath.basename(self.pairs[number][0])

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """The picture (RGB) and its class positions (H, W) int16.

        Raises:
            UserError: a file that is no picture or no index mask, sizes that differ, an unknown index.
        """
        picture_at, mask_at = self.pairs[number]
        picture = read_picture(picture_at)
        mask_HW = read_raw_context(places.read(mask_at), mask_at) if self.raw_context else _read_mask(mask_at)
        if mask_HW.shape != (picture.height, picture.width):
            sizes = f"{picture.width} x {picture.height} and {mask_HW.shape[1]} x {mask_HW.shape[0]}"
            raise UserError(f"{picture_at} and its mask differ in size ({sizes})")
        return picture, self.classes.positions(mask_HW, mask_at)


def open_annotated(config: AnnotatedConfig) -> AnnotatedPictures:
    """List a data set and read its classes; the pictures themselves are read later.

    Raises:
        UserError: a folder is missing or empty, a mask has no picture, or the class list is wrong.
    """
    if config.layout != "folder":
        return _open_official(config)
    pictures_at, masks_at = storage.join(config.root, config.pictures), storage.join(config.root, config.masks)
    pictures, masks = _by_stem(pictures_at, PICTURE_SUFFIXES), _by_stem(masks_at, (".png",))
    if not masks:
        raise UserError(f"{masks_at} has no PNG mask; pictures are expected in {pictures_at} beside it")
    if lonely := sorted(set(masks) - set(pictures)):
        raise UserError(f"{len(lonely)} of {len(masks)} masks have no picture in {pictures_at}, first {lonely[0]}.png")
    stems = sorted(masks)[: config.limit or None]
    if config.classes is None:
        classes_at = storage.join(config.root, "classes.yaml")
        classes = read_class_list(places.read(classes_at), classes_at)
    else:
        classes = config.classes
    pairs = [(pictures[s], masks[s]) for s in stems]
    record = {"layout": "folder", "split": "every mask", "of": len(masks)}
    if without_mask := len(pictures) - len(masks):
        record["without_mask"] = without_mask
        log.warning("pictures without a mask are left out", pictures=without_mask, folder=pictures_at)
    return AnnotatedPictures(pairs, classes, record=record)


def _open_official(config: AnnotatedConfig) -> AnnotatedPictures:
    layout = LAYOUTS[config.layout]
    source, pairs = find_pairs(layout, config.root, config.partial)
    record = {
        "layout": config.layout,
        "title": layout.title,
        "pictures": source.pictures,
        "masks": source.masks,
        "split": source.split or "every mask",
        "of": layout.pictures,
    }
    classes = config.classes or layout.classes()
    return AnnotatedPictures(pairs[: config.limit or None], classes, source.raw_context, record)


@dataclass
class DataCheck:
    """What reading every picture and mask of a data set found."""

    pictures: int
    expected: int
    pixels: int
    void: int
    """Pixels that are not scored."""
    pictures_C: np.ndarray
    """Pictures that show each class, in the order of `words`."""
    words: list[str]

    faults: list[str] = field(default_factory=list)
    """A sentence for each picture or mask that cannot be used."""

    @property
    def absent(self) -> list[str]:
        """Classes that no mask shows."""
        return [word for word, count in zip(self.words, self.pictures_C, strict=True) if not count]


def check_data(data: AnnotatedPictures, threads: int) -> DataCheck:
    """Read every picture and mask, count, and note every damaged file, sizes that differ, and unknown indices."""
    words = [*data.classes.names, *(["background"] if data.classes.score_background else [])]
    found = DataCheck(0, data.record.get("of", len(data)), 0, 0, np.zeros(len(words), np.int64), words)

    def read(number: int) -> np.ndarray | str:
        try:
            return data.read(number)[1]
        except UserError as error:
            return str(error)

    for truth_HW in read_ahead(range(len(data)), read, threads):
        if isinstance(truth_HW, str):
            found.faults.append(truth_HW)
            continue
        found.pictures += 1
        found.pixels += truth_HW.size
        found.void += int((truth_HW == NOT_SCORED).sum())
        found.pictures_C += np.bincount(truth_HW[truth_HW != NOT_SCORED], minlength=len(words)) > 0
    return found


def read_picture(address: str) -> Image.Image:
    """The picture at a path or URL, decoded to RGB, as stored (no rotation by EXIF: masks know none).

    Raises:
        UserError: there is no such file, it is no picture, is damaged, or has over :data:`MAX_PIXELS` pixels.
    """
    return _open(address).convert("RGB")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result], threads: int) -> Iterator[Result]:
    """``read(item)`` for each item, in order, with up to ``2 * threads`` reads under way."""
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[Result]] = [pool.submit(read, item) for item in islice(remaining, 2 * threads)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting.extend(pool.submit(read, item) for item in islice(remaining, 1))
        finally:
            for future in waiting:
                future.cancel()


def _read_mask(address: str) -> np.ndarray:
    mask = _open(address)
    if mask.mode not in ("1", "P", "L", "I", "I;16"):
        raise UserError(f"{address} is no index mask (its mode is {mask.mode}); palette or grey PNG is expected")
    # Masks of one bit hold 0 and 1, which numpy reads as truth values.
    return np.asarray(mask).astype(np.uint8) if mask.mode == "1" else np.asarray(mask)


def _open(address: str) -> Image.Image:
    return open_picture(places.read(address), address)


def open_picture(content: bytes, name: str, most_pixels: int = 0) -> Image.Image:
    """A decoded picture from anywhere; ``most_pixels`` (0: :data:`MAX_PIXELS`) is asked before anything is decoded.

    Raises:
        UserError: it is no picture, is damaged, or has too many pixels; ``name`` is how the sentence calls it.
    """
    most = most_pixels or MAX_PIXELS
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > most:
            raise UserError(f"{name} has more than {most // 1_000_000} million pixels")
        picture.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as a picture ({error})") from error
    return picture


def _by_stem(folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    if not places.is_folder(folder):
        raise UserError(f"{folder}: there is no such folder")
    found: dict[str, str] = {}
    for name in (name for name in places.names(folder) if "/" not in name):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in suffixes:
            continue
        if stem in found:
            raise UserError(f"{folder} has two files named {stem}")
        found[stem] = storage.join(folder, name)
    return found
