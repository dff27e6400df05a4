"""Reading lists, cleaning their rows, and naming the things of captions."""

import bz2
import gzip
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import layout, prepare, sources
from data_prep.config import DownloadConfig
from data_prep.download import with_config_of_name
from data_prep.nouns import extract_nouns, merge_nouns
from data_prep.pack import PackConfig
from data_prep.prepare import PrepareConfig, normalise_caption, normalise_url, stable_id
from data_prep.sources import SOURCES, Row, read_rows
from pacl_scale.config import parse
from pacl_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAIRS = SOURCES["pairs"]
WITHOUT_NOUNS = PrepareConfig(samples_per_shard=4, nouns=False)


def test_tsv_layouts_differ(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("a dog\thttp://h/1\n")
    assert list(read_rows(str(path), SOURCES["cc3m"])) == [Row(url="http://h/1", caption="a dog")]
    path.write_text("http://h/1\ta dog\n")
    assert list(read_rows(str(path), SOURCES["cc12m"])) == [Row(url="http://h/1", caption="a dog")]


def test_tsv_survives_what_lists_hold(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv.gz"
    rows = [b'5" pipe "\thttp://h/1', b"no tab here", b"", b"a\xff\x85b\rc\thttp://h/2\r", b"a\tb\tc"]
    path.write_bytes(gzip.compress(b"\n".join(rows)))
    assert list(read_rows(str(path), PAIRS)) == [
        Row("http://h/1", '5" pipe "'),
        Row(None, None),
        Row("http://h/2", "a\ufffd\ufffdb\rc"),
        Row(None, None),
    ]


def test_csv_with_and_without_header(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('x,url,caption\n1,http://h/1,"a dog, a ""cat"""\n1,2\n')
    assert list(read_rows(str(path), PAIRS)) == [Row("http://h/1", 'a dog, a "cat"'), Row(None, None)]
    path.write_text("url,caption\nhttp://h/1,a dog\n", encoding="utf-8-sig")  # as spreadsheets do
    assert list(read_rows(str(path), PAIRS)) == [Row("http://h/1", "a dog")]
    path.write_text('"a dog",http://h/1\n')
    assert list(read_rows(str(path), PAIRS)) == [Row("http://h/1", "a dog")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"caption": ["a dog", None], "url": ["http://h/1", "http://h/2"]}), path)
    assert list(read_rows(str(path), PAIRS)) == [Row("http://h/1", "a dog"), Row("http://h/2", None)]


def yfcc_line(photo: int, title: str, description: str = "", marker: str = "0") -> str:
    fields = [str(photo * 2), str(photo), "hash", *["x"] * 5, title, description, *["x"] * 6]
    return "\t".join([*fields, f"http://farm/{photo}.jpg", *["x"] * 7, marker])


def test_yfcc_is_joined_with_its_metadata(tmp_path: Path) -> None:
    subset, metadata = tmp_path / "subset.tsv.bz2", tmp_path / "yfcc100m_dataset.bz2"
    subset.write_bytes(bz2.compress(b"".join(b"%d\t%d\tabc\n" % (n, n) for n in (5, 3, 8, 9, 11))))
    lines = [
        yfcc_line(3, "IMG_0520", "A+%3Cb%3Eblack%3C%2Fb%3E+dog%0Aon+grass"),
        yfcc_line(4, "not listed"),
        yfcc_line(5, "Two+cats", "word+" * 80),
        "a broken line",
        yfcc_line(8, "DSC00012.JPG"),
        yfcc_line(9, "a+film", marker="1"),
        yfcc_line(5, "a repeated line"),
    ]
    metadata.write_bytes(bz2.compress("\n".join(lines).encode()))
    rows = list(read_rows(str(subset), SOURCES["yfcc15m"], str(metadata)))
    assert rows[0] == Row("http://farm/3.jpg", "A black dog on grass")
    assert rows[1].caption is not None and rows[1].caption.startswith("Two cats. word word")
    assert len(rows[1].caption) <= 10 + 200 and rows[1].caption.endswith("word")
    assert rows[2:] == [
        Row("http://farm/8.jpg", ""),
        Row(None, None, "a video"),
        Row(None, None, "not in the metadata"),
    ]
    config = PrepareConfig(nouns=False)
    plan = prepare.prepare(str(subset), SOURCES["yfcc15m"], str(tmp_path / "out"), config, str(metadata))
    assert (plan.list_rows, plan.rows) == (5, 2)
    assert plan.left_out == {"caption too short": 1, "a video": 1, "not in the metadata": 1}


def test_a_list_that_is_not_yfcc(tmp_path: Path) -> None:
    (tmp_path / "subset.tsv").write_text("a dog\thttp://h/1\n")
    (tmp_path / "metadata").write_text("")
    for listed in ("a dog\thttp://h/1\n", "1\t\u00b2\tabc\n", f"1\t{'9' * 20}\tabc\n"):
        (tmp_path / "subset.tsv").write_text(listed)
        with pytest.raises(UserError, match="photo id"):
            list(read_rows(str(tmp_path / "subset.tsv"), SOURCES["yfcc15m"], str(tmp_path / "metadata")))
    (tmp_path / "subset.tsv").write_text("1\t5\tabc\n")
    (tmp_path / "metadata").write_text(yfcc_line(5, "a+dog").replace("\t5\t", f"\t{'9' * 20}\t"))
    rows = list(read_rows(str(tmp_path / "subset.tsv"), SOURCES["yfcc15m"], str(tmp_path / "metadata")))
    assert rows == [Row(None, None, "not in the metadata")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads(path: Path) -> None:
    if path.stem == "photos":
        words = ["--images", "x", "--captions", "x", "--output", "x"]
        assert parse(PackConfig, ["--config", str(path), *words], "pack").image_column == "image"
        return
    words = ["url_list=x.tsv", "output=x", *(["metadata=y"] if path.stem == "yfcc15m" else [])]
    config = parse(DownloadConfig, ["--config", str(path), *words], "download")
    assert config.source == ("pairs" if path.stem == "demo" else path.stem)
    assert config.expect.rows == sources.get(config.source).rows
    assert config.fetch.allowed_networks == (["127.0.0.0/8"] if path.stem == "demo" else [])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.tsv", None, "no such file"),
        ("list.doc", b"x", "must be a .tsv, .csv or .parquet"),
        ("list.parquet", b"no parquet at all", "cannot be read"),
        ("list.tsv.gz", b"not compressed", "cannot be read"),
        ("list.tsv.bz2", b"not compressed", "cannot be read"),
        ("damaged.tsv.gz", gzip.compress(b"a dog\thttp://h/1\n" * 999, mtime=0)[:20] + b"\xff" * 40, "cannot be read"),
        ("other.parquet", "table", "no column caption or url"),
    ],
)
def test_unreadable_lists_in_one_sentence(tmp_path: Path, name: str, content: object, words: str) -> None:
    path = tmp_path / name
    if content == "table":
        pq.write_table(pa.table({"x": [1]}), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_rows(str(path), PAIRS))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("http://h.org/a.jpg", "http://h.org/a.jpg"),
        (" HTTP://H.org:80/a b.jpg#part ", "http://h.org/a%20b.jpg"),
        ("https://h:443/é?q=ü&r=%20|", "https://h/%C3%A9?q=%C3%BC&r=%20%7C"),
        ("https://h:8443", "https://h:8443/"),
        ("//h/a.jpg", "http://h/a.jpg"),
        ("http://bücher.de/x", "http://xn--bcher-kva.de/x"),
        ("http://[2001:db8::1]/x", "http://[2001:db8::1]/x"),
    ],
)
def test_urls_are_normalised(raw: str, clean: str) -> None:
    assert normalise_url(raw) == clean
    assert normalise_url(clean) == clean


@pytest.mark.parametrize(
    "raw",
    [
        "ftp://h/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http:///a.jpg",
        "http://user:word@h/a.jpg",
        "http://h/a.jpg\r\nHost: other",
        "http://h:99999/",
        "http://a b/c",
        "h/a.jpg",
        "",
        "http://h/" + "a" * 5000,
    ],
)
def test_urls_that_must_not_be_asked_for(raw: str) -> None:
    assert normalise_url(raw) is None


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://h/", "//"]))
def test_a_normalised_url_is_plain_ascii_and_stays(text: str, start: str) -> None:
    clean = normalise_url(start + text)
    if clean is not None:
        assert clean.isascii() and clean.isprintable() and " " not in clean
        assert normalise_url(clean) == clean


@given(st.text(max_size=80))
def test_a_normalised_caption_is_one_line(text: str) -> None:
    clean = normalise_caption(text)
    assert "  " not in clean and clean == clean.strip() and "\n" not in clean and "\0" not in clean


def test_captions_are_normalised() -> None:
    assert normalise_caption(" <PERSON> &amp; a\u202e dog\t\x00 of Cafe\u0301 ") == "person & a dog of Café"


def test_ids_are_stable() -> None:
    assert stable_id("http://h/1") == 14139307617061598327


def _list_of(tmp_path: Path, rows: list[str]) -> str:
    path = tmp_path / "list.tsv"
    path.write_text("\n".join(rows))
    return str(path)


def test_every_row_ends_in_exactly_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "DEDUPLICATION_CHUNK_ROWS", 3)
    rows = [f"picture number {n}\thttp://h/{n}" for n in range(10)]
    rows += ["seen before\thttp://H/3", "seen\thttp://h/9", "x\thttp://h/20", "y" * 2000 + "\thttp://h/21"]
    rows += ["not http\tftp://h/1", "no tab"]
    plan = prepare.prepare(_list_of(tmp_path, rows), PAIRS, str(tmp_path / "out"), WITHOUT_NOUNS)
    assert plan.left_out == {
        "duplicate URL": 2,
        "caption too short": 1,
        "caption too long": 1,
        "unusable URL": 1,
        "malformed row": 1,
    }
    assert (plan.list_rows, plan.rows, plan.shards) == (16, 10, 3)
    tables = [pq.read_table(layout.list_url(str(tmp_path / "out"), shard)) for shard in range(3)]
    assert [table.num_rows for table in tables] == [4, 4, 2]
    whole = pa.concat_tables(tables)
    assert whole["url"].to_pylist() == [f"http://h/{n}" for n in range(10)]
    assert whole["id"].to_pylist() == [stable_id(f"http://h/{n}") for n in range(10)]


@given(st.lists(st.integers(0, 30), max_size=120))
def test_duplicates_keep_the_first_in_order(numbers: list[int]) -> None:
    from collections import Counter

    rows = [(stable_id(str(number)), str(number), f"caption {at}") for at, number in enumerate(numbers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DEDUPLICATION_CHUNK_ROWS", 7)
        left_out: Counter[str] = Counter()
        kept = list(prepare._without_duplicates(rows, left_out))
    firsts = {number: rows[at] for at, number in reversed(list(enumerate(numbers)))}
    assert kept == [firsts[number] for number in dict.fromkeys(numbers)]
    assert len(kept) + left_out["duplicate URL"] == len(rows)


def test_a_plan_is_made_once_and_guards_its_place(tmp_path: Path) -> None:
    url_list, out = _list_of(tmp_path, ["a dog\thttp://h/1"]), str(tmp_path / "out")
    first = prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS)
    changed = layout.list_url(out, 0)
    before = Path(changed).stat().st_mtime_ns
    assert prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS) == first
    assert Path(changed).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="choose another output"):
        prepare.prepare(url_list, PAIRS, out, PrepareConfig(samples_per_shard=5, nouns=False))
    Path(url_list).write_text("a cat\thttp://h/1")
    with pytest.raises(UserError, match="choose another output"):
        prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS)


def test_a_killed_preparation_leaves_no_stale_shards(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    prepare.prepare(_list_of(tmp_path, ["a dog\thttp://h/1"]), PAIRS, out, WITHOUT_NOUNS)
    Path(out, layout.PLAN).unlink()
    Path(layout.list_url(out, 0)).rename(layout.list_url(out, 7))
    assert prepare.prepare(_list_of(tmp_path, ["a cat\thttp://h/2"]), PAIRS, out, WITHOUT_NOUNS).shards == 1
    assert list(layout.file_sizes(str(Path(out, "list")), ".parquet")) == ["00000.parquet"]


def test_a_killed_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had written stays, and is not tagged again; the plan is that of a run in one piece."""
    rows = [f"a dog, number {n}\thttp://h/{n}" for n in range(20)] + ["x\thttp://h/99", "again\thttp://h/3"]
    url_list, whole, cut = _list_of(tmp_path, rows), str(tmp_path / "whole"), str(tmp_path / "cut")
    config = PrepareConfig(samples_per_shard=4)
    plan = prepare.prepare(url_list, PAIRS, whole, config)
    real, tagged, written = prepare._table, [], layout.write_bytes

    def table(piece: list, with_nouns: bool) -> pa.Table:
        tagged.append(len(piece))
        return real(piece, with_nouns)

    def killed(url: str, content: bytes) -> None:
        if url.endswith("00002.parquet"):
            raise KeyboardInterrupt
        written(url, content)

    monkeypatch.setattr(prepare, "_table", table)
    monkeypatch.setattr(layout, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(url_list, PAIRS, cut, config)
    monkeypatch.setattr(layout, "write_bytes", written)
    stamps = {path: path.stat().st_mtime_ns for path in Path(cut, "list").glob("*.parquet")}
    assert len(stamps) == 2
    del tagged[:]
    assert prepare.prepare(url_list, PAIRS, cut, config) == plan
    assert tagged == [4, 4, 4]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for path in Path(whole, "list").iterdir():
        assert Path(cut, "list", path.name).read_bytes() == path.read_bytes()
    assert len(list(Path(cut, "list").iterdir())) == len(list(Path(whole, "list").iterdir()))


def test_a_list_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url_list, out = _list_of(tmp_path, ["a dog\thttp://h/1"]), str(tmp_path / "out")
    first = prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS)
    real, read = sources.sha256_of, []
    monkeypatch.setattr(sources, "sha256_of", lambda url: read.append(url) or real(url))
    assert prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS) == first and not read
    os.utime(url_list, (1, 1))
    assert prepare.prepare(url_list, PAIRS, out, WITHOUT_NOUNS) == first and read == [url_list]


def test_a_missing_list_says_where_it_is_published(tmp_path: Path) -> None:
    config, out = PrepareConfig(nouns=False), str(tmp_path / "out")
    with pytest.raises(UserError, match=r"no such file; cc3m comes from https://ai.google.com.*acknowledgement.*lower"):
        prepare.prepare(str(tmp_path / "x.tsv"), SOURCES["cc3m"], out, config)
    with pytest.raises(UserError, match="no such file$"):
        prepare.prepare(str(tmp_path / "x.tsv"), PAIRS, out, config)
    (tmp_path / "x.tsv").write_text("1\t2\tabc\n")
    with pytest.raises(UserError, match="metadata.bz2: there is no such file; yfcc15m comes from"):
        prepare.prepare(str(tmp_path / "x.tsv"), SOURCES["yfcc15m"], out, config, str(tmp_path / "metadata.bz2"))


def test_strangers_tars_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="did not make"):
        prepare.prepare(_list_of(tmp_path, ["a dog\thttp://h/1"]), PAIRS, str(tmp_path / "out"), WITHOUT_NOUNS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "is empty"), (["", ""], "is empty"), (["a dog\tftp://h/1", "x"], "none of its 2 rows is usable")],
)
def test_nothing_usable_writes_nothing(tmp_path: Path, rows: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare.prepare(_list_of(tmp_path, rows), PAIRS, str(tmp_path / "out"), WITHOUT_NOUNS)
    assert not list(tmp_path.glob("out/**/*.*"))


def test_processes_name_the_same_nouns(tmp_path: Path) -> None:
    url_list = _list_of(tmp_path, [f"two dogs near chair number {n}\thttp://h/{n}" for n in range(12)])
    tables = []
    for processes in (1, 2):
        out = str(tmp_path / f"out{processes}")
        config = PrepareConfig(samples_per_shard=4, noun_processes=processes)
        plan = prepare.prepare(url_list, PAIRS, out, config)
        tables.append([pq.read_table(layout.list_url(out, shard)) for shard in range(plan.shards)])
    assert tables[0] == tables[1]
    assert tables[0][2]["nouns"].to_pylist()[0][0] == "dog"


def test_things_of_captions() -> None:
    captions = {
        "A man eats a hot dog at the dining table .": ["man", "hot dog", "dining table", "table"],
        "two teddy bears near a fire hydrant": ["teddy bear", "fire hydrant", "hydrant"],
        "The dogs' mice and children": ["dog", "mouse", "child"],
        "a red ball on a striped background next to two green apples": ["ball", "apple"],
        "a close up view of a kitchen table top": ["kitchen table", "table"],
        "someone in front of the group": [],
        "": [],
    }
    assert dict(zip(captions, extract_nouns(captions), strict=True)) == captions


def test_nouns_of_several_captions() -> None:
    assert merge_nouns([["dog", "chair"], [], ["cat", "dog"]]) == ["dog", "chair", "cat"]


def test_sources_tell_what_they_are() -> None:
    assert sources.get("cc3m").rows == 3_318_333
    with pytest.raises(ValueError, match="choose one of"):
        sources.get("laion")
    for source in SOURCES.values():
        assert {"url", "caption"} <= set(source.columns) or source.needs_metadata or source.name == sources.MIRROR


def test_ids_fit_64_bits() -> None:
    ids = np.array([stable_id(str(n)) for n in range(1000)], np.uint64)
    assert len(np.unique(ids)) == 1000 and ids.max() > 2**63


def test_a_data_set_can_be_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = with_config_of_name(["cc12m", "--output", "s3://bucket/cc12m"])
    config = parse(DownloadConfig, words, "data_prep/download.py")
    assert (config.source, config.url_list, config.output) == ("cc12m", "cc12m.tsv", "s3://bucket/cc12m")
    assert with_config_of_name(["url_list=cc3m", "output=x"]) == ["url_list=cc3m", "output=x"]


def test_a_list_of_ones_own_must_be_named() -> None:
    config = parse(DownloadConfig, ["output=x"], "data_prep/download.py")
    with pytest.raises(UserError, match="url_list is missing"):
        config.require_list()
