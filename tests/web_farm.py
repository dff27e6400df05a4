"""A loopback web server full of what the open web does to a downloader: for the tests of data_prep."""

import functools
import io
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SLOW_SECONDS = 0.5
"""Until a slow server answers."""

DRIP_SECONDS = 0.2
"""Between two bytes of a server that drips."""

HEALS_AFTER = 1
"""Requests to a healing address that are answered with 500 before it works."""


def draw(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture that differs for every number: a gradient and a few blocks."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """``picture`` as the bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


POISON = "poison for decoders"

BAD_EXIF = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0131, 5, 1, 6)
"""A TIFF header with an orientation of 6, and a text of the type of fractions: Pillow reads it and cannot write it."""


def with_exif(jpeg: bytes, tiff: bytes) -> bytes:
    """``jpeg`` with ``tiff`` as its EXIF segment."""
    segment = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


class WebFarm:
    """A context manager that serves on a free loopback port.

    ``farm.url("ok/7.jpg")`` is the address of a sound picture; the other paths are the methods of
    :class:`_Answers`. ``farm.requests`` counts requests by path; ``farm.agents`` are the user agents seen.
    """

    def __enter__(self) -> "WebFarm":
        self.requests: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Answers)
        self._server.farm = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def warm_up(self) -> None:
        """Draw what takes long now, so that no answer is late because of it."""
        _bomb()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{path}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    farm: WebFarm

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what half of this farm is about


class _Answers(BaseHTTPRequestHandler):
    """Answers by the first part of the path."""

    server: _Server

    def do_GET(self) -> None:
        farm = self.server.farm
        with farm.lock:
            farm.requests[self.path.lstrip("/")] += 1
            farm.agents.add(self.headers.get("User-Agent", ""))
            seen = farm.requests[self.path.lstrip("/")]
        kind, _, rest = self.path.lstrip("/").partition("/")
        self.seen, self.rest = seen, rest.partition("?")[0]
        answer: Callable[[], None] = getattr(self, f"answer_{kind}", self.answer_missing)
        answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def number(self) -> int:
        digits = "".join(letter for letter in self.rest if letter.isdigit())
        return int(digits or 0)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self) -> None:
        self.send(encoded(draw(self.number())))

    def answer_slow(self) -> None:
        self.server.farm.stopping.wait(SLOW_SECONDS)
        self.answer_ok()

    def answer_missing(self) -> None:
        self.send(b"", 404)

    def answer_gone(self) -> None:
        self.send(b"", 410)

    def answer_error(self) -> None:
        self.send(b"", 500)

    def answer_heals(self) -> None:
        if self.seen <= HEALS_AFTER:
            self.send(b"", 500)
        else:
            self.answer_ok()

    def answer_busy(self) -> None:
        self.send(b"", 429, Retry_After="1")

    def answer_cut(self) -> None:
        """Half of what was announced, then the end of the connection."""
        body = encoded(draw(self.number()))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def answer_reset(self) -> None:
        """The same, but the connection is reset."""
        self.answer_cut()
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Without the shutdown that the server would do first, which says farewell politely.
        self.connection.close()

    def answer_unannounced(self) -> None:
        """Half a picture and no length: only the picture itself tells."""
        body = encoded(draw(self.number()))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def answer_silent(self) -> None:
        self.server.farm.stopping.wait(60)

    def answer_slowheaders(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while not self.server.farm.stopping.is_set():
            self.wfile.write(b"X")
            time.sleep(DRIP_SECONDS)

    def answer_slowbody(self) -> None:
        body = encoded(draw(self.number(), (960, 640)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for byte in body:
            if self.server.farm.stopping.wait(DRIP_SECONDS):
                return
            self.wfile.write(bytes([byte]))

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.farm.stopping.is_set():
            self.wfile.write(b"\xff\xd8\xff" + b"x" * 65533)

    def answer_announced(self) -> None:
        """Two gigabytes, announced."""
        self.send_response(200)
        self.send_header("Content-Length", str(2 << 30))
        self.end_headers()
        while not self.server.farm.stopping.is_set():
            self.wfile.write(b"\0" * 65536)

    def answer_empty(self) -> None:
        self.send(b"")

    def answer_gibberish(self) -> None:
        self.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")

    def answer_redirect(self) -> None:
        self.send(b"x", 302, Location=f"/{self.rest}")

    def answer_loop(self) -> None:
        self.send(b"", 302, Location=self.path)

    def answer_farther(self) -> None:
        self.send(b"", 302, Location=f"/farther/{self.number() + 1}")

    def answer_toprivate(self) -> None:
        self.send(b"", 302, Location="http://169.254.169.254/latest/meta-data/")

    def answer_shyredirect(self) -> None:
        """A redirect that asks not to be used, to a picture that does not."""
        self.send(b"", 302, Location=f"/ok/{self.number()}.jpg", X_Robots_Tag="noai")

    def answer_toname(self) -> None:
        """To a name of this machine instead of its address."""
        self.send(b"", 302, Location=f"http://localhost:{self.server.server_address[1]}/ok/{self.number()}.jpg")

    def answer_tofile(self) -> None:
        self.send(b"", 302, Location="file:///etc/passwd")

    def answer_toftp(self) -> None:
        self.send(b"", 302, Location="ftp://127.0.0.1/x.jpg")

    def answer_endlessredirect(self) -> None:
        """A redirect whose own body never ends."""
        self.send_response(302)
        self.send_header("Location", f"/ok/{self.number()}.jpg")
        self.end_headers()
        while not self.server.farm.stopping.is_set():
            self.wfile.write(b"x" * 65536)

    def answer_text(self) -> None:
        self.send(b"<html>not found, but with status 200</html>")

    def answer_wrongtype(self) -> None:
        """A sound picture that calls itself text."""
        body = encoded(draw(self.number()))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_corrupt(self) -> None:
        body = bytearray(encoded(draw(self.number())))
        body[20:60] = b"\0" * 40
        self.send(bytes(body))

    def answer_bomb(self) -> None:
        """A small PNG that unfolds to 400 megapixels."""
        self.send(_bomb())

    def answer_hugejpeg(self) -> None:
        """A small JPEG whose header tells of 400 megapixels."""
        body = bytearray(encoded(draw(self.number())))
        at = body.index(b"\xff\xc0")
        body[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
        self.send(bytes(body))

    def answer_scans(self) -> None:
        """A progressive JPEG with a scan again and again: each is a pass over all pixels."""
        body = encoded(draw(self.number()), progressive=True)
        at = body.rindex(b"\xff\xda")
        self.send(body[:at] + body[at:-2] * 200 + b"\xff\xd9")

    def answer_trailing(self) -> None:
        """A whole JPEG and something behind it that looks like the start of a scan."""
        self.send(encoded(draw(self.number())) + b"\xff\xda and more \xff\xda")

    def answer_badexif(self) -> None:
        """A picture to be turned, with EXIF that is damaged elsewhere."""
        lying = draw(self.number(), (64, 96)).transpose(Image.Transpose.ROTATE_90)
        self.send(with_exif(encoded(lying), BAD_EXIF))

    def answer_poison(self) -> None:
        """A picture that a decoder of the tests dies of."""
        note = PngInfo()
        note.add_text("note", POISON)
        self.send(encoded(draw(self.number()), "PNG", pnginfo=note))

    def answer_png(self) -> None:
        self.send(encoded(draw(self.number()), "PNG"))

    def answer_clearpng(self) -> None:
        picture = draw(self.number()).convert("RGBA")
        picture.putalpha(0)
        self.send(encoded(picture, "PNG"))

    def answer_deeppng(self) -> None:
        grey = np.asarray(draw(self.number()).convert("L"), np.uint16) * 257
        self.send(encoded(Image.fromarray(grey), "PNG"))

    def answer_webp(self) -> None:
        self.send(encoded(draw(self.number()), "WEBP"))

    def answer_gif(self) -> None:
        frames = [draw(self.number() + frame) for frame in range(3)]
        self.send(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))

    def answer_cmyk(self) -> None:
        self.send(encoded(draw(self.number()).convert("CMYK")))

    def answer_grey(self) -> None:
        self.send(encoded(draw(self.number()).convert("L")))

    def answer_rotated(self) -> None:
        """A portrait that was stored lying down, with EXIF's word for it."""
        exif = Image.Exif()
        exif[0x0112] = 6
        lying = draw(self.number(), (64, 96)).transpose(Image.Transpose.ROTATE_90)
        self.send(encoded(lying, exif=exif))

    def answer_tiny(self) -> None:
        self.send(encoded(draw(self.number(), (3, 3))))

    def answer_strip(self) -> None:
        self.send(encoded(draw(self.number(), (2000, 20))))

    def answer_noai(self) -> None:
        self.send(encoded(draw(self.number())), X_Robots_Tag="noai")


@functools.cache
def _bomb() -> bytes:
    return encoded(Image.new("1", (20_000, 20_000)), "PNG")
