"""Which texts are true of which picture: targets of the loss, and pairs that it leaves out.

Legend: b images and n texts of this rank, N texts of all ranks, D width, K values of a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

OtherPositives = Literal["ignore", "target"]
"""What to do with texts that are true of an image without being its own: leave the pair out of the loss, or let them
share the target."""


@dataclass(frozen=True)
class GlobalTexts:
    """The texts of all ranks in the order of ranks, as :meth:`PACLLoss.gather` returns them."""

    vectors_ND: Tensor
    """(N, D) text vectors; a gradient on them is summed over ranks and returned to the rank that gave the text."""
    ids_N: Tensor | None
    """(N,) identifiers of what the texts say, or None."""
    own: slice
    """Which of them are this rank's."""


@dataclass(frozen=True)
class Pairs:
    """Which pairs are targets and which are left out; the masks are made for a few rows at a time."""

    own_bK: Tensor
    """Columns of an image's own texts, padded with -1."""
    true_bK: Tensor | None
    """Ids of texts that are true of the image, padded with -1."""
    others: OtherPositives
    columns: "_Values"
    ids: "_Values | None"

    @staticmethod
    def build(
        phi: Tensor, texts: GlobalTexts, image_ids: Tensor | None, owner: Tensor | None, others: OtherPositives
    ) -> "Pairs":
        images, n = len(phi), texts.own.stop - texts.own.start
        if phi.dim() != 2 or phi.shape[1] != len(texts.vectors_ND):
            raise ValueError(f"phi must be (images, {len(texts.vectors_ND)}), not {tuple(phi.shape)}")
        if image_ids is not None and (texts.ids_N is None or image_ids.dim() != 2 or len(image_ids) != images):
            raise ValueError("image_text_ids must have one row an image, and need text_ids beside them")
        if owner is None and images != n:
            raise ValueError(f"{n} texts for {images} images need text_owner to say which belongs to which")
        if owner is not None and (len(owner) != n or not bool(((owner >= 0) & (owner < images)).all())):
            raise ValueError(f"text_owner must give one of {images} images for each of {n} texts")
        columns = torch.arange(phi.shape[1], device=phi.device)
        ids = None if texts.ids_N is None else _Values(*torch.unique(texts.ids_N, return_inverse=True))
        own = _table(columns[texts.own], owner, images)
        true = None
        if texts.ids_N is not None:
            true = _table(texts.ids_N[texts.own], owner, images)
            true = true if image_ids is None else torch.cat([true, image_ids], dim=1)
        return Pairs(own, true, others, _Values(columns, columns), ids)

    def masks(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Which pairs of these rows are targets, and which are left out (None: no pair)."""
        own = self.columns.found_in(self.own_bK[rows])
        if self.true_bK is None or self.ids is None:
            return own, None
        true = self.ids.found_in(self.true_bK[rows])
        return (own | true, None) if self.others == "target" else (own, true & ~own)


def _table(values_n: Tensor, owner_n: Tensor | None, images: int) -> Tensor:
    """(images, K): the values of each image's texts, padded with -1."""
    if owner_n is None:
        return values_n.unsqueeze(1)
    order = torch.argsort(owner_n, stable=True)
    counts = torch.bincount(owner_n, minlength=images)
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(order), device=order.device) - first[owner_n[order]]
    table = values_n.new_full((images, int(counts.max())), -1)
    table[owner_n[order], place] = values_n[order]
    return table


@dataclass(frozen=True)
class _Values:
    """One integer for each of N columns, as the U different ones in ascending order and the place of each column's."""

    different_U: Tensor
    places_N: Tensor

    def found_in(self, table_bK: Tensor) -> Tensor:
        """(b, N): whether the column's value stands in the row's table. Work and memory are O(b (K log U + N))."""
        place_bK = torch.searchsorted(self.different_U, table_bK).clamp_(max=len(self.different_U) - 1)
        known_bK = self.different_U[place_bK] == table_bK
        found_bU = torch.zeros(len(table_bK), len(self.different_U), dtype=torch.uint8, device=table_bK.device)
        found_bU.scatter_reduce_(1, place_bK, known_bK.to(torch.uint8), "amax")
        return found_bU.bool()[:, self.places_N]
