"""PACL (Patch Aligned Contrastive Learning) at cluster scale.

Importing the package is cheap on purpose: torch, deepspeed and img2dataset are imported by the modules that
use them, so that ``pacl-scale --help`` answers at once.
"""

__version__ = "0.1.0"
