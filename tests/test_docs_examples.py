"""The worked examples of the documentation and the hooks, as a contributor meets them: on a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sweeps
from colours import write_pictures
from documented import ROOT, Step
from documented_places import EXAMPLES, HOOKS, LOOPBACK
from web_farm import WebFarm

from pacl_scale.evaluate.rows import read_rows

LONGEST = 30
"""Lines that a patch adds and removes."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the worked examples change."""
    for name in ("pacl_scale", "data_prep", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def apply(title: str, folder: Path) -> None:
    """Apply the patch below a heading of the page; what it adds is held against the rules of `make lint`."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    (diff,) = re.findall(r"```diff\n(.*?)```", section, flags=re.S)
    assert 0 < len(re.findall(r"^[+-](?!\+\+ |-- )", diff, flags=re.M)) <= LONGEST
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    changed = re.findall(r"^\+\+\+ b/(.*\.py)$", diff, flags=re.M)
    for words in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, *changed], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def run_there(title: str, folder: Path, *more: str) -> str:
    """Run the command of an example on the changed copy; returns what it prints."""
    command = [sys.executable, *Step(EXAMPLES[title], more).words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_data_set_is_added(copy: Path) -> None:
    apply("Add a data set", copy)
    with WebFarm() as farm:
        rows = [f"{n}\t{farm.url(f'ok/{n}.jpg')}\ta bird number {n}\n" for n in range(3)]
        (copy / "birds.tsv").write_text("".join(rows))
        run_there("Add a data set", copy, *LOOPBACK)
    report = json.loads((copy / "data/birds/report.json").read_text())
    assert (report["source"], report["got"]) == ("birds", 3)


@pytest.mark.slow
@pytest.mark.weights
def test_an_encoder_is_added(copy: Path) -> None:
    apply("Add an encoder", copy)
    assert "128 pairs a GPU, 1 micro-batches, 196 patches a picture" in run_there("Add an encoder", copy)


@pytest.mark.slow
def test_a_protocol_is_added(copy: Path) -> None:
    apply("Add a protocol", copy)
    (copy / "runs").mkdir()
    sweeps.write_runs(copy / "runs", ["photos"])
    write_pictures(copy / "annotated")
    run_there("Add a protocol", copy, "controls=[untrained]")
    found = [row for row in read_rows(str(copy / "runs/photos")) if row.protocol["name"] == "article"]
    assert found and all(row.protocol["flip"] and len(row.protocol["templates"]) == 2 for row in found)


@pytest.mark.slow
def test_the_hooks_mend_and_refuse(tmp_path: Path) -> None:
    """They need nothing but the environment that make built, and no network."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "a.py").write_text("import os\nx = {'a':1}\n")
    # mypy's hook has no files of its own: `make lint` runs the same.
    environment = {**os.environ, "SKIP": "mypy", "PRE_COMMIT_HOME": str(tmp_path / "home")}

    def there(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert there("git", "init", "-q").returncode == 0
    assert there("git", "add", "a.py", ".pre-commit-config.yaml", "pyproject.toml").returncode == 0
    installed = there(*HOOKS[0].split())
    assert installed.returncode == 0 and (tmp_path / ".git/hooks/pre-commit").is_file(), installed.stderr
    for status in (1, 0):
        done = there(".venv/bin/pre-commit", "run", "--all-files")
        assert done.returncode == status, done.stdout + done.stderr
    assert (tmp_path / "a.py").read_text() == 'x = {"a": 1}\n'
