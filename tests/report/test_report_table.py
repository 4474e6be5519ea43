"""The report's table: the plan's rows, what features add, and a file that any reader opens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.report.feature_rows import feature_rows
from adq_wds.report.projection import project
from adq_wds.report.report_table import ReportHeader, report_table, save_report_table
from adq_wds.tables.headers import checked
from tests.conftest import MakeFeatures, MakeShard

FORMAT = (Path(__file__).parents[2] / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> adq.Features:
    make_features("a.tar", [0, 1, 0, 1], names=["cat", "dog"], bad=[1], contents=[1, 2, 3, 3])
    make_features("b.tar", [0, 0], names=["dog"], first=10, contents=[5, 6])
    return adq.Features(tmp_path / "features")


@pytest.fixture
def plan(features: adq.Features) -> adq.Plan:
    return adq.build_plan(features, keep=0.5, bins=1, dedup="exact", bins_by="difficulty")


def test_each_sample_has_its_row_of_the_features(plan: adq.Plan, features: adq.Features) -> None:
    """The second sample of the first shard is bad."""
    assert feature_rows(plan, features).tolist() == [0, -1, 1, 2, 3, 4, 5]


def test_the_table_has_the_plans_rows_and_the_features(plan: adq.Plan, features: adq.Features) -> None:
    xy = project(features)
    table = report_table(plan, features, xy)
    rows = plan.table()
    for name in ("shard", "key", "label", "bin", "pick", "rank", "kept", "reason", "duplicate_of"):
        assert table[name].to_pylist() == rows[name].to_pylist(), name
    assert table["class"].to_pylist() == ["cat", "", "dog", "cat", "dog", "dog", "dog"]
    bad = np.arange(7) == 1
    for name, values in (("x", xy[:, 0]), ("y", xy[:, 1]), ("texture", features.texture())):
        column = table[name].to_numpy()
        assert np.isnan(column).tolist() == bad.tolist()
        assert column[~bad].tolist() == values.tolist()
    assert np.isnan(table["margin"].to_numpy()[bad]).all()


def test_a_plan_alone_has_no_places(plan: adq.Plan) -> None:
    names = report_table(plan).column_names
    assert "key" in names
    assert not {"x", "y", "texture"} & set(names)


def test_a_plan_from_keys_has_a_table(tmp_path: Path, make_shard: MakeShard) -> None:
    shard = make_shard("a.tar", 3)
    table = report_table(adq.Plan.from_keys(str(shard), ["s00001"]))
    assert table["kept"].to_pylist() == [False, True, False]
    assert table["class"].to_pylist() == ["", "", ""]
    assert set(table["bin"].to_pylist()) == {-1}


def test_features_of_other_samples_are_refused(
    plan: adq.Plan, make_features: MakeFeatures, tmp_path: Path
) -> None:
    folder = tmp_path / "others"
    make_features("a.tar", [0, 1, 0, 1], bad=[1], folder=folder)
    with pytest.raises(adq.FeaturesError, match=r"no features of shard 'b\.tar'"):
        feature_rows(plan, adq.Features(folder))
    b = make_features("b.tar", [0, 0], first=10, folder=folder)
    replace(b, spans=replace(b.spans, crc32=b.spans.crc32 + np.uint32([0, 1]))).save(folder / "b.parquet")
    with pytest.raises(adq.FeaturesError, match=r"shard b\.tar, key 'k0011': .* other bytes; give those"):
        feature_rows(plan, adq.Features(folder))


def test_the_file_is_flat_and_described(plan: adq.Plan, features: adq.Features, tmp_path: Path) -> None:
    table = report_table(plan, features, project(features))
    for name in ("a.parquet", "b.parquet"):
        save_report_table(table, tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    read = pq.read_table(tmp_path / "a.parquet")
    assert read.num_rows == plan.n_samples
    header = checked(json.loads(read.schema.metadata[b"adq_wds"]), ReportHeader)  # type: ignore[arg-type]
    assert (header["plan"], header["features"]) == (plan.hash, features.hash)
    section = FORMAT.split("## The report's table")[1].split("\n## ")[0]
    for name in (*table.column_names, *header):
        assert f"`{name}`" in section, name
    assert f"ersion {header['version']}" in section
