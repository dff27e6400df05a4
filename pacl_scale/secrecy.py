"""Secrets stay out of what is written: settings that hold one are refused, log lines and sentences hide them.

Credentials come from the environment or the services' own files (``~/.aws``). What they would leak into is a run
directory, which is shared, copied and published: the resolved configuration, logs, batch scripts, reports.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

SHORTEST = 8
"""Values of fewer characters are no secrets but words, which text is full of."""

_NAME = re.compile(
    r"SECRET|PASSW(OR)?D|PASSPHRASE|PRIVATE_?KEY|ACCESS_?KEY|API_?KEY|(^|_)TOKEN$|CREDENTIAL", re.IGNORECASE
)
_LEADS_TO_ONE = re.compile(r"_(ID|FILE|PATH|URI|URL)$", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_SIGNATURE_OF_URL = re.compile(
    r"(?<=[?&])((?:x-amz-(?:signature|credential|security-token)|signature|sig|access_token|token|api_?key)=)[^&\s\"']+",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as ``WANDB_API_KEY`` does and ``AWS_ACCESS_KEY_ID`` does not."""
    return bool(_NAME.search(name)) and not _LEADS_TO_ONE.search(name)


def hidden(text: str) -> str:
    """``text`` without passwords and signatures in URLs and without what secret variables of the environment hold."""
    text = _USER_OF_URL.sub(HIDDEN, text)
    text = _SIGNATURE_OF_URL.sub(rf"\g<1>{HIDDEN}", text)
    for value in _values():
        text = text.replace(value, HIDDEN)
    return text


def key_of_secret(settings: Mapping[str, Any], prefix: str = "") -> str | None:
    """The dotted key of the first setting that holds a secret; ``None`` where there is none."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found = key_of_secret(value, f"{prefix}{key}.")
            if found:
                return found
        elif any(hidden(text) != text for text in _texts(value)):
            return f"{prefix}{key}"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _values() -> list[str]:
    """What secret variables hold, the longest first: one may be a part of another."""
    found = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
