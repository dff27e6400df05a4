"""A page on this machine: drop a picture, type words, see masks. ``python -m pacl_scale.demo runs/photos``."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``demo``. Returns 0; raises :class:`pacl_scale.errors.UserError` for a user's mistake."""
    # Imported here, so that importing the package does not import torch.
    from pacl_scale.demo.command import run

    return run(argv)
