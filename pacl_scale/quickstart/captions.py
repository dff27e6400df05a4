"""What a person might write below a drawn scene: some of its things, in sentences of varied grammar.

A caption never names everything there is to see, and never where: that is all the training has to go by.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PLURALS = {"fish": "fish", "butterfly": "butterflies", "house": "houses"}
"""Plurals that are not the word with an s."""

NUMBERS = {2: ("two", "a pair of", "two"), 3: ("three", "three", "some"), 4: ("four", "four", "some")}

GROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "in the grass", "on green grass", "in tall grass", "lying on the grass"),
    "sand": ("on the sand", "in the sand", "on yellow sand", "on dry sand", "lying on sand"),
    "sky": ("in the sky", "in a blue sky", "up in the sky", "in the cloudy sky", "high in the sky"),
    "water": ("in the water", "on the water", "floating on water", "over dark water", "above the water"),
    "wall": ("on the wall", "on a brick wall", "in front of a brick wall", "against the wall", "on a red wall"),
    "floor": ("on the floor", "on a wooden floor", "lying on the floor", "on a brown floor", "on an old floor"),
    "snow": ("in the snow", "on white snow", "on the snow", "lying in the snow", "on fresh snow"),
    "pavement": ("on the pavement", "on grey pavement", "on a stone pavement", "lying on the pavement"),
    "night": ("at night", "in the night", "in the dark night", "late at night", "in a clear night"),
}
"""How captions speak of each ground; each contains the ground's name."""


@dataclass(frozen=True)
class Thing:
    """An object as far as a caption can speak of it; x and y are its place in 0..1."""

    kind: str
    colour: str
    texture: str
    size: float
    x: float
    y: float


def plural(word: str) -> str:
    """The plural of a kind's name."""
    return PLURALS.get(word, f"{word}s")


def write_caption(things: Sequence[Thing], ground: str, rng: np.random.Generator) -> str:
    """A caption that mentions at least one of ``things``, seldom all, and often the ground.

    Args:
        things: what can be seen, in any order.
        ground: a name of ``GROUND_PHRASES``.
        rng: makes every choice.
    """
    mentioned = _choose(things, rng)
    place = str(rng.choice(GROUND_PHRASES[ground])) if rng.random() < 0.65 else ""
    phrases = _phrases(mentioned, things, rng)
    sentence = _sentence(phrases, mentioned, place, rng)
    sentence = " ".join(sentence.split())
    if rng.random() < 0.25:
        sentence = f"{sentence[0].upper()}{sentence[1:]}."
    return sentence


def _choose(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
    """Those worth a mention: each thing with a chance of seven in ten, but never none and seldom all."""
    order = rng.permutation(len(things))
    chosen = [things[i] for i in order if rng.random() < 0.7] or [things[order[0]]]
    return chosen[:-1] if len(chosen) == len(things) > 2 and rng.random() < 0.6 else chosen


def _phrases(mentioned: Sequence[Thing], things: Sequence[Thing], rng: np.random.Generator) -> list[str]:
    """One noun phrase for each kind that is mentioned; twins become "two fish" or "a red and a blue fish"."""
    seen = Counter(thing.kind for thing in things)
    phrases = []
    for kind in dict.fromkeys(thing.kind for thing in mentioned):
        group = [thing for thing in things if thing.kind == kind]
        if seen[kind] == 1:
            phrases.append(_single(group[0], rng))
        elif len({thing.colour for thing in group}) == 1:
            phrases.append(f"{rng.choice(NUMBERS[len(group)])} {_adjectives(group[0], rng)} {plural(kind)}")
        elif len(group) == 2 and rng.random() < 0.5:
            phrases.append(f"{_article(group[0].colour)} and {_article(group[1].colour)} {kind}")
        else:
            phrases.append(f"{rng.choice(NUMBERS[len(group)])} {plural(kind)}")
    return phrases


def _single(thing: Thing, rng: np.random.Generator) -> str:
    words = f"{_adjectives(thing, rng)} {thing.kind}".strip()
    pick = rng.random()
    if pick < 0.04:
        return f"one {words}"
    if pick < 0.1:
        return f"the {words}"
    return _article(words)


def _adjectives(thing: Thing, rng: np.random.Generator) -> str:
    """Size, colour and texture, each of them sometimes."""
    words = []
    if thing.size > 0.45 and rng.random() < 0.25:
        words.append(str(rng.choice(["big", "large"])))
    if thing.size < 0.3 and rng.random() < 0.25:
        words.append(str(rng.choice(["small", "little"])))
    if rng.random() < 0.6:
        words.append(thing.colour)
    if thing.texture != "plain" and rng.random() < 0.45:
        # "a red striped fish" and "a striped red fish" are both said.
        words.insert(len(words) if rng.random() < 0.5 else max(len(words) - 1, 0), thing.texture)
    return " ".join(words)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'one')) else 'a'} {words}"


def _listed(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _sentence(phrases: list[str], mentioned: Sequence[Thing], place: str, rng: np.random.Generator) -> str:
    listed = _listed(phrases)
    plain = len(phrases) == 1 and not phrases[0].startswith(("two", "three", "four", "some", "a pair"))
    there = "there is" if plain or not phrases[0].startswith(("two", "three", "four", "some")) else "there are"
    forms = [
        f"{listed} {place}",
        f"{listed} {place}",
        f"{there} {listed} {place}",
        f"a picture of {listed} {place}",
        f"I can see {listed} {place}",
        f"{place}, {listed}" if place else f"{listed}",
        f"look at {listed} {place}",
        f"{listed}, seen {place}" if place else f"just {listed}",
    ]
    if len(phrases) == 2:
        first, second = phrases
        relation = _relation(mentioned, rng)
        forms += [f"{first} {relation} {second} {place}"] * 3
        forms.append(f"{first} with {second} {place}")
        forms.append(f"{place} there is {first}, and {second} too" if place else f"{first} together with {second}")
    return str(rng.choice(forms))


def _relation(mentioned: Sequence[Thing], rng: np.random.Generator) -> str:
    """How the first mentioned thing lies to the second; vague where twins make it ambiguous."""
    if len(mentioned) != 2 or rng.random() < 0.4:
        return str(rng.choice(["next to", "beside", "near"]))
    first, second = mentioned
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "to the left of" if first.x < second.x else "to the right of"
    return "above" if first.y < second.y else "below"
