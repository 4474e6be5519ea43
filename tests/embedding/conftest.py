"""The shards that most tests of embedding use."""

from pathlib import Path

import pytest

from tests.conftest import MakeShard


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    """Three shards of 50, 70 and 3 samples; two of them share keys, one has images of another size."""
    return [
        make_shard("b.tar", 50),
        make_shard("a.tar", 70, first=20, classes=3),
        make_shard("c.tar", 3, side=17),
    ]
