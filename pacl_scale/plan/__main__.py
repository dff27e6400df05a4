"""``python -m pacl_scale.plan``."""

import sys

from pacl_scale.errors import run_command
from pacl_scale.plan.command import main

sys.exit(run_command(main))
