"""Zero-shot classification: a picture's class is the one whose prompts it is most compatible with.

B pictures, T patches, C classes, K answers kept of each picture.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from pacl_scale import log
from pacl_scale.encoders import Preprocess, prompt_ensemble
from pacl_scale.evaluate.intervals import DRAWS, LEVEL, mean_per_class_interval, share_interval
from pacl_scale.evaluate.labelled import LabelledConfig, LabelledPictures, templates_of
from pacl_scale.evaluate.methods import MAJORITY, MASKCLIP, VALUE_PATH, Method, Towers
from pacl_scale.evaluate.pictures import read_ahead
from pacl_scale.evaluate.progress import Progress
from pacl_scale.evaluate.protocol import normalised
from pacl_scale.evaluate.rows import Row, checkpoint_of, digest, towers_of

ANSWERS = 5
"""Best answers kept of each picture, for top-1 and top-5."""

READERS = 4

CLASSES_AT_ONCE = 64
"""Classes whose prompts are encoded together: eighty prompts each."""

LARGEST_CONFUSION = 200
"""Classes up to which a row holds the confusion matrix."""

MOST_CONFUSED = 20
"""Pairs of true word and wrong answer that a row names."""


@dataclass
class Answers:
    """A method's answers for one picture."""

    true: int
    said: list[int]
    """Classes, the best first, at most :data:`ANSWERS`."""


def protocol_of(data: LabelledPictures, config: LabelledConfig, preprocess: Preprocess) -> dict[str, Any]:
    """All that fixes the figure beside checkpoint and data, for the row."""
    return {
        "name": "classification",
        "resize": preprocess.resize,
        "size": preprocess.image_size,
        "filter": f"{preprocess.interpolation}, antialiased, by torchvision on Pillow pictures",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "templates": list(templates_of(data, config.templates)),
        "template_set": config.templates,
        "word_vector": "normalised mean of its normalised prompts",
        "score": "phi of the picture with the class vector; of clip the cosine of its head",
        "ties": "the class first in the list",
    }


def data_of(data: LabelledPictures) -> dict[str, Any]:
    """What is measured on, for the row."""
    return data.record | {"words": data.words, "numbers": digest(data.numbers)}


@torch.no_grad()
def evaluate_classification(
    name: str,
    data: LabelledPictures,
    config: LabelledConfig,
    towers: Towers,
    methods: Sequence[Method],
    batch_size: int,
    controls: Sequence[str] = (MAJORITY,),
    progress: Progress | None = None,
) -> list[Row]:
    """Top-1, top-5 and mean accuracy a class, one row a method; each picture passes the vision tower once.

    Args:
        name: the data set's name in the rows.
        data: pictures, labels and words.
        config: gives the prompts.
        towers: the frozen encoders.
        methods: what is compared; ``maskclip`` and ``value_path``, which are about patches, are left out.
        batch_size: pictures that pass the tower together.
        controls: with :data:`MAJORITY`, the most frequent true class is answered everywhere: it peeks at the truth.
        progress: remembers the answers for finished pictures; see :mod:`pacl_scale.evaluate.progress`.

    Returns:
        One row a method, then the control; none while other processes' pictures are missing.

    Raises:
        UserError: a picture cannot be read.
    """
    started = time.monotonic()
    methods = [method for method in methods if method.name not in (MASKCLIP, VALUE_PATH)]
    protocol = protocol_of(data, config, towers.vision.preprocess)
    vectors_CD = class_vectors_of(towers, data.words, protocol["templates"])
    progress = progress or Progress.forgetful(Answers)
    places = progress.remaining([data.name(place) for place in range(len(data))])
    _answer(name, data, places, towers, methods, vectors_CD, batch_size, progress)
    finished = progress.all_done(len(data))
    if finished is None:
        return []
    answers = {method.name: {picture: found[method.name] for picture, found in finished.items()} for method in methods}
    checkpoints: dict[str, dict[str, Any]] = {
        method.name: checkpoint_of(method) | method.compares_by for method in methods
    }
    if MAJORITY in controls and answers:
        answers[MAJORITY], word = _majority(next(iter(answers.values())), data.words)
        checkpoints[MAJORITY] = {"answer": word}
    seconds = round(time.monotonic() - started, 3)
    rows = []
    for method_name, found in answers.items():
        scores, confusion = scores_of(found, data.words)
        rows.append(
            Row(
                task="classification",
                data_set=name,
                protocol=protocol,
                method=method_name,
                checkpoint=checkpoints[method_name],
                towers=towers_of(towers),
                pictures=len(data),
                scores=scores,
                confusion=confusion,
                data=data_of(data),
                seconds=seconds,
            )
        )
    return rows


def class_vectors_of(towers: Towers, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector a class, (C, D) float32 on the towers' device."""
    parts = [words[start : start + CLASSES_AT_ONCE] for start in range(0, len(words), CLASSES_AT_ONCE)]
    return torch.cat([prompt_ensemble(towers.text, part, templates) for part in parts]).to(towers.device)


def scores_of(answers: dict[str, Answers], words: Sequence[str]) -> tuple[dict[str, Any], list[list[int]] | None]:
    """The figures of a row, and pictures by true and answered class where there are few classes.

    Returns:
        ``top1``, ``top5`` (None below six classes, where it says little), ``mean_per_class`` over the classes present,
        ``intervals`` (bootstrap over pictures), ``per_class``, ``most_confused`` (true word, answer, pictures).
    """
    every = [answers[name] for name in sorted(answers)]
    true_P = np.array([answer.true for answer in every])
    said_PK = np.full((len(every), ANSWERS), -1)
    for row, answer in enumerate(every):
        said_PK[row, : len(answer.said)] = answer.said
    right_P = said_PK[:, 0] == true_P
    among_P = (said_PK == true_P[:, None]).any(axis=1)
    pictures_C = np.bincount(true_P, minlength=len(words))
    hits_C = np.bincount(true_P[right_P], minlength=len(words))
    present_C = pictures_C > 0
    accuracy_C = np.divide(hits_C, pictures_C, out=np.zeros(len(words)), where=present_C)
    enough = len(words) > ANSWERS
    scores: dict[str, Any] = {
        "top1": float(right_P.mean()),
        "top5": float(among_P.mean()) if enough else None,
        "mean_per_class": float(accuracy_C[present_C].mean()),
        "classes": len(words),
        "classes_present": int(present_C.sum()),
        "intervals": {
            "level": LEVEL,
            "draws": DRAWS,
            "top1": share_interval(right_P),
            "mean_per_class": mean_per_class_interval(hits_C, pictures_C),
        }
        | ({"top5": share_interval(among_P)} if enough else {}),
        "per_class": [
            {"word": word, "accuracy": float(accuracy_C[c]) if present_C[c] else None, "pictures": int(pictures_C[c])}
            for c, word in enumerate(words)
        ],
    }
    cells_CC = np.bincount(true_P * len(words) + said_PK[:, 0], minlength=len(words) ** 2).reshape(len(words), -1)
    scores["most_confused"] = _most_confused(cells_CC, words)
    return scores, cells_CC.tolist() if len(words) <= LARGEST_CONFUSION else None


def _most_confused(cells_CC: np.ndarray, words: Sequence[str]) -> list[tuple[str, str, int]]:
    """The largest errors: true word, answer, and pictures; on a tie in the order of the list."""
    wrong_CC = cells_CC - np.diag(np.diag(cells_CC))
    order = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(place), len(words)) for place in order]
    return [(words[true], words[said], int(wrong_CC[true, said])) for true, said in pairs if wrong_CC[true, said]]


def _answer(
    name: str,
    data: LabelledPictures,
    places: Sequence[int],
    towers: Towers,
    methods: Sequence[Method],
    vectors_CD: Tensor,
    batch_size: int,
    progress: Progress,
) -> None:
    """Every method's answers for the pictures at ``places``, into ``progress``."""
    preprocess = towers.vision.preprocess
    shape = shaping(preprocess)

    def prepare(place: int) -> tuple[Tensor, int]:
        picture, label = data.read(place)
        return normalised(np.asarray(shape(picture)), preprocess), label

    pictures = read_ahead(places, prepare, READERS)
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    for batch in log.progress(batches, f"evaluate {name}", unit="batch"):
        inputs, labels = zip(*(next(pictures) for _ in batch), strict=True)
        tokens_BTD = towers.vision.encode(torch.stack(inputs).to(towers.device)).tokens
        said = {method.name: _best(method.compare(tokens_BTD, vectors_CD)) for method in methods}
        for row, (place, label) in enumerate(zip(batch, labels, strict=True)):
            progress.add(data.name(place), {method: Answers(label, found[row]) for method, found in said.items()})


def _best(phi_BC: Tensor) -> list[list[int]]:
    """The best classes of each picture; on a tie the class first in the list."""
    order_BC = phi_BC.sort(dim=1, descending=True, stable=True).indices
    return order_BC[:, :ANSWERS].tolist()


def shaping(preprocess: Preprocess) -> Compose:
    """Pictures resized and cropped as the tower was trained, by torchvision."""
    size = preprocess.image_size
    mode = InterpolationMode(preprocess.interpolation)
    if preprocess.resize == "squash":
        return Compose([Resize((size, size), mode)])
    return Compose([Resize(size, mode), CenterCrop(size)])


def _majority(answers: dict[str, Answers], words: Sequence[str]) -> tuple[dict[str, Answers], str]:
    counts_C = np.bincount([answer.true for answer in answers.values()], minlength=len(words))
    order = np.argsort(-counts_C, kind="stable")[:ANSWERS].tolist()
    return {name: Answers(answer.true, order) for name, answer in answers.items()}, words[order[0]]
