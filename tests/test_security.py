"""docs/security.md and its tests agree; no code runs what came from outside; secrets stay out of what is written."""

import ast
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pretended_slurm
import pytest
import structlog

from data_prep.download import main as download
from pacl_scale import config, evaluate, log, submit, train
from pacl_scale.distributed import slurm_ranks
from pacl_scale.errors import EXIT_FAILED, EXIT_USER_ERROR, RunFailed, UserError, run_command
from pacl_scale.secrecy import hidden, is_secret_name
from pacl_scale.submit import SubmitConfig
from pacl_scale.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SECRET = "planted/Secret+0123456789"
VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD")


SPEAKS_TO_ITSELF = {
    "pacl_scale/data/own_process.py": ["pickle.loads"],
    "pacl_scale/data/loader.py": ["pickle.loads"] * 2,
}
"""What a process and its own child say to each other over a socket that nobody else can open."""


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    """The dotted name that each call calls, and its keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}


def faults(source: str) -> list[str]:
    """What in a module would run, or unpack, whatever a file or a stranger says."""
    tree = ast.parse(source)
    found = []
    for name, given in calls(tree):
        last = name.rpartition(".")[2]
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if re.fullmatch(r"(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\.(loads?|open|Unpickler)", name):
            found.append(name)
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"{name} of pickles")
        if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path"):
            found.append(name)
        if given.get("shell", "False") != "False":
            found.append(f"{name} with a shell")
        unpacks = last == "extractall" or (last == "extract" and "tar" in name.lower())
        if unpacks and given.get("filter") != "'data'":
            found.append(f"{name} without filter='data'")
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"{name} that trusts remote code")
        if given.get("verify") == "False":
            found.append(f"{name} that takes any certificate")
        if last == "Environment" and given.get("autoescape", "False") == "False":
            found.append("templates that escape nothing")
        if last == "from_pretrained" and "AutoModel" in name and given.get("use_safetensors") != "True":
            found.append(f"{name} without use_safetensors=True")
    return found


@pytest.mark.parametrize("folder", ["pacl_scale", "data_prep", "benchmarks"])
def test_no_code_runs_what_a_file_says(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules
    found = {str(path.relative_to(ROOT)): bad for path in modules if (bad := faults(path.read_text()))}
    assert found == {name: bad for name, bad in SPEAKS_TO_ITSELF.items() if name.startswith(folder)}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(content)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "archive.extractall(folder)",
        "tar.extract(member)",
        "AutoModel.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "requests.get(url, verify=False)",
        "jinja2.Environment(loader=loader)",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert faults(line)


def test_the_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^\s*def {name}\(", source, re.MULTILINE), f"{file}.{name}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| who", "|---"))]
    assert all(re.search(r"`test_\w+\.test_\w+`", row) for row in rows)


def test_names_of_secrets() -> None:
    assert all(is_secret_name(name) for name in VARIABLES)
    others = (
        "AWS_ACCESS_KEY_ID",
        "AWS_SHARED_CREDENTIALS_FILE",
        "TOKENIZERS_PARALLELISM",
        "NCCL_SOCKET_IFNAME",
        "HOME",
    )
    assert not any(is_secret_name(name) for name in others)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://key:pass@bucket/x", "s3://***@bucket/x"),
        ("https://h/x?a=1&X-Amz-Signature=ab12&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?sig=ab%2F12", "https://h/x?sig=***"),
        ("https://h:8080/x@y?size=3", "https://h:8080/x@y?size=3"),
        (f"the store says {SECRET!r}", "the store says '***'"),
    ],
)
def test_text_hides_secrets(text: str, left: str, planted: None) -> None:
    assert hidden(text) == left


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret in every variable that may hold one, of a store that nobody serves."""
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")


@pytest.mark.parametrize("value", ["s3://key:word@bucket/x", "https://h/t?X-Amz-Signature=abcdef", f"/data/{SECRET}"])
def test_settings_that_hold_a_secret_are_refused(value: str, planted: None) -> None:
    for key in ("data.root", "checkpoint.folder"):
        with pytest.raises(UserError, match=f"{key} holds a secret") as caught:
            config.parse(TrainConfig, [f"{key}={value}"], "test")
        assert value not in str(caught.value)


def test_the_clusters_file_takes_no_secret() -> None:
    with pytest.raises(UserError, match=r"environment\.WANDB_API_KEY would be written into the batch script"):
        config.parse(SubmitConfig, ["--environment.WANDB_API_KEY=abc"], "test")
    with pytest.raises(UserError, match="holds a secret"):
        config.parse(SubmitConfig, ['--setup=["export URL=https://me:word@h/x"]'], "test")


def test_a_tag_in_a_configuration_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, tag in enumerate(("!!python/object/apply:os.mkdir [built]", "!!python/name:os.mkdir ''")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"run: {tag}\n")
        with pytest.raises(UserError) as caught:
            config.parse(TrainConfig, ["--config", str(file)], "test")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "built").exists()


def test_values_of_a_cluster_are_no_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended_slurm.install(tmp_path, monkeypatch)
    run, value = tmp_path / "it's; touch built; $(touch built)", "'; touch built; $(touch built) \"`touch built`"
    words = ["--cluster", str(ROOT / "configs" / "clusters" / "example.yaml"), f"run={run}", "global_batch_size=64"]
    monkeypatch.chdir(tmp_path)
    assert submit.main([*words, "--nodes=1", "--dry-run", f"--environment.SAID={value}"]) == 0
    script = capsys.readouterr().out
    # As much of it as needs no cluster, run as a shell reads it.
    lines = [line for line in script.splitlines() if line.startswith("export SAID=") or " claim " in line]
    assert len(lines) == 2
    shell = "\n".join(["claim() { printf '%s\\n' \"$@\"; }", lines[0], 'printf "%s\\n" "$SAID"', lines[1]])
    said = subprocess.run(
        ["bash", "-c", shell.replace(f"{sys.executable} -m pacl_scale.job", "claim")], capture_output=True, text=True
    )
    assert said.stdout.splitlines()[0] == value
    assert str(run) in said.stdout.splitlines()
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "many"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x"},
        {"SLURM_NODEID": "9"},
        {"SLURM_STEP_ID": "$(touch built)"},
        {"SLURM_LOCALID": None},
    ],
)
def test_slurms_variables_that_make_no_sense_are_one_sentence(changes: dict[str, str | None]) -> None:
    variables = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    variables |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    variables["MASTER_ADDR"] = "n1"
    assert slurm_ranks(variables)["WORLD_SIZE"] == "4"
    changed = {name: value for name, value in (variables | changes).items() if value is not None}
    with pytest.raises(UserError, match="Slurm's variables make no sense"):
        slurm_ranks(changed)


def test_log_lines_hide_secrets(tmp_path: Path, planted: None, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(file=tmp_path / "train.log")
    try:
        logger = log.get_logger("pacl_scale.test")
        logger.warning("the store says", answer=f"no key {SECRET}")
        try:
            local = SECRET  # what a frame holds must not be shown either
            raise ValueError(f"{local} is refused")
        except ValueError:
            logger.exception("failed")
        logging.getLogger("botocore").error("signed with %s", SECRET)
    finally:
        structlog.reset_defaults()
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()
    written = (tmp_path / "train.log").read_text()
    assert "the store says" in written and "is refused" in written and "signed with" in written
    assert SECRET not in written + capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(UserError, EXIT_USER_ERROR), (RunFailed, 1), (ValueError, EXIT_FAILED)])
def test_the_last_words_of_a_command_hide_secrets(
    error: type[Exception], status: int, planted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error(f"{SECRET} is no key")

    assert run_command(fails) == status
    said = capsys.readouterr().err
    assert "*** is no key" in said and SECRET not in said
    assert ("Traceback" in said) == (error is ValueError)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, names included."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.weights
def test_a_planted_secret_is_nowhere_in_a_run(
    quick_features: str,
    tmp_path: Path,
    planted: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A training with Weights & Biases, one that fails, an evaluation, a download and a job that is queued."""
    pretended_slurm.install(tmp_path, monkeypatch)
    monkeypatch.setattr("pacl_scale.storage.ATTEMPTS", 1)
    run = tmp_path / "run"
    steps = ["steps=2", "global_batch_size=16", "distributed.ranks=1", "engine.precision=fp32", "optim.warmup_steps=1"]
    text = ["text.source=package", "text.model=all-minilm-l6-v2"]
    words = [f"run={run}", *steps, *text, f"data.root={quick_features}"]
    command = [sys.executable, "-m", "pacl_scale.train", *words, "record.wandb_project=tests"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    assert run_command(lambda: train.main([f"run={tmp_path / 'failed'}", *steps, *text, "data.root=s3://no/where"]))
    nothing = f"segmentation.x.root={tmp_path / 'nothing'}"
    assert run_command(lambda: evaluate.main(["--checkpoint", str(run), nothing, f"output={tmp_path / 'rows'}"])) == 2
    url_list = tmp_path / "list.tsv"
    url_list.write_text("a dog\thttp://127.0.0.1:1/x.jpg\n")
    assert download([f"url_list={url_list}", "output=s3://no/where"])
    cluster = str(ROOT / "configs" / "clusters" / "example.yaml")
    asked = ["--cluster", cluster, "--nodes=1", f"run={tmp_path / 'queued'}", "global_batch_size=64"]
    assert run_command(lambda: submit.main(asked)) == 0
    files = contents(tmp_path)
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {Path(name).name for name in files}
    assert any("wandb" in name for name in files) and any(name.endswith(".pkl") for name in files)
    said = "".join(capfd.readouterr()) + done.stdout + done.stderr
    assert not [name for name, content in files.items() if SECRET.encode() in content]
    assert SECRET not in said and "no/where" in said
