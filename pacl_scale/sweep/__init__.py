"""Sweeps: many evaluations or trainings from one grid, as few Slurm jobs, none of them done twice.

``python -m pacl_scale.sweep --config configs/sweeps/paper.yaml``
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``sweep``; returns 0, or raises what :func:`pacl_scale.errors.run_command` explains."""
    # Imported here: the workers import this package first, and need little of it.
    from pacl_scale.sweep.command import run

    return run(argv)
