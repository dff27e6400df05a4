"""timm's transformer block for bfloat16 on a CPU: the same sums, about a third faster in eager mode.

Encoding is what a run without a GPU waits for. Three things gain it, none of which needs a compiler: attention
over few tokens as two batched products of one picture at a time (its scores stay in the cache; torch's CPU flash
kernel reaches a quarter of the speed of the linear layers there), the layer scales and the attention scale folded
into the weights, and oneDNN's packed weights with GELU and the residual sum done by the product itself.

B pictures, T tokens, D channels, H heads of d channels.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

PICTURES_PER_PASS = 8
"""Pictures that go through the tower at once on a CPU: their largest intermediate fits a cache of 32 MB, and the
allocator reuses its pages instead of mapping new ones (8 were 18 % faster than 32)."""

FEW_TOKENS = 1024
"""Above so many tokens one picture's scores no longer fit the cache, and torch's flash attention is taken."""

NORMS = (nn.LayerNorm, LayerNorm)


def is_plain(block: nn.Module) -> TypeGuard[Block]:
    """Whether ``block`` is the pre-norm block that :class:`CpuBlock` computes, with nothing added to it."""
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    optional = [
        block.attn.q_norm,
        block.attn.k_norm,
        block.mlp.norm,
        getattr(block.attn, "norm", nn.Identity()),
    ]
    gelu = isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"
    norms = type(block.norm1) in NORMS and type(block.norm2) in NORMS
    return gelu and norms and all(isinstance(part, nn.Identity) for part in optional)


class CpuBlock(nn.Module):
    """A frozen plain block in bfloat16, (B, T, D) -> (B, T, D); its input is left as it was."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        # timm leaves the types of its parts open.
        attention: Any = block.attn
        mlp: Any = block.mlp
        self._heads = attention.num_heads
        width = attention.qkv.in_features
        # The scores' 1/sqrt(d) goes into the queries; for the usual 64 channels it is exact in bfloat16.
        scale = torch.ones(attention.qkv.out_features)
        scale[:width] = attention.scale
        self._norm1, self._norm2 = block.norm1.bfloat16(), block.norm2.bfloat16()
        self._qkv = linear(attention.qkv, scale)
        self._proj = linear(attention.proj, _gamma(block.ls1))
        self._fc1 = linear(mlp.fc1, gelu=True)
        self._fc2 = linear(mlp.fc2, _gamma(block.ls2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attention and MLP, each with its residual sum."""
        x_BTD = self._proj(self._attend(self._qkv(self._norm1(x_BTD))), x_BTD)
        return self._fc2(self._fc1(self._norm2(x_BTD)), x_BTD)

    def _attend(self, qkv_BTC: Tensor) -> Tensor:
        if qkv_BTC.shape[1] == 1:
            # A token alone attends to itself: what is left of attention is its value.
            return qkv_BTC.chunk(3, dim=2)[2]
        qkv_BKHTd = qkv_BTC.unflatten(2, (3, self._heads, -1)).permute(0, 2, 3, 1, 4)
        if qkv_BTC.shape[1] > FEW_TOKENS:
            q_BHTd, k_BHTd, v_BHTd = qkv_BKHTd.unbind(1)
            mixed_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, scale=1.0)
            return mixed_BHTd.transpose(1, 2).flatten(2)
        pictures = [_attend_one(*qkv_KHTd.unbind(0)) for qkv_KHTd in qkv_BKHTd.contiguous()]
        return torch.stack(pictures).flatten(2)


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def _attend_one(q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor) -> Tensor:
    weights_HTT = torch.bmm(q_HTd, k_HTd.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights_HTT, v_HTd).transpose(0, 1)


def linear(layer: nn.Linear, scale: Tensor | None = None, gelu: bool = False) -> nn.Module:
    """``layer`` in bfloat16 with each output multiplied by ``scale``, packed for oneDNN where torch can do so."""
    scale = torch.ones(layer.out_features) if scale is None else scale.detach()
    weight = (layer.weight.detach() * scale[:, None]).bfloat16()
    bias = None if layer.bias is None else (layer.bias.detach() * scale).bfloat16()
    plain = PlainLinear(weight, bias, gelu)
    try:
        packed = PackedLinear(weight, bias, gelu)
        probe = torch.linspace(-1, 1, 4 * weight.shape[1]).view(1, 4, -1).bfloat16()
        torch.testing.assert_close(packed(probe), plain(probe), rtol=0.05, atol=0.05)
    except (AttributeError, RuntimeError, TypeError, AssertionError):
        # torch keeps these operators for its own compiler: another build may lack them or change their arguments.
        return plain
    return packed


class PlainLinear(nn.Module):
    """A linear layer and what may follow it: GELU, or a residual sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__()
        self._weight, self._bias, self._gelu = weight, bias, gelu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        y = F.gelu(y) if self._gelu else y
        return y if residual is None else y.add_(residual)


class PackedLinear(nn.Module):
    """The same by oneDNN, with the weights laid out for it once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__()
        self._operators = torch.ops.mkldnn
        self._weight = self._operators._reorder_linear_weight(weight.contiguous())
        self._bias = bias
        self._activation: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return self._operators._linear_pointwise(x, self._weight, self._bias, *self._activation)
        return self._operators._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
