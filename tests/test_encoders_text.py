"""The cache around a text tower, the prompts' mean, and Hugging Face towers made on the spot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pacl_scale.encoders import PAPER_TEMPLATES, TextEncoderConfig, build_text, prompt_ensemble
from pacl_scale.encoders.text import CachedTextEncoder
from pacl_scale.errors import UserError


class Counting:
    """A tower whose vectors are (length, number of a's), and which remembers what it was asked."""

    width = 2
    device = torch.device("cpu")
    module = torch.nn.Identity()

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    def padded_length(self, tokens: list[int]) -> int:
        return 2 * -(-len(tokens) // 2)

    def embed(self, tokens: list[list[int]]) -> Tensor:
        self.batches.append(["".join(map(chr, row)) for row in tokens])
        return torch.tensor([[len(row), row.count(ord("a"))] for row in tokens], dtype=torch.bfloat16)

    def fingerprint(self) -> dict[str, Any]:
        return {"source": "counting"}


def test_strings_are_encoded_once_in_full_batches_of_one_length() -> None:
    tower = Counting()
    encoder = CachedTextEncoder(tower, batch_size=2, cache_size=10)
    vectors = encoder.encode(["aaaa", "b", "aaaa", "ca", "daa"])
    assert vectors.dtype == torch.float32
    assert vectors.tolist() == [[4, 4], [1, 0], [4, 4], [2, 1], [3, 2]]
    assert tower.batches == [["aaaa", "daa"], ["b", "ca"]]
    assert encoder.encode(["daa", "e"]).tolist() == [[3, 2], [1, 0]]
    assert tower.batches[2:] == [["e", "e"]]
    assert encoder.fingerprint() == {"source": "counting"}


@pytest.mark.weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_does_not_depend_on_the_company(dtype: torch.dtype) -> None:
    texts = [f"a {'very ' * (number % 23)}small dog number {number}" for number in range(40)]
    encoders = [
        build_text(TextEncoderConfig(source="package", model="all-minilm-l6-v2"), "cpu", dtype) for _ in range(2)
    ]
    together = encoders[0].encode(texts)
    # Four of them alone, of different lengths: every one is a whole batch's work.
    assert all(torch.equal(encoders[1].encode([texts[i]])[0], together[i]) for i in (0, 13, 26, 39))


def test_the_least_recently_used_string_is_dropped_first() -> None:
    tower = Counting()
    encoder = CachedTextEncoder(tower, batch_size=1, cache_size=2)
    for text in ("a", "bb", "a", "ccc"):
        encoder.encode([text])
    tower.batches.clear()
    encoder.encode(["a"])
    assert tower.batches == []
    encoder.encode(["bb"])
    assert tower.batches == [["bb"]]


def test_more_strings_than_the_cache_holds_at_once() -> None:
    for size in (0, 1):
        encoder = CachedTextEncoder(Counting(), batch_size=2, cache_size=size)
        for _ in range(2):
            assert encoder.encode(["a", "bb", "a", "ccc"]).tolist() == [[1, 1], [2, 0], [1, 1], [3, 0]]


def test_vectors_stay_those_of_their_strings_while_the_cache_is_used() -> None:
    tower, random = Counting(), np.random.default_rng(0)
    for size in (1, 3, 7, 50):
        encoder = CachedTextEncoder(tower, batch_size=4, cache_size=size)
        for _ in range(40):
            texts = ["".join(random.choice(["a", "b"], random.integers(1, 6))) for _ in range(random.integers(0, 9))]
            assert encoder.encode(texts).tolist() == [[len(text), text.count("a")] for text in texts]


def test_no_strings_give_no_vectors() -> None:
    assert CachedTextEncoder(Counting(), 2, 2).encode([]).shape == (0, 2)


def test_the_ensemble_is_the_unit_mean_of_unit_vectors() -> None:
    encoder = CachedTextEncoder(Counting(), 4, 100)
    templates = ["{}", "a {} aaa"]
    vectors = prompt_ensemble(encoder, ["dog", "banana"], templates)
    assert vectors.shape == (2, 2)
    one, two = torch.tensor([6.0, 3.0]), torch.tensor([12.0, 7.0])
    mean = one / one.norm() + two / two.norm()
    torch.testing.assert_close(vectors[1], mean / mean.norm())
    assert prompt_ensemble(encoder, []).shape == (0, 2)


def test_the_papers_templates() -> None:
    assert len(PAPER_TEMPLATES) == 7 and all(template.count("{}") == 1 for template in PAPER_TEMPLATES)
    encoder = CachedTextEncoder(Counting(), 4, 100)
    for wrong in ([], ["a dog"], ["{} {}"]):
        with pytest.raises(ValueError, match="template"):
            prompt_ensemble(encoder, ["dog"], wrong)


def test_impossible_settings_are_refused() -> None:
    for settings, complaint in (
        ({"batch_size": 0}, "batch_size"),
        ({"cache_size": -1}, "cache_size"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"source": "package", "weights": "x"}, "weights"),
        ({"source": "huggingface", "weights": "file.safetensors"}, "weights"),
    ):
        with pytest.raises(ValueError, match=complaint):
            TextEncoderConfig(**settings)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "red", "car", "on", "grass"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            initializer_range=0.5,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return folder


def test_hugging_face_pooling(bert_folder: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(bert_folder).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[2, 4, 5, 3]])).last_hidden_state[0]
    for settings, expected in (
        ({}, states.mean(dim=0)),
        ({"pooling": "cls"}, states[0]),
        ({"normalize": True}, states.mean(dim=0) / states.mean(dim=0).norm()),
    ):
        encoder = build_text(TextEncoderConfig(source="huggingface", model=str(bert_folder), **settings))
        # A longer neighbour pads the batch, which must not change the mean.
        vectors = encoder.encode(["a dog", "a red car on a red dog on grass"])
        assert vectors.shape == (2, encoder.width)
        torch.testing.assert_close(vectors[0], expected, rtol=1e-4, atol=1e-4)


def test_long_strings_are_cut(bert_folder: Path) -> None:
    config = TextEncoderConfig(source="huggingface", model=str(bert_folder), max_tokens=4)
    encoder = build_text(config)
    torch.testing.assert_close(encoder.encode(["a dog on grass"]), encoder.encode(["a dog"]))
    assert not torch.allclose(encoder.encode(["a car on grass"]), encoder.encode(["a dog"]))


def test_random_weights_and_fingerprints(bert_folder: Path) -> None:
    def fingerprint(**settings: Any) -> dict[str, Any]:
        return build_text(TextEncoderConfig(source="huggingface", model=str(bert_folder), **settings)).fingerprint()

    assert fingerprint(weights="random") == fingerprint(weights="random") != fingerprint(weights="random", seed=1)
    others = [fingerprint(), fingerprint(pooling="cls"), fingerprint(normalize=True), fingerprint(max_tokens=4)]
    assert all(others[i] != others[j] for i in range(4) for j in range(i))


def test_no_such_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers cannot give") as caught:
        build_text(TextEncoderConfig(source="huggingface", model=str(tmp_path)))
    assert "\n" not in str(caught.value)
