"""The trainable block: its size, its formula, its initialisation."""

import pytest
import torch

from pacl_scale.embedder import EmbedderConfig, PatchEmbedder


@pytest.mark.parametrize(("width_in", "width_out", "parameters"), [(768, 512, 1_050_112), (1024, 768, 2_164_992)])
def test_it_has_the_papers_size(width_in: int, width_out: int, parameters: int) -> None:
    assert sum(each.numel() for each in PatchEmbedder(width_in, width_out).parameters()) == parameters


def test_it_computes_the_residual_formula() -> None:
    embedder = PatchEmbedder(6, 4, hidden=5)
    tokens = torch.randn(2, 3, 6)
    w1, w2, ws = embedder.linear1, embedder.linear2, embedder.skip
    inner = (tokens @ w1.weight.T + w1.bias).clamp(min=0)
    expected = inner @ w2.weight.T + w2.bias + tokens @ ws.weight.T + ws.bias
    torch.testing.assert_close(embedder(tokens), expected)


def test_zero_starts_from_the_skip_and_still_learns() -> None:
    embedder = PatchEmbedder(6, 4, init="zero")
    tokens = torch.randn(2, 3, 6)
    torch.testing.assert_close(embedder(tokens), embedder.skip(tokens))
    embedder(tokens).square().sum().backward()
    assert embedder.linear2.weight.grad is not None and embedder.linear2.weight.grad.abs().sum() > 0


def test_uniform_starts_with_a_second_layer() -> None:
    assert PatchEmbedder(6, 4).linear2.weight.abs().sum() > 0


def test_no_hidden_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden"):
        EmbedderConfig(hidden=0)
