"""What a sweep's job does: its cells one after another, each in a process of its own.

The processes are forked from one that has imported everything, so a cell costs no start-up of Python and torch; and a
cell that crashes, hangs or eats all memory ends its own process only. ``python -m pacl_scale.sweep.worker PACK`` does
the same on this machine.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import psutil

from pacl_scale.controller import patiently, state_of
from pacl_scale.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError, run_command
from pacl_scale.signals import STOPPING
from pacl_scale.sweep import ledger

LOG = "log.txt"
SETTINGS = "settings.yaml"
INTERRUPTIONS = 10
"""How often in a call a cell may be stopped or lost before it is given up: it may be what ends its jobs."""

SAVE_SECONDS = 120.0
"""How long a cell may take to save when its job is asked to stop; less where Slurm gives less."""

MARGIN_SECONDS = 20.0
"""What remains of the time between Slurm's signal and its end, to queue the job again."""

HERE = "local"
"""In place of a job's number: no Slurm job."""

Kind = Literal["evaluate", "train"]


@dataclass(frozen=True)
class Pack:
    """The cells of one job; also what submitit starts in it."""

    file: str
    """Where this is written, ``<sweep>/packs/<name>.json``."""
    folder: str
    """Folder of all cells."""
    cells: list[str]
    kind: Kind
    call: str
    attempts: int
    """How often in a call a cell is tried."""
    limit_s: float
    """Seconds that a cell may take."""
    save_s: float = SAVE_SECONDS
    """Seconds that it may take to save when its job is asked to stop."""

    def __call__(self) -> None:
        """Work on all cells that are not done."""
        work(self)

    def checkpoint(self) -> Any:
        """Asked to stop by Slurm: let the cell under way save, and have the rest done when the job runs again."""
        import submitit

        stop_child(self.save_s)
        return submitit.helpers.DelayedSubmission(self)


def read_pack(file: str) -> Pack:
    """The pack in a file. Raises :class:`UserError` where it is none."""
    try:
        return Pack(**json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no pack of a sweep") from error


def write_pack(pack: Pack) -> None:
    """Write a pack where it says."""
    ledger.write_json(Path(pack.file), asdict(pack))


def may_try(entry: ledger.Entry, call: str, attempts: int) -> bool:
    """Whether a cell is still to be worked on in this call."""
    last = entry.last
    if last is None or last.call != call:
        return last is None or last.outcome != "done"
    if last.outcome in ("done", "refused"):
        return False
    lost = entry.count(call, ("stopped", "lost")) + (last.outcome == "running")
    return entry.count(call, ledger.FAILURES) < attempts and lost <= INTERRUPTIONS


def work(pack: Pack) -> None:
    """Work on the cells of a pack that still need it, in order."""
    context = multiprocessing.get_context("forkserver")
    # With the libraries of towers, which are seconds to import and which every cell would import for itself.
    preload = ["sweep.preload", _room(pack.kind), "encoders.from_open_clip"]
    context.set_forkserver_preload([f"pacl_scale.{module}" for module in preload])
    job, node = job_name(), socket.gethostname()
    for name in pack.cells:
        folder = Path(pack.folder) / name
        entry = ledger.read(folder)
        if entry is None or not may_try(entry, pack.call, pack.attempts):
            continue
        if is_elsewhere(entry, job):
            print(f"{name}: job {entry.last.job if entry.last else ''} works on it", flush=True)
            continue
        entry = ledger.begin(folder, pack.call, job, node)
        outcome, why = _one(context.Process(target=_in_child, args=(pack.kind, str(folder))), folder, pack.limit_s)
        ledger.end(folder, entry, outcome, why)
        print(f"{name}: {outcome}{f' ({why})' if why else ''}", flush=True)
        if outcome == "stopped":
            # The signal that ended it was meant for the job; this process hears it too, or is ended.
            time.sleep(5)


def is_elsewhere(entry: ledger.Entry, job: str) -> bool:
    """Whether another Slurm job that lives is at work on a cell: one whose number an ended call could not note."""
    last = entry.last
    if last is None or last.outcome != "running" or HERE in (job, last.job) or last.job == job:
        return False
    return patiently(lambda: state_of(last.job)) is not None


def job_name() -> str:
    """Slurm's number of this job, with the array's index; "local" outside a job."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", HERE)


_child: BaseProcess | None = None


def save_seconds(signal_seconds: float) -> float:
    """How long a cell may save where its job is asked to stop so long before its end."""
    return min(SAVE_SECONDS, max(signal_seconds / 2, signal_seconds - MARGIN_SECONDS))


def stop_child(seconds: float) -> None:
    """Ask the cell under way to save and end; end it if it does not."""
    if _child is None or _child.pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(_child.pid, signal.SIGUSR2)
    _child.join(seconds)
    _end(_child)


def _one(process: BaseProcess, folder: Path, limit_s: float) -> tuple[ledger.Outcome, str]:
    global _child
    _child = process
    try:
        process.start()
        process.join(limit_s)
        if process.is_alive():
            _end(process)
            return "timeout", f"not done within {limit_s / 60:g} minutes"
    finally:
        # Also when this process is ended by submitit's handler or by Ctrl-C.
        _end(process)
        _child = None
    code = process.exitcode or 0
    if code == 0:
        return "done", ""
    if code == EXIT_REQUEUE or -code in STOPPING:
        return "stopped", "asked to stop"
    if code == EXIT_USER_ERROR:
        return "refused", said(folder)
    if code < 0:
        name = signal.Signals(-code).name
        return "failed", f"ended by {name}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
    return "failed", said(folder)


def _end(process: BaseProcess) -> None:
    """Kill a cell's process and all that it started."""
    if process.pid is None or not process.is_alive():
        return
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.join()


def said(folder: Path) -> str:
    """The last words of a cell's log: its error."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "its log cannot be read"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return last.removeprefix("error: ")[:500]


def _in_child(kind: Kind, folder: str) -> None:
    """The ordinary command on a cell's settings; what it says goes to the cell's log."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    with open(Path(folder) / LOG, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    settings = ["--config", str(Path(folder) / SETTINGS)]

    def command() -> int:
        if kind == "train":
            from pacl_scale import train

            return train.main(settings)
        from pacl_scale import evaluate

        return evaluate.main(settings)

    status = run_command(command)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def _room(kind: Kind) -> str:
    return "train" if kind == "train" else "evaluate.command"


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Work on one pack on this machine."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1:
        raise UserError("usage: python -m pacl_scale.sweep.worker PACK.json")
    signal.signal(signal.SIGTERM, _interrupted)
    work(read_pack(words[0]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
