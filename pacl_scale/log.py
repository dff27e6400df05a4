"""Structured log lines and a progress bar that falls back to plain lines where there is no terminal."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import structlog
from tqdm import tqdm

from pacl_scale.secrecy import hidden

Item = TypeVar("Item")

PLAIN_PROGRESS_SECONDS = 10.0
"""Without a terminal, progress is one log line at most this often."""


def get_logger(name: str) -> Any:
    """A logger whose calls read ``log.info("event", key=value)``."""
    return structlog.get_logger(name)


def configure(rank: int = 0, file: str | Path | None = None, quiet: bool = False) -> None:
    """Send log lines to stderr (rank 0 only, warnings from every rank) and, if given, to ``file`` as well.

    Args:
        rank: this process's rank; the other ranks print warnings and errors only, marked with their rank.
        file: the attempt's ``train.log``; appended to, so that an earlier attempt's lines stay.
        quiet: only warnings and errors, whatever the rank.
    """
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        colors = isinstance(handler, _TqdmHandler) and sys.stderr.isatty()
        handler.setFormatter(
            _Formatter(
                foreign_pre_chain=_shared_processors(),
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0, pad_level=False, sort_keys=False),
                ],
            )
        )
        root.addHandler(handler)
    # Libraries (botocore, img2dataset, deepspeed) are heard from warnings on; our own loggers from info on.
    root.setLevel(logging.WARNING)
    own = logging.WARNING if quiet or rank else logging.INFO
    for name in ("pacl_scale", "data_prep"):
        logging.getLogger(name).setLevel(own)
    structlog.contextvars.clear_contextvars()
    if rank:
        structlog.contextvars.bind_contextvars(rank=rank)
    structlog.configure(
        processors=[*_shared_processors(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield ``items`` beneath a progress bar on a terminal, or with a plain line now and then elsewhere."""
    total = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, unit=unit, dynamic_ncols=True, leave=False)
        return
    log, started, last = get_logger("pacl_scale"), time.monotonic(), time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= PLAIN_PROGRESS_SECONDS:
            last = time.monotonic()
            rate = done / (last - started)
            eta = {"eta_s": round((total - done) / rate)} if total else {}
            log.info(what, done=done, total=total, per_s=float(f"{rate:.3g}"), **eta)


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Hides secrets: a line may quote the answer of a store or of a library that was given one."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


class _TqdmHandler(logging.Handler):
    """Prints through tqdm, so that a log line does not tear a progress bar."""

    stream: IO[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _shared_processors() -> list[Any]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.processors.format_exc_info,
    ]
