"""PACL (Patch Aligned Contrastive Learning) at cluster scale.

Importing the package is cheap on purpose: torch, deepspeed and img2dataset are imported by the modules that
use them, so that ``pacl-scale --help`` answers at once.
"""

import sys
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from pacl_scale.errors import end_quietly_when_interrupted

try:
    __version__ = metadata.version("pacl-scale")
    """As in pyproject.toml, through what the installer wrote down."""
except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "not installed"

if TYPE_CHECKING:
    from pacl_scale.pretrained import Pretrained

if sys.argv[:1] == ["-m"]:
    # So it is while `python -m pacl_scale.train` looks for its module: this process is a command of ours.
    end_quietly_when_interrupted()


def load(
    path: str, device: Literal["auto", "cpu", "cuda"] = "auto", precision: Literal["bf16", "fp32"] = "bf16"
) -> "Pretrained":
    """A trained model, ready to segment.

    Args:
        path: a run directory, a checkpoint or an exported folder, as a path or any fsspec URL; a repository on the
            Hugging Face Hub is ``hf://org/name``.
        device: "auto" takes CUDA where there is a GPU.
        precision: compute dtype of the towers.

    Raises:
        pacl_scale.errors.UserError: no checkpoint there, a damaged one, or its towers cannot be had.
    """
    from pacl_scale import pretrained

    return pretrained.load(path, device, precision)
