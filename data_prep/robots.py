"""X-Robots-Tag: which answers ask not to be used for machine learning, or not to be indexed."""

import re
from collections.abc import Iterable

OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives that are honoured; ``none`` is short for noindex and nofollow."""

WITH_VALUES = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
"""Directives before a colon; any other word there is the name of a robot, for which what follows is meant."""

_NAMED = re.compile(r"\s*([A-Za-z][\w.-]*)\s*:(.*)", re.DOTALL)


def opt_out(headers: Iterable[str], token: str) -> str | None:
    """The first of the X-Robots-Tag ``headers`` that asks everybody, or the robot ``token``, to stay away.

    img2dataset's own look at them takes what stands before the first colon for a robot's name, so that it misses
    ``unavailable_after: 1 Jan 2030, noai``, and does not know ``none``.
    """
    for header in headers:
        robot = None
        for piece in str(header).split(","):
            named = _NAMED.fullmatch(piece)
            if named and named[1].lower() in WITH_VALUES:
                continue
            if named:
                robot, piece = named[1].lower(), named[2]
            if piece.strip().lower() in OPT_OUT and robot in (None, token):
                return str(header)
    return None
