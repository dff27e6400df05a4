"""The page: complete in itself, true to the rows, harmless whatever words the data holds."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import pytest
from colours import install as install_towers
from colours import write_captions, write_pictures, write_run
from playwright.sync_api import sync_playwright

from pacl_scale.errors import UserError, run_command
from pacl_scale.evaluate import main as evaluate
from pacl_scale.evaluate.rows import read_rows
from pacl_scale.report import main, write_report
from pacl_scale.report.wording import duration, percent

HOSTILE = "<script>alert(1)</script>"
VOID_TAGS = {"meta", "link", "img", "input", "br", "path", "use"}


class Page(HTMLParser):
    """Text, links and structure of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.pictures_without_words: list[dict] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [values[key] for key in ("src", "href", "data", "action") if values.get(key)]
        if values.get("role") == "img" and not values.get("aria-label"):
            self.pictures_without_words.append(values)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID_TAGS or self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += f" {data}"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with rows, examples, a hostile class word, and curves."""
    install_towers(monkeypatch)
    data = write_pictures(tmp_path / "data", count=6)
    classes = data / "classes.yaml"
    classes.write_text(classes.read_text().replace("1: red", f"1: ['red {HOSTILE}', red]", 1))
    captions = write_captions(tmp_path / "captions")
    run = write_run(tmp_path / "run")
    write_run(tmp_path / "mean", right=False)
    evaluate(
        [
            f"--checkpoint={run}",
            f"methods.mean_pooled={tmp_path / 'mean'}",
            f'--segmentation={{"blocks": {{"root": "{data}"}}}}',
            f'--retrieval={{"texts": {{"csv": "{captions}"}}}}',
            "examples=1",
            "threads=1",
        ]
    )
    for name in ("run", "mean"):
        lines = [json.dumps({"step": step, "loss": 4.85 - step / 100, "lr": 1e-3}) for step in range(1, 61)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 61, "lo']))
        (tmp_path / name / "config.yaml").write_text("global_batch_size: 128\nsteps: 60\nseed: 3\n")
    return run


def whole_page(run: Path) -> str:
    output = write_report(
        str(run / "report.html"),
        evaluated=str(run),
        runs={"pacl": str(run), "mean_pooled": str(run.parent / "mean")},
        preparation={"expected": 1200, "got": 900, "failures": {"HTTP 404": 290, HOSTILE: 10}, "shards": 3},
        seconds={"draw": 3.25, "train": 125.0},
    )
    return Path(output).read_text()


def test_page_says_what_the_rows_say(run: Path) -> None:
    page = Page(whole_page(run))
    assert not page.open, "every element is closed"
    for row in read_rows(str(run)):
        figures = [row.scores["miou"], row.scores["pixel_accuracy"]] if row.task == "segmentation" else []
        assert all(percent(figure) in page.text for figure in figures)
    for text in ("Mean-pooled", "Untrained", "Patch oracle", "blocks", "900", "1,200", "290", "2 min 5 s", "2 min 8 s"):
        assert text in page.text
    assert "4.84 to 4.25 in 7,680 samples" in page.text
    assert "crimson for red" in page.text
    assert "60 steps of 128 pairs, seed 3" in page.text


def test_page_shows_intervals_and_what_is_taken_for_what(run: Path) -> None:
    page = Page(whole_page(run))
    text = " ".join(page.text.split())
    for row in read_rows(str(run)):
        if row.task == "segmentation":
            low, high = row.scores["intervals"]["miou"]
            assert f"{percent(low)} to {percent(high)}" in text
    swapped = run.parent / "mean"
    evaluate([f"--checkpoint={swapped}", f'--segmentation={{"blocks": {{"root": "{run.parent / "data"}"}}}}'])
    text = " ".join(Page(Path(write_report(str(swapped / "r.html"), str(swapped), {})).read_text()).text.split())
    pairs = text.split("Most often taken for another")[1].split(".")[0]
    assert "green as red <script>alert(1)</script>" in pairs and "blue as" not in pairs


def test_every_heading_says_the_protocol(run: Path) -> None:
    text = " ".join(Page(whole_page(run)).text.split())
    assert "Outlines: blocks, 6 pictures, protocol whole Protocol whole, short side 16, whole picture" in text
    assert "patches of 4 every 4, no background rule, 7 prompts a word (paper), bfloat16" in text
    assert "Protocol retrieval, short side 16" in text and "Protocol of texts: retrieval" in text
    assert "open_clip_torch" in text


def test_page_needs_nothing_from_anywhere(run: Path) -> None:
    html = whole_page(run)
    page = Page(html)
    inside = [address for address in page.addresses if address.startswith("#")]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert set(inside) <= {f"#{name}" for name in page.ids}, "every link on the page leads somewhere"
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!data:|#)", html) and "@import" not in html
    assert "default-src 'none'" in html
    # Only names of XML vocabularies look like addresses.
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_words_of_the_data_cannot_become_markup(run: Path) -> None:
    html = whole_page(run)
    assert HOSTILE not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("<script>") == 1


def test_pictures_are_described_for_those_who_do_not_see_them(run: Path) -> None:
    html = whole_page(run)
    page = Page(html)
    assert not page.pictures_without_words
    assert re.search(r'aria-label="Truth: [^"]*green \d+ %', html)
    assert html.count('class="example card"') == 3
    assert html.count('class="after"') == 3


def test_curve_follows_light_and_dark(run: Path) -> None:
    html = whole_page(run)
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--method-pacl" in svg and "var(--method-mean_pooled" in svg and "guessing" in svg
    assert not re.search(r"#0[1-3]0[1-3]", svg), "no marker colour is left"
    assert "prefers-color-scheme: dark" in html


def test_page_shows_where_each_word_fits(run: Path) -> None:
    html = whole_page(run)
    assert html.count("<details>") == 3 and "Where each word fits, by PACL" in html
    assert re.search(r'aria-label="How well “green” fits each part of \d.png"', html)


def test_page_shows_what_was_measured_while_it_trained(run: Path) -> None:
    lines = [
        {"step": step, "miou": step / 100, "image_to_text_R@1": 0.5, "text_to_image_R@1": step / 60}
        for step in (20, 40, 60)
    ]
    store = fsspec.filesystem("memory")
    for file, content in (
        ("validation.jsonl", "\n".join(json.dumps(line) for line in lines) + '\n{"step": 80, "mi'),
        ("metrics.jsonl", (run / "metrics.jsonl").read_text()),
        ("config.yaml", "global_batch_size: 128\nsteps: 60\nseed: 3\n"),
    ):
        store.pipe_file(f"/bucket/run/{file}", content.encode())
    (run / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = {"pacl": "memory://bucket/run", "mean_pooled": str(run)}
    html = Path(write_report(str(run / "r.html"), str(run), runs)).read_text()
    text = " ".join(Page(html).text.split())
    assert html.count("<svg") == 3 and "PACL, mIoU: 20.0 to 60.0 in 7,680 samples" in text
    assert "Mean-pooled, R@1 text to picture: 33.3 to 100.0 in 7,680 samples" in text
    assert "PACL: 4.84 to 4.25 in 7,680 samples" in text and "samples seen" in html
    (run / "config.yaml").unlink()
    text = Path(write_report(str(run / "r.html"), str(run), {"pacl": str(run)})).read_text()
    assert "in 60 steps" in text and "samples seen" not in text, "without the batch size samples cannot be counted"


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("examples.json", "{", "examples.json or a file beside it is damaged"),
        ("examples.json", '{"examples": [{"rank": "best"}]}', "examples.json or a file beside it is damaged"),
        ("00-best-pacl.png", "no picture", "examples.json or a file beside it is damaged"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "[1]", "config.yaml is no configuration"),
        ("report.json", "no JSON", "report.json is not JSON"),
        ("report.json", "[1, 2]", "no report of a data preparation"),
        ("report.json", '{"expected": "x", "got": 1}', "no report of a data preparation"),
    ],
)
def test_damaged_files_end_in_one_sentence(
    run: Path, file: str, content: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "report.json").write_text('{"expected": 2, "got": 1}')
    (damaged,) = [path for path in run.rglob(file)] or [run / file]
    damaged.write_text(content)
    assert run_command(lambda: main([str(run), f"preparation={run / 'report.json'}"])) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and complaint in said[0]


def test_names_of_runs_cannot_become_markup(run: Path) -> None:
    name = 'x"><script>alert(1)</script>'
    with pytest.raises(UserError, match="names of methods hold"):
        main([str(run), f"--runs={json.dumps({name: str(run)})}"])
    html = Path(write_report(str(run / "r.html"), str(run), {name: str(run)})).read_text()
    assert "<script>alert(1)" not in html


def test_published_figures_stand_beside_with_their_differences(run: Path) -> None:
    for path in (run / "evals").glob("blocks-*.json"):
        row = json.loads(path.read_text())
        row["data"] |= {"layout": "voc_20", "of": 1449}
        path.write_text(json.dumps(row))
    text = " ".join(Page(whole_page(run)).text.split())
    part = text.split("What others published on blocks")[1].split("Finding captions")[0]
    assert part.index("CorrCLIPv2-L") < part.index("NACLIP") < part.index("CLIP-DINOiser") < part.index("TCL")
    assert "MaskCLIP Zhou et al., ECCV 2022, as compared later mIoU 74.9" in part
    assert "6 of 1449 pictures here" in part and "refined with PAMR there" in part
    assert "size: 16 here, 448 there" in part and "not stated there" in part


FAINT_TEXT = """() => {
    const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const paperOf = element => {
        if (!element) return [255, 255, 255];
        const [r, g, b, alpha = 1] = parts(getComputedStyle(element).backgroundColor);
        if (alpha === 1) return [r, g, b];
        const below = paperOf(element.parentElement);
        return [r, g, b].map((c, i) => alpha * c + (1 - alpha) * below[i]);
    };
    const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, style = getComputedStyle(element);
        if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
        if (["SCRIPT", "STYLE"].includes(element.tagName)) continue;
        const ink = parts(element instanceof SVGElement ? style.fill : style.color);
        const [a, b] = [light(ink), light(paperOf(element))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) faint.push([walker.currentNode.textContent.trim().slice(0, 40), ratio, style.color]);
    }
    return faint;
}"""
"""Text whose contrast is below what WCAG 2 asks for at level AA."""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_page_in_a_browser_fits_and_answers_the_keyboard(run: Path, width: int, scheme: Any) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    whole_page(run)
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((run / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 60) == (scheme == "dark")
        assert page.evaluate(FAINT_TEXT) == []
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('summary')"):
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "where one is, is seen"
        page.keyboard.press("Enter")
        heat = page.locator(".heats").first
        heat.wait_for(state="visible")
        assert heat.locator("img").first.evaluate("picture => picture.naturalWidth") > 0
        page.get_by_label("Opacity of the masks").focus()
        page.keyboard.press("End")
        shown = page.locator(".panels .stage img").first.evaluate("picture => getComputedStyle(picture).opacity")
        assert float(shown) == 1
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert whole_page(run) == whole_page(run)


def test_page_without_curves_preparation_or_examples(run: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml"):
        (run / name).unlink()
    (examples,) = (run / "evals").glob("blocks-whole-*-examples")
    (examples / "examples.json").unlink()
    assert main([str(run), f"output={run / 'small.html'}"]) == 0
    page = Page((run / "small.html").read_text())
    assert not page.open
    assert "Training" not in page.text and "Missing" not in page.text and "Best" not in page.text


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation yet"):
        main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_numbers_as_readers_say_them() -> None:
    assert [duration(seconds) for seconds in (0.5, 12.4, 125, 3700)] == ["0.5 s", "12 s", "2 min 5 s", "1 h 1 min"]
    assert [percent(0.12345), percent(1.0, 0), percent(None)] == ["12.3", "100", "–"]
