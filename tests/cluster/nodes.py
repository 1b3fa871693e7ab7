"""A cluster of several raylets on this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster


def node(num_cpus: float = 1, **options: object) -> dict[str, object]:
    """Options of one node."""
    return {"num_cpus": num_cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False, **options}


@contextlib.contextmanager
def running_cluster(**head: object) -> Iterator[Cluster]:
    """A connected cluster with a head node of these options; nodes can be added, and all are ended afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Ray writes the cluster's address where other programs of this machine would find it.
        Path(directory, "ray").mkdir()
        patch.setenv("RAY_TMPDIR", directory)
        cluster = Cluster(initialize_head=True, head_node_args=node(**head))
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
