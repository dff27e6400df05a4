"""Image-text retrieval with PACL's compatibility phi on held-out pictures with several captions each."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pacl_scale import log, storage
from pacl_scale.data.decode import BadPicture, PictureConfig, decode
from pacl_scale.errors import UserError
from pacl_scale.evaluate.captioned import CaptionedPictures
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.pictures import read_ahead
from pacl_scale.evaluate.protocol import normalised
from pacl_scale.evaluate.rows import Row

# I pictures, N texts, B pictures of a batch, T patches.

RANKS = (1, 5, 10)
READERS = 4


@torch.no_grad()
def evaluate_retrieval(
    name: str, data: CaptionedPictures, towers: Towers, methods: Sequence[Method], batch_size: int
) -> list[Row]:
    """R@1, R@5 and R@10 both ways, one row a method; each picture and each text is encoded once.

    Pictures are resized and cropped as the tower was trained (and PACL with it), captions taken as they are.
    """
    started = time.monotonic()
    texts_ND = towers.text.encode(data.texts).to(towers.device)
    phi: dict[str, list[Tensor]] = {method.name: [] for method in methods}
    preprocess = towers.vision.preprocess

    def prepare(address: str) -> Tensor:
        try:
            pixels_HW3 = decode(storage.read_bytes(address), preprocess, PictureConfig(exact=True), None)
        except BadPicture as error:
            raise UserError(f"{address} cannot be used: {error}") from error
        return normalised(pixels_HW3, preprocess)

    batches = [data.addresses[start : start + batch_size] for start in range(0, len(data.addresses), batch_size)]
    pictures = read_ahead(data.addresses, prepare, READERS)
    for batch in log.progress(batches, f"evaluate {name}", unit="batch"):
        pixels_B3HW = torch.stack([next(pictures) for _ in batch]).to(towers.device)
        tokens_BTD = towers.vision.encode(pixels_B3HW).tokens
        for method in methods:
            phi[method.name].append(method.compare(tokens_BTD, texts_ND).cpu())
    seconds = round(time.monotonic() - started, 3)
    return [
        Row(
            task="retrieval",
            data_set=name,
            protocol={
                "name": "retrieval",
                "resize": preprocess.resize,
                "size": preprocess.image_size,
                "text": "the caption as it is",
                "ties": "count against the true answer",
            },
            method=method.name,
            checkpoint=method.checkpoint | method.compares_by,
            towers=towers.config,
            pictures=len(data.addresses),
            scores=recalls(torch.cat(phi[method.name]), data.true_IN),
            data=data.record,
            seconds=seconds,
        )
        for method in methods
    ]


def recalls(phi_IN: Tensor, true_IN: Tensor) -> dict[str, Any]:
    """Recall at :data:`RANKS` from all compatibilities (I, N) and the true pairs (I, N) bool."""
    return {
        "image_to_text": _recall(phi_IN, true_IN),
        "text_to_image": _recall(phi_IN.T, true_IN.T),
        "texts": phi_IN.shape[1],
    }


def _recall(phi_QK: Tensor, true_QK: Tensor) -> dict[str, float]:
    """Share of queries whose best true answer has fewer than k wrong answers at or above its score.

    Counting equal scores as above keeps a model that gives one score to everything from looking perfect.
    """
    best_Q1 = phi_QK.masked_fill(~true_QK, -torch.inf).amax(dim=1, keepdim=True)
    ahead_Q = ((phi_QK >= best_Q1) & ~true_QK).sum(dim=1)
    return {f"R@{k}": float((ahead_Q < k).double().mean()) for k in RANKS}
