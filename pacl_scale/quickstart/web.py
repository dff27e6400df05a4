"""A small web server on loopback that serves pictures the way the web does: some links are dead."""

import sys
import threading
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import quote, unquote, urlsplit

GONE_FOLDER = "gone"
"""Whatever is asked for below this folder was there once (410)."""

PAGE_FOLDER = "page"
"""Whatever is asked for below this folder is a web page, even if it is called ``.jpg``."""

PAGE = b"<!doctype html><title>Not here any more</title><p>This picture has moved."

MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class PictureServer:
    """A context manager that serves pictures from a thread of its own.

    Args:
        pictures: a folder, served with its sub-folders, or contents by name. Other names are dead links (404).

    Attributes:
        requests: how often each path was asked for.
        statuses: how often each HTTP status was given.
    """

    def __init__(self, pictures: str | Path | Mapping[str, bytes]) -> None:
        self._pictures = pictures
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Address of the folder, as in ``http://127.0.0.1:8000``."""
        assert self._server is not None, "the web server does not run"
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def url_of(self, name: str) -> str:
        """Address of one picture, whether there is one or not."""
        return f"{self.url}/{quote(name)}"

    def __enter__(self) -> "PictureServer":
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def answer(self, name: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, media type and body of the answer to a request for ``name``."""
        folder = name.split("/", 1)[0]
        if folder == GONE_FOLDER:
            return HTTPStatus.GONE, "text/html", PAGE
        if folder == PAGE_FOLDER:
            return HTTPStatus.OK, "text/html", PAGE
        content = self._read(name)
        if content is None:
            return HTTPStatus.NOT_FOUND, "text/html", PAGE
        return HTTPStatus.OK, MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream"), content

    def count(self, name: str, status: HTTPStatus) -> None:
        """Note an answer; requests come from many threads."""
        with self._lock:
            self.requests[name] += 1
            self.statuses[int(status)] += 1

    def _read(self, name: str) -> bytes | None:
        if isinstance(self._pictures, Mapping):
            return self._pictures.get(name)
        root = Path(self._pictures).resolve()
        try:
            path = (root / name).resolve()
            # Neither "../" in a URL nor a link may lead out of the folder.
            return path.read_bytes() if path.is_relative_to(root) and path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    # A downloader opens hundreds of connections at once; the default of 5 would refuse some of them.
    request_queue_size = 512

    def __init__(self, pictures: PictureServer) -> None:
        self.pictures = pictures
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up early is no fault of ours; anything else keeps its traceback.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A client that keeps its connection open and falls silent frees the thread after so many seconds.
    timeout = 30
    server: _Server

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        status, media_type, body = self.server.pictures.answer(name)
        self.server.pictures.count(name, status)
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        # Thousands of lines that say nothing but the counts.
        pass
