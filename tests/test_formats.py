"""Files written by every earlier version are read, to the last value. The golden files: tests/golden/make.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.tables.bins import Bins
from adq_wds.tables.soft_labels import SoftTable
from tests.folders import load_index
from tests.golden.make import labels_and_embeddings

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))
PLAN_COLUMNS = {
    "shard": pa.string(), "index": pa.int32(), "key": pa.string(), "byte_offset": pa.int64(), "n_bytes": pa.int64(),
    "crc32": pa.uint32(), "label": pa.int32(), "bin": pa.int16(), "pick": pa.int32(), "rank": pa.int32(),
    "kept": pa.bool_(),
}  # fmt: skip
REASONS = {"reason": pa.string(), "duplicate_of": pa.string()}
MEMBERS = {"members": pa.string()}


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.fixture
def expected(folder: Path) -> dict[str, object]:
    """What a person read off the files once and checked, beside them."""
    values: dict[str, object] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return values


def test_there_is_a_golden_file_per_version() -> None:
    from adq_wds.tables import bins, features_file, index, plan

    assert len(VERSIONS) == max(module.VERSION for module in (bins, features_file, index, plan))


def test_plans_are_read_to_the_last_value(folder: Path, expected: dict[str, object]) -> None:
    plan = adq.load_plan(folder / "plan.parquet")
    assert plan.hash == expected["plan_hash"]
    assert plan.table().to_pydict() == expected["plan"]
    more = {"v1": {}, "v2": {}, "v3": REASONS}.get(folder.name, REASONS | MEMBERS)
    assert {field.name: field.type for field in plan.table().schema} == PLAN_COLUMNS | more


def test_epochs_of_fresh_draws_are_those_of_the_version(folder: Path, expected: dict[str, Any]) -> None:
    """Version 1 takes each cell's quota from the next ranks on in every epoch; later ones go by their shares."""
    plan = adq.load_plan(folder / "plan.parquet")
    if "epochs" in expected:
        for epoch, kept in zip((0, 1, 2, 3, 1000, 10**9), expected["epochs"], strict=True):
            assert [plan.kept_in(name, epoch).tolist() for name in plan.shards] == kept
        return
    cells, classes = plan.header["cells"], [c["label"] for c in plan.header["classes"]]
    for epoch in (0, 1, 5):
        for rows in plan:
            for i, kept in enumerate(plan.kept_in(rows.name, epoch).tolist()):
                rank, inside = int(rows.rank[i]), rows.bin[i] >= 0 and rows.rank[i] >= 0
                if inside:
                    c, k = classes.index(rows.label[i]), rows.bin[i]
                    quota, size = cells["quota"][c][k], cells["size"][c][k]
                    assert kept == ((rank - epoch * quota) % size < quota)
                else:
                    assert kept == (rank == -1)


def test_soft_labels_are_read_to_the_last_value(folder: Path) -> None:
    if not (folder / "soft.parquet").exists():
        return
    expected = json.loads((folder / "soft.json").read_text(encoding="utf-8"))
    table = SoftTable(folder / "soft.parquet")
    assert table.hash == expected["hash"]
    for shard, keys, top, probability in expected["shards"]:
        rows = table.shard(shard)
        assert (rows.keys, rows.top.tolist(), rows.probability.tolist()) == (keys, top, probability)


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
    indexed = load_index(folder / "index.parquet")
    assert {name: [list(row) for row in spans.rows()] for name, spans in indexed.items()} == expected["index"]
    members = {name: spans.members and spans.members.to_pylist() for name, spans in indexed.items()}
    assert members == expected.get("members", dict.fromkeys(indexed))


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


def test_codebooks_that_clean_answer_to_the_last_value() -> None:
    folder = GOLDEN / "v4"
    codebook = adq.load_codebook(folder / "cleaned_codebook.safetensors")
    expected = json.loads((folder / "cleaned_codebook.json").read_text(encoding="utf-8"))
    assert (codebook.hash, codebook.header) == (expected["hash"], expected["header"])
    assert np.allclose(codebook.class_rates(0.3), expected["rates"], rtol=0, atol=1e-15)
    assert codebook.margins is not None
    assert codebook.copies is not None
    label, embedding = labels_and_embeddings(folder)
    assert codebook.margins.margins(embedding, label).tolist() == expected["margins"]
    assert [None if np.isinf(m) else m for m in codebook.margins.least] == expected["least"]
    assert [codebook.copies.digest.tolist(), codebook.copies.stays.tolist()] == [
        expected["digest"],
        expected["stays"],
    ]


def test_plans_with_margins_are_made_again_from_their_bins() -> None:
    folder = GOLDEN / "v3"
    expected = json.loads((folder / "cleaned.json").read_text(encoding="utf-8"))
    plan, bins = adq.load_plan(folder / "cleaned.parquet"), Bins.load(folder / "cleaned_bins.parquet")
    assert (plan.hash, plan.header["clean"]) == (expected["hash"], expected["clean"])
    rows = plan.table().to_pydict()
    rows["margin"] = [None if margin != margin else margin for margin in rows["margin"]]
    assert rows == expected["plan"]
    asked: dict[str, Any] = {"clean": 0.2, "dedup": 0.99, "exclude": [("a-000000.tar", "k001")]}
    # by the margins in these bins; margins of new bins are by the newest rule
    again = adq.build_plan(folder / "features", bins=bins, keep=0.5, seed=3, balance=0.5, **asked)
    assert again.hash == plan.hash


def test_the_same_features_still_give_the_same_plan() -> None:
    """Mathematics and draws are part of the format: a plan made today equals the newest one of golden files.

    Those of earlier versions were made by earlier rules: they are read, not made again.
    """
    folder = GOLDEN / VERSIONS[-1]
    old = adq.load_plan(folder / "plan.parquet")
    asked: Any = {"kernel": old.header["settings"]["kernel"], "must_include": [("a-000000.tar", "k001")]}
    plan = adq.build_plan(folder / "features", bins=2, keep=0.5, seed=3, **asked)
    assert plan.table().equals(old.table())
    assert plan.header["cells"] == old.header["cells"]
    assert np.isclose(plan.header["bins"][0]["importance"], old.header["bins"][0]["importance"], atol=1e-12)
