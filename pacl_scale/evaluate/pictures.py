"""Annotated pictures as they lie in folders: ``images/*.jpg`` beside ``masks/*.png``."""

import io
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pacl_scale import storage
from pacl_scale.data.decode import FORMATS
from pacl_scale.errors import UserError
from pacl_scale.evaluate.classes import ClassList, read_class_list

Item = TypeVar("Item")
Result = TypeVar("Result")

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few bytes can ask for any amount of memory."""


@dataclass
class AnnotatedConfig:
    """A folder of pictures with masks."""

    root: str
    """Folder or URL that holds the two folders below."""

    pictures: str = "images"
    """Folder of the pictures below `root`; those without a mask are left out."""

    masks: str = "masks"
    """Folder of PNG masks below `root`: palette or grey, the pixel's value is the index of its class."""

    classes: ClassList | None = None
    """Which index is which class; if not given, `classes.yaml` in `root` says it with the same keys."""

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
    without_mask: int = field(default=0)
    """Pictures left out because there is no mask of their name."""

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, number: int) -> str:
        """File name of a picture."""
        return posixpath.basename(self.pairs[number][0])

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """The picture (RGB) and its class positions (H, W) int64.

        Raises:
            UserError: a file that is no picture or no index mask, sizes that differ, an unknown index.
        """
        picture_at, mask_at = self.pairs[number]
        picture = read_picture(picture_at)
        mask = _open(mask_at)
        if mask.mode not in ("P", "L", "I", "I;16"):
            raise UserError(f"{mask_at} is no index mask (its mode is {mask.mode}); palette or grey PNG is expected")
        mask_HW = np.asarray(mask)
        if mask_HW.shape != (picture.height, picture.width):
            sizes = f"{picture.width} x {picture.height} and {mask.width} x {mask.height}"
            raise UserError(f"{picture_at} and its mask differ in size ({sizes})")
        return picture, self.classes.positions(mask_HW, mask_at)


def open_annotated(config: AnnotatedConfig) -> AnnotatedPictures:
    """List a data set and read its classes; the pictures themselves are read later.

    Raises:
        UserError: a folder is missing or empty, a mask has no picture, or the class list is wrong.
    """
    pictures_at, masks_at = storage.join(config.root, config.pictures), storage.join(config.root, config.masks)
    pictures, masks = _by_stem(pictures_at, PICTURE_SUFFIXES), _by_stem(masks_at, (".png",))
    if not masks:
        raise UserError(f"{masks_at} has no PNG mask; pictures are expected in {pictures_at} beside it")
    if lonely := sorted(set(masks) - set(pictures)):
        raise UserError(f"{len(lonely)} of {len(masks)} masks have no picture in {pictures_at}, first {lonely[0]}.png")
    stems = sorted(masks)[: config.limit or None]
    if config.classes is None:
        classes_at = storage.join(config.root, "classes.yaml")
        classes = read_class_list(storage.read_bytes(classes_at), classes_at)
    else:
        classes = config.classes
    return AnnotatedPictures([(pictures[s], masks[s]) for s in stems], classes, len(pictures) - len(masks))


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


def _open(address: str) -> Image.Image:
    content = storage.read_bytes(address)
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise UserError(f"{address} has more than {MAX_PIXELS // 1_000_000} million pixels")
        picture.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{address} is not a picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{address} cannot be read as a picture ({error})") from error
    return picture


def _by_stem(folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    files, path = storage.filesystem(folder)
    with storage.explained(folder):
        if not files.isdir(path):
            raise UserError(f"{folder}: there is no such folder")
        names = [posixpath.basename(name) for name in files.ls(path, detail=False)]
    found: dict[str, str] = {}
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() not in suffixes:
            continue
        if stem in found:
            raise UserError(f"{folder} has two files named {stem}")
        found[stem] = storage.join(folder, name)
    return found
