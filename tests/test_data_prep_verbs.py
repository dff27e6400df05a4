"""The stages as commands of their own, and the account they leave: a small data set is walked through all of them."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from web_farm import WebFarm

from data_prep import layout, retry
from data_prep.download import main
from data_prep.prepare import read_plan
from data_prep.survey import domain_of
from pacl_scale.data.index import SampleIndex

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "configs/data/demo.yaml")
KINDS = ["ok"] * 14 + ["missing", "error", "heals", "noai"]


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        yield running


@pytest.fixture(scope="module")
def finished(farm: WebFarm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three shards that is done; tests work on copies."""
    folder = tmp_path_factory.mktemp("verbs")
    rows = [f"a dog, number {n}\t{farm.url(f'{kind}/{n}.jpg')}\n" for n, kind in enumerate(KINDS)]
    (folder / "pairs.tsv").write_text("".join(rows))
    words = [f"url_list={folder / 'pairs.tsv'}", "prepare.samples_per_shard=6", "prepare.nouns=false"]
    assert main(["--config", DEMO, *words, f"output={folder / 'set'}"]) == 0
    (folder / "pairs.tsv").unlink()
    return folder / "set"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "set"))


def run(verb: str, place: Path, *more: str) -> int:
    """A verb needs neither the list nor the settings that the shards were made with, but those of its own downloads."""
    return main([verb, "--config", DEMO, f"output={place}", *more])


def report_of(place: Path) -> dict:
    return json.loads((place / "report.json").read_text())


def stamps(place: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """Counts opened and closed tags, keeps what is loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elsewhere: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.elsewhere += [
            v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith(("#", "data:"))
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_account_in_figures_and_for_reading(finished: Path) -> None:
    report = report_of(finished)
    assert (report["list_rows"], report["expected"], report["got"], report["pending"]) == (18, 18, 14, 0)
    survey = report["survey"]
    (host,) = survey["by_host"]
    assert (host["rows"], host["got"], host["causes"]) == (18, 14, {"http_500": 2, "http_404": 1, "opt_out": 1})
    assert (survey["domains"], survey["by_domain"][0]["domain"], survey["by_domain"][0]["got"]) == (1, "127.0.0.1", 14)
    assert survey["shorter_side"]["counts"] == [0, 14, 0, 0, 0, 0, 0, 0, 0, 0]  # 96 x 64
    assert survey["aspect"]["counts"][7] == 14 and sum(survey["aspect"]["counts"]) == 14
    assert survey["caption_length"]["counts"] == [0, 14, *[0] * 8]
    page = Page((finished / "report.html").read_text())
    assert not page.open and not page.elsewhere
    for words in ("14 samples of 18 that were expected", "http_404", "not found", "77.8 %", report["list_sha256"]):
        assert words in page.text


def test_domains_of_hosts() -> None:
    hosts = [
        "a.example.org",
        "example.org:8080",
        "b.a.example.co.uk",
        "co.uk",
        "farm5.static.flickr.com",
        "10.0.0.1:80",
    ]
    domains = ["example.org", "example.org", "example.co.uk", "co.uk", "flickr.com", "10.0.0.1"]
    assert [domain_of(host) for host in hosts] == domains
    assert domain_of("[::1]:80") == "[::1]:80" and domain_of("localhost") == "localhost"


def test_captions_of_strangers_are_escaped() -> None:
    from data_prep.page import as_page
    from data_prep.report import Report

    host = {"host": "<script>alert(1)</script>", "rows": 1, "got": 1, "causes": {}}
    survey = {"hosts": 1, "hosts_without_success": 0, "by_host": [host]}
    report = Report("pairs", "<b>", "a" * 64, None, None, 1, {}, 1, 1, {}, 0, 0, 1, 10, 1, survey=survey)
    page = as_page(report)
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page


@pytest.mark.slow
def test_verbs_are_idempotent_and_need_no_list(copy: Path, farm: WebFarm, capsys: pytest.CaptureFixture[str]) -> None:
    before, asked = stamps(copy), farm.requests.total()
    assert run("verify", copy) == 0
    assert "3 of 3 shards are sound, 14 samples" in capsys.readouterr().out
    assert run("index", copy) == 0
    assert "14 samples of 3 shards indexed" in capsys.readouterr().out
    assert stamps(copy) == before
    assert run("report", copy) == 0
    changed = {path for path, when in stamps(copy).items() if before.get(path) != when}
    assert changed <= {str(copy / name) for name in ("report.json", "report.html")}
    assert farm.requests.total() == asked


@pytest.mark.slow
def test_verify_sets_damaged_shards_aside_and_what_is_left_is_told(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "00001.tar").write_bytes((copy / "00001.tar").read_bytes()[:3000])
    assert run("verify", copy) == 1
    assert "damaged and set aside in broken/: 00001.tar" in capsys.readouterr().err
    assert (copy / "broken" / "00001.tar").stat().st_size == 3000
    assert [shard.name for shard in SampleIndex.load(str(copy)).shards] == ["00000.tar", "00002.tar"]
    assert run("verify", copy) == 0
    assert "1 are not made yet" in capsys.readouterr().out
    assert run("report", copy) == 0
    report = report_of(copy)
    assert (report["expected"], report["got"], report["pending"], report["samples"]) == (18, 8, 6, 8)
    (copy / "index.parquet").unlink()
    assert run("index", copy) == 0 and len(SampleIndex.load(str(copy))) == 8


@pytest.mark.slow
def test_retry_asks_for_what_may_pass_and_a_remade_shard_does_not_ask_again(copy: Path, farm: WebFarm) -> None:
    """After a retry, a first shard that is damaged and made again must not bring the same picture a second time."""
    healed = "heals/16.jpg"
    assert farm.requests[healed] == 1
    # The round is planned first, then made by runs on parts: the second has something to do, and is the last.
    assert run("prepare", copy, "again=true") == 0
    words = ["prepare.samples_per_shard=6", "prepare.nouns=false", "retry.backoff_seconds=0.05", "parts=2"]
    for part in (0, 1):
        assert main(["--config", DEMO, f"output={copy}", *words, f"part={part}"]) == 0
    report = report_of(copy)
    assert (report["got"], report["retried"]) == (15, 2)
    assert report["failures"] == {"http_404": 1, "http_500": 1, "opt_out": 1}
    plan = read_plan(str(copy))
    assert retry.retried_later(str(copy), plan, retry.read_rounds(str(copy)), 3) == frozenset()
    (copy / "00002.tar").write_bytes(b"damaged")
    assert run("verify", copy) == 1
    asked = farm.requests[healed]
    assert run("retry", copy, "retry.causes=[timeout]") == 0
    assert farm.requests[healed] == asked and not (copy / "00004.tar").exists()
    again = report_of(copy)
    assert (again["got"], again["failures"], again["pending"]) == (15, report["failures"], 0)
    keys = SampleIndex.load(str(copy)).key
    assert len(set(keys.tolist())) == len(keys) == 15


@pytest.mark.slow
def test_pictures_of_another_kind_do_not_join(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout.remove_shard(str(copy), 0)
    assert run("retry", copy, "fetch.image_size=64") == 2
    assert "holds pictures made with fetch.image_size=224" in capsys.readouterr().err


def test_files_of_others_are_no_shards(copy: Path) -> None:
    (copy / "x_stats.json").write_text("{}")
    assert run("index", copy) == 0


def test_settings_that_a_verb_would_ignore(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, word in (("index", "again=true"), ("report", "verify=all"), ("index", "verify=all")):
        assert run(verb, copy, word) == 2
        assert word.partition("=")[0] in capsys.readouterr().err


def test_a_retry_of_an_unfinished_set_is_not_queued(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout.remove_shard(str(copy), 1)
    assert run("retry", copy, "--slurm") == 2
    assert "1 shards are not made yet" in capsys.readouterr().err


def test_scratch_that_cannot_be_used(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout.remove_shard(str(copy), 1)
    (tmp_path / "file").touch()
    assert run("retry", copy, f"fetch.scratch={tmp_path / 'file'}") == 2
    assert "fetch.scratch: " in capsys.readouterr().err


def test_verbs_without_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("verify", "index", "report", "retry"):
        assert run(verb, tmp_path) == 2
        assert "there is no list/plan.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# What the list must be


def test_only_the_expected_list_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.tsv").write_text("a dog\thttp://h/1\na cat\thttp://h/2\n")
    words = ["prepare", f"url_list={tmp_path / 'list.tsv'}", f"output={tmp_path / 'out'}", "prepare.nouns=false"]
    for expected, reason in ((f"sha256={'0' * 64}", "is not the expected file"), ("rows=3", "has 2 rows where")):
        assert main([*words, f"expect.{expected}"]) == 2
        assert reason in capsys.readouterr().err
        assert not list(tmp_path.glob("out/**/*.*"))
    digest = hashlib.sha256((tmp_path / "list.tsv").read_bytes()).hexdigest()
    assert main([*words, f"expect.sha256={digest.upper()}", "expect.rows=2"]) == 0
    assert "2 rows in 1 shards, 1 to be made" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/list/plan.json").read_text())["list_sha256"] == digest
