"""Configuration: precedence, and one sentence for every mistake."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from pacl_scale import config
from pacl_scale.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, run_command


@dataclass
class Inner:
    """Inner settings."""

    scale: float = 1.5
    """How large it is."""

    kind: Literal["round", "square"] = "round"
    """Which one it is."""


@dataclass
class Outer:
    """Settings of a test."""

    steps: int = 3
    """Number of steps."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Two rates."""

    name: str | None = None
    """What it is called."""

    inner: Inner = field(default_factory=Inner)
    """The inner ones."""

    dry_run: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps cannot be negative")


def parse(*words: str) -> Outer:
    return config.parse(Outer, words, "prog")


def test_keys_may_have_hyphens_and_switches_need_no_value() -> None:
    for words in (["--dry-run"], ["--dry_run"], ["--dry-run=true"], ["dry_run=true"], ["--dry-run", "true"]):
        assert parse(*words) == Outer(dry_run=True), words
    assert parse("--dry-run", "false") == Outer()
    assert parse("--dry-run", "--inner.scale", "2") == Outer(dry_run=True, inner=Inner(scale=2.0))
    assert parse("--name", "a-b") == parse("name=a-b") == Outer(name="a-b")
    positionals = [("words", {"nargs": "*"})]
    found, given = config.parse(Outer, ["--dry-run", "red-car", "xxname", "steps-like"], "prog", positionals)
    assert found.dry_run and given["words"] == ["red-car", "xxname", "steps-like"]
    with pytest.raises(UserError, match="dry-walk"):
        parse("--dry-walk")


def test_precedence_is_defaults_then_file_then_words(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\ninner: {scale: 2}\n")
    assert parse() == Outer()
    assert parse("--config", str(file)) == Outer(steps=7, inner=Inner(scale=2.0))
    assert parse("--config", str(file), "steps=9", "--inner.kind", "square") == Outer(
        steps=9, inner=Inner(scale=2.0, kind="square")
    )


def test_two_files_add_up(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 7\ninner: {scale: 2}\n")
    (tmp_path / "b.yaml").write_text("inner: {kind: square}\n")
    found = parse("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert found == Outer(steps=7, inner=Inner(scale=2.0, kind="square"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--stepz", "3"], "--stepz"),
        (["inner.scail=3"], "inner.scail"),
        (["steps=many"], "steps"),
        (["steps=1.5"], "steps"),
        (["inner.kind=oval"], "inner.kind"),
        (["steps=-1"], "steps cannot be negative"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "prog --help" in str(caught.value)


@pytest.mark.parametrize("content", ["stepz: 3", "inner: {scail: 1}", "steps: [1", "steps: many", "- 1\n- 2"])
def test_mistakes_in_a_file_are_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        parse("--config", str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for docstring in (
        "Number of steps.",
        "Two rates.",
        "What it is called.",
        "How large it is.",
        "Which one it is.",
    ):
        assert docstring in text


def test_printed_config_is_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse("steps=11", "inner.kind=square", "--print-config")
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "a.yaml")) == Outer(steps=11, inner=Inner(kind="square"))


def test_saved_yaml_has_no_differences() -> None:
    settings = Outer(steps=5)
    saved = yaml.safe_load(config.to_yaml(settings))
    assert config.differences(saved, config.to_dict(settings)) == {}


def test_differences_name_dotted_keys() -> None:
    found = config.differences(config.to_dict(Outer()), config.to_dict(Outer(name="x", inner=Inner(scale=3.0))))
    assert found == {"name": (None, "x"), "inner.scale": (1.5, 3.0)}


def test_positionals_come_beside_the_config() -> None:
    settings, extras = config.parse(Outer, ["photo.jpg", "steps=2"], "prog", [("picture", {"help": "a picture"})])
    assert settings.steps == 2
    assert extras == {"picture": "photo.jpg"}


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> int:
        raise UserError("the bucket does not exist")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(lambda: None) == 0
    assert run_command(fails) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: the bucket does not exist\n"
    assert run_command(interrupted) == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("module", "costly"),
    [
        ("pacl_scale", ("torch", "deepspeed", "img2dataset")),
        # Every rank of a job imports it; a training on cached tokens and vectors builds no tower and draws nothing.
        ("pacl_scale.train", ("deepspeed", "timm", "torchvision", "open_clip", "transformers", "matplotlib")),
    ],
)
def test_importing_is_cheap(module: str, costly: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {costly} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["trian"], EXIT_USER_ERROR)])
def test_console_verbs(words: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-m", "pacl_scale", *words], capture_output=True, text=True)
    assert done.returncode == status
    assert "train" in done.stdout + done.stderr
