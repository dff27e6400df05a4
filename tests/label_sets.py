"""Small copies of the labelled data sets' own layouts: a picture is of the colour that its class is named after."""

import json
import pickle
from collections.abc import Sequence
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import RGB
from PIL import Image
from torchvision import datasets

NAMES = list(RGB)


def picture(word: str, side: int = 32) -> Image.Image:
    """A picture of one colour, with a darker edge."""
    pixels = np.full((side, side + 8, 3), RGB[word], np.uint8)
    pixels[0] //= 2
    return Image.fromarray(pixels)


def save(path: Path, word: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(word).save(path, quality=95)


def folders(root: Path, names: Sequence[str] = NAMES, each: int = 2, shown: Sequence[str] = NAMES) -> Path:
    """A folder a class; ``shown`` says the colour in each."""
    for name, word in zip(names, shown, strict=True):
        for number in range(each):
            save(root / name / f"{number}.jpg", word)
    return root


def food(root: Path) -> Path:
    """Food-101: meta/test.json leads to images/<class>/<number>.jpg; training pictures lie beside."""
    classes = {f"{word}_curry": [f"{word}_curry/{n}" for n in (11, 12)] for word in NAMES}
    for word in NAMES:
        for number in (11, 12, 99):
            save(root / "food-101" / "images" / f"{word}_curry" / f"{number}.jpg", word)
    meta = root / "food-101" / "meta"
    meta.mkdir(parents=True)
    (meta / "test.json").write_text(json.dumps(classes))
    (meta / "train.json").write_text(json.dumps({name: [f"{name}/99"] for name in classes}))
    return root


def pets(root: Path) -> Path:
    """Oxford-IIIT Pets: annotations/test.txt with labels from 1; cats' file names begin with a capital."""
    base = root / "oxford-iiit-pet"
    lines = []
    for number, word in enumerate(NAMES):
        for copy in (1, 2):
            name = f"{word}_{'cat' if number else 'hound'}_{copy}"
            save(base / "images" / f"{name}.jpg", word)
            lines.append(f"{name} {number + 1} {2 if number else 1} 1")
    (base / "annotations").mkdir()
    (base / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")
    (base / "annotations" / "trainval.txt").write_text(lines[0] + "\n")
    return root


def cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10: rows of 3,072 bytes, all of a picture's red first; torchvision knows the files by their checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    pixels = [np.asarray(picture(word).resize((32, 32))).transpose(2, 0, 1).ravel() for word in (*NAMES, "green")]
    batch = {"data": np.stack(pixels), "labels": [0, 1, 2, 1]}
    names = ["red", "green", "blue", *(f"thing{n}" for n in range(7))]
    kind = datasets.CIFAR10
    sums: dict[str, str] = {}
    contents: list[tuple[str, Any]] = [(name, batch) for name, _ in [*kind.train_list, *kind.test_list]]
    for name, content in [*contents, (kind.meta["filename"], {"label_names": names})]:
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return root


def textures(root: Path) -> Path:
    """DTD: labels/test1.txt with class/name lines, both folders named dtd."""
    base = root / "dtd" / "dtd"
    lines = []
    for word in NAMES:
        save(base / "images" / f"{word}" / f"{word}_0001.jpg", word)
        lines.append(f"{word}/{word}_0001.jpg")
    (base / "labels").mkdir()
    (base / "labels" / "test1.txt").write_text("\n".join(lines) + "\n")
    return root


def planes(root: Path) -> Path:
    """FGVC-Aircraft: variants.txt, and names with spaces after the picture's number."""
    base = root / "fgvc-aircraft-2013b" / "data"
    (base / "images").mkdir(parents=True)
    (base / "variants.txt").write_text("".join(f"a {word} 747\n" for word in NAMES))
    lines = []
    for number, word in enumerate(NAMES):
        save(base / "images" / f"000{number}.jpg", word)
        lines.append(f"000{number} a {word} 747")
    (base / "images_variant_test.txt").write_text("\n".join(lines) + "\n")
    return root


def second_imagenet(root: Path) -> Path:
    """ImageNetV2: folders named by class number, so that 10 sorts before 2."""
    for number, word in ((0, "red"), (10, "green"), (2, "blue")):
        path = root / "ImageNetV2-matched-frequency" / str(number) / "a.jpeg"
        path.parent.mkdir(parents=True)
        picture(word).save(path)
    return root
