"""What is handed out: a wheel with all that the commands read, a source archive that is a checkout, one version."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import pacl_scale
from pacl_scale import config
from pacl_scale.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SOURCES = ("pacl_scale", "data_prep", "configs", "tests", "slurm", "docs", "benchmarks")


def files_of(folder: str) -> set[str]:
    """The files of a folder of the checkout that belong to the project, as paths below the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "checkout with a blank"
    # Built in a copy: setuptools leaves folders beside the sources.
    for name in sorted(files_of(".")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "pacl_scale" / "configs").symlink_to("../configs")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_has_all_that_the_commands_read(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    wanted = files_of("pacl_scale") | files_of("data_prep")
    wanted |= {f"pacl_scale/{name}" for name in files_of("configs")}
    assert code == wanted
    assert {f"pacl_scale-{VERSION}.dist-info/licenses/LICENSE"} <= names


@pytest.mark.slow
def test_the_source_archive_is_a_checkout(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = set().union(*(files_of(folder) for folder in SOURCES)) | {"Makefile", "constraints.txt", "LICENSE"}
    assert wanted <= names


def test_there_is_one_version() -> None:
    # An older editable install is none of this checkout's business.
    assert pacl_scale.__version__ in (VERSION, "not installed")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert re.search(rf"^## {re.escape(VERSION)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_citation_names_the_paper() -> None:
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert "Patch Aligned Contrastive Learning" in paper["title"]
    assert [author["family-names"] for author in paper["authors"]][0] == "Mukhoti"
    assert paper["identifiers"][0]["value"] == "arXiv:2212.04994"


def test_shipped_configurations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--config", "configs/train/paper_b16.yaml"], ["--config=configs/train/paper_b16.yaml"]):
        assert config.parse(TrainConfig, words, "test").vision.model == "ViT-B-16"
    own = tmp_path / "configs" / "train" / "paper_b16.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("steps: 7\n")
    # The user's own folder comes first.
    assert config.parse(TrainConfig, ["--config", "configs/train/paper_b16.yaml"], "test").steps == 7


def test_both_images_are_made_by_the_same_steps_from_what_is_there() -> None:
    docker, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    joined = docker.replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", joined, re.MULTILINE) for word in line.split()]
    assert copied and all((ROOT / word).exists() for word in copied)
    assert re.findall(r"^    (\S+) /opt/pacl-scale/\1$", apptainer, re.MULTILINE) == copied
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(copied)
    for command in ("apt-get install", "python -m pip install"):
        steps = [re.search(rf"{command} (.*?)\s*(?:&&|$)", text, re.MULTILINE) for text in (joined, apptainer)]
        assert all(steps) and len({" ".join(step[1].split()) for step in steps if step}) == 1
    base = re.findall(r"^(?:FROM|From:) (python:\S+)$", docker + apptainer, re.MULTILINE)
    assert len(base) == 2 and len(set(base)) == 1
    assert re.findall(r"^USER (\S+)$", docker, re.MULTILINE)[-1] == "1000"
    (extras,) = re.findall(r"'\.\[(.*)\]'", docker)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
