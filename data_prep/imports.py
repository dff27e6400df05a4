"""Import a library without a heavy one that it would pull in for parts that are not used here."""

import sys
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
