"""Labelled pictures for zero-shot classification: the usual data sets as clip-benchmark and torchvision read them.

Their readers, class names and prompts are used as they are, so that a figure means what others' figures mean. What is
added is that nothing is ever downloaded or run in a shell: a data set that is not there ends in a sentence first.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torchvision.datasets import ImageFolder

from pacl_scale.errors import UserError, first_line
from pacl_scale.evaluate.pictures import MAX_PIXELS
from pacl_scale.evaluate.protocol import TemplateSet, template_set


@dataclass(frozen=True)
class Known:
    """A data set that clip-benchmark reads."""

    name: str
    """clip-benchmark's name for it."""
    needs: tuple[str, ...]
    """Files and folders below the root without which its reader would download, or fail."""
    pictures: int
    """Pictures of the split."""
    get: str
    """Where it comes from, in one clause."""
    split: str = "test"
    by_folder: bool = False
    """Classes are folders in the order of their names, so that one missing folder would shift all after it."""


KNOWN: Mapping[str, Known] = {
    "imagenet": Known(
        "imagenet1k-unverified", ("val",), 50000, "image-net.org, unpacked as val/<synset>/*.JPEG", by_folder=True
    ),
    "imagenet_v2": Known(
        "imagenetv2",
        ("ImageNetV2-matched-frequency",),
        10000,
        "huggingface.co/datasets/vaishaal/ImageNetV2, its folder imagenetv2-matched-frequency-format-val renamed",
    ),
    "imagenet_a": Known("imagenet-a", (".",), 7500, "imagenet-a.tar of Hendrycks et al.", by_folder=True),
    "imagenet_r": Known("imagenet-r", (".",), 30000, "imagenet-r.tar of Hendrycks et al.", by_folder=True),
    "imagenet_sketch": Known("imagenet_sketch", (".",), 50889, "ImageNet-Sketch.zip of Wang et al.", by_folder=True),
    "objectnet": Known(
        "objectnet",
        ("objectnet-1.0/images", "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"),
        18574,
        "objectnet.dev, its mappings/*.json beside objectnet-1.0",
    ),
    "cifar10": Known(
        "cifar10", ("cifar-10-batches-py",), 10000, "cifar-10-python.tar.gz of cs.toronto.edu/~kriz, unpacked"
    ),
    "cifar100": Known(
        "cifar100", ("cifar-100-python",), 10000, "cifar-100-python.tar.gz of cs.toronto.edu/~kriz, unpacked"
    ),
    "food101": Known("food101", ("food-101/images", "food-101/meta/test.json"), 25250, "food-101.tar.gz, unpacked"),
    "pets": Known(
        "pets",
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/test.txt"),
        3669,
        "images.tar.gz and annotations.tar.gz of the Oxford-IIIT Pets, unpacked in oxford-iiit-pet",
    ),
    "cars": Known(
        "cars",
        ("stanford_cars/cars_test", "stanford_cars/devkit", "stanford_cars/cars_test_annos_withlabels.mat"),
        8041,
        "Stanford Cars as torchvision lays it out",
    ),
    "caltech101": Known(
        "caltech101",
        ("caltech101/101_ObjectCategories", "caltech101/Annotations"),
        9145,
        "caltech-101.zip of data.caltech.edu",
        by_folder=True,
    ),
    "flowers": Known(
        "flowers",
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        6149,
        "Oxford Flowers 102 as torchvision lays it out",
    ),
    "dtd": Known("dtd", ("dtd/dtd/images", "dtd/dtd/labels/test1.txt"), 1880, "dtd-r1.0.1.tar.gz, unpacked in dtd"),
    "aircraft": Known(
        "fgvc_aircraft", ("fgvc-aircraft-2013b/data/images",), 3333, "fgvc-aircraft-2013b.tar.gz, unpacked"
    ),
    "stl10": Known("stl10", ("stl10_binary",), 8000, "stl10_binary.tar.gz, unpacked"),
    "eurosat": Known("eurosat", ("eurosat/2750",), 27000, "EuroSAT.zip, unpacked in eurosat", by_folder=True),
}
"""Seventeen data sets; the twelve of the paper are not documented."""


@dataclass
class LabelledConfig:
    """Pictures with one label each: a folder a class, or one of the usual data sets."""

    root: str
    """Folder on this machine that holds the data set."""

    layout: Literal[
        "folder",
        "imagenet",
        "imagenet_v2",
        "imagenet_a",
        "imagenet_r",
        "imagenet_sketch",
        "objectnet",
        "cifar10",
        "cifar100",
        "food101",
        "pets",
        "cars",
        "caltech101",
        "flowers",
        "dtd",
        "aircraft",
        "stl10",
        "eurosat",
    ] = "folder"
    """"folder": one folder of pictures a class, whose name ('_' for a space) is the word, as torchvision's ImageFolder.
    The others as clip-benchmark and torchvision read them, with clip-benchmark's class names."""

    partial: bool = False
    """Measure on the pictures that are there, however few; the row says of how many."""

    templates: Literal["own", "paper", "imagenet", "single", "none"] = "own"
    """Prompts around a class name: "own" are clip-benchmark's for the data set (a folder's are CLIP's eighty), the
    others as for segmentation."""

    limit: int = 0
    """Only so many pictures, evenly spread over the data set; 0 takes all."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError("limit cannot be negative")


@dataclass
class LabelledPictures:
    """A data set's pictures, labels and classes."""

    source: Any
    """Number to (picture, label)."""
    numbers: list[int]
    """Those of the pictures that count."""
    words: list[str]
    templates: tuple[str, ...] | None
    """Prompts that come with the data set, each with one {}."""
    record: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, place: int) -> str:
        """The picture's number in the data set; unique."""
        return str(self.numbers[place])

    def read(self, place: int) -> tuple[Image.Image, int]:
        """The picture in RGB and the position of its class.

        Raises:
            UserError: it cannot be read, is too large, or has a label that is no class.
        """
        number = self.numbers[place]
        try:
            picture, label = self.source[number]
            label = int(label)
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"picture {number} has more than {MAX_PIXELS // 1_000_000} million pixels")
            picture = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"picture {number} of {self.record['layout']} cannot be read ({error})") from error
        if not 0 <= label < len(self.words):
            raise UserError(f"picture {number} of {self.record['layout']} has the label {label}, which is no class")
        return picture, label


def open_labelled(config: LabelledConfig) -> LabelledPictures:
    """List a data set; the pictures themselves are read later.

    Raises:
        UserError: it is not there or not whole, or clip-benchmark is not installed; the sentence says what to do.
    """
    if not os.path.isdir(config.root):
        known = KNOWN.get(config.layout)
        hint = f"; get it from {known.get}" if known else ""
        raise UserError(f"{config.root}: there is no such folder{hint}")
    if config.layout == "folder":
        found = _open_folder(config.root)
    else:
        found = _open_known(config.root, config.layout, config.partial)
    if config.limit and config.limit < len(found):
        step = len(found) / config.limit
        found.numbers = [found.numbers[int(n * step)] for n in range(config.limit)]
    return found


def _open_folder(root: str) -> LabelledPictures:
    try:
        source = ImageFolder(root)
    except FileNotFoundError as error:
        raise UserError(f"{root} must hold a folder of pictures for each class ({first_line(error)})") from error
    words = [name.replace("_", " ") for name in source.classes]
    if len(words) < 2:
        raise UserError(f"{root} has one class alone; classification needs at least two")
    record = {"layout": "folder", "split": "every picture", "of": len(source)}
    return LabelledPictures(source, list(range(len(source))), words, None, record)


def _open_known(root: str, layout: str, partial: bool) -> LabelledPictures:
    known = KNOWN[layout]
    for needed in known.needs:
        # Without this its reader might start wget in a shell.
        if not os.path.exists(os.path.join(root, needed)):
            raise UserError(f"{root} does not hold {layout}: expected {os.path.join(root, needed)}; get {known.get}")
    source = _built(root, layout, known, partial)
    # Folders as torchvision's ImageFolder counts them, and as Caltech-101's reader does.
    words, folders = list(source.classes), getattr(source, "class_to_idx", getattr(source, "categories", None))
    if known.by_folder and folders is not None and len(folders) != len(words):
        raise UserError(f"{layout} has {len(words)} classes, but {root} leads to {len(folders)} folders of pictures")
    if len(source) != known.pictures and not partial:
        raise UserError(
            f"{layout} has {known.pictures} pictures, but {root} leads to {len(source)}; get {known.get} "
            "(or set partial=true to measure on these alone)"
        )
    templates = tuple(template.replace("{c}", "{}") for template in source.templates)
    record = {"layout": layout, "split": known.split, "of": known.pictures, "names": "clip-benchmark's"}
    return LabelledPictures(source, list(range(len(source))), words, templates, record)


def _built(root: str, layout: str, known: Known, partial: bool) -> Any:
    try:
        # Not imported with the module: it takes seconds, and segmentation has no need of it.
        builder = importlib.import_module("clip_benchmark.datasets.builder")
        readers = importlib.import_module("clip_benchmark.datasets.imagenetv2")
    except ImportError as error:
        raise UserError(f"{layout} is read by clip-benchmark; run: pip install 'pacl-scale[classification]'") from error
    found = None
    if layout == "imagenet_v2":
        found = len(list(Path(root, known.needs[0]).glob("**/*.jpeg")))
        if not found or (found != known.pictures and not partial):
            raise UserError(f"{layout} has {known.pictures} pictures, but {root} leads to {found}; get {known.get}")
    try:
        with warnings.catch_warnings(), _takes_for_whole(readers, found):
            warnings.simplefilter("ignore", UserWarning)
            source = builder.build_dataset(known.name, root=root, split=known.split, download=False)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, IndexError, ImportError) as error:
        raise UserError(f"{root} does not hold {layout} as expected ({first_line(error)}); get {known.get}") from error
    if layout == "imagenet_v2":
        # Its reader takes files as the file system lists them; an order is needed to go on after an interruption.
        source.fnames.sort()
    return source


@contextlib.contextmanager
def _takes_for_whole(readers: Any, pictures: int | None) -> Iterator[None]:
    """ImageNetV2's reader downloads whenever the number of pictures is not the one that it holds for the whole."""
    whole = readers.V2_DATASET_SIZE
    readers.V2_DATASET_SIZE = whole if pictures is None else pictures
    try:
        yield
    finally:
        readers.V2_DATASET_SIZE = whole


def templates_of(data: LabelledPictures, chosen: Literal["own"] | TemplateSet) -> tuple[str, ...]:
    """The prompts of a data set under a choice of :attr:`LabelledConfig.templates`."""
    if chosen == "own":
        return data.templates or template_set("imagenet")
    return template_set(chosen)
