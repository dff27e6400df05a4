"""Lists in the layouts of CC3M, CC12M and YFCC15M, by name, from the list to the index and the report."""

import bz2
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_farm import WebFarm

from data_prep import sources
from data_prep.download import main
from pacl_scale import storage
from pacl_scale.data.index import SampleIndex

GOOD = 8


@pytest.fixture(scope="module")
def farm() -> Iterator[WebFarm]:
    with WebFarm() as running:
        yield running


def metadata_line(photo: int, url: str, title: str, description: str, marker: int = 0) -> str:
    """A line of YFCC100M's metadata: 25 columns."""
    fields = [str(photo * 2), str(photo), "hash", *["x"] * 5, title, description, *["x"] * 6, url, *["x"] * 7]
    return "\t".join([*fields, str(marker)])


def write_list(name: str, folder: Path, farm: WebFarm) -> list[str]:
    """Eight pictures, one that is gone, one that heals, one row that cannot be used; returns the words that name it."""
    urls = [farm.url(f"ok/{name}{n}.jpg") for n in range(GOOD)] + [farm.url(f"gone/{name}"), farm.url(f"heals/{name}")]
    captions = [f"a <PERSON> with dog number {n}" for n in range(GOOD + 2)]
    if name == "yfcc15m":
        ids = [101 + n for n in range(len(urls))]
        listed = "".join(f"{n}\t{photo}\tabcdef\n" for n, photo in enumerate([*ids, 999]))
        (folder / "subset.tsv.bz2").write_bytes(bz2.compress(listed.encode()))
        lines = [metadata_line(5, farm.url("ok/not-listed"), "no", "")]
        texts = [caption.replace(" ", "+").replace("<PERSON>", "man") for caption in captions]
        lines += [metadata_line(*row, "") for row in zip(ids, urls, texts, strict=True)]
        lines.append(metadata_line(999, "x", "film", "", 1))
        (folder / "metadata.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
        return [f"url_list={folder / 'subset.tsv.bz2'}", f"metadata={folder / 'metadata.bz2'}"]
    rows = list(zip(captions, urls, strict=True))
    ordered = [(url, caption) if name == "cc12m" else (caption, url) for caption, url in rows]
    (folder / "list.tsv").write_text("\n".join(["\t".join(row) for row in ordered] + ["no tab here"]))
    return [f"url_list={folder / 'list.tsv'}"]


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cc3m", "cc12m", "yfcc15m"])
def test_from_the_list_to_the_index(
    name: str, farm: WebFarm, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the object store, with the nouns of one of them; what heals is brought by a retry, and all is read back."""
    words = [name, *write_list(name, tmp_path, farm), f"output={s3_url}", f"prepare.nouns={name == 'cc12m'}".lower()]
    words += ["prepare.noun_processes=1", "fetch.processes=1", "fetch.threads=4"]
    words += ["fetch.allowed_networks=[127.0.0.0/8]", "retry.backoff_seconds=0.05"]
    assert main(words) == 2
    assert "11 rows where expect.rows is" in capsys.readouterr().err
    assert not storage.exists(s3_url)
    assert main([*words, "expect.rows=null"]) == 0
    report = json.loads(storage.read_bytes(f"{s3_url}/report.json"))
    assert (report["source"], report["list_rows"], report["expected"], report["got"]) == (name, 11, 10, GOOD)
    assert report["left_out"] == {"a video" if name == "yfcc15m" else "malformed row": 1}
    assert report["failures"] == {"http_410": 1, "http_500": 1}
    assert len(SampleIndex.load(s3_url)) == GOOD
    assert (report["metadata_sha256"] is not None) == (name == "yfcc15m")
    assert sources.SOURCES[name].licence.split(";")[0] in storage.read_bytes(f"{s3_url}/report.html").decode()
    assert main(["retry", *words]) == 0 and main(["verify", *words]) == 0
    assert "2 of 2 shards are sound, 9 samples" in capsys.readouterr().out
    listed = pq.read_table(pa.BufferReader(storage.read_bytes(f"{s3_url}/list/00000.parquet")))
    assert (["dog", "number"] in listed["nouns"].to_pylist() or ["person", "dog"] in listed["nouns"].to_pylist()) == (
        name == "cc12m"
    )
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(f"{s3_url}/00000.tar"))) as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
        texts = [member.read().decode() for member in members if member]
    who = "man" if name == "yfcc15m" else "person"
    assert texts == [f"a {who} with dog number {n}" for n in range(GOOD)]
