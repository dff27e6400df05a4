"""The trainable part of PACL: a residual block on frozen patch tokens.

``e_v(x) = W2 relu(W1 x + b1) + b2 + Ws x + bs``, applied to every token alike. With ViT-B/16 tokens that is
768 -> 512 -> 512 beside 768 -> 512: 1,050,112 parameters, the paper's "about 1.1 M".
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class EmbedderConfig:
    """The vision embedder, the only part of PACL that is trained."""

    hidden: int | None = None
    """Channels between its two linear layers; None is as many as it puts out."""
    init: Literal["uniform", "zero"] = "uniform"
    """The second layer at the start, which the paper leaves open: ``uniform`` as the others, or ``zero``, so that
    training starts from the skip alone."""

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError("hidden: it must be at least 1")


class PatchEmbedder(nn.Module):
    """Linear-ReLU-Linear plus a linear skip, (..., ``width_in``) -> (..., ``width_out``).

    Weights and biases are drawn uniformly from +-1/sqrt(fan in), torch's default for a linear layer, from the
    global random state; with ``init="zero"`` the second layer's are 0.

    Args:
        width_in: channels of the vision tower's patch tokens.
        width_out: channels of the text vectors.
        hidden: channels in between; None is ``width_out``.
        init: see :class:`EmbedderConfig`.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        hidden: int | None = None,
        init: Literal["uniform", "zero"] = "uniform",
    ) -> None:
        super().__init__()
        hidden = width_out if hidden is None else hidden
        self.linear1 = nn.Linear(width_in, hidden)
        self.linear2 = nn.Linear(hidden, width_out)
        self.skip = nn.Linear(width_in, width_out)
        if init == "zero":
            nn.init.zeros_(self.linear2.weight)
            nn.init.zeros_(self.linear2.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (..., ``width_in``) of the parameters' dtype; not normalised."""
        return self.linear2(F.relu(self.linear1(tokens))) + self.skip(tokens)
