"""Features are read as they were written or not at all, and never mixed."""

import dataclasses
import hashlib
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.tables import features
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import FeaturesFile, ShardFeatures
from adq_wds.tables.parquet import column_hash, list_array

MakeFeatures = Callable[..., ShardFeatures]
BAD = [2, 7]


@pytest.fixture
def made(make_features: MakeFeatures) -> ShardFeatures:
    """Eight usable samples and two bad ones."""
    return make_features("deep/a.tar", [0, 1, 1, 0, 2, 2, 0, 1], bad=BAD, names=["cat", "dog", "öwl"])


@pytest.fixture
def path(made: ShardFeatures, tmp_path: Path) -> Path:
    return tmp_path / "features" / "deep--a.parquet"


# ---- There and back


def test_writing_and_reading_changes_nothing(made: ShardFeatures, path: Path) -> None:
    file = FeaturesFile(path)
    assert (file.shard, file.n, file.n_read, file.width) == ("deep/a.tar", 8, 10, 6)
    assert file.names == ["cat", "dog", "öwl"]
    assert file.embedding().dtype == np.float16
    assert file.embedding().tobytes() == made.embedding.tobytes()
    assert file.texture().tobytes() == made.texture.tobytes()
    columns = file.read_columns(["label", "norm", "shard"])
    assert columns["label"].to_pylist() == made.label.tolist()
    assert columns["norm"].to_pylist() == made.norm.tolist()
    assert set(columns["shard"].to_pylist()) == {"deep/a.tar"}
    assert file.spans().rows() == made.spans.rows()
    assert made.bad is not None
    assert file.bad_spans().rows() == made.bad.rows()
    assert [row[5] for row in file.bad] == ["not an image"] * 2
    assert {name: file.header[name] for name in made.header} == made.header


def test_an_empty_shard_is_written_and_read(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [], bad=[0, 1, 2], width=5)
    file = FeaturesFile(tmp_path / "features" / "a.parquet")
    assert (file.n, file.n_read, file.embedding().shape, len(file.spans())) == (0, 3, (0, 5), 0)


def test_gradients_and_scores_are_columns_of_version_2(make_features: MakeFeatures, tmp_path: Path) -> None:
    made = make_features("a.tar", [0, 2, 1], n_classes=3, scores={"sharp": "2", "bright": "1"}, bad=[1])
    file = FeaturesFile(tmp_path / "features" / "a.parquet")
    assert (file.header["version"], file.n_classes, file.scores) == (2, 3, {"sharp": "2", "bright": "1"})
    assert made.logit_grad is not None
    assert file.logit_grad().tobytes() == made.logit_grad.tobytes()
    assert file.score("sharp").tobytes() == made.scores["sharp"].tobytes()
    assert file.norm().tobytes() == made.norm.tobytes()
    plain = make_features("b.tar", [0, 1])
    file = FeaturesFile(tmp_path / "features" / "b.parquet")
    assert (file.header["version"], file.n_classes, file.scores, plain.scores) == (1, None, {}, {})


@pytest.mark.parametrize("labels", [[], [0, 2, 1]])
def test_digests_are_a_v3_column(make_features: MakeFeatures, tmp_path: Path, labels: list[int]) -> None:
    made = make_features("a.tar", labels, bad=[0])
    assert FeaturesFile(tmp_path / "features" / "a.parquet").digest() is None
    digest = np.random.default_rng(0).integers(0, 256, (len(labels), 16), dtype=np.uint8)
    path = tmp_path / "b.parquet"
    dataclasses.replace(made, digest=digest).save(path)
    file = FeaturesFile(path)
    found = file.digest()
    assert found is not None
    assert (file.header["version"], found.dtype, found.tobytes()) == (3, np.uint8, digest.tobytes())
    assert found.shape == (len(labels), 16)
    part = FeaturesFile(path, limit=2).digest()
    assert part is not None
    assert part.tobytes() == digest[: len(part)].tobytes()
    assert pq.ParquetFile(path).schema_arrow.field("digest").type == pa.binary(16)


def test_features_without_images_have_no_texture(make_features: MakeFeatures, tmp_path: Path) -> None:
    made = make_features("a.tar", [0, 2, 1])
    dataclasses.replace(made, texture=None).save(tmp_path / "b.parquet")
    file = FeaturesFile(tmp_path / "b.parquet")
    assert (file.header["version"], file.has_texture) == (3, False)
    assert file.embedding().tobytes() == made.embedding.tobytes()
    with pytest.raises(adq.FeaturesError, match=r"b\.parquet: no texture here.*scores=\['diversity'\]"):
        file.texture()


def test_what_a_file_does_not_hold_is_refused_by_name(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1], scores={"sharp": "1"})
    file = FeaturesFile(tmp_path / "features" / "a.parquet")
    with pytest.raises(adq.FeaturesError, match=r"a\.parquet: no logit .* here; embed with logit_grad=True"):
        file.logit_grad()
    with pytest.raises(adq.FeaturesError, match=r"no score 'bright' here, only \['sharp'\]; embed with it"):
        file.score("bright")
    features = Features(tmp_path / "features")
    with pytest.raises(adq.FeaturesError, match="which kernel 'gradient' needs; embed with logit_grad=True"):
        _ = features.n_classes


def test_columns_made_otherwise_are_not_mixed(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1], n_classes=2, scores={"sharp": "1"})
    make_features("b.tar", [0, 1], n_classes=3, scores={"sharp": "2"})
    features = Features(tmp_path / "features")
    with pytest.raises(adq.FeaturesError, match=r"a\.parquet has logit gradients \(2, 'softmax'\), .* \(3"):
        _ = features.n_classes
    with pytest.raises(adq.FeaturesError, match=r"score 'sharp' has revision '1' in .* and '2' in .*b\."):
        features.score("sharp")
    make_features("b.tar", [0, 1, 1], n_classes=2, scores={"sharp": "1"})
    features = Features(tmp_path / "features")
    assert features.n_classes == 2
    assert features.score("sharp").shape == (5,)


GOLDEN = {
    "int16": (pa.array([1, -2], pa.int16()), struct.pack("<2h", 1, -2)),
    "int32": (pa.array([1, -2], pa.int32()), struct.pack("<2i", 1, -2)),
    "int64": (pa.array([1, -(2**40)], pa.int64()), struct.pack("<2q", 1, -(2**40))),
    "uint32": (pa.array([1, 2**32 - 1], pa.uint32()), struct.pack("<2I", 1, 2**32 - 1)),
    "bool": (pa.array([True, False], pa.bool_()), b"\x01\x00"),
    "float": (pa.array([0.5, -1.25], pa.float32()), struct.pack("<2f", 0.5, -1.25)),
    "string": (pa.array(["a", "öö"], pa.string()), struct.pack("<2q", 1, 4) + "aöö".encode()),
    "fixed_size_binary[2]": (pa.array([b"ab", b"cd"], pa.binary(2)), b"abcd"),
    "fixed_size_list<element: halffloat not null>[2]": (
        list_array(np.array([[0.5, 1], [-2, 0]], np.float16)),
        struct.pack("<4e", 0.5, 1, -2, 0),
    ),
}
# Written down once: `column_hash` of the arrays above. A change here makes every file in the world unreadable.
GOLDEN_HASH = {
    "int16": "a41c5359aae5ee4f9e23c0a72fc38f6bc456186e100099dadf1a208efc3fadd9",
    "int32": "1cfc883423910e2efcbaf6a2cd8a1a2ea7b163a9b993ffed2733ee6863834328",
    "int64": "c04469e11c2075ad2ffbac6c45f6d34858b805fddd9ec666f9af6fd549c7af13",
    "uint32": "93536fae4dd085ef2d5241aeb8285185bf37c2d92bc006c244003774b338ec28",
    "bool": "0ac1bb49964f289be9540f187687d525c3cc8d00f4155536841392140a5c9991",
    "float": "b9e476e96c53e4aaa88faf92e577cee23732cc29ff151461478971f23ddf6cf9",
    "string": "0d2f1dc6f8cf42153cb341cfb4dd317c120a73db9e4a23c947357a71ea991416",
    "fixed_size_binary[2]": "6ef5aabefebd983b58e5f3d9ea280fa9356391874fdfa2e0b4f7f234651a22eb",
    "fixed_size_list<element: halffloat not null>[2]": "bba9b332638a5b61f02adcc5763f9ab075c07440209ff362c90f53c2f7091a0f",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_columns_hash_is_what_the_format_says(kind: str) -> None:
    array, payload = GOLDEN[kind]
    expected = hashlib.sha256(f"{kind}\n2\n".encode() + payload).hexdigest()
    assert column_hash(array) == expected == GOLDEN_HASH[kind]
    parts = pa.chunked_array([array.slice(0, 1), array.slice(1)])
    assert column_hash(parts) == expected
    padded = pa.concat_arrays([array.slice(1), array, array.slice(0, 1)])
    assert column_hash(padded.slice(1, 2)) == expected, "a slice hashes as its own values"


def test_empty_values_have_no_hash() -> None:
    with pytest.raises(ValueError, match="1 empty values in a column of int32"):
        column_hash(pa.array([1, None], pa.int32()))


def test_strings_that_join_alike_hash_apart() -> None:
    assert column_hash(pa.array(["ab", "c"])) != column_hash(pa.array(["a", "bc"]))
    assert column_hash(pa.array([], pa.string())) != column_hash(pa.array([""]))


# ---- Checked when saved (F31)


@pytest.mark.parametrize("column", ["embedding", "norm", "texture", "logit_grad", "sharp"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_not_saved(
    column: str, value: float, make_features: MakeFeatures, tmp_path: Path
) -> None:
    made = make_features("a.tar", [0, 1, 1], bad=[1], n_classes=3, scores={"sharp": "1"})
    array = made.scores["sharp"] if column == "sharp" else getattr(made, column)
    array[1 if array.ndim == 1 else (1, 2)] = value
    with pytest.raises(adq.FeaturesError, match=rf"shard a\.tar, key 'k0002': {column} holds NaN or"):
        made.save(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"label": np.zeros(7, np.int32)}, r"label is \(7,\) int32, expected 8 rows of int32"),
    ({"label": np.full(8, -2, np.int32), "names": None}, "labels -2 … -2, expected -1 …"),
    ({"label": np.full(8, 3, np.int32)}, "labels 3 … 3, expected 0 … 2"),
    ({"label": np.full(8, -1, np.int32)}, "labels -1 … -1, expected 0 … 2"),
    ({"embedding": np.ones((8, 4), np.float32)}, r"embedding is \(8, 4\) float32, expected 8 rows of .*half"),
    ({"embedding": np.ones((8, 0), np.float16)}, r"embedding is \(8, 0\) float16"),
    ({"embedding": np.ones(8, np.float16)}, r"embedding is \(8,\) float16"),
    ({"bad_reasons": []}, "0 reasons for 2 bad samples"),
    ({"scores": {"sharp": np.ones(8, np.float32)}}, r"scores \['sharp'\], its header says others"),
    ({"logit_grad": np.ones((8, 3), np.float16)}, "logit gradients and a header that contradicts them"),
    ({"logit_grad": np.ones((2, 3), np.float16)}, r"logit_grad is \(2, 3\) float16, expected 8 rows"),
    ({"scores": {"sharp": np.ones(2, np.float32)}}, r"sharp is \(2,\) float32, expected 8 rows"),
    ({"digest": np.zeros((2, 16), np.uint8)}, r"digest is \(2, 16\) uint8, expected 8 rows of .*\[16\]"),
    ({"digest": np.zeros((8, 15), np.uint8)}, r"digest is \(8, 15\) uint8"),
    ({"digest": np.zeros((8, 16))}, r"digest is \(8, 16\) float64"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_columns_that_do_not_fit_are_not_saved(
    change: dict[str, Any], text: str, made: ShardFeatures, tmp_path: Path
) -> None:
    with pytest.raises(adq.FeaturesError, match=rf"shard deep/a\.tar: {text}"):
        dataclasses.replace(made, **change).save(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


# ---- A folder


def test_files_are_ordered_by_shard_name(make_features: MakeFeatures, tmp_path: Path) -> None:
    for shard in ("b.tar", "a/z.tar", "a-b.tar", "B.tar"):
        make_features(shard, [0, 1])
    features = Features(tmp_path / "features")
    assert [file.shard for file in features] == ["B.tar", "a-b.tar", "a/z.tar", "b.tar"]
    assert len(features) == 8
    assert features.width == 6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("encoder", "encoder 'synthetic' and 'other'"),
        ("revision", "revision '1' and 'other'"),
        ("preprocessing_hash", "preprocessing_hash '0' and 'other'"),
        ("image", "image 'jpg' and 'other'"),
        ("label", "label 'cls' and 'other'"),
        ("width", "width 6 and 7"),
    ],
)
def test_other_features_do_not_mix(name: str, text: str, make_features: MakeFeatures, tmp_path: Path) -> None:
    """F29."""
    make_features("a.tar", [0, 1])
    odd = make_features("b.tar", [0, 1], width=7 if name == "width" else 6)
    if name != "width":
        odd.header[name] = "other"
        odd.save(tmp_path / "features" / "b.parquet")
    with pytest.raises(adq.FeaturesError, match=rf"a\.parquet and .*b\.parquet do not belong .* {text}"):
        Features(tmp_path / "features")


def test_two_files_of_a_shard_and_foreign_ones_are_refused(path: Path) -> None:
    path.with_name("copy.parquet").write_bytes(path.read_bytes())
    one = r"(copy|deep--a)\.parquet"
    with pytest.raises(
        adq.FeaturesError, match=rf"{one} and .*{one} both describe shard deep/a\.tar; remove"
    ):
        Features(path.parent)
    path.with_name("copy.parquet").unlink()
    pq.write_table(pa.table({"a": [1]}), path.with_name("z.parquet"))
    with pytest.raises(adq.FeaturesError, match=r"z\.parquet: not made by adq_wds"):
        Features(path.parent)


def test_only_the_shards_asked_for_are_opened(make_features: MakeFeatures, tmp_path: Path) -> None:
    for shard in ("a.tar", "b.tar", "c.tar"):
        make_features(shard, [0, 1, 2])
    (tmp_path / "features" / "b.parquet").write_bytes(b"damaged")
    features = Features(tmp_path / "features", shards=["c.tar", "a.tar"])
    assert [file.shard for file in features] == ["a.tar", "c.tar"]
    with pytest.raises(adq.FeaturesError, match=r"d\.parquet: no such file"):
        Features(tmp_path / "features", shards=["a.tar", "d.tar"])


def test_a_view_of_other_samples_has_another_hash(make_features: MakeFeatures, tmp_path: Path) -> None:
    for shard in ("a.tar", "b.tar"):
        make_features(shard, [0, 1, 2], bad=[1])
    folder = tmp_path / "features"
    views = [Features(folder), Features(folder, shards=["a.tar"])]
    views += [Features(folder, limit=limit) for limit in (1, 2, 3, 5, 7)]
    assert len({view.hash for view in views}) == len(views)
    assert Features(folder).hash == Features(folder, limit=8).hash == Features(folder, limit=1000).hash


@pytest.mark.parametrize("limit", range(1, 16))
def test_a_limit_counts_good_and_bad_samples(limit: int, make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1, 2, 0], bad=[0, 1, 3])  # positions 2 4 5 6
    make_features("b.tar", [1, 1, 1, 1, 1], bad=[5], first=50)
    features = Features(tmp_path / "features", shards=["b.tar", "a.tar"], limit=limit)
    everyone = [("b.tar", i, i != 5) for i in range(6)] + [("a.tar", i, i in (2, 4, 5, 6)) for i in range(7)]
    expected = everyone[:limit]
    for file in features:
        mine = [(i, good) for shard, i, good in expected if shard == file.shard]
        assert file.spans().index.tolist() == [i for i, good in mine if good]
        assert file.bad_spans().index.tolist() == [i for i, good in mine if not good]
        assert file.n_read == len(mine)
        assert file.embedding().shape == (file.n, 6)
        assert len(file.texture()) == file.n
    assert len(features) == sum(good for _, _, good in expected)
    assert {file.shard for file in features} == {shard for shard, _, _ in expected}


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3"])
def test_a_limit_that_is_none_is_refused_with_its_value(limit: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=f"limit must be an integer >= 1, got {limit!r}"):
        Features(path.parent, limit=limit)
    assert repr(Features(path.parent)) == "<Features 8 samples in 1 shards, synthetic, D = 6>"


def test_more_files_than_a_process_may_open_give_the_same_rows(
    make_features: MakeFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(12):
        make_features(f"{i:02d}.tar", [i % 2] * 5)
    monkeypatch.setattr(features, "KEPT_OPEN", 11)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 8, limits[1]))
    try:
        opened = Features(tmp_path / "features")
        plan = adq.build_plan(opened, bins=2, keep=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    monkeypatch.setattr(features, "KEPT_OPEN", 12)
    kept_open = Features(tmp_path / "features")
    assert len(os.listdir("/proc/self/fd")) >= n_open + 12
    assert (opened.hash, plan.hash) == (kept_open.hash, adq.build_plan(kept_open, bins=2, keep=0.5).hash)
