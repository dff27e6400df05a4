"""Text towers of Hugging Face transformers: any encoder that ``AutoModel`` knows, pooled over its tokens.

n strings, L tokens (padded to the longest of the batch), D channels.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from pacl_scale.encoders.text import TextEncoderConfig, TextTower, padded_length
from pacl_scale.encoders.weights import freeze, hash_of
from pacl_scale.errors import UserError, first_line

DEFAULT_MAX_TOKENS = 512
"""Where a tokenizer states no length of its own."""


def build_huggingface_text(config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> TextTower:
    """The transformers tower that ``config`` names; see :func:`pacl_scale.encoders.build_text`."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(config.model)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        if config.weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = AutoModel.from_config(settings)
        else:
            # Only safetensors: the older format can carry code.
            model = AutoModel.from_pretrained(config.model, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"model: transformers cannot give {config.model}: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model: {config.model} has no tokenizer.json, which its strings need")
    limit = min(tokenizer.model_max_length, DEFAULT_MAX_TOKENS)
    max_tokens = min(config.max_tokens or limit, limit)
    return HuggingFaceText(
        model, tokenizer.backend_tokenizer, max_tokens, config.pooling, config.normalize, device, dtype
    )


class HuggingFaceText:
    """A :class:`~pacl_scale.encoders.text.TextTower` by a transformers encoder and a tokenizer."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        max_tokens: int,
        pooling: Literal["mean", "cls"],
        normalize: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self._fingerprint = {
            "source": "huggingface",
            "weights_blake2b": hash_of(model),
            "pooling": pooling,
            "normalize": normalize,
            "max_tokens": max_tokens,
        }
        self.module = freeze(model).to(device, dtype)
        # transformers leaves the type of a model's configuration open.
        self.width: int = cast(Any, model).config.hidden_size
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._padding = (tokenizer.padding or {}).get("pad_id", 0)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self._pooling, self._normalize = pooling, normalize

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """See :meth:`pacl_scale.encoders.text.TextTower.tokenize`."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def padded_length(self, tokens: list[int]) -> int:
        """See :meth:`pacl_scale.encoders.text.TextTower.padded_length`."""
        return padded_length(len(tokens), self._max_tokens)

    def embed(self, tokens: list[list[int]]) -> Tensor:
        """See :meth:`pacl_scale.encoders.text.TextTower.embed`."""
        length = max(self.padded_length(row) for row in tokens)
        tokens_nL = pad(tokens, length, self._padding).to(self.device)
        mask_nL = pad([[1] * len(row) for row in tokens], length, 0).to(self.device)
        states_nLD = self.module(input_ids=tokens_nL, attention_mask=mask_nL).last_hidden_state.float()
        vectors_nD = states_nLD[:, 0] if self._pooling == "cls" else _mean(states_nLD, mask_nL)
        return F.normalize(vectors_nD, dim=-1) if self._normalize else vectors_nD

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`pacl_scale.encoders.text.TextEncoder.fingerprint`."""
        return dict(self._fingerprint)


def pad(rows: list[list[int]], length: int, filler: int) -> Tensor:
    """(n, ``length``) int64 from rows of at most so many numbers."""
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def _mean(states_nLD: Tensor, mask_nL: Tensor) -> Tensor:
    weights_nL1 = mask_nL.unsqueeze(-1).to(states_nLD.dtype)
    return (states_nLD * weights_nL1).sum(dim=1) / weights_nL1.sum(dim=1).clamp(min=1)
