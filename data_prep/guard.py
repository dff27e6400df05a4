"""What stands between a list of strangers' URLs and this machine, below img2dataset's call of ``urlopen``.

img2dataset asks for every picture through :func:`urllib.request.urlopen`, which takes the opener that
:func:`urllib.request.install_opener` was given: a documented hook, so nothing of img2dataset is replaced. The
opener made here speaks http and https only (the default one also opens ``file:`` and ``ftp:``), and

* resolves a name once, refuses it if *any* of its addresses is not public, and connects to the address that was
  checked, so that a second answer of the name server cannot lead elsewhere; redirects go the same way;
* ends a request at its deadline however slowly its bytes drip, redirects, TLS and headers included;
* ends a body at its size limit, and notices one that is shorter than announced;
* says who is asking in the user agent.

Proxies named in the environment are not used: the address check would then be the proxy's.
"""

import functools
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, NoReturn

from data_prep.causes import FetchError

READ_BYTES = 1 << 16
MOST_REDIRECTS = 5


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Limits:
    """What a request may take, and who asks.

    Attributes:
        deadline_s: seconds from the start of a request to the last byte, redirects included.
        body_bytes: size of the largest body taken.
        allowed_networks: addresses in these may be connected to although they are not public.
        user_agent: sent with each request.
    """

    deadline_s: float
    body_bytes: int
    allowed_networks: tuple[Network, ...]
    user_agent: str


def install(limits: Limits) -> None:
    """Let :func:`urllib.request.urlopen` of this process go through the guard."""
    # urlopen asks nothing of its opener but open().
    urllib.request.install_opener(GuardedOpener(limits))  # type: ignore[arg-type]


class GuardedOpener:
    """An opener whose every fault is a :class:`~data_prep.causes.FetchError` that names its cause."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        context = ssl.create_default_context()
        context.sslsocket_class = _TimedSSLSocket
        self._director = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.UnknownHandler(),
            _HTTPHandler(limits),
            _HTTPSHandler(limits, context),
            urllib.request.HTTPDefaultErrorHandler(),
            _RedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._director.add_handler(handler)

    def open(self, request: Any, data: Any = None, timeout: Any = None) -> "CappedBody":
        """Answer of the server to ``request`` (a Request or a URL), its body still to be read."""
        if not isinstance(request, urllib.request.Request):
            request = urllib.request.Request(request)
        request.add_header("User-agent", self.limits.user_agent)
        request.ends = time.monotonic() + self.limits.deadline_s
        try:
            response = self._director.open(request, data, timeout)
        except Exception as error:
            _explain(error)
        return CappedBody(response, self.limits.body_bytes)


class CappedBody:
    """The part of a response that img2dataset uses: ``headers``, ``read()`` and the context manager."""

    def __init__(self, response: Any, most_bytes: int) -> None:
        self._response = response
        self._most_bytes = most_bytes
        self.headers: Message = response.headers

    def __enter__(self) -> "CappedBody":
        return self

    def __exit__(self, *exception: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body. Raises FetchError: too large, too slow, empty or cut short."""
        announced = self._response.length
        if announced is not None and announced > self._most_bytes:
            raise FetchError("too_large", f"{announced} bytes announced, {self._most_bytes} allowed")
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := self._response.read1(READ_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > self._most_bytes:
                    raise FetchError("too_large", f"more than {self._most_bytes} bytes")
        except Exception as error:
            _explain(error)
        if announced is not None and size < announced:
            raise FetchError("truncated", f"{size} of {announced} bytes")
        if not size:
            raise FetchError("empty", "no bytes")
        return b"".join(pieces)


def check_address(address: str, allowed: Sequence[Network] = ()) -> None:
    """Raise FetchError unless ``address`` (an IP literal) is public, or in one of the ``allowed`` networks.

    IPv4 addresses in IPv6 clothes (mapped, 6to4, NAT64) are judged as what they stand for.
    """
    ip: Any = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    if any(ip in network for network in allowed):
        return
    if not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified:
        raise FetchError("private_address", address)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _Timed:
    """A socket that gives up for good at ``ends``, whatever the time-out of a single read."""

    ends: float
    silence_s: float

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("not finished at its deadline")
        self.settimeout(min(left, self.silence_s))  # type: ignore[attr-defined]
        return super().recv_into(buffer, nbytes, flags)  # type: ignore[misc]


class _TimedSocket(_Timed, socket.socket):
    pass


class _TimedSSLSocket(_Timed, ssl.SSLSocket):  # type: ignore[misc]
    pass


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was checked; the name is not resolved a second time."""

    def __init__(self, host: str, limits: Limits, ends: float, **options: Any) -> None:
        super().__init__(host, **options)
        self._limits = limits
        self._ends = ends

    def connect(self) -> None:
        error: OSError | None = None
        for family, kind, protocol, _, address in self._addresses():
            connection = _TimedSocket(family, kind, protocol)
            self._set_times(connection)
            try:
                connection.settimeout(min(connection.silence_s, max(self._ends - time.monotonic(), 0.001)))
                connection.connect(address)
            except OSError as failure:
                connection.close()
                error = failure
                continue
            self.sock = connection
            return
        raise error or OSError("the name has no address")

    def _addresses(self) -> list[Any]:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for *_, address in found:
            check_address(str(address[0]), self._limits.allowed_networks)
        return found

    def _set_times(self, connection: Any) -> None:
        connection.ends = self._ends
        connection.silence_s = self.timeout if isinstance(self.timeout, (int, float)) else self._limits.deadline_s


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    def connect(self) -> None:
        # HTTPSConnection's own connect calls _Connection's and wraps its socket, in the class set above.
        super().connect()
        self._set_times(self.sock)


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def http_open(self, req: Any) -> Any:
        return self.do_open(functools.partial(_Connection, limits=self._limits, ends=req.ends), req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, limits: Limits, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._limits = limits
        self._secure = context

    def https_open(self, req: Any) -> Any:
        connection = functools.partial(
            _SecureConnection, limits=self._limits, ends=req.ends, context=self._secure
        )
        return self.do_open(connection, req)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    max_redirections = MOST_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        # The caller reads the redirect's own body to its end, however long: a closed one is empty.
        fp.close()
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
        raise FetchError(cause, _line(error.reason)) from None
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


def _line(value: Any) -> str:
    """The first 200 characters of a server's words, on one line."""
    return " ".join(str(value).split())[:200]
