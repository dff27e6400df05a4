"""How a command ends: one sentence on stderr and an exit status, never a traceback for a user's mistake."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from pacl_scale.secrecy import hidden

EXIT_USER_ERROR = 2
"""Exit status of a :class:`UserError`, as argparse uses for wrong arguments."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

EXIT_FAILED = 1
"""Exit status of a :class:`RunFailed`, and of a defect of this program."""

EXIT_REQUEUE = 75
"""Exit status of a run that saved and stopped because it was asked to: start it again (EX_TEMPFAIL of sysexits)."""


class UserError(Exception):
    """A fault that the user can mend: a wrong key, a missing bucket, data that cannot be used.

    The message is one sentence that says what is wrong and, where it helps, what to do about it.
    """


class RunFailed(Exception):
    """A run ended before its end, and not by a mistake in its settings. The message is one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, to be quoted; its kind where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def end_quietly_when_interrupted() -> None:
    """Let Ctrl-C end in a sentence from now on, also while a command's libraries are still being imported."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("error: interrupted", file=sys.stderr, flush=True)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def run_command(command: Callable[[], int | None]) -> int:
    """Run ``command`` and return the exit status of the process.

    A :class:`UserError` becomes its sentence on stderr and status 2, a :class:`RunFailed` the same with status 1,
    Ctrl-C becomes status 130. Anything else is a defect of this program: its traceback and status 1. Secrets in
    any of these are hidden.
    """
    try:
        return command() or 0
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # All ranks find the same mistake; rank 0 says it, and its end ends the others before they repeat it.
            time.sleep(5.0)
        print(f"error: {hidden(str(error))}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except RunFailed as error:
        # Every rank says it: the one that would speak for all may be the one that is gone.
        print(f"error: {hidden(str(error))}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception:
        print(hidden(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return EXIT_FAILED
