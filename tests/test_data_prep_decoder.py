"""Pictures that a decoder dies of or never comes back from: their rows end in a state, and their shard has an end."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from web_farm import POISON, WebFarm

from data_prep import beside
from data_prep.causes import cause_of
from data_prep.decoder import Neighbour, WatchedResizer
from data_prep.download import main

ROOT = Path(__file__).resolve().parents[1]

SICK_DECODER = f"""
import os, signal
import PIL.Image
opened = PIL.Image.open
def open(stream, *rest, **options):
    if {POISON.encode()!r} in stream.getvalue():
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(stream, *rest, **options)
PIL.Image.open = open
"""
"""For ``sitecustomize``, which every interpreter imports first."""


def resizer(img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> tuple[Any, ...]:
    """Does as it is told by its picture."""
    word = img_stream.getvalue()
    if word == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == b"hang":
        signal.pause()
    return word, 1, 1, 1, 1, None


def make() -> Any:
    return resizer


def test_next_door_a_picture_costs_a_process_and_the_next_one_is_decoded() -> None:
    neighbour = Neighbour(make, seconds=0.5)
    said = [neighbour(io.BytesIO(word)) for word in (b"a", b"die", b"b", b"hang", b"c")]
    neighbour.end()
    assert [answer[0] for answer in said] == [b"a", None, b"b", None, b"c"]
    errors = [answer[5] for answer in said if answer[5]]
    assert errors == ["decoder: its process ended with status -9", "decoder: not decoded in 0.5 s"]
    assert {cause_of(error) for error in errors} == {"decoder"}


def test_only_an_attempt_that_ended_within_a_decoder_makes_the_next_one_careful(tmp_path: Path) -> None:
    note, sizes = str(tmp_path / "note"), []
    for _ in range(2):
        watched = WatchedResizer(make, note, sizes.append)
        assert not watched.is_careful and watched(io.BytesIO(b"abc"))[0] == b"abc"
        watched.close()
    assert sizes == [3, 3]
    child = os.fork()
    if not child:
        WatchedResizer(make, note, sizes.append)(io.BytesIO(b"die"))
    os.waitpid(child, 0)
    for _ in range(2):  # and the one after it as well: it may have died of something else
        watched = WatchedResizer(make, note, sizes.append)
        assert watched.is_careful and watched(io.BytesIO(b"die"))[5].startswith("decoder: ")
        watched.close()
    assert sizes == [3, 3, 3, 3]


@pytest.mark.slow
def test_poisonous_pictures_have_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text(SICK_DECODER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "first"), os.environ.get("PYTHONPATH", "")]))
    paths = ["ok/1.jpg", "poison/1", "png/2", "missing/1", "webp/3", "poison/2"]
    with WebFarm() as farm:
        (tmp_path / "pairs.tsv").write_text("".join(f"a dog called {path}\t{farm.url(path)}\n" for path in paths))
        words = ["--config", str(ROOT / "configs/data/demo.yaml"), f"url_list={tmp_path / 'pairs.tsv'}"]
        words += [f"output={tmp_path / 'out'}", "prepare.nouns=false", "fetch.processes=1", "fetch.threads=4"]
        assert main(words) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["got"], report["failures"]) == (3, {"decoder": 2, "http_404": 1})


def test_a_process_beside_finds_pythons_own_modules_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among installed packages, and the checkout may be one, lie some of the same names."""
    (tmp_path / "dataclasses.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setattr(beside, "CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = [sys.executable, "-c", "import dataclasses"]
    assert subprocess.run(words, env=beside.environment(), cwd=tmp_path.parent).returncode == 0
