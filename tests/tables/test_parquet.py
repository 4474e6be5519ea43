"""Files of a later version, with more columns, and of an earlier one, with fewer, are read; other columns are not."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adq_wds.errors import PlanError
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.parquet import HASH_KEY, HEADER_KEY, GroupFile, column_hash, column_hashes, write_groups

KEY = pa.field("key", pa.string(), nullable=False)
SIZE = pa.field("size", pa.int32(), nullable=False)
DIGEST = pa.field("digest", pa.binary(4), nullable=False)
NOTE = pa.field("note", pa.string(), nullable=False)
VALUES: dict[str, list[Any]] = {
    "key": ["a", "b", "c"],
    "size": [1, 2, 3],
    "digest": [b"aaaa", b"bbbb", b"cccc"],
    "note": ["x", "", "y"],
}


def written(folder: Path, *fields: pa.Field, **values: list[Any]) -> GroupFile:
    schema = pa.schema(fields)
    table = pa.table({name: (VALUES | values)[name] for name in schema.names}, schema=schema)
    entry = {"name": "a.tar", "n": table.num_rows, "columns": column_hashes(table)}
    path = folder / "t.parquet"
    write_groups(path, schema, [table], {"format": "adq_wds.t", "version": 1, "shards": [entry]})
    return GroupFile(path, kind="t", version=1, error=PlanError)


def test_a_further_column_is_ignored_at_any_position(tmp_path: Path) -> None:
    file = written(tmp_path, NOTE, SIZE, DIGEST, KEY)
    assert file.group(0, pa.schema([KEY, SIZE])).to_pydict() == {n: VALUES[n] for n in ("key", "size")}


def test_an_optional_column_is_read_only_where_present(tmp_path: Path) -> None:
    schema = pa.schema([KEY, DIGEST, NOTE])
    file = written(tmp_path, KEY, NOTE)
    assert file.group(0, schema, optional=("digest",)).column_names == ["key", "note"]
    assert file.group(0, schema, ["note", "digest"], optional=("digest",)).column_names == ["note"]
    assert ("digest" in file.columns, "note" in file.columns) == (False, True)
    file = written(tmp_path, KEY, DIGEST, NOTE)
    assert file.group(0, schema, ["digest"], optional=("digest",)).to_pydict() == {"digest": VALUES["digest"]}


def test_required_columns_must_exist_and_all_have_their_types(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a\.tar': damaged: .no column 'size', only \['key'\]"):
        written(tmp_path, KEY).group(0, pa.schema([KEY, SIZE]))
    other = pa.field("note", pa.int32(), nullable=False)
    with pytest.raises(PlanError, match="column note: int32 not null, expected string not null"):
        written(tmp_path, KEY, other, note=[1, 2, 3]).group(0, pa.schema([KEY, NOTE]), optional=("note",))


@pytest.mark.parametrize("name", ["key", "key.x"])
def test_a_column_that_pyarrow_reads_with_another_is_refused(name: str, tmp_path: Path) -> None:
    schema = pa.schema([KEY, pa.field(name, pa.string(), nullable=False)])
    table = pa.Table.from_arrays([VALUES["key"], VALUES["note"]], schema=schema)
    entry = {"name": "a.tar", "n": 3, "columns": {"key": column_hash(table.column(0))}}
    path = tmp_path / "t.parquet"
    # written without `write_groups`, whose check of names asks for columns by name
    with pq.ParquetWriter(path, schema) as writer:
        writer.write_table(table)
        text = canonical_json({"format": "adq_wds.t", "version": 1, "shards": [entry]})
        writer.add_key_value_metadata({HEADER_KEY: text, HASH_KEY: sha256_text(text)})
    file = GroupFile(path, kind="t", version=1, error=PlanError)
    with pytest.raises(PlanError, match="columns named twice or with a dot"):
        file.group(0, pa.schema([KEY]))


def test_more_fixed_size_bytes_than_the_file_has_are_not_read(tmp_path: Path) -> None:
    wide = pa.field("digest", pa.binary(50_000), nullable=False)
    file = written(tmp_path, KEY, wide, digest=[bytes(50_000)] * 3)
    with pytest.raises(PlanError, match="column 'digest' claims 3 rows of 50,000 bytes in a file of"):
        file.group(0, pa.schema([KEY, wide]))
