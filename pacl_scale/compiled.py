"""Loops over pixels and numbers that are compiled for the machine at hand when they first run, by numba."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function without the interpreter lock, and keep the result on disk where that is possible.

    Args:
        options: of ``numba.njit``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(function, nogil=True, error_model="numpy", cache=True, **options)
        except RuntimeError:
            # A home that cannot be written to.
            return njit(function, nogil=True, error_model="numpy", **options)

    return decorate
