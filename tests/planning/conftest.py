"""One set of features for tests of plans: two shards, four unequal classes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adq_wds.tables.features_file import ShardFeatures


@cache
def mixed_labels(n: int) -> Any:
    return np.random.default_rng(n).choice([0, 1, 2, 7], n, p=[0.5, 0.3, 0.15, 0.05]).tolist()


@pytest.fixture
def mixed(make_features: Callable[..., ShardFeatures], tmp_path: Path) -> Path:
    """A folder of 120 samples in two shards: classes 0, 1, 2 and 7."""
    make_features("x.tar", mixed_labels(70))
    make_features("y.tar", mixed_labels(50), first=1000)
    return tmp_path / "features"
