"""One cluster for all tests in this folder, and two jobs that run beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, running_cluster
from jobs import SLOW, TWO_BY_TWO, Job, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    # Not below pytest's own folder: the path of a socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_cluster(Path(folder)) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that needs more time than its limit, so that it is requeued; it begins with the first test."""
    folder = tmp_path_factory.mktemp("limited")
    # Slurm looks every 30 s, so the warning comes 15 to 45 s before the end, and what is left takes less than the rest.
    options = [*TWO_BY_TWO, "--time=2", "--signal=B:USR1@15"]
    return submit(cluster, folder, "srun.sbatch", options, SLOW, TEST_DELAY_S="0.5")


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that those which are disturbed must equal; wait for it."""
    return submit(cluster, tmp_path_factory.mktemp("undisturbed"), "srun.sbatch", TWO_BY_TWO, SLOW)
