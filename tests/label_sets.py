"""Small copies of the labelled data sets' own layouts: a picture is of the colour that its class is named after."""

import inspect
import json
import pickle
import re
from collections.abc import Sequence
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import RGB
from PIL import Image
from scipy.io import savemat
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


SYNSETS = {"red": "n01498041", "green": "n07753592", "blue": "n12267677"}
"""Stingray, banana and acorn: three synsets that ImageNet, A, R and Sketch have alike."""
SYNSET_WORDS = {"red": "stingray", "green": "banana", "blue": "acorn"}


def synsets(root: Path, which: str = "all") -> dict[str, str]:
    """A folder a synset, of which three show colours; A and R have two hundred each, which their reader lists."""
    from clip_benchmark.datasets import builder

    names = builder.all_imagenet_wordnet_ids
    if which != "all":
        text = inspect.getsource(builder.build_dataset)
        names = re.findall(r"n\d{8}", text.split(f"imagenet_{which}_wnids = ")[1].split("\n")[0])
    root.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "any.jpg")
    for name in names:
        (root / name).mkdir()
        (root / name / "0.JPEG").hardlink_to(root / "any.jpg")
    (root / "any.jpg").unlink()
    for word, name in SYNSETS.items():
        (root / name / "0.JPEG").unlink()
        save(root / name / "0.JPEG", word)
    return SYNSET_WORDS


def imagenet(root: Path) -> dict[str, str]:
    """ImageNet: folders of synsets below val."""
    return synsets(root / "val")


def imagenet_a(root: Path) -> dict[str, str]:
    """ImageNet-A."""
    return synsets(root, "a")


def imagenet_r(root: Path) -> dict[str, str]:
    """ImageNet-R."""
    return synsets(root, "r")


def objects(root: Path) -> dict[str, str]:
    """ObjectNet: folders by its own names, of which some are no class of ImageNet; four files say which is which."""
    shown = {"apple": "blue", "banana": "green", "wheel": "red"}
    for folder, word in shown.items():
        save(root / "objectnet-1.0" / "images" / folder / "a.jpg", word)
    files: dict[str, Any] = {
        "folder_to_objectnet_label.json": {"banana": "Banana", "wheel": "Wheel", "apple": "Apple"},
        # The apple is none of ImageNet's.
        "objectnet_to_imagenet_1k.json": {"Wheel": "paddlewheel; car wheel", "Banana": "banana"},
        "pytorch_to_imagenet_2012_id.json": {"0": 1, "1": 0, "2": 2},
    }
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    (root / "imagenet_to_label_2012_v2").write_text("banana\npaddlewheel\ncar wheel\n")
    return {"green": "banana", "red": "wheel"}


def hundred(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """CIFAR-100: one file of pictures, fine and coarse labels side by side."""
    base, kind = root / "cifar-100-python", datasets.CIFAR100
    base.mkdir(parents=True)
    pixels = [np.asarray(picture(word).resize((32, 32))).transpose(2, 0, 1).ravel() for word in NAMES]
    batch = {"data": np.stack(pixels), "fine_labels": [98, 3, 50], "coarse_labels": [1, 1, 1]}
    names = {"fine_label_names": [f"thing{n}" for n in range(100)], "coarse_label_names": ["a", "b"]}
    sums = {}
    for name, content in (("train", batch), ("test", batch), ("meta", names)):
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["meta"]})
    return dict(zip(NAMES, ("thing98", "thing3", "thing50"), strict=True))


def cars(root: Path) -> dict[str, str]:
    """Stanford Cars: MATLAB structures with labels from 1; the names lie in the devkit."""
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    fields = [("bbox_x1", object), ("class", object), ("fname", object)]
    lines = []
    for number, word in enumerate(NAMES):
        save(base / "cars_test" / f"0000{number}.jpg", word)
        lines.append((7, number + 2, f"0000{number}.jpg"))
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": np.array(lines, fields)})
    names = np.array(["AM General Hummer", "a red car", "a green car", "a blue car"], object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    return {word: f"a {word} car" for word in NAMES}


def caltech(root: Path) -> dict[str, str]:
    """Caltech-101: folders in the order of their names, capitals first; the background is a class."""
    named = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes"]
    shown = {"Leopards": "red", "accordion": "green", "airplanes": "blue"}
    base = root / "caltech101"
    (base / "Annotations").mkdir(parents=True)
    for name in [*named, *(f"b{n:02d}" for n in range(102 - len(named)))]:
        (base / "101_ObjectCategories" / name).mkdir(parents=True)
        if name in shown:
            save(base / "101_ObjectCategories" / name / "image_0001.jpg", shown[name])
    return {"red": "leopard", "green": "accordion", "blue": "airplane"}


def flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Flowers-102: labels from 1 by picture; the test split is `tstid`, the largest one."""
    base, kind = root / "flowers-102", datasets.Flowers102
    base.mkdir(parents=True)
    labels = [9, 1, 4, 5, 6]
    for number, word in ((1, "blue"), (3, "red"), (5, "green"), (2, "blue"), (4, "red")):
        save(base / "jpg" / f"image_{number:05d}.jpg", word)
    savemat(base / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(base / "setid.mat", {"trnid": np.array([2]), "valid": np.array([4]), "tstid": np.array([3, 5, 1])})
    sums = {key: md5((base / f"{name}.mat").read_bytes()).hexdigest() for key, name in MATLAB.items()}
    found = kind._file_dict | {key: (f"{name}.mat", sums[key]) for key, name in MATLAB.items()}
    monkeypatch.setattr(kind, "_file_dict", found)
    return {"red": "sweet pea", "green": "tiger lily", "blue": "monkshood"}


MATLAB = {"label": "imagelabels", "setid": "setid"}


def stl(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """STL-10: raw bytes, each picture's channels one after the other and down the columns; labels from 1."""
    base, kind = root / "stl10_binary", datasets.STL10
    base.mkdir(parents=True)
    pixels = np.stack([np.asarray(picture(word, 96))[:, :96].transpose(2, 1, 0) for word in NAMES])
    for part in ("train", "test", "unlabeled"):
        (base / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (base / f"{part}_y.bin").write_bytes(bytes([2, 3, 4]))
    names = ["airplane", "red bird", "green car", "blue cat", *(f"thing{n}" for n in range(6))]
    (base / "class_names.txt").write_text("\n".join(names) + "\n")
    sums = {file.name: md5(file.read_bytes()).hexdigest() for file in base.iterdir()}
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name, _ in kind.test_list])
    return {"red": "red bird", "green": "green car", "blue": "blue cat"}


def satellite(root: Path) -> dict[str, str]:
    """EuroSAT: ten folders, whose words are clip-benchmark's in the order of the names."""
    names = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
    shown = {"Forest": "green", "Industrial": "red", "SeaLake": "blue"}
    for name in names.split():
        save(root / "eurosat" / "2750" / name / f"{name}_1.jpg", shown.get(name, "red"))
    return {"green": "forest", "blue": "lake or sea"}
