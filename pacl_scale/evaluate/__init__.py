"""Zero-shot evaluation: a pure function of (checkpoint, data set, protocol) to a row of figures.

``python -m pacl_scale.evaluate --config configs/eval/voc_annotated.yaml --checkpoint runs/photos``
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``evaluate``. Returns 0; raises :class:`pacl_scale.errors.UserError` for a user's mistake."""
    # Imported here, so that importing the package (for one dataclass, say) does not import torch.
    from pacl_scale.evaluate.command import run

    return run(argv)
