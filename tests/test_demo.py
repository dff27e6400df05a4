"""The page in a real browser: upload, type, see the mask change; and what it refuses."""

import asyncio
import base64
import http.client
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import RGB, install, write_run
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from pacl_scale.demo.command import DemoConfig, free_port, is_loopback, open_studio
from pacl_scale.demo.guard import Guard, hosts_for
from pacl_scale.demo.studio import drawn, words_in
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay

CHROMIUM = shutil.which("chromium") or ""
WAIT = 20_000
"""Milliseconds that the browser waits for anything."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and pictures: red above blue, one that is none, one that is too large."""
    root = tmp_path_factory.mktemp("demo")
    write_run(root / "run")
    (root / "examples").mkdir()
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32], pixels[32:] = RGB["red"], RGB["blue"]
    Image.fromarray(pixels).save(root / "two.png")
    Image.new("RGB", (64, 64), RGB["green"]).save(root / "examples" / "meadow.png")
    (root / "fake.png").write_text("no picture")
    Image.new("1", (1500, 1500)).save(root / "large.png")
    Image.new("RGB", (1, 9000)).save(root / "strip.png")
    return root


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """The page of a server process, ended by its own id."""
    words = [str(place / "run"), "port=0", "megapixels=2", "upload_mb=1", f"examples={place / 'examples'}"]
    command = [sys.executable, str(Path(__file__).with_name("demo_server.py")), *words]
    # NiceGUI behaves otherwise where it sees a test around it.
    around = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NICEGUI_"))}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, cwd=place, env=around, **pipes)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + server.stdout.read()
        yield found.group()
    finally:
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=30)
    assert "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page, newly opened; nothing is asked of any other address, and no script complains."""
    asked: list[str] = []
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.get_by_text("No picture yet").wait_for()
    yield page
    page.close()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:", "ws://127."))]
    assert asked and not elsewhere and not complaints


def shown(page: Page) -> np.ndarray:
    """The pixels on the stage."""
    url = page.locator(".stage img").get_attribute("src") or ""
    content = base64.b64decode(url.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content))).astype(int) if content else np.zeros((1, 1, 3), int)


def until_changed(page: Page, before: np.ndarray) -> np.ndarray:
    """The stage's pixels once they differ from ``before``."""
    end = time.monotonic() + WAIT / 1000
    while time.monotonic() < end:
        now = shown(page)
        if now.shape != before.shape or np.abs(now - before).max() > 30:
            return now
        page.wait_for_timeout(50)
    raise AssertionError("the picture did not change")


def field_of(page: Page, label: str) -> Locator:
    return page.get_by_label(label)


def ask(page: Page, words: str, rest: str = "") -> None:
    field_of(page, "Words for the rest").fill(rest)
    field_of(page, "Words, separated by commas").fill(words)
    field_of(page, "Words, separated by commas").press("Enter")


def hold(page: Page, slider: str, key: str, times: int) -> None:
    """Press a key on a slider; Quasar's takes keys on its track."""
    page.get_by_role("slider", name=slider).locator("[tabindex='0']").focus()
    for _ in range(times):
        page.keyboard.press(key)
        page.wait_for_timeout(20)


def mixed(picture: str, number: int, share: float = 0.55) -> list[float]:
    """A colour of the picture under the colour of word ``number``."""
    return [p * (1 - share) + c * share for p, c in zip(RGB[picture], overlay.COLOURS[number], strict=True)]


@pytest.mark.slow
def test_upload_type_and_see_the_mask_change(page: Page, place: Path) -> None:
    ask(page, "red, blue")
    page.set_input_files("input[type=file]", place / "two.png")
    page.get_by_text("blue 50.0 %").wait_for()
    first = shown(page)
    assert first.shape == (64, 96, 3)
    np.testing.assert_allclose(first[8, 90], mixed("red", 0), atol=12)
    np.testing.assert_allclose(first[56, 90], mixed("blue", 1), atol=12)

    ask(page, "blue, green, red")
    page.get_by_text("green 0.0 %").wait_for()
    second = until_changed(page, first)
    np.testing.assert_allclose(second[8, 90], mixed("red", 2), atol=12)
    np.testing.assert_allclose(second[56, 90], mixed("blue", 0), atol=12)

    ask(page, "red", rest="blue")
    page.get_by_text("red 50.0 %").wait_for()
    third = until_changed(page, second)
    np.testing.assert_allclose(third[56, 90], RGB["blue"], atol=12, err_msg="what the rest wins has no colour")


@pytest.mark.slow
def test_hover_tells_every_words_score(page: Page, place: Path) -> None:
    ask(page, "red, blue")
    page.set_input_files("input[type=file]", place / "two.png")
    page.get_by_text("red 50.0 %").wait_for()
    box = page.locator(".stage img").bounding_box()
    assert box is not None
    for share, first in ((0.1, "red"), (0.9, "blue")):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * share)
        page.get_by_text(re.compile(rf"^Here: {first} 0\.\d\d, ")).wait_for()
    # The keyboard moves the place too, and a ring shows where it is.
    page.get_by_role("application").focus()
    for _ in range(16):
        page.keyboard.press("ArrowUp")
    page.get_by_text(re.compile(r"^Here: red 0\.\d\d, ")).wait_for()
    page.locator(".stage svg circle").nth(1).wait_for()
    for _ in range(16):
        page.keyboard.press("ArrowDown")
    page.get_by_text(re.compile(r"^Here: blue 0\.\d\d, ")).wait_for()
    # Other words are told where the pointer is, without its being moved.
    ask(page, "green, blue")
    page.get_by_text(re.compile(r"^Here: blue 0\.\d\d, green -0\.\d\d$")).wait_for()


@pytest.mark.slow
def test_sliders_and_heat_maps_answer_the_keyboard(page: Page, place: Path) -> None:
    ask(page, "red, blue")
    page.set_input_files("input[type=file]", place / "two.png")
    page.get_by_text("blue 50.0 %").wait_for()
    before = shown(page)
    hold(page, "Opacity of the colours", "PageUp", 5)
    after = until_changed(page, before)
    assert np.abs(after[56, 90] - overlay.COLOURS[1]).sum() < np.abs(before[56, 90] - overlay.COLOURS[1]).sum() - 20
    hold(page, "Leave out below this cosine", "PageUp", 12)
    page.get_by_text("blue 0.0 %").wait_for()
    hold(page, "Leave out below this cosine", "PageDown", 12)
    page.get_by_text("blue 50.0 %").wait_for()

    masks = shown(page)
    page.get_by_role("combobox", name="Show").press("ArrowDown")
    page.get_by_role("option", name="blue").click()
    heat = until_changed(page, masks)
    assert heat[56, 90].sum() > heat[8, 90].sum() + 100, "blue is bright where blue is"


@pytest.mark.slow
def test_bad_uploads_get_a_sentence_and_do_no_harm(page: Page, place: Path) -> None:
    for name, sentence in (
        *(("fake.png", "is not a picture"), ("large.png", "more than 2 million pixels")),
        ("strip.png", "more than 16 times longer than wide"),
    ):
        page.set_input_files("input[type=file]", place / name)
        page.get_by_role("alert").filter(has_text=f"{name}").filter(has_text=sentence).wait_for()
    ask(page, "red, red , blue")
    page.set_input_files("input[type=file]", place / "two.png")
    page.get_by_text("blue 50.0 %").wait_for()
    ask(page, "red", rest="red")
    page.get_by_text("is there twice").wait_for()
    ask(page, "green")
    page.get_by_text("One word alone gets every pixel").wait_for()
    page.get_by_role("button", name="Example meadow").click()
    page.get_by_text("green 100.0 %").wait_for()


@pytest.mark.slow
def test_a_phone_in_the_dark_shows_all_of_it(browser: Browser, address: str) -> None:
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(address)
    phone.get_by_text("No picture yet").wait_for()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    colour = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 60
    phone.close()


def test_large_bodies_and_other_host_names_are_refused(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")

    def status(method: str, path: str, body: object = None, **headers: str) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        try:
            connection.request(method, path, body, headers)  # type: ignore[arg-type]
            answer = connection.getresponse()
            if answer.status == 200:
                assert "default-src 'self'" in (answer.getheader("content-security-policy") or "")
            return answer.status
        finally:
            connection.close()

    assert status("GET", "/") == 200
    assert status("GET", "/", Host="elsewhere.example") == 400
    assert status("POST", "/_nicegui/client/x/upload/1", b"x" * (2 << 20)) == 413


def test_a_body_without_a_length_is_counted_while_it_arrives() -> None:
    taken: list[int] = []

    async def reads_all(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["more_body"]:
            taken.append(len(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def statuses(pieces: int) -> list[int]:
        waiting = [{"type": "http.request", "body": b"x" * 600, "more_body": n < pieces} for n in range(pieces + 1)]
        said: list[dict[str, Any]] = []

        async def receive() -> Any:
            return waiting.pop(0)

        async def send(message: Any) -> None:
            said.append(message)

        await Guard(reads_all, 1000)({"type": "http", "headers": []}, receive, send)
        return [message["status"] for message in said if "status" in message]

    def finished(coroutine: Any) -> Any:
        # Nothing here waits for anything; the browser's own event loop is running in this thread.
        with pytest.raises(StopIteration) as end:
            coroutine.send(None)
        return end.value.value

    assert finished(statuses(0)) == [200]
    assert finished(statuses(50)) == [413] and sum(taken) <= 1000


def test_what_fails_is_said_and_what_was_overtaken_says_nothing() -> None:
    class Part:
        """A part of the page that remembers what it was told."""

        text, visible = "", False

        def set_text(self, text: str) -> None:
            self.text = text

        def set_visibility(self, visible: bool) -> None:
            self.visible = visible

    def work(what: str) -> str:
        gates[what].wait(20)
        if what == "fails":
            raise MemoryError
        if what == "mistake":
            raise UserError("no picture")
        return what

    async def several() -> list[Any]:
        first = asyncio.ensure_future(visit._latest(work, "mistake"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(visit._latest(work, "second"))
        await asyncio.sleep(0)
        gates["mistake"].set()
        found = [await first, visit.parts["busy"].visible, visit.parts["complaint"].text]
        gates["second"].set()
        found += [await second, visit.parts["busy"].visible]
        gates["fails"].set()
        return [*found, await visit._latest(work, "fails"), visit.parts["complaint"].text]

    from pacl_scale.demo.page import Visit

    gates = {what: threading.Event() for what in ("mistake", "second", "fails")}
    visit = Visit(None, parts={"busy": Part(), "complaint": Part()})  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        # The browser's own event loop is running in this thread.
        found = pool.submit(asyncio.run, several()).result(60)
    assert found[:3] == [None, True, ""], "the later request is still at work, and the earlier one's mistake is old"
    assert found[3:5] == ["second", False]
    assert found[5] is None and "MemoryError" in found[6]


def test_a_taken_port_and_wrong_settings_end_in_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken, pytest.raises(UserError, match="choose another port"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free_port("127.0.0.1", taken.getsockname()[1])
    install(monkeypatch)
    for settings, complaint in (
        (DemoConfig(examples=str(place / "absent")), "no such folder"),
        (DemoConfig(examples=str(place / "run")), "has no picture"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_studio(settings, str(place / "run"))
    with pytest.raises(ValueError, match="port"):
        DemoConfig(port=70000)
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("0.0.0.0")
    assert hosts_for("0.0.0.0") == ["*"] and "*" not in hosts_for("127.0.0.1")
    assert hosts_for("127.0.0.2") == [*hosts_for("localhost")[:3], "127.0.0.2"], "loopback too: others stay refused"
    assert "[::1]" in hosts_for("::1") and "*" not in hosts_for("::1")


def test_examples_are_those_of_the_runs_evaluation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert open_studio(DemoConfig(), str(place / "run")).examples == []
    folder = place / "run" / "evals" / "blocks-whole-examples"
    folder.mkdir(parents=True)
    shutil.copy(place / "two.png", folder / "00-best.jpg")
    studio = open_studio(DemoConfig(), str(place / "run"))
    assert [path.name for path in studio.examples] == ["00-best.jpg"]
    sheet = studio.open((place / "two.png").read_bytes(), "two.png")
    answer = studio.look(sheet, ["red", "blue"], [])
    assert answer.at(5, 5)[0][0] == "red" and answer.at(5, 60)[0][0] == "blue" and answer.at(96, 5) == []
    assert np.asarray(drawn(sheet, None, -1, 0.5, None)).tolist() == np.asarray(sheet.picture).tolist()
    with pytest.raises(UserError, match="at most"):
        studio.look(sheet, [f"word{n}" for n in range(61)], [])
    assert words_in(" a, b ,,a , c d") == ["a", "b", "c d"]
