"""The text of a picture: a caption or a noun in a prompt, drawn from (seed, epoch, key) and nothing else.

PACL's paper takes the nouns of every caption as extra positives, each in one of seven templates. A noun of
another picture may well be in this one too, so every text carries an id of what it says and every picture
the ids of all that is known to be true of it; the loss can then tell a negative from an unlucky draw.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pacl_scale.encoders.templates import PAPER_TEMPLATES

LONGEST_CAPTION = 2000
"""Characters of a caption that are kept; every text tower reads far less, and captions come from the web."""

MOST_TEXTS = 64
"""Captions and nouns of one picture that are kept."""


@dataclass
class TextConfig:
    """Which text a picture is paired with in a step."""

    noun_prompt_share: float = 0.5
    """Share of the draws in which a picture that has nouns is paired with one of them in one of the paper's
    seven templates, instead of with a caption. 0 pairs with captions alone."""

    cached_vectors: bool = True
    """Take the text vectors that `cache` wrote, where the data set holds them, so that no text tower is needed; false
    encodes the texts with the text tower in every step."""

    def __post_init__(self) -> None:
        if not 0 <= self.noun_prompt_share <= 1:
            raise ValueError(f"noun_prompt_share is a share from 0 to 1, not {self.noun_prompt_share}")


@dataclass(frozen=True)
class PictureTexts:
    """All that is said of one picture."""

    captions: list[str]
    nouns: list[str]

    def ids(self) -> list[int]:
        """Ids of everything that is true of the picture, each once."""
        return list(dict.fromkeys(text_id(text) for text in (*self.captions, *self.nouns)))


def read_texts(members: Mapping[str, bytes | memoryview]) -> PictureTexts | None:
    """The texts of a sample: ``captions`` and ``nouns`` of its ``json`` member, else the ``txt`` member.

    Args:
        members: content by extension.

    Returns:
        None where there is no caption, or no JSON where JSON should be.
    """
    try:
        meta: Any = json.loads(bytes(members.get("json", b"{}")))
    except (ValueError, RecursionError):
        return None
    meta = meta if isinstance(meta, dict) else {}
    captions = _strings(meta.get("captions"))
    if not captions:
        single = bytes(members.get("txt", b"")).decode("utf-8", "replace")
        captions = _strings([single]) or _strings([meta.get("caption")])
    return PictureTexts(captions, _strings(meta.get("nouns"))) if captions else None


def draw_text(texts: PictureTexts, config: TextConfig, seed: int, epoch: int, key: str) -> tuple[str, int]:
    """The text of this picture in this epoch and the id of what it says; for a prompt that is the noun's
    id."""
    use_noun, which, template = draws(seed, epoch, key, "text", 3)
    if texts.nouns and use_noun < config.noun_prompt_share:
        noun = texts.nouns[int(which * len(texts.nouns))]
        return PAPER_TEMPLATES[int(template * len(PAPER_TEMPLATES))].format(noun), text_id(noun)
    caption = texts.captions[int(which * len(texts.captions))]
    return caption, text_id(caption)


def possible_texts(texts: PictureTexts) -> list[str]:
    """Everything that :func:`draw_text` can draw for a picture, each once: its captions, then its noun prompts."""
    prompts = (template.format(noun) for noun in texts.nouns for template in PAPER_TEMPLATES)
    return list(dict.fromkeys((*texts.captions, *prompts)))


def draws(seed: int, epoch: int, key: str, purpose: str, count: int) -> list[float]:
    """``count`` (at most 8) independent numbers in [0, 1) that depend on the arguments alone."""
    message = f"{seed}/{epoch}/{purpose}/{key}".encode("utf-8", "surrogateescape")
    digest = blake2b(message, digest_size=8 * count).digest()
    # 53 bits are what a float holds exactly; more could round up to 1.
    return [(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 11) / (1 << 53) for i in range(count)]


def text_id(text: str) -> int:
    """63 bits that stand for what a text says; case and spacing make no difference."""
    meaning = " ".join(text.casefold().split())
    return int.from_bytes(blake2b(meaning.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


def _strings(values: Any) -> list[str]:
    """Clean, non-empty strings of an untrusted JSON value."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    texts = (_clean(value) for value in values[:MOST_TEXTS] if isinstance(value, str))
    return list(dict.fromkeys(text for text in texts if text))


def _clean(text: str) -> str:
    """Cut to size, with single spaces, and with half of a surrogate pair, which JSON may hold but no file and no
    tokeniser takes, as a question mark."""
    return " ".join(text[:LONGEST_CAPTION].encode("utf-8", "replace").decode().split())
