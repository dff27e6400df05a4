"""A rank's part of a global batch.

b pairs, H x W pixels, T patches a picture of which n are delivered, D channels, Dt of a text vector, K ids a picture.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """This rank's part of a global batch: b pairs."""

    images: Tensor | None
    """(b, 3, H, W) float32, normalised for the encoder; None for a data set of features."""

    patches: Tensor | None
    """(b, n, D) float32 patch tokens; None for a data set of pictures."""

    patch_ids: Tensor | None
    """(b, n) int64, ascending: which of a picture's patches ``patches`` holds; None where it holds all."""

    grid: tuple[int, int] | None
    """Rows and columns of patches of a whole picture; None for a data set of pictures (the encoder decides)."""

    texts: list[str]
    """b texts, one a picture."""

    text_vectors: Tensor | None
    """(b, Dt) float32: the text tower's vectors of ``texts``; None where the data set holds none."""

    text_ids: Tensor
    """(b,) int64: what each text says; for a noun prompt the noun, whatever the template."""

    image_text_ids: Tensor
    """(b, K) int64: all that is known to be true of each picture (its captions and nouns), padded with -1."""

    keys: list[str]
    """WebDataset keys of the samples."""

    captions: list[list[str]]
    """All captions of each picture."""

    nouns: list[list[str]]
    """All nouns of each picture's captions, where data preparation wrote them."""

    position_after: int
    """Samples consumed by all ranks when this batch is done."""

    skipped: dict[str, int]
    """Samples of this batch that could not be used, by cause. In training each one's place is taken by a neighbour in
    the batch, so that all ranks keep the same shape; in ordered mode the batch is shorter."""

    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """b pictures as they lie in the tar, extension and content, where those were asked for and not pixels."""

    patch_sample: int = 0
    """Patches of a picture that take part in the step; 0 for all."""

    patch_seeds: list[int] = field(default_factory=list)
    """b seeds, from (seed, epoch, key), that decide which patches take part."""

    def __len__(self) -> int:
        return len(self.keys)

    def chosen(self, tokens: int, rows: slice = slice(None)) -> Tensor | None:
        """Which of an encoder's ``tokens`` patches of the pictures ``rows`` take part in this step.

        Returns:
            (rows, n) int64, ascending, with n = ``patch_sample``; None where all take part.
        """
        if not 0 < self.patch_sample < tokens:
            return None
        ids = [draw_patches(tokens, self.patch_sample, seed) for seed in self.patch_seeds[rows]]
        return torch.from_numpy(np.stack(ids))


def draw_patches(tokens: int, count: int, seed: int) -> np.ndarray:
    """``count`` of the patch numbers below ``tokens``, ascending, int64; the same for the same seed."""
    noise = np.random.Philox(key=seed).random_raw(tokens)
    return np.sort(np.argpartition(noise, count)[:count])
