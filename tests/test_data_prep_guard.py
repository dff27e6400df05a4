"""What the web may and may not do to a download, against a loopback farm that tries."""

import dataclasses
import ipaddress
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from web_farm import WebFarm, draw, encoded

import data_prep
from data_prep import guard
from data_prep.addresses import check_address
from data_prep.causes import CAUSES, FetchError, cause_of
from data_prep.guard import GuardedOpener, Limits
from data_prep.robots import opt_out

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


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
        "robot": "pacl-scale",
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
        ("cut/1", "truncated"),
        ("reset/1", "connection"),
        ("shyredirect/1", "opt_out"),
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
        "fec0::1",
        "2001:470:1:2:0:5efe:10.0.0.1",
        "2001:470:1:2:200:5efe:127.0.0.1",
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


def test_a_redirect_to_a_name_of_this_machine_is_refused(farm: WebFarm) -> None:
    """Loopback is allowed as 127.0.0.1 here, and the name leads to another address of it."""
    only = (ipaddress.ip_network("127.0.0.1/32"),)
    answers = {"localhost": "127.0.0.2"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket,
            "getaddrinfo",
            lambda host, port, **options: [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.get(host, host), port))
            ],
        )
        with pytest.raises(FetchError, match=r"private_address: 127\.0\.0\.2"):
            fetch(farm.url("toname/name.jpg"), allowed_networks=only)
        answers["localhost"] = "127.0.0.1"
        assert fetch(farm.url("toname/7.jpg"), allowed_networks=only) == encoded(draw(7))


def test_a_silent_name_server_does_not_hold_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(30) or [])
    started = time.monotonic()
    with pytest.raises(FetchError, match="^timeout: .*name server"):
        fetch("http://silent.example/x.jpg", deadline_s=0.3)
    over.set()
    assert time.monotonic() - started < 15


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


def guarded_host(farm: WebFarm) -> str:
    return farm.url("").split("/")[2]


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
    assert guarded._gate._rests == {guarded_host(farm): (0.0, 0)}


def test_a_server_that_says_when_is_believed(farm: WebFarm) -> None:
    guarded = opener(backoff_s=0.01)
    with pytest.raises(FetchError, match="http_429"):
        guarded.open(farm.url("busy/9"), timeout=30)
    started = time.monotonic()
    guarded.open(farm.url("ok/9.jpg"), timeout=30).read()
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("in an hour", 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("\u00b2", 0),
        ("soon", 0),
        ("9" * 400, 999_999_999),
    ],
)
def test_when_a_server_wants_to_be_asked_again(header: str, seconds: float) -> None:
    if header == "in an hour":
        header = formatdate(time.time() + 3600, usegmt=True)
    assert guard._seconds_of(header) == pytest.approx(seconds, abs=120)


def test_processes_tell_each_other_which_hosts_rest(tmp_path: Path, farm: WebFarm) -> None:
    rests = str(tmp_path / "hosts")
    with pytest.raises(FetchError, match="http_500"):
        fetch(farm.url("error/9"), backoff_s=60.0, rests=rests)
    with pytest.raises(FetchError, match="^backoff: "):
        fetch(farm.url("ok/10.jpg"), backoff_s=60.0, rests=rests, deadline_s=5.0)
    assert farm.requests["ok/10.jpg"] == 0
    assert len(list(tmp_path.glob("hosts/*"))) == 1


def test_nobody_waits_for_a_host_that_rests_too_long(farm: WebFarm) -> None:
    guarded = opener(backoff_s=60.0, deadline_s=5.0)
    guarded._gate._rests["127.0.0.1:1"] = (time.monotonic() + 30, 1)
    started = time.monotonic()
    with pytest.raises(FetchError, match="^backoff: "):
        guarded.open("http://127.0.0.1:1/x.jpg", timeout=30)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("header", "asks"),
    [
        ("noai", True),
        ("NoIndex, nofollow", True),
        ("none", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai", True),
        ("max-snippet: 5, noimageai", True),
        ("pacl-scale: noai", True),
        ("otherbot: nofollow, noai", False),
        ("otherbot: noai, pacl-scale: noindex", True),
        ("nofollow", False),
        ("", False),
        ("::,,:", False),
    ],
)
def test_robots_tags(header: str, asks: bool) -> None:
    assert (opt_out([header], "pacl-scale") is not None) == asks


def test_opt_outs_are_heeded_unless_told_otherwise(farm: WebFarm) -> None:
    for path in ("noai/1", "shyredirect/1"):
        with pytest.raises(FetchError, match="^opt_out: noai"):
            fetch(farm.url(path))
    assert fetch(farm.url("noai/4"), robot=None) == fetch(farm.url("shyredirect/4"), robot=None) == encoded(draw(4))


# Bytes held at a time


def test_bodies_wait_for_room_and_give_back_what_they_took(farm: WebFarm) -> None:
    guarded = opener(held_bytes=1 << 21)
    size = len(encoded(draw(7)))
    for path in ("ok/7.jpg", "unannounced/7"):
        with guarded.open(farm.url(path)) as body:
            assert body.read()
    assert guarded.budget.free == (1 << 21) - size - size // 2
    guarded.budget.give_back(size + size // 2)
    for path in ("endless/1", "announced/1", "cut/1", "empty/1", "reset/1"):
        with pytest.raises(FetchError), guarded.open(farm.url(path)) as body:
            body.read()
    assert guarded.budget.free == 1 << 21
    guarded.budget.take((1 << 21) - 10, ends=0.0)
    got: list[bytes] = []
    with guarded.open(farm.url("ok/7.jpg")) as body:
        waiting = threading.Thread(target=lambda: got.append(body.read()))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not got
        guarded.budget.give_back((1 << 21) - 10)
        waiting.join(10)
    assert len(got[0]) == size
    guarded.budget.take(guarded.budget.free, ends=0.0)
    guarded.limits = dataclasses.replace(guarded.limits, deadline_s=0.3)
    with pytest.raises(FetchError, match="^timeout: .*large bodies"), guarded.open(farm.url("ok/7.jpg")) as body:
        body.read()


def test_every_cause_is_explained() -> None:
    raised = set()
    for path in Path(data_prep.__file__).parent.glob("*.py"):
        raised |= set(re.findall(r'(?:FetchError\(|cause = |None, f)"([a-z_]+)(?=[":])', path.read_text()))
    assert raised >= {"dns", "decoder", "evaluation_picture", "opt_out", "too_many_pixels", "timeout", "retried"}
    assert raised <= set(CAUSES), "a cause that nothing explains"
    assert set(CAUSES) <= raised, "an explanation of what is never said"
    assert cause_of("http_503: Service Unavailable") == "http_503"
    assert cause_of("something new") == "other"
    assert all(explanation for explanation in CAUSES.values())
