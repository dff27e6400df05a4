"""What a newcomer stumbles over: the wrong Python, no package index, a full disk, Ctrl-C in the middle of the demo."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pacl_scale import storage
from pacl_scale.errors import UserError
from pacl_scale.quickstart import main
from pacl_scale.quickstart import pipeline as quickstart

ROOT = Path(__file__).resolve().parents[1]
GOOD = 'case "$1$2" in --version*) echo "Python 3.11.2";; -mvenv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; esac'


class Newcomer:
    """A checkout as far as ``make demo`` needs it until packages are there, and a Python of a few lines of shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "größer als a b"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)

    def make(self, body: str, *words: str) -> subprocess.CompletedProcess[str]:
        """``make demo`` with a Python that does what ``body`` says."""
        python = self.folder / "python"
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        command = ["make", "demo", "PYTHON=./python", *words]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def newcomer(tmp_path: Path) -> Newcomer:
    return Newcomer(tmp_path)


def test_the_wrong_python_is_named_with_what_to_do(newcomer: Newcomer) -> None:
    done = newcomer.make('case "$1" in --version) echo "Python 3.9.2";; *) exit 1;; esac')
    assert done.returncode == 2
    assert "error: Python 3.11 or later is needed, and ./python is Python 3.9.2" in done.stderr
    assert "make PYTHON=" in done.stderr and not (newcomer.folder / ".venv").exists()
    done = newcomer.make("", "PYTHON=./no-such-python")
    assert "error: Python 3.11 or later is needed, and ./no-such-python is" in done.stderr


def test_a_python_without_venv_is_named(newcomer: Newcomer) -> None:
    done = newcomer.make('case "$2" in *ensurepip*) exit 1;; esac')
    assert done.returncode == 2 and "apt install python3-venv" in done.stderr


def test_an_environment_that_was_half_made_is_made_again(newcomer: Newcomer) -> None:
    assert newcomer.make(f"{GOOD}\n[ $2 != venv ]").returncode == 2
    assert not (newcomer.folder / ".venv" / "bin" / "python").exists()
    assert newcomer.make(GOOD).returncode == 0


def test_packages_that_can_not_be_installed_end_in_a_sentence(newcomer: Newcomer) -> None:
    failing = GOOD + '\ncase "$2" in pip) echo "no such host" >&2; exit 1;; esac'
    done = newcomer.make(failing)
    assert done.returncode == 2
    assert done.stderr.index("no such host") < done.stderr.index("error: packages are not installed")
    assert not (newcomer.folder / ".venv" / "demo.stamp").exists()
    # The index is there again: the same command goes on.
    (newcomer.folder / ".venv" / "bin" / "python").write_text("#!/bin/sh\n")
    assert newcomer.make(GOOD).returncode == 0


def test_the_makefile_is_for_every_make_and_shell() -> None:
    """macOS has GNU make 3.81, a BSD userland and, as /bin/sh, no bash of this century."""
    text = (ROOT / "Makefile").read_text()
    for word in (
        "$(file",
        ".ONESHELL",
        "!=",
        "[[",
        "&>",
        "readlink -f",
        "sed -i",
        "grep -P",
        "cp -a",
        "${ ",
        "mapfile",
    ):
        assert word not in text, word
    for script in (ROOT / "slurm").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


class Stages:
    """Stands in for what the stages of the demo do; at the ``interrupted``-th of them somebody presses Ctrl-C."""

    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.interrupted = -1
        report = json.dumps({"shards": 1, "samples": 2, "failures": {}})

        def download(pipeline: Any, store: Any) -> None:
            self.command(["", "pacl_scale.download"])
            (pipeline.folder / quickstart.DOWNLOAD).write_text(report)

        monkeypatch.setattr(quickstart, "draw_scenes", lambda config, folder: self.command(["", "pacl_scale.draw"]))
        monkeypatch.setattr(quickstart, "ObjectStore", lambda folder, buckets: nullcontext(self))
        monkeypatch.setattr(quickstart.Pipeline, "_download", download)
        monkeypatch.setattr(quickstart.Pipeline, "_command", self.command)
        monkeypatch.setattr(quickstart, "read_rows", lambda run: [])
        monkeypatch.setattr(quickstart, "write_report", lambda page, *rest: page)

    def command(self, words: Sequence[str]) -> None:
        if self.interrupted == len(self.done):
            raise KeyboardInterrupt
        self.done.append(words[1].removeprefix("pacl_scale."))


def test_a_demo_that_was_interrupted_goes_on_at_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = Stages(monkeypatch)
    words = [f"run={tmp_path / 'demo'}"]
    expected = ["draw", "download", "cache", "train", "train", "evaluate"]
    for number in range(len(expected)):
        stages.interrupted = number
        with pytest.raises(KeyboardInterrupt):
            main(words)
        assert stages.done == expected[:number]
        assert ("going on with the unfinished demo" in capsys.readouterr().out) == (number > 1)
    stages.interrupted = -1
    assert main(words) == 0
    assert stages.done == expected
    seconds = json.loads((tmp_path / "demo" / "summary.json").read_text())["seconds"]
    assert [*seconds] == ["draw", "download", "encode", "train", "train_mean_pooled", "evaluate", "total"]
    # A finished demo is made anew, and so is an unfinished one of other settings.
    assert main(words) == 0 and stages.done == expected * 2
    stages.interrupted = len(stages.done) + 3
    with pytest.raises(KeyboardInterrupt):
        main(words)
    stages.interrupted = -1
    assert main([*words, "scenes.seed=1"]) == 0
    assert stages.done == [*expected * 2, *expected[:3], *expected]


def test_ctrl_c_waits_for_the_stage_and_ends_one_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    tidy = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: print(flush=True); sys.stdin.read()\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    for code, status, patience in ((tidy, 130, 60.0), (deaf, -signal.SIGTERM, 0.2)):
        monkeypatch.setattr(quickstart, "PATIENCE_S", patience)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
            assert process.stdout and process.stdout.readline()
            process.send_signal(signal.SIGINT)
            quickstart.end(process)
            assert process.returncode == status


@pytest.mark.parametrize(("argument", "said"), [("-m", "error: interrupted\n"), ("script.py", "Traceback")])
def test_ctrl_c_while_libraries_are_imported(argument: str, said: str) -> None:
    """Under ``python -m`` a sentence; a script of the user's that imports the package keeps its traceback."""
    code = f"import sys; sys.argv = [{argument!r}]; import pacl_scale; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.startswith(said)


def test_help_may_be_read_by_half() -> None:
    command = [sys.executable, "-m", "pacl_scale", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_place_without_room_or_rights_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: Any, directory: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quickstart, "draw_scenes", full)
    with pytest.raises(UserError, match="No space left on device\\); make room and start again"):
        main([f"run={tmp_path / 'demo'}"])
    with pytest.raises(UserError, match="choose a place of your own"), storage.explained(str(tmp_path)):
        raise PermissionError(13, "Permission denied")
