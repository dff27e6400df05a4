"""Zero-shot segmentation: each picture is encoded once, and every method scores the same patch tokens.

Letters: B pictures, T = h*w patches, Din width of the tower's tokens, D of text vectors, C classes, H x W pixels.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacl_scale import log
from pacl_scale.evaluate.classes import NOT_SCORED, ClassList
from pacl_scale.evaluate.counts import Confusion, per_class_table
from pacl_scale.evaluate.methods import MAJORITY, PATCH_ORACLE, Method, Towers
from pacl_scale.evaluate.pictures import AnnotatedPictures, read_ahead
from pacl_scale.evaluate.protocol import Protocol, as_input, best_class, class_vectors, patch_scores
from pacl_scale.evaluate.rows import Row

READERS = 4
"""Threads that read, decode and resize pictures beside the tower."""

BATCHES_WAITING = 4
"""Pictures of different shapes wait for company in their own batches, but never more than so many batches' worth."""


@dataclass
class Prepared:
    """One picture ready for the tower."""

    number: int
    picture: Image.Image
    truth_HW: np.ndarray
    pixels_3HW: Tensor


@dataclass
class _Tally:
    """What is counted for one method."""

    counts: dict[str | None, Confusion]
    """By word set."""
    per_picture: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate_segmentation(
    name: str,
    data: AnnotatedPictures,
    towers: Towers,
    methods: Sequence[Method],
    protocol: Protocol,
    batch_size: int,
    controls: Sequence[str] = (MAJORITY, PATCH_ORACLE),
) -> list[Row]:
    """Score ``methods`` and ``controls`` on a data set, in one pass of the vision tower.

    Args:
        name: the data set's name in the rows.
        data: pictures, masks, classes.
        towers: the frozen encoders; each picture passes the vision tower once.
        methods: embedders to score.
        protocol: how pictures are shown and scores become labels.
        batch_size: pictures of one shape that pass the tower together.
        controls: of :data:`MAJORITY` (the most frequent true class everywhere: it peeks at the truth) and
            :data:`PATCH_ORACLE` (the true majority class of each patch: what the patch grid can reach).

    Returns:
        One row a method, then one a control.
    """
    started = time.monotonic()
    classes, total = data.classes, len(data.classes.indices)
    vectors = _vectors(towers, classes, protocol)
    tallies = {method.name: _Tally({word_set: Confusion.empty(total) for word_set in vectors}) for method in methods}
    oracle = _Tally({None: Confusion.empty(total)})
    truths_C: dict[str, np.ndarray] = {}
    done = encoded_batches(data, range(len(data)), towers, protocol, batch_size)
    for prepared, tokens_1TD, grid in log.progress(done, f"evaluate {name}", total=len(data), unit="picture"):
        picture_name, truth_HW = data.name(prepared.number), prepared.truth_HW
        truths_C[picture_name] = np.bincount(truth_HW[truth_HW != NOT_SCORED], minlength=total)
        for method in methods:
            patches_1TD = method.embed(tokens_1TD)
            for word_set, vectors_CD in vectors.items():
                predicted_HW = predict(patches_1TD, vectors_CD, grid, truth_HW.shape)
                _count(tallies[method.name], word_set, picture_name, Confusion.of(truth_HW, predicted_HW, total))
        if PATCH_ORACLE in controls:
            predicted_HW = oracle_labels(truth_HW, grid, total)
            _count(oracle, None, picture_name, Confusion.of(truth_HW, predicted_HW, total))
    checkpoints: dict[str, dict[str, Any]] = {method.name: method.checkpoint for method in methods}
    if MAJORITY in controls:
        tallies[MAJORITY], answer = _majority(truths_C, total)
        checkpoints[MAJORITY] = {"answer": classes.names[answer]}
    if PATCH_ORACLE in controls:
        tallies[PATCH_ORACLE], checkpoints[PATCH_ORACLE] = oracle, {}
    pictures_C = sum((truth_C > 0 for truth_C in truths_C.values()), start=np.zeros(total, np.int64))
    seconds = round(time.monotonic() - started, 3)
    return [
        Row(
            task="segmentation",
            data_set=name,
            protocol=protocol.record(),
            method=method,
            checkpoint=checkpoints[method],
            towers=towers.config,
            pictures=len(data),
            scores=_scores(tally, classes, pictures_C),
            per_picture=dict(sorted(tally.per_picture.items())),
            confusion=tally.counts[None].counts_CC.tolist(),
            seconds=seconds,
        )
        for method, tally in tallies.items()
    ]


@torch.no_grad()
def encoded_batches(
    data: AnnotatedPictures, numbers: Sequence[int], towers: Towers, protocol: Protocol, batch_size: int
) -> Iterator[tuple[Prepared, Tensor, tuple[int, int]]]:
    """Each picture of ``numbers`` with its patch tokens (1, T, Din) and grid, in the order of full batches.

    Pictures are batched by their input size; reading, decoding and resizing run ahead in threads.
    """
    preprocess, patch_size = towers.vision.preprocess, towers.vision.patch_size

    def prepare(number: int) -> Prepared:
        picture, truth_HW = data.read(number)
        size = protocol.input_size(picture.height, picture.width, preprocess.image_size, patch_size)
        return Prepared(number, picture, truth_HW, as_input(picture, size, preprocess))

    def encode(batch: list[Prepared]) -> Iterator[tuple[Prepared, Tensor, tuple[int, int]]]:
        tokens = towers.vision.encode(torch.stack([item.pixels_3HW for item in batch]).to(towers.device))
        for row, item in enumerate(batch):
            yield item, tokens.tokens[row : row + 1], tokens.grid

    waiting: dict[torch.Size, list[Prepared]] = {}
    for item in read_ahead(numbers, prepare, READERS):
        batch = waiting.setdefault(item.pixels_3HW.shape, [])
        batch.append(item)
        if len(batch) == batch_size:
            yield from encode(waiting.pop(item.pixels_3HW.shape))
        elif sum(map(len, waiting.values())) >= BATCHES_WAITING * batch_size:
            yield from encode(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for batch in waiting.values():
        yield from encode(batch)


def predict(patches_1TD: Tensor, vectors_CD: Tensor, grid: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Class positions (H, W) int64 of one picture from its embedded patches (1, T, D)."""
    scores_1Chw = patch_scores(patches_1TD, vectors_CD, grid)
    return best_class(scores_1Chw[0], size[0], size[1])[0].cpu().numpy()


def oracle_labels(truth_HW: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """What the patch grid can express of the truth (H, W): the most frequent scored class of each patch, upsampled.

    One-hot maps of the patches' true classes take the place of a model's scores; a patch without a scored pixel
    votes for no class. A tie goes to the class that comes first.
    """
    (height, width), (h, w) = truth_HW.shape, grid
    rows_H1 = ((np.arange(height) + 0.5) * h / height).astype(np.int64)[:, None]
    columns_1W = ((np.arange(width) + 0.5) * w / width).astype(np.int64)[None, :]
    patch_HW = rows_H1 * w + columns_1W
    scored = truth_HW != NOT_SCORED
    votes = np.bincount(patch_HW[scored] * classes + truth_HW[scored], minlength=h * w * classes)
    votes_TC = torch.from_numpy(votes).view(h * w, classes)
    winners_TC = F.one_hot(votes_TC.argmax(dim=1), classes) * (votes_TC.sum(dim=1, keepdim=True) > 0)
    winners_Chw = winners_TC.float().T.reshape(classes, h, w)
    return best_class(winners_Chw, height, width)[0].numpy()


def _vectors(towers: Towers, classes: ClassList, protocol: Protocol) -> dict[str | None, Tensor]:
    return {
        word_set: class_vectors(towers.text, classes.synonyms(word_set), protocol).to(towers.device)
        for word_set in classes.word_sets()
    }


def _count(tally: _Tally, word_set: str | None, picture: str, counts: Confusion) -> None:
    tally.counts[word_set] = tally.counts[word_set] + counts
    if word_set is None:
        scores = {"miou": counts.miou(), "pixel_accuracy": counts.pixel_accuracy()}
        tally.per_picture[picture] = {
            key: None if value is None else round(value, 6) for key, value in scores.items()
        } | {"classes": int((counts.truth_C > 0).sum())}


def _majority(truths_C: dict[str, np.ndarray], classes: int) -> tuple[_Tally, int]:
    answer = int(sum(truths_C.values(), start=np.zeros(classes, np.int64)).argmax())
    tally = _Tally({None: Confusion.empty(classes)})
    for picture, truth_C in truths_C.items():
        _count(tally, None, picture, Confusion.constant(truth_C, answer))
    return tally, answer


def _scores(tally: _Tally, classes: ClassList, pictures_C: np.ndarray) -> dict[str, Any]:
    counts = tally.counts[None]
    of_pictures = [scores["miou"] for scores in tally.per_picture.values() if scores["miou"] is not None]
    groups = {}
    for name in classes.groups:
        # Controls that use no words have one set of counts, whatever the words.
        groups[name] = tally.counts.get(name, counts).summary(classes.members(name))
        if classes.groups[name].words:
            asked = classes.synonyms(name)
            groups[name]["words"] = {classes.names[c]: asked[c] for c in classes.members(name)}
    return counts.summary() | {
        "miou_per_picture": float(np.mean(of_pictures)) if of_pictures else None,
        "groups": groups,
        "per_class": per_class_table(counts, classes, pictures_C),
    }
