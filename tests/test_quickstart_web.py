"""The demo's web server: pictures, dead links, and nothing beside its folder."""

import http.client
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pacl_scale.quickstart.web import PictureServer


def ask(server: PictureServer, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


def test_pictures_of_a_folder_and_its_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "deep er").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    (tmp_path / "deep er" / "b.png").write_bytes(b"png")
    with PictureServer(tmp_path) as server:
        assert ask(server, "/a.jpg") == (200, "image/jpeg", b"jpeg")
        assert ask(server, urlsplit(server.url_of("deep er/b.png")).path) == (200, "image/png", b"png")
        assert ask(server, "/a.jpg?width=9") == (200, "image/jpeg", b"jpeg")


def test_dead_links_and_pages() -> None:
    with PictureServer({"a.jpg": b"jpeg"}) as server:
        assert ask(server, "/b.jpg")[0] == 404
        assert ask(server, "/")[0] == 404
        assert ask(server, "/gone/a.jpg")[0] == 410
        status, media_type, body = ask(server, "/page/a.jpg")
        assert (status, media_type) == (200, "text/html") and body.startswith(b"<!doctype html>")


@pytest.mark.parametrize("path", ["/../secret.jpg", "/%2e%2e/secret.jpg", "/link.jpg", "//etc/passwd", "/%00.jpg"])
def test_nothing_beside_the_folder_is_served(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with PictureServer(tmp_path / "open") as server:
        assert ask(server, path)[0] == 404


def test_requests_are_counted() -> None:
    with PictureServer({"a.jpg": b"jpeg"}) as server:
        for path in ("/a.jpg", "/a.jpg", "/b.jpg", "/gone/c.jpg"):
            ask(server, path)
        assert server.requests == {"a.jpg": 2, "b.jpg": 1, "gone/c.jpg": 1}
        assert server.statuses == {200: 2, 404: 1, 410: 1}


def test_head_has_no_body() -> None:
    with PictureServer({"a.jpg": b"jpeg"}) as server:
        port = urlsplit(server.url).port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"HEAD /a.jpg HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\nContent-Length: 4\r\n\r\n")


def test_many_clients_at_once() -> None:
    with PictureServer({"a.jpg": b"x" * 100_000}) as server, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: ask(server, "/a.jpg"), range(400)))
        assert all(status == 200 and len(body) == 100_000 for status, _, body in answers)
        assert server.requests["a.jpg"] == 400


def test_port_is_free_afterwards_even_after_an_exception() -> None:
    with pytest.raises(RuntimeError), PictureServer({}) as server:
        port = urlsplit(server.url).port
        raise RuntimeError
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
