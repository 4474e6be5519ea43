"""Files written by every earlier version are read, to the last value. The golden files: tests/golden/make.py."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.tables.spans import load_index

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))
PLAN_COLUMNS = {
    "shard": pa.string(), "index": pa.int32(), "key": pa.string(), "byte_offset": pa.int64(), "n_bytes": pa.int64(),
    "crc32": pa.uint32(), "label": pa.int32(), "bin": pa.int16(), "pick": pa.int32(), "rank": pa.int32(),
    "kept": pa.bool_(),
}  # fmt: skip


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.fixture
def expected(folder: Path) -> dict[str, object]:
    """What a person read off the files once and checked, beside them."""
    values: dict[str, object] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return values


def test_there_is_a_golden_file_per_version() -> None:
    from adq_wds.tables import bins, features_file, plan, spans

    assert len(VERSIONS) == max(module.VERSION for module in (bins, features_file, plan, spans))


def test_plans_are_read_to_the_last_value(folder: Path, expected: dict[str, object]) -> None:
    plan = adq.load_plan(folder / "plan.parquet")
    assert plan.hash == expected["plan_hash"]
    assert plan.table().to_pydict() == expected["plan"]
    assert {field.name: field.type for field in plan.table().schema} == PLAN_COLUMNS


def test_features_are_read_to_the_last_value(folder: Path, expected: dict[str, object]) -> None:
    features = adq.Features(folder / "features")
    assert features.hash == expected["features_hash"]
    rows: list[list[object]] = [
        [file.shard, file.spans().keys, file.texture().tolist(), file.embedding().tolist(), file.bad]
        for file in features
    ]
    if folder.name != "v1":
        for row, file in zip(rows, features, strict=True):
            row += [file.logit_grad().tolist(), file.score("sharp").tolist()]
    for row, file in zip(rows, features, strict=True):
        digest = file.digest()
        assert (digest is None) == (folder.name in ("v1", "v2"))
        row += [] if digest is None else [digest.tolist()]
    assert json.loads(json.dumps(rows)) == expected["features"]


def test_bins_are_read_to_the_last_value(folder: Path, expected: dict[str, object]) -> None:
    bins = adq.Bins.load(folder / "bins.parquet")
    assert [bins.label.tolist(), bins.bin.tolist(), bins.pick.tolist()] == expected["bins"]
    assert bins.header["features"] == expected["features_hash"]


def test_indices_are_read_to_the_last_value(folder: Path, expected: dict[str, object]) -> None:
    found = load_index(folder / "index.parquet")
    assert {name: [list(row) for row in spans.rows()] for name, spans in found.items()} == expected["index"]


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/codebook.safetensors")), ids=lambda p: p.parent.name)
def test_codebooks_are_read_to_the_last_value(folder: Path) -> None:
    codebook = adq.load_codebook(folder)
    expected = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    assert codebook.hash == expected["hash"]
    assert codebook.header == expected["header"]
    for name in ("query", "threshold", "label", "held_out", "weight"):
        assert getattr(codebook, name).tolist() == expected[name]
    assert np.allclose(codebook.rates(0.3), expected["rates"], rtol=0, atol=1e-15)
    again = adq.fit_codebook(folder.parent / "features", bins=2, min_pilot=2)
    assert np.allclose(again.query, codebook.query, rtol=0, atol=1e-6)


def test_the_same_features_still_give_the_same_plan(folder: Path, tmp_path: Path) -> None:
    """Mathematics and draws are part of the format: a plan made today equals the one made then."""
    old = adq.load_plan(folder / "plan.parquet")
    plan = adq.build_plan(
        folder / "features",
        bins=2,
        kernel=old.header["settings"]["kernel"],
        keep=0.5,
        seed=3,
        must_include=[("a-000000.tar", "k001")],
    )
    assert plan.table().equals(old.table())
    assert np.isclose(plan.header["bins"][0]["importance"], old.header["bins"][0]["importance"], atol=1e-12)
