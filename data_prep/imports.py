"""Import a library without a heavy one that it would pull in for parts that are not used here."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Iterator[None]:
    """Within the block an import of ``module`` fails as if it were not installed, unless it is loaded already.

    webdataset and thinc (below spaCy) import torch if they can, and work as well without it: that costs each
    process some seconds and half a gigabyte.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def light_img2dataset() -> Iterator[None]:
    """Within the block img2dataset is imported without torch, without a look for updates, and without a word."""
    # albumentations, which img2dataset resizes with, would ask a package index for a newer version of itself.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with without("torch"), warnings.catch_warnings():
        # It imports a module of the standard library that is on its way out.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
