"""A proxy on loopback that spoils some of the answers of the store behind it."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FAULTS = ("500", "503", "reset before", "reset in body", "truncated", "stalled", "wrong length")


class FaultyProxy:
    """Forwards requests to ``endpoint`` and spoils a share of the GETs, and of writes what can be; a context manager.

    Args:
        endpoint: of the store, as in ``http://127.0.0.1:9000``.
        share: of the requests that are spoiled.
        faults: which, drawn at random.
        stall_s: how long a stalled answer is silent; longer than the reader's time-out.
    """

    def __init__(
        self, endpoint: str, share: float, faults: tuple[str, ...] = FAULTS, stall_s: float = 1.0, seed: int = 0
    ) -> None:
        self.share, self.faults, self.stall_s = share, faults, stall_s
        self.spoiled: Counter[str] = Counter()
        self.requests = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._target = urlsplit(endpoint)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            def do_HEAD(self) -> None:
                proxy.pass_on(self)

            def do_PUT(self) -> None:
                proxy.answer_write(self)

            do_POST = do_DELETE = do_PUT

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Forward one request and perhaps spoil its answer."""
        fault = self._draw()
        if self._refused(request, fault):
            return
        status, headers, body = self._forward(request)
        if fault is None or status >= 400:
            self._send(request, status, headers, body)
            return
        if fault == "wrong length":
            # A whole answer to another question: the length fits the body, not the range that was asked for.
            self._send(request, status, headers, body[: len(body) // 2])
            return
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2])
        request.wfile.flush()
        if fault == "stalled":
            time.sleep(self.stall_s)
        if fault == "reset in body":
            self._reset(request)
        request.close_connection = True

    def answer_write(self, request: BaseHTTPRequestHandler) -> None:
        """Forward a request that changes the store, or refuse it; the answer of one may be lost on the way."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self._draw()
        if self._refused(request, fault):
            return
        answer = self._forward(request, body)
        if fault == "reset in body":
            self._reset(request)
            return
        self._send(request, *answer)

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        """Forward one request and leave its answer as it is."""
        status, headers, body = self._forward(request)
        self._send(request, status, headers, body)

    def _refused(self, request: BaseHTTPRequestHandler, fault: str | None) -> bool:
        """Whether ``fault`` kept the request from the store; it is answered then."""
        if fault in ("500", "503"):
            self._send(request, int(fault), {}, SLOW_DOWN if fault == "503" else b"oops")
        elif fault == "reset before":
            self._reset(request)
        else:
            return False
        return True

    def _draw(self) -> str | None:
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.share:
                return None
            fault = self._random.choice(self.faults)
            self.spoiled[fault] += 1
            return fault

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        # The signature covers the Host header, so it is passed on as it came.
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            skip = ["connection", "transfer-encoding", "date", "server"]
            # The length of an answer without a body is that of the body it would have.
            skip += [] if request.command == "HEAD" else ["content-length"]
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in skip}
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def _reset(self, request: BaseHTTPRequestHandler) -> None:
        """Close the connection with RST instead of FIN."""
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
        request.close_connection = True
