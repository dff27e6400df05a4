"""Every block of the documentation is known, and what cannot be run here is at least what it says."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import documented
import pytest
from documented import ROOT, checkout
from documented_places import BENCHMARKS, ELSEWHERE, HELPED, MAKE, NAMED, READ, every_place

from data_prep.config import DownloadConfig
from data_prep.download import with_config_of_name
from pacl_scale import config
from pacl_scale.evaluate.classes import read_class_list
from pacl_scale.evaluate.command import EvaluateConfig
from pacl_scale.sweep.command import SweepConfig

MESSAGE = re.compile(r"^\| `(.+?)` \|", flags=re.M)


def test_every_command_has_a_place_and_every_place_a_command() -> None:
    commands, known = documented.commands(), every_place()
    unknown = [f"{place}: {command}" for command, place in commands.items() if command not in known]
    assert not unknown, "give these a place in tests/documented_places.py:\n" + "\n".join(unknown)
    assert not set(known) - set(commands), "no page says these any more"


def test_every_block_says_what_it_is() -> None:
    for block in documented.blocks():
        assert block.language in documented.LANGUAGES, f"{block.page}:{block.line} is a block of {block.language!r}"
    assert not documented.unfenced()


@pytest.mark.parametrize("command", ELSEWHERE)
def test_commands_that_another_test_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, name = ELSEWHERE[command].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "data_prep/download.py" in words:
        rest = [word for word in words[2:] if word != "--slurm"]
        assert config.parse(DownloadConfig, with_config_of_name(rest), command).output
    if "pacl_scale.evaluate" in words:
        settings = config.parse(EvaluateConfig, words[3:], command)
        assert settings.check_data or settings.classification


@pytest.mark.parametrize("command", READ)
def test_commands_that_are_only_read(command: str) -> None:
    if "VERB" not in command:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for extra in re.findall(r"(?:pacl-scale|\.)\[(\w+)\]", command):
        assert extra in settings["project"]["optional-dependencies"]
    if command.startswith("pytest"):
        marker = command.split()[-1]
        assert any(line.startswith(f"{marker}:") for line in settings["tool"]["pytest"]["ini_options"]["markers"])


@pytest.mark.parametrize("command", MAKE)
def test_targets_of_make(command: str) -> None:
    # As if nothing was made yet: an environment that is there hides what it would be made with.
    target, *variables = shlex.split(command)[1:]
    words = ["make", "--always-make", "--dry-run", target, *variables]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(variable.partition("=")[2] in done.stdout for variable in variables)
    explained = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^{target}\s+\S", explained, flags=re.M), f"make help does not explain {target}"


@pytest.mark.parametrize("command", BENCHMARKS)
def test_words_of_benchmarks(command: str) -> None:
    script, *words = shlex.split(command)[1:]
    calls = [node for node in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(node, ast.Call)]
    added = [ast.literal_eval(c.args[0]) for c in calls if getattr(c.func, "attr", "") == "add_argument"]
    assert {word for word in words if word.startswith("--")} <= set(added)
    positionals = [name for name in added if not name.startswith("-")]
    assert positionals or not words or words[0].startswith("--")


@pytest.mark.parametrize("command", NAMED)
def test_commands_that_are_named(command: str) -> None:
    words = shlex.split(command)
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("command", HELPED)
def test_help_as_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, words = documented.entry(shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and "--config" in capsys.readouterr().out


def test_yaml_of_the_pages_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    for block in documented.blocks():
        if block.language == "yaml" and block.page == "docs/cluster.md":
            (tmp_path / "sweep.yaml").write_text(block.text)
            assert config.parse(SweepConfig, ["--config", "sweep.yaml"], "sweep").settings
        elif block.language == "yaml":
            assert read_class_list(block.text.encode(), block.page).words[2] == ["cat", "kitten"]


@functools.cache
def sentences() -> str:
    """Every text in the code, one a line; what is put in while it runs is dots."""
    # Its lines go on with a backslash, between quotes.
    makefile = re.sub(r'"\s*\\\n\s*"', " ", (ROOT / "Makefile").read_text(encoding="utf-8"))
    found = [re.sub(r"\$\$?\((?:[^()]|\([^()]*\))*\)", "...", makefile)]
    for path in sorted([*(ROOT / "pacl_scale").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## No message")[0]
    messages = MESSAGE.findall(page)
    assert len(messages) > 30
    for message in messages:
        assert message.removeprefix("error: ").strip(". ") in sentences(), message
