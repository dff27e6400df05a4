"""How tests are shared among workers, and the table of times per file."""

import subprocess
import sys
from pathlib import Path

import schedule

HERE = Path(__file__).parent


def test_every_file_that_is_to_begin_first_exists() -> None:
    assert all((HERE / f"{name}.py").is_file() for name in schedule.FIRST + schedule.ONE_CLUSTER)


def test_a_file_stays_together() -> None:
    names = {schedule.group_of(f"tests/test_x.py::{test}") for test in ("test_a", "TestB::test_c[tests/y.py::z]")}
    assert names == {"test_x"}


def test_drills_of_training_share_a_cluster() -> None:
    files = ("test_slurm", "test_slurm_asks", "test_slurm_nodes", "test_slurm_sweep")
    assert [schedule.group_of(f"tests/{file}.py::test") for file in files] == ["test_slurm"] * 3 + ["test_slurm_sweep"]


def test_times_are_summed_by_file(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    cases = [("tests.test_a", 1), ("tests.test_b.TestIn", 5), ("tests.test_a", 2)]
    lines = "".join(f'<testcase classname="{name}" name="test" time="{seconds}.0"/>' for name, seconds in cases)
    report.write_text(f'<testsuites><testsuite time="90.0">{lines}</testsuite></testsuites>')
    done = subprocess.run([sys.executable, str(HERE / "times.py"), str(report)], capture_output=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["5.0", "s", "1", "tests", "test_b"],
        ["3.0", "s", "2", "tests", "test_a"],
        ["8.0", "s", "3", "tests,", "in", "1.5", "minutes"],
    ]
    missing = subprocess.run([sys.executable, str(HERE / "times.py"), "no.xml"], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr == "error: there is no no.xml; run the tests first\n"
