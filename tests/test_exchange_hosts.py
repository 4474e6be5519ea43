"""What a plan exports is what the real library reads; each test is skipped where its library is not installed.

``pip install -e ".[exchange,test]"`` installs most of them; FiftyOne and LightlyStudio bring a database each.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import adq_wds as adq
from tests.conftest import jpeg, write_tar

KEYS = [
    "a,b",
    'qu"ote',
    "it's",
    "=SUM(1)",
    "ключ",
    "鍵",
    "👨‍👩‍👧",
    "sp ace ",
    "back\\slash",
    "%s",
    "new\nline",
    *"0123456789",
]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [(f"{key}.{field}", f"{field} of {key}".encode()) for key in KEYS for field in ("txt", "bin")]
    return write_tar(tmp_path / "a.tar", members)


@pytest.fixture
def plan(shard: Path) -> adq.Plan:
    return adq.Plan.from_keys(str(shard), KEYS[::2])


@pytest.fixture
def indices(plan: adq.Plan, tmp_path: Path) -> Any:
    plan.export("indices", tmp_path / "keep.npy")
    return np.load(tmp_path / "keep.npy")


def test_torch_subsets(plan: adq.Plan, indices: Any) -> None:
    assert list(torch.utils.data.Subset(KEYS, indices)) == plan.keys()  # type: ignore[arg-type]


def test_datasets_of_shards_and_of_parquet(plan: adq.Plan, indices: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cache = str(tmp_path / "cache")
    files = [str(tmp_path / name) for name in plan.shards]
    of_shards = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=cache)
    assert of_shards.select(indices)["__key__"] == plan.keys()
    pq.write_table(plan.table(), tmp_path / "table.parquet")
    plan.export("parquet-filter", tmp_path / "keep.json")
    filters = json.loads((tmp_path / "keep.json").read_text())
    path = str(tmp_path / "table.parquet")
    filtered = datasets.load_dataset(
        "parquet", data_files=path, filters=filters, split="train", cache_dir=cache
    )
    assert filtered["key"] == plan.keys()
    for to in ("csv", "json"):
        name = str(tmp_path / f"keep.{to}l".replace("csvl", "csv"))
        plan.export({"json": "jsonl"}.get(to, to), name)
        rows = datasets.load_dataset(to, data_files=name, split="train", cache_dir=cache)
        assert rows["key"] == plan.keys()


def test_litdata_subsets(plan: adq.Plan, indices: Any, tmp_path: Path) -> None:
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.cache import Cache
    from litdata.utilities.train_test_split import subset_dataset

    cache = Cache(str(tmp_path / "lit"), chunk_size=4)
    for i, key in enumerate(KEYS):
        cache[i] = {"key": key}
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(str(tmp_path / "lit"))
    assert [row["key"] for row in subset_dataset(dataset, indices.tolist())] == plan.keys()


def test_lancedb_conditions(plan: adq.Plan, indices: Any, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    table = lancedb.connect(str(tmp_path / "db")).create_table("t", plan.table())
    plan.export("lancedb", tmp_path / "keep.sql")
    condition = (tmp_path / "keep.sql").read_text(encoding="utf-8")
    assert table.search().where(condition).limit(None).to_arrow()["key"].to_pylist() == plan.keys()
    assert table.take_offsets(indices.tolist()).to_arrow()["key"].to_pylist() == plan.keys()


def test_webshart_indexes(tmp_path: Path) -> None:
    webshart = pytest.importorskip("webshart")
    keys = ["a,b", 'qu"ote', "it's", "new\nline", "k1", "k2"]
    members = [(f"{key}.{field}", f"{field} of {key}".encode()) for key in keys for field in ("txt", "cls")]
    (tmp_path / "shards").mkdir()
    shard = write_tar(tmp_path / "shards" / "a.tar", members)
    plan = adq.Plan.from_keys(str(shard), keys[::2])
    plan.export("webshart", tmp_path / "indexes")
    dataset = webshart.discover_dataset(str(tmp_path / "shards"), metadata=str(tmp_path / "indexes"))
    names = dataset.list_files_in_shard(0)
    reader = dataset.open_shard(0)
    read = {name: reader.read_file(i) for i, name in enumerate(names)}
    assert read == {f"{key}.{f}": f"{f} of {key}".encode() for key in keys[::2] for f in ("txt", "cls")}


def test_pandas_reads_csv_and_jsonl(plan: adq.Plan, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    plan.export("csv", tmp_path / "keep.csv")
    plan.export("jsonl", tmp_path / "keep.jsonl")
    assert (
        pandas.read_csv(tmp_path / "keep.csv", dtype=str, keep_default_na=False)["key"].tolist()
        == plan.keys()
    )
    rows = pandas.read_json(tmp_path / "keep.jsonl", lines=True, dtype=False)
    assert rows["key"].astype(str).tolist() == plan.keys()


def test_lightly_studio_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = pytest.importorskip("lightly_studio")
    monkeypatch.chdir(tmp_path)
    keys = ["k0", "it's", "ключ"]
    (tmp_path / "images").mkdir()
    for i, key in enumerate(keys):
        (tmp_path / "images" / f"{key}.jpg").write_bytes(jpeg(i))
    shard = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", jpeg(i)) for i, key in enumerate(keys)])
    adq.Plan.from_keys(str(shard), keys[1:]).export("tags", tmp_path / "tags.json")
    dataset = studio.ImageDataset.create()
    dataset.add_images_from_path(path=str(tmp_path / "images"), embed=False)
    tag_of = {key: tag for tag, keys in json.loads(Path("tags.json").read_text()).items() for key in keys}
    for sample in dataset:
        sample.add_tag(tag_of[Path(sample.file_name).stem])
    assert {Path(s.file_name).stem: set(s.tags) for s in dataset} == {key: {tag_of[key]} for key in keys}


def test_fiftyone_tags(tmp_path: Path) -> None:
    fiftyone = pytest.importorskip("fiftyone")
    shard = write_tar(tmp_path / "a.tar", [(f"{key}.jpg", jpeg(i)) for i, key in enumerate(KEYS)])
    adq.Plan.from_keys(str(shard), KEYS[::2]).export("tags", tmp_path / "tags.json")
    dataset = fiftyone.Dataset()
    try:
        dataset.add_samples([fiftyone.Sample(f"/images/{i}.jpg", key=key) for i, key in enumerate(KEYS)])
        for tag, keys in json.loads((tmp_path / "tags.json").read_text()).items():
            dataset.select_by("key", keys).tag_samples(tag)
        assert dataset.match_tags("kept").values("key") == KEYS[::2]
    finally:
        dataset.delete()
