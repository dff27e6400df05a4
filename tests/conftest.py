"""Fixtures of more than one test file, and how tests are shared among the workers of ``pytest -n``."""

import os
import resource
import uuid
from collections.abc import Callable, Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores between them. Before torch is imported, which reads it then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import schedule
from _pytest.junitxml import xml_key
from slurm_cluster import Cluster, missing, slurm_cluster
from training import VECTORS, write_features

from pacl_scale.errors import UserError
from pacl_scale.quickstart.store import ObjectStore, find_server

PROPERTIES = "testsuite_properties"

# Crashes that tests ask for, also of Slurm's jobs, leave no memory dumps in the working directory.
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> schedule.ByFile:
    """Files, the longest first."""
    config.option.loadscopereorder = False
    return schedule.ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The same in every worker, as xdist demands."""
    if hasattr(config, "workerinput"):
        schedule.longest_first(items)


@pytest.fixture(scope="session")
def record_testsuite_property(
    request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]
) -> Callable[[str, object], None]:
    """pytest's own; a worker, which writes no report, hands what is recorded to the process that does."""
    output = getattr(request.config, "workeroutput", None)
    if output is None:
        return record_testsuite_property
    return lambda name, value: output.setdefault(PROPERTIES, []).append((name, value))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Write what a worker recorded to the report."""
    if report := node.config.stash.get(xml_key, None):
        for name, value in getattr(node, "workeroutput", {}).get(PROPERTIES, []):
            report.add_global_property(name, value)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running S3 server; the environment leads s3fs to it for the whole session."""
    try:
        find_server()
    except UserError as error:
        pytest.skip(str(error))
    with (
        ObjectStore(tmp_path_factory.mktemp("store"), buckets=("tests",)) as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def s3_url(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the object store that is this test's own, as in ``s3://tests/3f2a9c01``.

    The environment is set again for each test: another test may have changed it, and processes that a test
    starts inherit it.
    """
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return f"{store.url}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of patch tokens, see :func:`training.write_features`."""
    return write_features(tmp_path_factory.mktemp("data") / "features")


@pytest.fixture(scope="session")
def quick_features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with text vectors beside them, for tests that train often."""
    return write_features(tmp_path_factory.mktemp("data") / "quick_features", vectors=VECTORS)


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of four nodes with two pretended GPUs each, whose arrays have at most ten jobs."""
    if why_not := missing():
        pytest.skip(f"no Slurm cluster can be started here: {why_not}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=4, gpus=2, max_array_size=10) as running:
        yield running


@pytest.fixture
def cluster(started_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The same with the environment set for one test, and all nodes up."""
    for name, value in started_cluster.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    started_cluster.wait_for_nodes()
    return started_cluster
