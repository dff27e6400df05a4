"""Texts are drawn from (seed, epoch, key) alone, and ids say what they mean."""

import json
from collections import Counter

import pytest

from pacl_scale.data.captions import PictureTexts, TextConfig, draw_text, draws, read_texts, text_id
from pacl_scale.encoders import PAPER_TEMPLATES

TEXTS = PictureTexts(["a dog runs", "brown dog outside", "an animal"], ["dog", "grass"])


def test_captions_come_from_json_or_txt() -> None:
    both = {"txt": b"one  caption\n", "json": json.dumps({"captions": ["x", "y"], "nouns": ["n"]}).encode()}
    assert read_texts(both) == PictureTexts(["x", "y"], ["n"])
    assert read_texts({"txt": b"one  caption\n"}) == PictureTexts(["one caption"], [])
    # As img2dataset writes it: metadata with the caption, and no list.
    assert read_texts({"json": b'{"caption": "from json", "url": "u"}'}) == PictureTexts(["from json"], [])
    assert read_texts({"txt": "gr\u00fcn \ud83d".encode("utf-8", "surrogatepass")}) is not None


def test_json_that_is_nested_without_end_is_no_caption() -> None:
    assert read_texts({"txt": b"ok", "json": b"[" * 100_000}) is None


def test_half_a_surrogate_pair_can_be_written_down() -> None:
    """JSON may hold one; neither a file nor a tokeniser takes it. What the text means does not change."""
    texts = read_texts({"json": rb'{"captions": ["a \ud83d dog"], "nouns": ["\udc00"]}'})
    assert texts == PictureTexts(["a ? dog"], ["?"])
    assert text_id(texts.captions[0]) == text_id("a \ud83d dog")


@pytest.mark.parametrize(
    "members",
    [{}, {"txt": b" \n"}, {"txt": b"ok", "json": b"{"}, {"json": b"[]"}, {"json": b'{"captions": "abc"}'}],
)
def test_no_caption(members: dict[str, bytes]) -> None:
    assert read_texts(members) is None


@pytest.mark.parametrize("nouns", ['"abc"', "[1, null, {}]", '{"a": 1}', '["  "]', "7"])
def test_nouns_that_are_none_are_dropped(nouns: str) -> None:
    assert read_texts({"json": f'{{"captions": ["c"], "nouns": {nouns}}}'.encode()}) == PictureTexts(["c"], [])


def test_drawing_depends_on_seed_epoch_and_key_alone() -> None:
    config = TextConfig()
    assert draw_text(TEXTS, config, 1, 2, "k") == draw_text(TEXTS, config, 1, 2, "k")
    others = {draw_text(TEXTS, config, s, e, k) for s in (0, 1, 2) for e in (0, 1, 2) for k in ("k", "l", "m")}
    assert len(others) > 8


def test_shares_are_kept() -> None:
    drawn = [draw_text(TEXTS, TextConfig(noun_prompt_share=0.25), 0, e, "k") for e in range(4000)]
    from_nouns = [text for text, id in drawn if id in (text_id("dog"), text_id("grass"))]
    assert 0.22 < len(from_nouns) / len(drawn) < 0.28
    assert len(set(from_nouns)) == 2 * len(PAPER_TEMPLATES)
    counts = Counter(text for text, _ in drawn if text in TEXTS.captions)
    assert set(counts) == set(TEXTS.captions)
    assert min(counts.values()) > 800


def test_captions_alone_where_there_are_no_nouns_or_none_are_wanted() -> None:
    no_nouns = PictureTexts(["c"], [])
    assert draw_text(no_nouns, TextConfig(noun_prompt_share=1), 0, 0, "k") == ("c", text_id("c"))
    drawn = {draw_text(TEXTS, TextConfig(noun_prompt_share=0), 0, e, "k")[0] for e in range(50)}
    assert drawn == set(TEXTS.captions)


def test_a_prompt_means_its_noun() -> None:
    text, id = draw_text(PictureTexts(["c"], ["dog"]), TextConfig(noun_prompt_share=1), 0, 0, "k")
    assert text in {template.format("dog") for template in PAPER_TEMPLATES}
    assert id == text_id("dog") == text_id(" Dog\n")
    assert id in TEXTS.ids()
    assert TEXTS.ids() == [text_id(t) for t in (*TEXTS.captions, *TEXTS.nouns)]


def test_ids_are_the_same_in_every_release_and_fit_int64() -> None:
    assert text_id("a dog runs") == 6244433547939997004
    assert all(0 <= text_id(str(n)) < 2**63 for n in range(1000))


def test_draws_are_uniform() -> None:
    values = [value for epoch in range(500) for value in draws(0, epoch, "k", "x", 8)]
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02


def test_share_outside_of_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="share from 0 to 1"):
        TextConfig(noun_prompt_share=1.5)
