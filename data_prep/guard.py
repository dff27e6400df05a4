"""What stands between a list of strangers' URLs and this machine, below img2dataset's call of ``urlopen``.

img2dataset asks for every picture through :func:`urllib.request.urlopen`, which takes the opener that
:func:`urllib.request.install_opener` was given: a documented hook, so nothing of img2dataset is replaced. The
opener made here speaks http and https only (the default one also opens ``file:`` and ``ftp:``), and

* resolves a name once, refuses it if *any* of its addresses is not public, and connects to the address that was
  checked, so that a second answer of the name server cannot lead elsewhere; redirects go the same way;
* ends a request at its deadline however slowly its bytes drip, redirects, TLS and headers included;
* ends a body at its size limit, and notices one that is shorter than announced;
* holds no more bytes of bodies at a time than it is allowed to;
* says who is asking in the user agent, and heeds X-Robots-Tag, that of redirects too;
* lets a host rest that is busy, silent or refusing, if told so.

Proxies named in the environment are not used: the address check would then be the proxy's.
"""

import functools
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from data_prep.addresses import Network, check_address, resolve
from data_prep.budget import ByteBudget
from data_prep.causes import RETRIED_SCHEME, FetchError
from data_prep.hosts import HostGate
from data_prep.robots import opt_out

READ_BYTES = 1 << 16
MOST_REDIRECTS = 5

FIRST_BYTES = 1 << 20
"""Taken of the budget for a body of unknown length; most pictures are smaller."""


@dataclass(frozen=True)
class Limits:
    """What a request may take, and who asks.

    Attributes:
        deadline_s: seconds from the start of a request to the last byte, redirects included.
        body_bytes: size of the largest body taken.
        allowed_networks: addresses in these may be connected to although they are not public.
        user_agent: sent with each request.
        backoff_s: rest of a host after a failure of its own, doubled with each in a row; 0 for none.
        rests: folder in which processes tell each other which hosts rest; ``None`` for this process alone.
        robot: the name that X-Robots-Tag can address; ``None`` does not look at it.
        held_bytes: bodies held at a time, until :attr:`GuardedOpener.budget` has them back.
    """

    deadline_s: float
    body_bytes: int
    allowed_networks: tuple[Network, ...]
    user_agent: str
    backoff_s: float = 0.0
    rests: str | None = None
    robot: str | None = None
    held_bytes: int = 1 << 28


def install(limits: Limits) -> "GuardedOpener":
    """Let :func:`urllib.request.urlopen` of this process go through the guard; returns it."""
    opener = _opener(limits)
    # urlopen asks nothing of its opener but open().
    urllib.request.install_opener(opener)  # type: ignore[arg-type]
    return opener


@functools.lru_cache(maxsize=1)
def _opener(limits: Limits) -> "GuardedOpener":
    """One opener for all shards of a process: it reads certificates, and knows which hosts rest."""
    return GuardedOpener(limits)


class GuardedOpener:
    """An opener whose every fault is a :class:`~data_prep.causes.FetchError` that names its cause."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = ByteBudget(limits.held_bytes)
        """Of a body that was read to its end, :meth:`ByteBudget.give_back` is the caller's to call."""
        context = ssl.create_default_context()
        context.sslsocket_class = _TimedSSLSocket
        self._gate = HostGate(limits.backoff_s, limits.deadline_s, limits.rests)
        self._director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.UnknownHandler(),
            _HTTPHandler(limits),
            _HTTPSHandler(limits, context),
            urllib.request.HTTPDefaultErrorHandler(),
            _RedirectHandler(limits),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._director.add_handler(handler)

    def open(self, request: Any, data: Any = None, timeout: Any = None) -> "CappedBody":
        """Answer of the server to ``request`` (a Request or a URL), its body still to be read."""
        if not isinstance(request, urllib.request.Request):
            request = urllib.request.Request(request)
        if request.type == RETRIED_SCHEME:
            raise FetchError("retried", "the shard was made again, but not this row")
        request.add_header("User-agent", self.limits.user_agent)
        host = request.host
        self._gate.wait(host)
        request.ends = time.monotonic() + self.limits.deadline_s
        with self._gate.watching(host):
            try:
                response = self._director.open(request, data, timeout)
            except Exception as error:
                _explain(error)
        try:
            _heed(response.headers, self.limits.robot)
        except FetchError:
            response.close()
            raise
        return CappedBody(response, self, host, request.ends)


class CappedBody:
    """The part of a response that img2dataset uses: ``headers``, ``read()`` and the context manager."""

    def __init__(self, response: Any, opener: GuardedOpener, host: str, ends: float) -> None:
        self._response = response
        self._most_bytes = opener.limits.body_bytes
        self._budget = opener.budget
        self._gate = opener._gate
        self._host = host
        self._ends = ends
        self.headers: Message = response.headers

    def __enter__(self) -> "CappedBody":
        return self

    def __exit__(self, *exception: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body. Raises FetchError: too large, too slow, empty or cut short."""
        with self._gate.watching(self._host):
            body = self._read()
        self._gate.succeeded(self._host)
        return body

    def _read(self) -> bytes:
        announced = self._response.length
        if announced is not None and announced > self._most_bytes:
            raise FetchError("too_large", f"{announced} bytes announced, {self._most_bytes} allowed")
        taken = size = 0
        pieces: list[bytes] = []
        try:
            taken += self._take(min(FIRST_BYTES, self._most_bytes) if announced is None else announced)
            while piece := self._response.read1(READ_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > self._most_bytes:
                    raise FetchError("too_large", f"more than {self._most_bytes} bytes")
                if size > taken:
                    taken += self._take(self._most_bytes - taken)
            if announced is not None and size < announced:
                raise FetchError("truncated", f"{size} of {announced} bytes")
            if not size:
                raise FetchError("empty", "no bytes")
            return b"".join(pieces)
        except Exception as error:
            size = 0
            _explain(error)
        finally:
            self._budget.give_back(taken - size)

    def _take(self, count: int) -> int:
        self._budget.take(count, self._ends)
        return count


class _Timed:
    """A socket that gives up for good at ``ends``, whatever the time-out of a single read."""

    ends: float
    silence_s: float
    patience_s: float | None = None

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("not finished at its deadline")
        patience_s = min(left, self.silence_s)
        if patience_s != self.patience_s:  # setting it is a call of the system
            self.patience_s = patience_s
            self.settimeout(patience_s)  # type: ignore[attr-defined]
        return super().recv_into(buffer, nbytes, flags)  # type: ignore[misc]


class _TimedSocket(_Timed, socket.socket):
    pass


class _TimedSSLSocket(_Timed, ssl.SSLSocket):  # type: ignore[misc]
    pass


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was checked; the name is not resolved a second time."""

    limits: Limits
    ends: float

    def connect(self) -> None:
        error: OSError | None = None
        for family, kind, protocol, _, address in self._addresses():
            connection = _TimedSocket(family, kind, protocol)
            self._set_times(connection)
            try:
                connection.settimeout(min(connection.silence_s, max(self.ends - time.monotonic(), 0.001)))
                connection.connect(address)
            except OSError as failure:
                connection.close()
                error = failure
                continue
            self.sock = connection
            return
        raise error or OSError("the name has no address")

    def _addresses(self) -> list[Any]:
        found = resolve(self.host, self.port, self.ends)
        for *_, address in found:
            check_address(str(address[0]), self.limits.allowed_networks)
        return found

    def _set_times(self, connection: Any) -> None:
        connection.ends = self.ends
        connection.silence_s = self.timeout if isinstance(self.timeout, (int, float)) else self.limits.deadline_s


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    def connect(self) -> None:
        # HTTPSConnection's own connect calls _Connection's and wraps its socket, in the class set above.
        super().connect()
        self._set_times(self.sock)


def _connector(kind: type[_Connection], limits: Limits, ends: float) -> Any:
    """What urllib calls as if it were the class of a connection."""

    def connect_to(host: str, **options: Any) -> _Connection:
        connection = kind(host, **options)
        connection.limits, connection.ends = limits, ends
        return connection

    return connect_to


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def http_open(self, req: Any) -> Any:
        return self.do_open(_connector(_Connection, self._limits, req.ends), req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, limits: Limits, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._limits = limits
        self._secure = context

    def https_open(self, req: Any) -> Any:
        return self.do_open(_connector(_SecureConnection, self._limits, req.ends), req, context=self._secure)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        # The caller reads the redirect's own body to its end, however long: a closed one is empty.
        fp.close()
        _heed(headers, self._limits.robot)
        if request is None or request.type not in ("http", "https"):
            raise FetchError("redirects", f"to {_line(newurl)}")
        request.ends = req.ends  # type: ignore[attr-defined]
        return request


def _explain(error: Exception) -> NoReturn:
    """Raise the FetchError that says what ``error`` means."""
    if isinstance(error, FetchError):
        raise error
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        cause = "redirects" if 300 <= error.code < 400 else f"http_{error.code}"
        wait = str(error.headers.get("Retry-After", "")) if error.headers else ""
        raise FetchError(cause, _line(error.reason), _seconds_of(wait)) from None
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        cause = "timeout"
    elif isinstance(reason, socket.gaierror):
        cause = "dns"
    elif isinstance(reason, ssl.SSLError):
        cause = "tls"
    elif isinstance(reason, http.client.IncompleteRead):
        cause = "truncated"
    elif isinstance(reason, http.client.RemoteDisconnected | OSError):
        cause = "connection"
    elif isinstance(reason, http.client.HTTPException):
        cause = "protocol"
    else:
        cause = "other"
    raise FetchError(cause, f"{type(reason).__name__} {_line(reason)}") from None


def _seconds_of(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for what is neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        when = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max((when - datetime.now(UTC)).total_seconds(), 0.0)


def _heed(headers: Message, robot: str | None) -> None:
    """Raise FetchError for an answer whose X-Robots-Tag asks ``robot`` to stay away."""
    asked = opt_out(headers.get_all("X-Robots-Tag", []), robot) if robot is not None else None
    if asked is not None:
        raise FetchError("opt_out", _line(asked))


def _line(value: Any) -> str:
    """The first 200 characters of a server's words, on one line."""
    return " ".join(str(value).split())[:200]
