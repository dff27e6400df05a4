"""Imported by the process that cells are forked from, and by no other: it outlives what ends a cell.

Slurm signals every process of a job. This one keeps the exit statuses of the cells, so it must hear them out; it ends
when the worker does.
"""

import signal

from pacl_scale.signals import STOPPING

for number in STOPPING:
    signal.signal(number, signal.SIG_IGN)
