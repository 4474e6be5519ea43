"""A user's Parquet file that nothing can be found in is refused when it is opened."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.tables.keyed_rows import KeyedRows


@pytest.mark.parametrize("columns", [["key"], ["key", "shard"]])
def test_a_file_without_rows_is_refused(columns: list[str], tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in columns}), path)
    with pytest.raises(adq.FeaturesError, match=r"e\.parquet: no rows; expected one for each sample"):
        KeyedRows(path, {})
