"""Fixtures of more than one test file."""

import uuid
from collections.abc import Iterator

import pytest
from training import VECTORS, write_features

from pacl_scale.errors import UserError
from pacl_scale.quickstart.store import ObjectStore, find_server


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
