"""``python -m pacl_scale.demo``."""

import sys

from pacl_scale.demo import main
from pacl_scale.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
