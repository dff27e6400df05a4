"""The last blocks of a vision transformer as a module of their own, which training may change.

B pictures, P prefix tokens (class, registers), T patches, D channels of the tower, E of its tokens.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class VisionTail(nn.Module):
    """From what the block before puts out to patch tokens, (B, P + T, D) -> (B, T, E).

    Args:
        blocks: the last ones.
        norm: after them; trained with them.
        width: D.
        prefix: P.
        projection_DE: into another space, never trained; None is none.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], norm: nn.Module, width: int, prefix: int, projection_DE: Tensor | None
    ) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.prefix = prefix
        self.projection_DE: Tensor | None
        self.register_buffer("projection_DE", projection_DE, persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Patch tokens, without prefix tokens."""
        for block in self.blocks:
            x_BND = block(x_BND)
        tokens_BTD = self.norm(x_BND[:, self.prefix :])
        return tokens_BTD if self.projection_DE is None else tokens_BTD @ self.projection_DE
