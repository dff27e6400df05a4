"""Hosts that fail are left alone for a while, by all processes of a run on this machine."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from data_prep.causes import FetchError


class HostGate:
    """Lets hosts rest: after a failure that is the host's own, nobody asks it until its rest is over.

    Args:
        first_s: the first rest; each failure in a row doubles it. 0 opens the gate for good.
        longest_s: no rest is longer, and nobody waits longer.
        folder: where processes tell each other which hosts rest, a small file a host; ``None`` for this process alone.
    """

    def __init__(self, first_s: float, longest_s: float, folder: str | None = None) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._folder = folder
        self._lock = threading.Lock()
        self._rests: dict[str, tuple[float, int]] = {}
        if folder and first_s:
            os.makedirs(folder, exist_ok=True)

    def wait(self, host: str) -> None:
        """Wait until ``host`` may be asked. Raises FetchError if it keeps failing meanwhile."""
        if not self._first_s:
            return
        gives_up = time.monotonic() + self._longest_s
        while (rest := self._rest(host)[0] - time.monotonic()) > 0:
            if time.monotonic() + rest > gives_up:
                raise FetchError("backoff", f"{host} rests for {rest:.1f} s")
            time.sleep(rest)

    @contextmanager
    def watching(self, host: str) -> Iterator[None]:
        """Remember a FetchError that leaves the block."""
        try:
            yield
        except FetchError as error:
            if error.cause in _HOST_IS_WELL:
                self.succeeded(host)
            else:
                self._failed(host, error.retry_after_s)
            raise

    def succeeded(self, host: str) -> None:
        """The host answered as it should."""
        with self._lock:
            if self._first_s and self._rest(host)[1]:
                self._remember(host, 0.0, 0)

    def _failed(self, host: str, retry_after_s: float) -> None:
        now = time.monotonic()
        with self._lock:
            free_at, in_a_row = self._rest(host)
            # Requests that were under way together are one failure.
            if not self._first_s or free_at > now:
                return
            rest = max(self._first_s * 2.0 ** min(in_a_row, 30), retry_after_s)
            self._remember(host, now + min(rest, self._longest_s), in_a_row + 1)

    def _rest(self, host: str) -> tuple[float, int]:
        """Until when the host rests, by the monotonic clock, which processes of a machine share; failures in a row."""
        if self._folder is None:
            return self._rests.get(host, (0.0, 0))
        try:
            with open(self._path(host), encoding="ascii") as file:
                free_at, in_a_row = json.load(file)
        except FileNotFoundError:
            return 0.0, 0
        return free_at, in_a_row

    def _remember(self, host: str, free_at: float, in_a_row: int) -> None:
        if self._folder is None:
            self._rests[host] = (free_at, in_a_row)
            return
        path = self._path(host)
        partial = f"{path}.{os.getpid()}"
        with open(partial, "w", encoding="ascii") as file:
            json.dump([free_at, in_a_row], file)
        os.replace(partial, path)

    def _path(self, host: str) -> str:
        # A stranger's host name is no file name.
        return os.path.join(str(self._folder), blake2b(host.encode(), digest_size=16).hexdigest())


_HOST_IS_WELL = frozenset(
    {"empty", "http_400", "http_403", "http_404", "http_410", "opt_out", "private_address", "redirects", "too_large"}
)
"""Failures that say nothing against asking the same host for another picture at once."""
