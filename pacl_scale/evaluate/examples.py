"""Pictures to look at: the best, the middling and the worst by score, with every method's labels beside the truth.

For each example ``<run>/evals/<data set>-<protocol>-<key>-examples/`` holds the picture (JPEG), a PNG a method whose
pixel values are positions in the example's own word list, and one strip with everything side by side for people.
``examples.json`` says what is what.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pacl_scale import storage
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.classes import ClassList
from pacl_scale.evaluate.heat import heat_png, small_size, word_maps
from pacl_scale.evaluate.labels import View
from pacl_scale.evaluate.masks import index_png
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedPictures
from pacl_scale.evaluate.protocol import Protocol, vectors_for
from pacl_scale.evaluate.rows import FOLDER, Row
from pacl_scale.evaluate.segmentation import encoded_batches, predict, score_maps
from pacl_scale.evaluate.views import lattice_of

TRUTH = "truth"
WORDS_SHOWN = 8
"""Words of one example with a colour of their own; the rest share grey as "other words"."""

SIDE = 400
"""Longest side in pixels of the pictures that are kept."""


@dataclass
class Example:
    """One picture, its words, and the files that show it."""

    rank: str
    """"best", "median" or "worst" by the main method's score on the picture."""
    picture: str
    """The picture's file name in the data set."""
    words: list[str]
    """Position in the PNGs to word; the truth's words first, by area. "other words" is last, if needed."""
    colours: list[overlay.Colour]
    truth_words: int
    """How many of the words, from the first, are in the ground truth."""
    scores: dict[str, dict[str, Any]]
    """Method to its mIoU and pixel accuracy on this picture."""
    files: dict[str, str]
    """"picture", "truth", "strip" and each method to a file name beside this list."""
    heat: dict[str, Any] = field(default_factory=dict)
    """The main method's score maps: "method"; "low" and "high", the cosines that values 0 and 255 of the PNGs stand
    for; "files", word to file name."""


def folder_of(run: str, row: Row) -> str:
    """Where the examples that were chosen by a row's scores lie."""
    return storage.join(run, FOLDER, f"{row.name}-examples")


def choose(row: Row, each: int) -> list[tuple[str, str]]:
    """(rank, picture name) of ``each`` best, median and worst pictures of a row, none twice.

    On equal scores the picture with more classes goes first, then the name: a perfect score says more there.
    """
    scored = {name: scores for name, scores in row.per_picture.items() if scores["miou"] is not None}
    order = sorted(scored, key=lambda name: (-scored[name]["miou"], -scored[name]["classes"], name))
    each = min(each, len(order) // 3)
    middle = (len(order) - each) // 2
    best, median, worst = order[:each], order[middle : middle + each], order[len(order) - each :]
    return [*(("best", n) for n in best), *(("median", n) for n in median), *(("worst", n) for n in worst)]


def write_examples(
    run: str,
    rows: Sequence[Row],
    data: AnnotatedPictures,
    towers: Towers,
    methods: Sequence[Method],
    protocol: Protocol,
    each: int,
) -> str:
    """Choose by the last method's scores, draw with ``methods``, write; returns the folder's address.

    The few pictures shown are encoded a second time, which costs less than keeping every prediction.
    """
    main = next(row for row in rows if row.method == methods[-1].name)
    folder, chosen = folder_of(run, main), choose(main, each)
    numbers = {data.name(number): number for number in range(len(data))}
    classes, lattice = data.classes, lattice_of(towers.vision, protocol)
    applies = protocol.background_applies(classes.score_background)
    background = classes.background_position if applies else None
    asked = vectors_for(towers.text, classes.synonyms(), protocol, applies and protocol.background == "words")
    asked = asked.to(towers.device)
    drawn: dict[str, tuple[Image.Image, dict[str, np.ndarray], list[tuple[View, Tensor]]]] = {}
    for prepared, tokens in encoded_batches(data, [numbers[n] for _, n in chosen], towers, protocol, 1):
        truth_HW = prepared.truth_HW
        labels = {m.name: predict(tokens, m, asked, truth_HW.shape, lattice, protocol, background)[0] for m in methods}
        maps = score_maps(tokens, methods[-1], asked)
        drawn[data.name(prepared.number)] = (prepared.picture, {TRUTH: truth_HW, **labels}, maps)
    examples = []
    for number, (rank, name) in enumerate(chosen):
        picture, labels, maps = drawn[name]
        scores = {row.method: row.per_picture[name] for row in rows if name in row.per_picture}
        stem = f"{number:02d}-{rank}"
        example, shown = _write_example(folder, stem, rank, name, picture, labels, scores, data.classes)
        size = small_size(picture.height, picture.width)
        # Background that a rule answers has no score of its own.
        scored = {c: word for c, word in shown.items() if c < asked.classes}
        example.heat = _write_heat(folder, stem, methods[-1].name, scored, word_maps(maps, [*scored], size, lattice))
        examples.append(example)
    listing = {"version": 1, "examples": [dataclasses.asdict(example) for example in examples]}
    storage.write_bytes(storage.join(folder, "examples.json"), (json.dumps(listing, indent=1) + "\n").encode())
    return folder


def _write_example(
    folder: str,
    stem: str,
    rank: str,
    name: str,
    picture: Image.Image,
    labels: dict[str, np.ndarray],
    scores: dict[str, dict[str, Any]],
    classes: ClassList,
) -> tuple[Example, dict[int, str]]:
    """Write one example; returns it, and the classes (by position) that have a word of their own on it."""
    # Background, where it is a label, comes after the classes.
    every_word = [*classes.names, "background"]
    shown, in_truth = _words_shown(labels, len(every_word))
    words = [every_word[c] for c in shown]
    table = np.full(len(every_word) + 1, len(shown))
    table[shown] = np.arange(len(shown))
    table[-1] = overlay.NOTHING
    if any((table[labels_HW] == len(shown)).any() for labels_HW in labels.values()):
        words.append("other words")
    colours = [*overlay.colours(len(shown)), overlay.OTHER][: len(words)]

    scale = min(1.0, SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    files = {"picture": f"{stem}.jpg", "strip": f"{stem}.png"}
    storage.write_bytes(storage.join(folder, files["picture"]), _encoded(small, "JPEG", quality=88))
    panels = [small]
    for method, labels_HW in labels.items():
        small_HW = overlay.nearest(table[labels_HW], size)
        files[method] = f"{stem}-{method}.png"
        storage.write_bytes(storage.join(folder, files[method]), index_png(small_HW, colours))
        panels.append(_panel(small, small_HW, overlay.nearest(labels[TRUTH], size) >= 0, words, colours))
    storage.write_bytes(storage.join(folder, files["strip"]), _encoded(_strip(panels, labels, words, colours), "PNG"))
    example = Example(rank, name, words, colours, in_truth, scores, files)
    return example, {c: every_word[c] for c in shown}


def _write_heat(folder: str, stem: str, method: str, words: dict[int, str], maps_nHW: np.ndarray) -> dict[str, Any]:
    if not words:
        return {}
    low, high = float(maps_nHW.min()), float(maps_nHW.max())
    files = {}
    for number, (word, scores_HW) in enumerate(zip(words.values(), maps_nHW, strict=True)):
        files[word] = f"{stem}-heat-{number}.png"
        storage.write_bytes(storage.join(folder, files[word]), heat_png(scores_HW, low, high))
    return {"method": method, "low": round(low, 4), "high": round(high, 4), "files": files}


def _panel(
    picture: Image.Image,
    labels_HW: np.ndarray,
    scored_HW: np.ndarray,
    words: Sequence[str],
    colours: Sequence[overlay.Colour],
) -> Image.Image:
    """One method's overlay, pale where the truth says nothing: what is said there is not scored."""
    strong, pale = (overlay.blend(picture, labels_HW, colours, opacity) for opacity in (0.6, 0.2))
    drawn = Image.composite(strong, pale, Image.fromarray(scored_HW))
    return overlay.draw_labels(drawn, np.where(scored_HW, labels_HW, overlay.NOTHING), words)


def _words_shown(labels: dict[str, np.ndarray], classes: int) -> tuple[list[int], int]:
    """Classes that get a colour: those of the truth by area, then what the methods say, the last method first."""
    shown: list[int] = []
    in_truth = 0
    for method in [TRUTH, *reversed([name for name in labels if name != TRUTH])]:
        area_C = np.bincount(labels[method][labels[method] >= 0], minlength=classes)
        found = [int(c) for c in np.argsort(-area_C, kind="stable") if area_C[c] and int(c) not in shown]
        shown = [*shown, *found][:WORDS_SHOWN]
        in_truth = in_truth or len(shown)
    return shown, in_truth


def _strip(
    panels: Sequence[Image.Image],
    labels: dict[str, np.ndarray],
    words: Sequence[str],
    colours: Sequence[overlay.Colour],
) -> Image.Image:
    gap, head = 8, 26
    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + head), (255, 255, 255))
    for number, (panel, title) in enumerate(zip(panels, ["picture", *labels], strict=True)):
        sheet.paste(panel, (number * (width + gap), head))
        overlay.write(sheet, (number * (width + gap) + 2, head // 2), title.replace("_", " "))
    return overlay.with_legend(sheet, list(zip(colours, words, strict=True)))


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
