"""What the web may and may not do to a download, against a loopback farm that tries."""

import io
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from web_farm import WebFarm, draw, encoded

from data_prep.causes import CAUSES, OPT_OUT_MESSAGE, FetchError, cause_of
from data_prep.guard import GuardedOpener, Limits, check_address

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)

with warnings.catch_warnings():
    # img2dataset imports a module of the standard library that is on its way out.
    warnings.simplefilter("ignore")
    from data_prep import picture
    from data_prep.picture import PictureResizer


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        running.warm_up()
        yield running


def opener(**changes: object) -> GuardedOpener:
    values: dict = {
        "deadline_s": 30.0,
        "body_bytes": 200_000,
        "allowed_networks": LOOPBACK,
        "user_agent": "tests/1 (mailto:me@example.org)",
    }
    return GuardedOpener(Limits(**{**values, **changes}))


def fetch(url: str, timeout: float = 30.0, **changes: object) -> bytes:
    with opener(**changes).open(urllib.request.Request(url), timeout=timeout) as body:
        return body.read()


def test_a_sound_picture_and_who_asks(farm: WebFarm) -> None:
    assert fetch(farm.url("ok/7.jpg")) == encoded(draw(7))
    assert fetch(farm.url("redirect/ok/7.jpg")) == encoded(draw(7))
    assert farm.agents == {"tests/1 (mailto:me@example.org)"}


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("missing/1", "http_404"),
        ("gone/1", "http_410"),
        ("error/1", "http_500"),
        ("busy/1", "http_429"),
        ("reset/1", "truncated"),
        ("silent/1", "timeout"),
        ("slowheaders/1", "timeout"),
        ("slowbody/1", "timeout"),
        ("endless/1", "too_large"),
        ("announced/1", "too_large"),
        ("empty/1", "empty"),
        ("gibberish/1", "protocol"),
        ("loop/1", "redirects"),
        ("farther/1", "redirects"),
        ("toprivate/1", "private_address"),
        ("tofile/1", "redirects"),
        ("toftp/1", "redirects"),
        ("redirect/missing", "http_404"),
    ],
)
def test_what_goes_wrong_has_one_cause_and_an_end(farm: WebFarm, path: str, cause: str) -> None:
    started = time.monotonic()
    # Short only where it is what ends the request: a busy machine must not turn other causes into this one.
    short = {"timeout": 0.6, "deadline_s": 1.0} if cause == "timeout" else {}
    with pytest.raises(FetchError) as caught:
        fetch(farm.url(path), **short)
    assert caught.value.cause == cause
    assert cause_of(str(caught.value)) == cause
    assert time.monotonic() - started < 20


def test_the_body_of_a_redirect_is_not_read(farm: WebFarm) -> None:
    assert fetch(farm.url("endlessredirect/3")) == encoded(draw(3))


def test_a_drip_is_cut_at_the_deadline_although_no_single_read_is_late(farm: WebFarm) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match="timeout"):
        fetch(farm.url("slowbody/1"), timeout=30, deadline_s=1.0)
    assert 0.9 < time.monotonic() - started < 15


def test_dead_hosts() -> None:
    with pytest.raises(FetchError, match="^connection: "):
        fetch("http://127.0.0.1:1/x.jpg")
    with pytest.raises(FetchError, match="^dns: "):
        fetch("http://nowhere.invalid/x.jpg")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_other_schemes_are_not_spoken(url: str) -> None:
    with pytest.raises(FetchError):
        fetch(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(FetchError, match="private_address"):
        check_address(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    check_address(address)


def test_loopback_is_refused_by_default_before_a_connection_is_made(farm: WebFarm) -> None:
    with pytest.raises(FetchError, match=r"private_address: 127\.0\.0\.1"):
        fetch(farm.url("ok/private"), allowed_networks=())
    with pytest.raises(FetchError, match="private_address"):
        fetch(farm.url("ok/private").replace("127.0.0.1", "localhost"), allowed_networks=())
    with pytest.raises(FetchError, match="private_address"):
        fetch(farm.url("ok/private").replace("127.0.0.1", "2130706433"), allowed_networks=())
    assert farm.requests["ok/private"] == 0


def test_a_name_is_resolved_once(farm: WebFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one connected to: a second answer of the name server is never asked for."""
    port = int(farm.url("").rsplit(":", 1)[1].strip("/"))
    asked = []

    def resolve(host: str, *args: object, **options: object) -> list:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetch(f"http://rebind.example:{port}/ok/4") == encoded(draw(4))
    assert asked == ["rebind.example"]


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: mixed)
    with pytest.raises(FetchError, match=r"private_address: 10\.0\.0\.1"):
        fetch("http://mixed.example/x", allowed_networks=())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", f"{path}.crt"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the openssl program")
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


def test_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drip is cut within TLS too, and a certificate nobody vouches for is refused."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for body in (b"", b"picture", b"pic"):
            plain, _ = listener.accept()
            plain.settimeout(5)
            try:
                with server_context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n" + body)
                    if body == b"pic":
                        secure.recv(1)
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"https://localhost:{listener.getsockname()[1]}/x.jpg"
    loopback = (*LOOPBACK, ipaddress.ip_network("::1/128"))
    with pytest.raises(FetchError, match="^tls: "):
        fetch(url, allowed_networks=loopback)
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    assert fetch(url, allowed_networks=loopback) == b"picture"
    with pytest.raises(FetchError, match="^timeout: "):
        fetch(url, allowed_networks=loopback, timeout=1.0, deadline_s=2.0)
    thread.join()
    listener.close()


def test_a_failing_host_rests_longer_each_time(farm: WebFarm) -> None:
    guarded = opener(backoff_s=0.2)
    taken = []
    for path in ("error/9", "error/9", "error/9", "ok/9.jpg", "ok/9.jpg", "missing/9", "ok/9.jpg"):
        started = time.monotonic()
        try:
            with guarded.open(farm.url(path), timeout=30) as body:
                body.read()
        except FetchError as error:
            assert error.cause in ("http_500", "http_404")
        taken.append(time.monotonic() - started)
    # Lower bounds only: how long a busy machine takes beyond the rest says nothing.
    assert taken[1] > 0.19 and taken[2] > 0.38 and taken[3] > 0.78
    assert guarded._gate._in_a_row == {}


def test_a_server_that_says_when_is_believed(farm: WebFarm) -> None:
    guarded = opener(backoff_s=0.01)
    with pytest.raises(FetchError, match="http_429"):
        guarded.open(farm.url("busy/9"), timeout=30)
    started = time.monotonic()
    guarded.open(farm.url("ok/9.jpg"), timeout=30).read()
    assert time.monotonic() - started > 0.9


def test_nobody_waits_for_a_host_that_rests_too_long(farm: WebFarm) -> None:
    guarded = opener(backoff_s=60.0, deadline_s=5.0)
    guarded._gate._free_at["127.0.0.1:1"] = time.monotonic() + 30
    started = time.monotonic()
    with pytest.raises(FetchError, match="^backoff: "):
        guarded.open("http://127.0.0.1:1/x.jpg", timeout=30)
    assert time.monotonic() - started < 4


def test_every_cause_is_explained() -> None:
    assert cause_of(OPT_OUT_MESSAGE) == "opt_out"
    assert cause_of("http_503: Service Unavailable") == "http_503"
    assert cause_of("something new") == "other"
    assert all(explanation for explanation in CAUSES.values())


# Pictures


@pytest.fixture(scope="module")
def resizer() -> PictureResizer:
    return PictureResizer(
        most_pixels=2_000_000,
        smallest_side=16,
        largest_aspect_ratio=20,
        image_size=48,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
    )


def resized(resizer: PictureResizer, content: bytes) -> tuple[Image.Image | None, str | None]:
    encoded_picture, width, height, _, _, error = resizer(io.BytesIO(content))
    if error is not None:
        return None, error
    picture = Image.open(io.BytesIO(encoded_picture))
    assert picture.format == "JPEG" and picture.size == (width, height)
    return picture, None


def looks_like(picture: Image.Image | None, original: Image.Image) -> bool:
    assert picture is not None
    wanted = np.asarray(original.convert("RGB").resize(picture.size), np.float32)
    return float(np.abs(np.asarray(picture.convert("RGB"), np.float32) - wanted).mean()) < 12


@pytest.mark.parametrize("path", ["ok/5", "png/5", "webp/5", "gif/5", "cmyk/5", "wrongtype/5"])
def test_kinds_of_pictures(farm: WebFarm, resizer: PictureResizer, path: str) -> None:
    picture, _ = resized(resizer, fetch(farm.url(path)))
    assert picture is not None and picture.size == (72, 48)
    assert looks_like(picture, draw(5))


def test_grey_pictures_of_8_and_16_bits(farm: WebFarm, resizer: PictureResizer) -> None:
    for path in ("grey/5", "deeppng/5"):
        picture, _ = resized(resizer, fetch(farm.url(path)))
        assert looks_like(picture, draw(5).convert("L"))


def test_a_rotated_picture_is_put_upright(farm: WebFarm, resizer: PictureResizer) -> None:
    picture, _ = resized(resizer, fetch(farm.url("rotated/5")))
    assert picture is not None and picture.size == (48, 72)
    assert looks_like(picture, draw(5, (64, 96)))


def test_transparency_becomes_white(farm: WebFarm, resizer: PictureResizer) -> None:
    picture, _ = resized(resizer, fetch(farm.url("clearpng/5")))
    assert looks_like(picture, Image.new("RGB", (96, 64), "white"))


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("text/1", "not_an_image"),
        ("corrupt/1", "not_an_image"),
        ("unannounced/1", "truncated"),
        ("bomb/1", "too_many_pixels"),
        ("tiny/1", "too_small"),
        ("strip/1", "aspect_ratio"),
    ],
)
def test_pictures_that_are_refused(farm: WebFarm, resizer: PictureResizer, path: str, cause: str) -> None:
    content = fetch(farm.url(path))
    started = time.monotonic()
    _, error = resized(resizer, content)
    assert error is not None and cause_of(error) == cause
    assert time.monotonic() - started < 2


# The quick look at a JPEG's header


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"comment": b"x" * 300}, {"icc_profile": b"x" * 100_000}, {"dpi": (72, 72)}],
    ids=["plain", "progressive", "comment", "profile", "dpi"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_plain_jpeg_is_measured_without_pillow(mode: str, options: dict) -> None:
    content = encoded(draw(1, (97, 61)).convert(mode), **options)
    assert picture._size_of_plain_jpeg(content) == (97, 61)
    for end in range(0, 40):
        assert picture._size_of_plain_jpeg(content[:end]) is None


def test_what_needs_a_closer_look_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (encoded(draw(1), exif=exif), encoded(draw(1), "PNG"), b"\xff\xd8\xff\xda" + b"x" * 50, b""):
        assert picture._size_of_plain_jpeg(content) is None


@given(st.binary(max_size=40))
def test_no_bytes_upset_the_quick_look(tail: bytes) -> None:
    size = picture._size_of_plain_jpeg(b"\xff\xd8\xff" + tail)
    assert size is None or len(size) == 2
