"""A shard is walked into rows: where its samples lie, and what is logged of the rest."""

import logging
from pathlib import Path

import pytest

from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import iter_spans, payload_crc32
from adq_wds.tables.spans import scan_spans, walk_shard
from tests.conftest import Caplog, write_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    names = ["README", "a.jpg", "a.cls", "b.jpg", "c.jpg", "docs/x"]
    return write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])


def test_rows_are_the_walks(shard: Path) -> None:
    with open_shard(shard) as buffer:
        spans = list(iter_spans(buffer, shard="a.tar"))
        crc32 = [payload_crc32(buffer, span) for span in spans]
    places = [(i, span.key, span.byte_offset, span.n_bytes) for i, span in enumerate(spans)]
    assert scan_spans(shard, shard="a.tar").rows() == [
        (*place, crc) for place, crc in zip(places, crc32, strict=True)
    ]
    assert scan_spans(shard, shard="a.tar", checksums=False).rows() == [(*place, 0) for place in places]


@pytest.mark.parametrize(
    ("limit", "keys", "n_ignored"), [(None, "abc", 2), (1, "a", 1), (3, "abc", 2), (9, "abc", 2)]
)
def test_a_walk_stops_after_its_limit_and_logs_what_it_ignored(
    shard: Path, caplog: Caplog, limit: int | None, keys: str, n_ignored: int
) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    with open_shard(shard) as buffer:
        walked = list(walk_shard(buffer, shard="a.tar", limit=limit, level=logging.WARNING))
    assert "".join(span.key for span in walked) == keys
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"shard a.tar: {n_ignored} member")


def test_an_empty_shard_is_a_warning_that_names_what_it_holds(tmp_path: Path, caplog: Caplog) -> None:
    path = write_tar(tmp_path / "a.tar", [("README", b"")])
    assert len(scan_spans(path, shard="a.tar")) == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "shard a.tar: no samples (1 member ignored: first 'README'); it counts as 0"
