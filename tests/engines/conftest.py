"""A Ray cluster of two nodes, for all tests of a process."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.clusters import cluster


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    pytest.importorskip("ray", reason="needs ray", exc_type=ImportError)
    with cluster(2) as nodes:
        yield nodes
