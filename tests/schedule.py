"""Which tests run side by side under ``pytest -n``, and in which order: what takes longest begins first.

Tests of one file stay together, so that they share what their fixtures made; the drills of training on Slurm share a
cluster, and no two of them fill the cores with ranks at once. They mostly wait, beside files that mostly compute.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

ONE_CLUSTER = ("test_slurm", "test_slurm_asks", "test_slurm_nodes")
FIRST = (
    ONE_CLUSTER[0],
    "test_chaos",
    "test_slurm_sweep",
    "test_sweep",
    "test_stop_and_go",
    "test_data_prep_slurm",
    "test_train",
    "test_plan",
    "test_data_prep_kills",
    "test_data_prep_download",
    "test_quickstart_pipeline",
)
"""Files by how long they take, as `make test-times` shows it."""


class ByFile(LoadScopeScheduling):
    """A worker is given the tests of a file together, and the files in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """The name of the tests that one worker runs together."""
    file = nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    return ONE_CLUSTER[0] if file in ONE_CLUSTER else file


def longest_first(items: list[pytest.Item]) -> None:
    """Put the tests of :data:`FIRST` before the others."""
    items.sort(key=lambda item: FIRST.index(group) if (group := group_of(item.nodeid)) in FIRST else len(FIRST))
