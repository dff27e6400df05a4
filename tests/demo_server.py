"""The demo's page on towers that see colours: a process of its own, as a user's would be."""

import sys
from typing import Any

import pytest
from colours import install

from pacl_scale.demo import main
from pacl_scale.errors import run_command


def serve(words: list[str]) -> Any:
    """Run the command with those towers."""
    install(pytest.MonkeyPatch())
    return run_command(lambda: main(words))


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
