"""``python -m pacl_scale.segment``."""

import sys

from pacl_scale.errors import run_command
from pacl_scale.segment import main

if __name__ == "__main__":
    sys.exit(run_command(main))
