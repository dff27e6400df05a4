"""Captioned pictures for retrieval: a CSV file, or the files that COCO and Flickr captions come in."""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pacl_scale import storage
from pacl_scale.errors import UserError

# I pictures, N texts.

Pairs = Iterator[tuple[str, str]]
"""(picture's path below the folder, caption)."""


@dataclass
class CaptionedConfig:
    """Captioned pictures: one file of captions, given by the key of its kind, and a folder."""

    csv: str = ""
    """CSV file with the columns `image` (file name) and `caption`, one line a caption."""

    coco: str = ""
    """COCO's own JSON (`captions_val2017.json`)."""

    karpathy: str = ""
    """Karpathy's JSON (`dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`), of which `split`
    counts: COCO's 5,000 and Flickr30k's 1,000 test pictures."""

    tokens: str = ""
    """Flickr's own lines `picture.jpg#number<tab>caption` (`results_20130124.token`, `Flickr8k.token.txt`)."""

    split: str = "test"
    """Of Karpathy's file: train, restval, val or test."""

    captions_per_picture: int = 0
    """Only the first so many captions of each picture; 0 takes all. Published COCO figures use 5."""

    pictures: str = ""
    """Folder of the pictures; if not given, `images` beside the file. Below it, Karpathy's COCO pictures lie in
    `val2014`, as they come."""

    limit: int = 0
    """Only the first so many pictures of the file; 0 takes all."""

    def __post_init__(self) -> None:
        if self.limit < 0 or self.captions_per_picture < 0:
            raise ValueError("limit and captions_per_picture cannot be negative")
        if sum(bool(getattr(self, kind)) for kind in READERS) != 1:
            raise ValueError(f"name one file of captions: {', '.join(READERS)}")

    @property
    def kind(self) -> str:
        """The key that is given."""
        return next(kind for kind in READERS if getattr(self, kind))

    @property
    def file(self) -> str:
        """Address of the file of captions."""
        return str(getattr(self, self.kind))


@dataclass
class CaptionedPictures:
    """Pictures, the distinct texts that describe them, and which describes which."""

    addresses: list[str]
    texts: list[str]
    true_IN: Tensor
    """(I, N) bool. A text that captions several pictures is one text and true of each of them."""
    record: dict[str, Any] = field(default_factory=dict)
    """Where they come from, for the rows."""


def open_captioned(config: CaptionedConfig) -> CaptionedPictures:
    """Read the file of captions.

    Raises:
        UserError: no such file, one of another form, or captions of fewer than two pictures.
    """
    content = storage.read_bytes(config.file)
    captions: dict[str, list[str]] = {}
    try:
        for image, caption in READERS[config.kind](content, config):
            if image and caption.strip():
                captions.setdefault(image, []).append(caption.strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{config.file} is no file of captions in UTF-8 ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config.file} does not have the form of {config.kind} ({_line(error)})") from error
    images = list(captions)[: config.limit or None]
    if len(images) < 2:
        raise UserError(f"{config.file} has captions of {len(images)} pictures; retrieval needs at least two")
    kept = {image: captions[image][: config.captions_per_picture or None] for image in images}
    texts = list(dict.fromkeys(text for image in images for text in kept[image]))
    column = {text: number for number, text in enumerate(texts)}
    true_IN = torch.zeros(len(images), len(texts), dtype=torch.bool)
    for row, image in enumerate(images):
        true_IN[row, [column[text] for text in kept[image]]] = True
    folder = config.pictures or storage.join(posixpath.dirname(config.file), "images")
    record = {
        "layout": config.kind,
        "split": config.split if config.kind == "karpathy" else "every picture",
        "of": len(captions),
        "captions_per_picture": config.captions_per_picture or "all",
    }
    return CaptionedPictures([storage.join(folder, image) for image in images], texts, true_IN, record)


def _from_csv(content: bytes, config: CaptionedConfig) -> Pairs:
    lines = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    if lines and not {"image", "caption"} <= set(lines[0]):
        raise UserError(f"{config.file} needs the columns image and caption; it has {', '.join(map(str, lines[0]))}")
    for line in lines:
        yield line["image"], line["caption"] or ""


def _from_coco(content: bytes, config: CaptionedConfig) -> Pairs:
    found = json.loads(content)
    names = {entry["id"]: _inside(entry["file_name"]) for entry in found["images"]}
    # In the order of the annotations' numbers, which the file does not keep.
    for entry in sorted(found["annotations"], key=lambda entry: entry["id"]):
        yield names[entry["image_id"]], entry["caption"]


def _from_karpathy(content: bytes, config: CaptionedConfig) -> Pairs:
    found = [entry for entry in json.loads(content)["images"] if entry["split"] == config.split]
    if not found:
        raise UserError(f"{config.file} has no picture of the split {config.split!r}")
    for entry in found:
        name = _inside(posixpath.join(entry.get("filepath", ""), entry["filename"]))
        for sentence in entry["sentences"]:
            yield name, sentence["raw"]


def _from_tokens(content: bytes, config: CaptionedConfig) -> Pairs:
    for line in content.decode("utf-8-sig").splitlines():
        if line.strip():
            image, tab, caption = line.partition("\t")
            if not tab or "#" not in image:
                raise ValueError(f"a line begins {line[:40]!r}")
            # Flickr8k's own file ends some names in .jpg.1, of pictures that do not exist.
            yield _inside(image.rpartition("#")[0]), caption


def _inside(name: Any) -> str:
    """A path below the folder of pictures, and never above it."""
    if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name!r} is no picture's name")
    return name


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


READERS: dict[str, Callable[[bytes, CaptionedConfig], Pairs]] = {
    "csv": _from_csv,
    "coco": _from_coco,
    "karpathy": _from_karpathy,
    "tokens": _from_tokens,
}
"""Kind of file to its reader."""
