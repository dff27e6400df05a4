"""Commands of Slurm that only pretend, for tests of what is asked and said; `test_slurm.py` has real ones."""

import os
from pathlib import Path

import pytest

from pacl_scale.checkpoint import STATE

COMMANDS = {
    "srun": "exit 1",
    "sbatch": 'cp "$1" "$HERE/script"; echo "Submitted batch job 7"',
    "sinfo": 'cat "$HERE/nodes"',
    "squeue": 'if [ -e "$HERE/state" ]; then cat "$HERE/state"; '
    'else echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi',
    "scontrol": 'if [ "$2" = hostnames ]; then echo "$3" | tr , "\\n"; exit; fi; '
    'if [ -s "$HERE/silent" ]; then sed -i 1d "$HERE/silent"; '
    'echo "scontrol: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi; '
    'echo "$@" >> "$HERE/asked"; '
    'echo "JobId=7 JobState=PENDING Partition=gpu ExcNodeList=n9 TresPerNode=gres:gpu:8 Comment=a b"',
    "scancel": 'echo "cancel $@" >> "$HERE/asked"',
}


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the commands first in the path.

    Jobs are in the state that the file ``state`` in ``folder`` holds, ``nodes`` is what sinfo says, ``script`` becomes
    what was queued, ``asked`` grows by what was asked, and the controller is as often silent as ``silent`` has lines.
    """
    (folder / "bin").mkdir()
    for name, body in COMMANDS.items():
        file = folder / "bin" / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    large = [f"gpu|up|n{n}|idle|96|900000|gpu:a100:8(S:0-1)|ib,big|2-00:00:00" for n in range(1, 7)]
    small = [f"gpu|up|n{n}|mixed|48|400000|gpu:v100:4|ib|2-00:00:00" for n in range(7, 11)]
    old = [f"old*|down|n{n}|idle|8|64000|(null)|(null)|infinite" for n in (11, 12)]
    (folder / "nodes").write_text("\n".join([*large, *small, *old]) + "\n")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(folder))


def saved(run: Path, step: int) -> None:
    """A checkpoint of a run, as far as a batch script looks at it."""
    folder = run / "checkpoints" / f"{step:08d}"
    folder.mkdir(parents=True)
    (folder / STATE).write_text("{}")
