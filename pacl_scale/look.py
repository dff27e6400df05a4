"""One picture and some words: a picture passes the tower once, then any words can be looked for in it.

H x W the picture as it came, N words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay
from pacl_scale.evaluate.heat import word_maps
from pacl_scale.evaluate.labels import Lattice, View, label_pixels, merged
from pacl_scale.evaluate.methods import Method, Towers
from pacl_scale.evaluate.protocol import Protocol, patch_scores, vectors_for
from pacl_scale.evaluate.views import check_size, check_stride, lattice_of, prepare


@dataclass(frozen=True)
class Seen:
    """A picture after its pass of the vision tower."""

    size: tuple[int, int]
    """Height and width in pixels."""
    embedded: list[tuple[View, Tensor, tuple[int, int]]]
    """Each view with its embedded patches (1, T, D) and their grid."""
    lattice: Lattice


@dataclass(frozen=True)
class Found:
    """Where words were found in a picture."""

    labels_HW: np.ndarray
    """Position of the best word of each pixel, int64; ``overlay.NOTHING`` below the threshold."""
    best_HW: np.ndarray
    """Cosine of that word."""
    views: list[tuple[View, Tensor]]
    """Each view's scores (N, h, w) on patches."""
    seen: Seen

    def scores(self, size: tuple[int, int]) -> np.ndarray:
        """Every word's cosines (N, height, width) float32 on the picture at ``size``."""
        words = range(len(self.views[0][1]))
        return word_maps(self.views, words, size, self.seen.lattice)

    def shares(self, words: Sequence[str]) -> dict[str, float]:
        """Share of the picture that each of the first words covers."""
        return {word: float((self.labels_HW == number).mean()) for number, word in enumerate(words)}


def check_protocol(towers: Towers, protocol: Protocol) -> None:
    """Raise :class:`UserError` where the towers cannot be used under a protocol."""
    try:
        check_stride(towers.vision, protocol)
    except ValueError as error:
        raise UserError(f"stride={protocol.stride} does not suit this vision tower: {error}") from error


@torch.no_grad()
def see(picture: Image.Image, towers: Towers, method: Method, protocol: Protocol) -> Seen:
    """Pass an RGB picture through the tower and the embedder, view by view.

    Raises:
        ValueError: the tower cannot have the protocol's stride; :func:`check_protocol` says so before.
        UserError: the picture is so long and narrow that it would fill the tower with patches.
    """
    size = (picture.height, picture.width)
    check_size(size, "the picture", towers.vision, protocol)
    prepared = prepare(0, picture, np.zeros(size, np.int64), towers.vision, protocol)
    embedded = []
    for view, pixels_3hw in zip(prepared.views, prepared.inputs, strict=True):
        tokens_1TD, grid = towers.vision.encode(pixels_3hw[None].to(towers.device), protocol.stride or None)
        embedded.append((view, method.embed(tokens_1TD), grid))
    return Seen(size, embedded, lattice_of(towers.vision, protocol))


@torch.no_grad()
def find(seen: Seen, words: Sequence[str], towers: Towers, protocol: Protocol, threshold: float | None = None) -> Found:
    """The best of ``words`` for every pixel; pixels whose best cosine is below ``threshold`` get none."""
    vectors = vectors_for(towers.text, [[word] for word in words], protocol, background=False).to(towers.device)
    views = [(view, patch_scores(patches_1TD, vectors, grid)[0]) for view, patches_1TD, grid in seen.embedded]
    height, width = seen.size
    labels_HW, best_HW = label_pixels(
        lambda portion: merged(views, portion, seen.size, seen.lattice), len(words), height * width, Protocol()
    )
    if threshold is not None:
        labels_HW = torch.where(best_HW >= threshold, labels_HW, overlay.NOTHING)
    return Found(labels_HW.cpu().numpy(), best_HW.float().cpu().numpy(), views, seen)
