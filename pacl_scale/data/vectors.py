"""Cached text vectors: how they lie in a tar, and back.

A sample with them has ``<key>.vectors``, N x D float16 numbers in row order: one vector for each text that training can
draw for its picture (:func:`pacl_scale.data.captions.possible_texts`), in that order. They travel with the sample, so
that a step reads no second place, however many texts a data set has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacl_scale.data.decode import BadPicture
from pacl_scale.data.index import SampleIndex
from pacl_scale.encoders.templates import PAPER_TEMPLATES
from pacl_scale.errors import UserError

VECTORS_EXTENSION = "vectors"
ENTRY = "text_vectors"
"""Where the ``extra`` of an index describes them."""


@dataclass(frozen=True)
class VectorFormat:
    """What an index says of its text vectors."""

    width: int
    """D."""
    tower: dict[str, Any]
    """Fingerprint of the text tower that computed them."""
    named: dict[str, Any]
    """How the configuration named that tower: ``source`` and ``model``."""
    templates: tuple[str, ...] = PAPER_TEMPLATES
    """The templates of the noun prompts."""

    @classmethod
    def of(cls, index: SampleIndex) -> "VectorFormat | None":
        """The format of a data set's text vectors; None where it has none.

        Raises:
            UserError: the index does not describe them, or the noun prompts have changed since they were computed.
        """
        entry = index.extra.get(ENTRY)
        if entry is None:
            return None
        try:
            found = cls(int(entry["width"]), entry["tower"], entry["named"], tuple(entry["templates"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{index.root_url}: its index does not describe its text vectors ({error!r})") from error
        if found.templates != PAPER_TEMPLATES:
            raise UserError(f"{index.root_url} holds text vectors of other noun prompts; run the cache step again")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For the ``extra`` of an index."""
        values = {"width": self.width, "tower": self.tower, "named": self.named, "templates": list(self.templates)}
        return {ENTRY: values}

    def check_tower(self, named: Mapping[str, Any]) -> None:
        """Raise UserError where a configuration names another tower than the one that computed the vectors."""
        if dict(named) != self.named:
            wanted, found = (" ".join(str(value) for value in each.values()) for each in (named, self.named))
            raise UserError(
                f"the data set holds text vectors of {found}, but text names {wanted}; name the same tower, "
                "or set data.text.cached_vectors=false to encode the texts with it"
            )

    def pack(self, vectors_ND: Tensor) -> dict[str, bytes]:
        """The member that holds a picture's vectors, from (N, D) of any float type on any device.

        Raises:
            UserError: a number that is not finite in float16.
        """
        half_ND = vectors_ND.half().cpu()
        if not torch.isfinite(half_ND).all():
            raise UserError("the text tower gives vectors with numbers beyond 65,504 or none at all; they are not kept")
        return {VECTORS_EXTENSION: half_ND.numpy().tobytes()}

    def read(self, members: Mapping[str, bytes | memoryview], texts: Sequence[str], text: str, out_D: Tensor) -> None:
        """Write the vector of ``text``, one of the sample's possible ``texts``, into ``out_D``, float32.

        Raises:
            BadPicture: no vectors, or not one for each text.
        """
        content = members.get(VECTORS_EXTENSION, b"")
        if len(content) != len(texts) * self.width * 2:
            raise BadPicture("text vectors of the wrong size")
        out_D.numpy()[:] = np.frombuffer(content, np.float16, self.width, texts.index(text) * self.width * 2)
