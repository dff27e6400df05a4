"""How many CPU cores there are to use."""

import os


def usable_cores() -> int:
    """Cores that this process may run on; all of the machine where its system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
