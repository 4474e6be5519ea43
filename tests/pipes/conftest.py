"""Two shards, and a codebook fitted on the first."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from tests.conftest import MakeShard


@pytest.fixture
def urls(make_shard: MakeShard) -> list[str]:
    """The second holds a class that the first has not."""
    return [str(make_shard("t-0.tar", 60, classes=3)), str(make_shard("t-1.tar", 40, first=60, classes=4))]


@pytest.fixture
def codebook(urls: list[str], tmp_path: Path) -> adq.Codebook:
    """Of the first shard; its rates differ much: nothing of bin 0, most of bin 3."""
    features = adq.embed_shards(urls[:1], "thumbnail", tmp_path / "features")

    def steep(size: Any, importance: Any, keep: float) -> Any:
        return size * np.arange(len(size))

    return adq.fit_codebook(
        features, bins=4, min_pilot=5, allocation=steep, out=tmp_path / "codebook.safetensors"
    )
