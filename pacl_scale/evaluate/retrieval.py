"""Image-text retrieval with PACL's compatibility phi on held-out pictures with several captions each."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacl_scale import log, storage
from pacl_scale.data.decode import BadPicture, PictureConfig, decode
from pacl_scale.encoders import Preprocess
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedPictures
from pacl_scale.evaluate.compared import Compared
from pacl_scale.evaluate.intervals import DRAWS, LEVEL, share_interval
from pacl_scale.evaluate.methods import MASKCLIP, Method, Towers
from pacl_scale.evaluate.pictures import read_ahead
from pacl_scale.evaluate.protocol import normalised
from pacl_scale.evaluate.rows import Row, checkpoint_of, digest, towers_of

# I pictures, N texts, B pictures of a batch, T patches, Q queries, K answers.

RANKS = (1, 5, 10)
READERS = 4
QUERIES_AT_ONCE = 512


def retrieval_protocol(preprocess: Preprocess) -> dict[str, Any]:
    """All that fixes the figure beside checkpoint and data, for the row."""
    return {
        "name": "retrieval",
        "resize": preprocess.resize,
        "size": preprocess.image_size,
        "filter": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "text": "the caption as it is",
        "score": "phi of picture and text; of clip the cosine of its head",
        "ties": "count against the true answer",
    }


def data_of(data: CaptionedPictures) -> dict[str, Any]:
    """What is measured on, for the row."""
    return data.record | {"names": digest([data.texts, [Path(address).name for address in data.addresses]])}


@torch.no_grad()
def evaluate_retrieval(
    name: str,
    data: CaptionedPictures,
    towers: Towers,
    methods: Sequence[Method],
    batch_size: int,
    folder: Path | None = None,
    part: int = 0,
    parts: int = 1,
) -> list[Row]:
    """R@1, R@5 and R@10 both ways, one row a method; each picture and each text is encoded once.

    Pictures are resized and cropped as the tower was trained (and PACL with it), captions taken as they are.

    Args:
        name: the data set's name in the rows.
        data: pictures and texts.
        towers: the frozen encoders.
        methods: what is compared; ``maskclip``, which compares whole pictures as ``clip`` does, is left out.
        batch_size: pictures that pass the tower together.
        folder: keeps what is compared, so that the same call goes on where it ended; None forgets it in the end.
        part: number of this process.
        parts: so many processes share the pictures, in the same ``folder``.

    Returns:
        The rows; none while other processes' pictures are missing.
    """
    started = time.monotonic()
    methods = [method for method in methods if method.name != MASKCLIP]
    with tempfile.TemporaryDirectory(prefix="pacl-retrieval-") as scratch:
        sizes = len(data.addresses), len(data.texts)
        compared = Compared(folder or Path(scratch), [method.name for method in methods], *sizes, part, parts)
        _compare(name, data, towers, methods, batch_size, compared)
        if not compared.is_whole():
            return []
        try:
            scores = {method.name: scores_of(compared, method.name, data.true_IN) for method in methods}
        except FileNotFoundError:
            # Another part has ended at the same time, written the rows and forgotten the rest.
            return []
    seconds = round(time.monotonic() - started, 3)
    return [
        Row(
            task="retrieval",
            data_set=name,
            protocol=retrieval_protocol(towers.vision.preprocess),
            method=method.name,
            checkpoint=checkpoint_of(method) | method.compares_by,
            towers=towers_of(towers),
            pictures=len(data.addresses),
            scores=scores[method.name],
            data=data_of(data),
            seconds=seconds,
        )
        for method in methods
    ]


def _compare(
    name: str,
    data: CaptionedPictures,
    towers: Towers,
    methods: Sequence[Method],
    batch_size: int,
    compared: Compared,
) -> None:
    """Compare what is left of this part's pictures with every text."""
    numbers = compared.remaining()
    if not numbers:
        return
    texts_ND = towers.text.encode(data.texts).to(towers.device)
    preprocess = towers.vision.preprocess

    def prepare(number: int) -> Tensor:
        address = data.addresses[number]
        try:
            pixels_HW3 = decode(storage.read_bytes(address), preprocess, PictureConfig(exact=True), None)
        except BadPicture as error:
            raise UserError(f"{address} cannot be used: {error}") from error
        return normalised(pixels_HW3, preprocess)

    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    pictures = read_ahead(numbers, prepare, READERS)
    for batch in log.progress(batches, f"evaluate {name}", unit="batch"):
        pixels_B3HW = torch.stack([next(pictures) for _ in batch]).to(towers.device)
        tokens_BTD = towers.vision.encode(pixels_B3HW).tokens
        compared.add({method.name: method.compare(tokens_BTD, texts_ND) for method in methods})


def scores_of(compared: Compared, method: str, true_IN: Tensor) -> dict[str, Any]:
    """Recall both ways from what is on disk, some queries at a time."""
    pictures, texts = true_IN.shape
    ahead_I, ahead_N = [], []
    for start in range(0, pictures, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, pictures)
        ahead_I.append(_ahead(compared.of_pictures(method, start, stop), true_IN[start:stop]))
    for start in range(0, texts, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, texts)
        ahead_N.append(_ahead(compared.of_texts(method, start, stop).T, true_IN[:, start:stop].T))
    return _recalls(torch.cat(ahead_I), torch.cat(ahead_N))


def recalls(phi_IN: Tensor, true_IN: Tensor) -> dict[str, Any]:
    """Recall at :data:`RANKS` from all compatibilities (I, N) and the true pairs (I, N) bool."""
    return _recalls(_ahead(phi_IN, true_IN), _ahead(phi_IN.T, true_IN.T))


def _recalls(ahead_I: Tensor, ahead_N: Tensor) -> dict[str, Any]:
    scores: dict[str, Any] = {"texts": len(ahead_N), "intervals": {"level": LEVEL, "draws": DRAWS}}
    for way, ahead_Q in (("image_to_text", ahead_I.numpy()), ("text_to_image", ahead_N.numpy())):
        scores[way] = {f"R@{k}": float(np.mean(ahead_Q < k)) for k in RANKS}
        scores["intervals"] |= {f"{way} R@{k}": share_interval(ahead_Q < k) for k in RANKS}
    return scores


def _ahead(phi_QK: Tensor, true_QK: Tensor) -> Tensor:
    """(Q,) how many wrong answers are at or above the best true one of each query.

    Counting equal scores as above keeps a model that gives one score to everything from looking perfect.
    """
    best_Q1 = phi_QK.masked_fill(~true_QK, -torch.inf).amax(dim=1, keepdim=True)
    return ((phi_QK >= best_Q1) & ~true_QK).sum(dim=1)
