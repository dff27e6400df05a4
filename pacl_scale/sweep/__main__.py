"""``python -m pacl_scale.sweep``."""

import sys

from pacl_scale.errors import run_command
from pacl_scale.sweep import main

if __name__ == "__main__":
    sys.exit(run_command(main))
