"""The documentation as a site: built with every warning an error, whole without a network, and readable on a phone."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
LOADED = re.compile(r"""<(?:script|img|iframe|source|link)[^>]*?\s(?:src|href)="(https?:)?//""")
WIDEST_PHONE, DESK = 390, 1280


def build(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder), *more]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if not path:
        pytest.skip("there is no chromium here")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


def pages_of(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")


def open_page(browser: Browser, width: int, scheme: Any, asked: list[str]) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    page.on("request", lambda request: asked.append(request.url))
    return page


def test_every_page_of_the_navigation_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = pages_of(site)
    for page in ("index", "quickstart", "troubleshooting", "derivation", "contributing", "reference/method"):
        assert f"{page}.html" in pages
    for page in pages:
        assert not LOADED.search((site / page).read_text(encoding="utf-8")), page
    assert "softmax pooling of its patches" in (site / "reference" / "method.html").read_text(encoding="utf-8")


def test_a_link_to_a_heading_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """So that the build itself is what checks links: pages, headings, and files that are in no navigation."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[there](two.md#no-such-heading) [gone](gone.md)\n")
    (tmp_path / "docs" / "two.md").write_text("# Two\n")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    kept = {key: settings[key] for key in ("site_name", "strict", "validation")}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(kept | {"nav": ["index.md"]}))
    words = ["-m", "mkdocs", "build", "--config-file", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 1
    for said in ("no-such-heading", "gone.md", "two.md"):
        assert said in done.stderr


@pytest.mark.parametrize(("width", "scheme"), [(WIDEST_PHONE, "dark"), (DESK, "light")])
def test_no_page_scrolls_sideways_or_asks_another_host(
    browser: Browser, site: Path, address: str, width: int, scheme: str
) -> None:
    asked: list[str] = []
    page = open_page(browser, width, scheme, asked)
    for name in pages_of(site):
        page.goto(f"{address}/{name}", wait_until="load")
        inside, outside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert inside <= outside, f"{name} is {inside} pixels wide in a window of {outside}"
        dark = page.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
        assert dark == (scheme == "dark"), name
    page.context.close()
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(address).netloc}


def test_the_search_finds_a_word_without_a_network(browser: Browser, address: str) -> None:
    asked: list[str] = []
    page = open_page(browser, DESK, "light", asked)
    page.goto(f"{address}/index.html")
    page.locator("input.md-search__input").click()
    page.keyboard.type("checkpoints", delay=20)
    page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
    page.context.close()
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(address).netloc}
