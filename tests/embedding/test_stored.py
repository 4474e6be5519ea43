"""Stored embeddings are found by shard and key, by position or in the sample, and no file is believed on its word."""

import hashlib
import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.embedding.stored import open_embeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.embedding.stored_parquet import MAX_GROUPS
from adq_wds.errors import FeaturesError, SampleError

KEYS = ["a", "b", "c", "d", "e"]
H = np.arange(15, dtype=np.float32).reshape(5, 3) - 7


def write(path: Path, h: NDArray[Any] = H, keys: list[str] = KEYS, *, group: int = 2, **columns: Any) -> Path:
    pq.write_table(pa.table({"key": keys, "embedding": list(h), **columns}), path, row_group_size=group)
    return path


def saved(path: Path, array: Any, **options: Any) -> Path:
    with path.open("wb") as file:
        np.save(file, array, **options)
    return path


def rows(source: StoredEmbeddings, shard: str, keys: list[str], first: int = 0) -> NDArray[np.float32]:
    found = [source.row({"__key__": key}, shard=shard, position=first + i) for i, key in enumerate(keys)]
    assert all(row.dtype == np.float32 for row in found)
    return np.stack(found)


# ---- Parquet


@pytest.mark.parametrize("of", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda of: pa.list_(of, 3)])
def test_any_list_is_read(
    tmp_path: Path, of: pa.DataType, kind: Callable[[pa.DataType], pa.DataType]
) -> None:
    values = pa.array(list(H.astype(of.to_pandas_dtype())), type=kind(of))
    pq.write_table(pa.table({"key": KEYS, "embedding": values}), tmp_path / "e.parquet", row_group_size=2)
    source = open_embeddings(tmp_path / "e.parquet")
    np.testing.assert_array_equal(rows(source, "any.tar", ["d", "a", "e"]), H[[3, 0, 4]])
    assert (source.width, source.n_rows, source.by_position) == (3, 5, False)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_keys_and_shards_of_any_text_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    key, shard = pa.array(KEYS, kind), pa.array(["x.tar"] * 5, kind)
    source = open_embeddings(write(tmp_path / "e.parquet", keys=key, shard=shard))
    np.testing.assert_array_equal(rows(source, "x.tar", ["c", "a"]), H[[2, 0]])


def test_tensor_columns_are_read(tmp_path: Path) -> None:
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(H)
    pq.write_table(pa.table({"key": KEYS, "embedding": column}), tmp_path / "e.parquet")
    np.testing.assert_array_equal(rows(open_embeddings(tmp_path / "e.parquet"), "s", KEYS), H)


def test_a_key_in_two_shards_is_told_apart_by_file_name(tmp_path: Path) -> None:
    shards = ["/data/x.tar", "https://host/y.tar?sig=1", "/data/x.tar", "z", "/data/x.tar"]
    source = open_embeddings(write(tmp_path / "e.parquet", keys=["a", "a", "b", "a", "c"], shard=shards))
    np.testing.assert_array_equal(rows(source, "elsewhere/x.tar", ["c", "a", "b"], 99), H[[4, 0, 2]])
    np.testing.assert_array_equal(rows(source, "y.tar", ["a"]), H[[1]])
    np.testing.assert_array_equal(rows(source, "z.tar", ["a"]), H[[3]])


def test_rows_agree_with_a_dictionary_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 500
    shards = [f"s{i}.tar" for i in rng.integers(0, 7, n)]
    keys = [f"k{i}" for i in range(n)]
    h = rng.normal(size=(n, 4)).astype(np.float32)
    path = write(tmp_path / "e.parquet", h, keys, group=n // (3 * MAX_GROUPS), shard=shards)
    source = open_embeddings(path)
    oracle = {(s, k): row for s, k, row in zip(shards, keys, h, strict=True)}
    for shard in rng.permutation(sorted(set(shards)) * 2):
        asked = [str(key) for key in rng.permutation([key for s, key in oracle if s == shard])]
        np.testing.assert_array_equal(rows(source, shard, asked), [oracle[shard, key] for key in asked])
    assert len(source._groups) <= MAX_GROUPS  # type: ignore[attr-defined]


def test_a_norm_column_scales_the_rows(tmp_path: Path) -> None:
    norms = np.linalg.norm(H, axis=1)
    path = write(tmp_path / "e.parquet", H / norms[:, None], norm=norms.astype(np.float64))
    np.testing.assert_allclose(rows(open_embeddings(path), "s", KEYS), H, rtol=1e-5)


def test_a_missing_key_or_shard_is_named(tmp_path: Path) -> None:
    source = open_embeddings(write(tmp_path / "e.parquet", shard=["x.tar"] * 5))
    with pytest.raises(FeaturesError, match=r"shard x\.tar, key 'zz': not in embeddings .*e\.parquet"):
        rows(source, "x.tar", ["a", "zz"])
    with pytest.raises(FeaturesError, match=r"shard y\.tar is none of its 1 shards \('x', \.\.\.\)"):
        rows(source, "y.tar", ["a"])


def test_a_key_that_stands_twice_is_refused_with_the_remedy(tmp_path: Path) -> None:
    keys = ["a", "b", "a", "c", "a"]
    with pytest.raises(FeaturesError, match="key 'a' stands 3 times"):
        rows(open_embeddings(write(tmp_path / "e.parquet", keys=keys)), "x.tar", ["b"])
    shards = ["1/x.tar", "x.tar", "2/x.tar", "x.tar", "y.tar"]
    source = open_embeddings(write(tmp_path / "e.parquet", keys=keys, shard=shards))
    with pytest.raises(FeaturesError, match=r"shard a/x\.tar is none of its .*, or is like several"):
        rows(source, "a/x.tar", ["a"])
    np.testing.assert_array_equal(rows(source, "elsewhere/2/x.tar", ["a"]), H[[2]])


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"key": ["a"]}, r"0 columns 'embedding' among \['key'\]"),
        ({"embedding": [[1.0]]}, "0 columns 'key'"),
        ({"key": ["a"], "embedding": [1.0]}, "'embedding' is double, expected lists of floats"),
        ({"key": ["a"], "embedding": [[1]]}, "'embedding' is list<.*int64>, expected lists of floats"),
        ({"key": [1], "embedding": [[1.0]]}, "'key' is int64, expected strings"),
        ({"key": ["a"], "embedding": [[1.0]], "shard": [1]}, "'shard' is int64, expected strings"),
        ({"key": ["a"], "embedding": [[1.0]], "norm": ["1"]}, "'norm' is string, expected floats"),
        ({"key": ["a", None], "embedding": [[1.0], [2.0]]}, "an empty key or shard"),
        ({"key": ["a"], "embedding": [pa.scalar([], pa.list_(pa.float32()))]}, "holds no numbers"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, table: dict[str, Any], text: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    with pytest.raises(FeaturesError, match=rf"e\.parquet: .*{text}"):
        open_embeddings(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("row", "text"),
    [([1.0, 2.0], "2 numbers"), (None, "an empty entry"), ([1.0, None, 2.0], "an empty entry")],
)
def test_an_odd_row_is_named_when_it_is_met(tmp_path: Path, row: list[float] | None, text: str) -> None:
    values = [list(map(float, r)) for r in H]
    table = pa.table({"key": KEYS, "embedding": [*values[:3], row, values[4]]})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=2)
    source = open_embeddings(tmp_path / "e.parquet")
    np.testing.assert_array_equal(rows(source, "s", ["a"]), H[[0]])
    with pytest.raises(FeaturesError, match=f"row 3, key 'd', has {text}, expected 3 numbers"):
        rows(source, "s", ["d"])


# ---- npy files, and folders of them


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_rows_are_found_by_position(tmp_path: Path, dtype: str, order: Any) -> None:
    source = open_embeddings(saved(tmp_path / "e.npy", np.asarray(H, dtype=dtype, order=order)))
    assert (source.width, source.n_rows, source.by_position) == (3, 5, True)
    np.testing.assert_array_equal(rows(source, "s.tar", ["x", "y"], 3), H[3:5])


@pytest.mark.parametrize("position", [5, -1, 10**12])
def test_npy_positions_outside_the_file_are_refused(tmp_path: Path, position: int) -> None:
    source = open_embeddings(saved(tmp_path / "e.npy", H))
    with pytest.raises(FeaturesError, match=rf"shard s\.tar: .*e\.npy holds 5 .* sample {position} is"):
        rows(source, "s.tar", ["x"], position)


def write_folder(folder: Path, sizes: list[int], *, name: str = "img_emb_{}.npy") -> NDArray[Any]:
    folder.mkdir()
    h = np.random.default_rng(0).normal(size=(sum(sizes), 4)).astype(np.float16)
    for i, part in enumerate(np.split(h, np.cumsum(sizes)[:-1])):
        np.save(folder / name.format(i), part)
    return h.astype(np.float32)


@pytest.mark.parametrize("name", ["img_emb_{}.npy", "img_emb_{:04}.npy", "{}.npy"])
def test_a_folder_of_npy_files_is_one_array(tmp_path: Path, name: str) -> None:
    sizes = [3, 1, 4, 1, 5, 0, 9, 2, 6, 5, 3, 5]  # 10 comes after 9, not after 1
    h = write_folder(tmp_path / "img_emb", sizes, name=name)
    source = open_embeddings(tmp_path / "img_emb")
    assert (source.name, source.n_rows, source.width) == ("stored:img_emb", len(h), 4)
    np.testing.assert_array_equal(rows(source, "a.tar", [""] * len(h)), h)
    with pytest.raises(FeaturesError, match=f"sample {len(h)} is asked"):
        rows(source, "a.tar", ["k"], len(h))
    np.save(tmp_path / "img_emb" / name.format(0), h[:3] + 1)
    assert open_embeddings(tmp_path / "img_emb").revision != source.revision


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path, order: Any) -> None:
    path = saved(tmp_path / "e.npy", np.asarray(H, order=order))
    source = open_embeddings(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(FeaturesError, match=r"e\.npy: truncated while it was read"):
        rows(source, "a.tar", KEYS)
    path.unlink()
    with pytest.raises(FeaturesError, match=r"e\.npy: cannot be read: No such file"):
        rows(source, "a.tar", KEYS)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a_0.npy", "a_2.npy"], r"numbered \[0, 2\]"),
        (["a_0.npy", "b_1.npy"], r"called \['a_', 'b_'\]"),
        (["a_0.npy", "a_00.npy"], r"numbered \[0, 0\]"),
        (["a_0.npy", "b.npy"], r"b\.npy: no number at the end of its name"),
        (["img/a_0.npy", "text/a_0.npy"], r"without \.npy files; its folders \['img', 'text'\] have some"),
        (["a_0.parquet"], r"a folder without \.npy files$"),
    ],
)
def test_a_folder_whose_order_is_unknown_is_refused(tmp_path: Path, names: list[str], text: str) -> None:
    for name in names:
        (tmp_path / "e" / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path / "e" / name, np.ones((2, 3), np.float32))
    with pytest.raises(FeaturesError, match=text):
        open_embeddings(tmp_path / "e")


def test_a_damaged_or_wider_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "e", [2, 2])
    np.save(tmp_path / "e" / "img_emb_1.npy", np.ones((2, 5), np.float32))
    with pytest.raises(FeaturesError, match=r"img_emb_1\.npy: rows of 5 numbers, img_emb_0\.npy has .* 4"):
        open_embeddings(tmp_path / "e")
    data = (tmp_path / "e" / "img_emb_0.npy").read_bytes()
    (tmp_path / "e" / "img_emb_1.npy").write_bytes(data[:-1])
    with pytest.raises(FeaturesError, match=r"img_emb_1\.npy: declares 16 bytes of numbers.*and holds 15"):
        open_embeddings(tmp_path / "e")


# ---- Files of both kinds


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_a_file_names_itself_and_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name) if name == "e.parquet" else saved(tmp_path / name, H)
    whole, source = path.read_bytes(), open_embeddings(path)
    assert (source.name, source.revision) == (f"stored:{name}", hashlib.sha256(whole).hexdigest())
    for n_bytes in range(0, len(whole), 7):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(FeaturesError, match=f"embeddings .*{name}: "):
            open_embeddings(path)


def test_numbers_beyond_float32_become_inf_without_a_warning(tmp_path: Path) -> None:
    large = np.full((1, 2), 1e300)
    for path in (saved(tmp_path / "e.npy", large), write(tmp_path / "e.parquet", large, ["a"])):
        assert np.isinf(rows(open_embeddings(path), "s", ["a"])).all()
    np.testing.assert_array_equal(row_in(of(np.array([1e300, -1e300, 1.0]))), [np.inf, -np.inf, 1])


def test_a_missing_file_and_another_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.npy: no such file"):
        open_embeddings(tmp_path / "nowhere.npy")
    (tmp_path / "e.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"e\.pkl: expected a name in \.parquet or \.npy"):
        open_embeddings(tmp_path / "e.pkl")


# ---- A field of the samples

FIELD = open_embeddings("field:emb.npy")


def of(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def row_in(data: object) -> NDArray[np.float32]:
    sample = {"__key__": "k7", "__url__": "/data/a.tar", "emb.npy": data, "jpg": b""}
    return FIELD.row(sample, shard="a.tar", position=0)


floats = st.sampled_from(["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])


@given(floats.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=1, max_dims=1, max_side=40))))
def test_every_vector_that_numpy_saves_is_read_as_float32(vector: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        wanted = vector.astype(np.float32)
    for array in (vector, vector[None]):
        row = row_in(of(array))
        assert row.dtype == np.dtype("=f4")
        np.testing.assert_array_equal(row, wanted)
        row[:] = 5  # it is the reader's own


def test_every_truncation_of_a_field_is_a_bad_sample() -> None:
    whole = of(np.arange(5, dtype=np.float32))
    for n_bytes in range(len(whole)):
        with pytest.raises(SampleError, match=r"shard a\.tar, key 'k7', field 'emb\.npy': "):
            row_in(whole[:n_bytes])


@given(st.integers(0, 147), st.integers(0, 255))
def test_a_changed_byte_gives_a_vector_or_a_bad_sample(at: int, value: int) -> None:
    data = bytearray(of(np.arange(5, dtype=np.float32)))
    data[at] = value
    try:
        row = row_in(bytes(data))
    except SampleError:
        return
    assert row.ndim == 1
    assert 1 <= len(row) <= 10


def npy(header: str, body: int = 0, *, version: int = 1, length: int | None = None) -> bytes:
    """An npy file with a header of our own, and some zeros."""
    n_bytes = len(header) if length is None else length
    prefix = b"\x93NUMPY" + bytes([version, 0]) + n_bytes.to_bytes(2 if version == 1 else 4, "little")
    return prefix + header.encode() + bytes(body)


def header(shape: str, descr: str = "'<f4'", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


LIES = [  # of a field, and of a file where they are wrong there too
    (npy(header("(1, 17179869184)"), 64), r"declares 68719476736 bytes of numbers, .* and holds 64"),
    (npy(header("(1, 4611686018427387904)"), 64), "bytes of numbers"),
    (npy(header("(1, 4)"), 17), r"declares 16 bytes of numbers, shape .* and holds 17"),
    (npy(header("(-1, -4)"), 16), "damaged npy header|float32 of shape"),
    (npy(header("(1, 0)")), r"float32 of shape \(1, 0\); expected"),
    (npy(header("()"), 4), r"float32 of shape \(\); expected"),
    (npy(header(f"({'9' * 4400},)")), "damaged npy header|of shape"),  # Python refuses to show such a number
    (npy(header("(1, 1, 4)"), 16), r"float32 of shape \(1, 1, 4\)"),
    (npy(header("(1, True)"), 4), r"float32 of shape \(1, True\)"),
    (npy(header("(1, 4)", "'<i4'"), 16), r"int32 of shape \(1, 4\)"),
    (npy(header("(1, 4)", "'<c8'"), 32), "complex64 of shape"),
    (npy(header("(1, 4)", "'<f16'"), 64), "float128 of shape|longdouble of shape|damaged npy header"),
    (npy(header("(1, 4)", "'|O'"), 16), "object of shape"),
    (npy(header("(1, 4)", "[('a', '<f4'), ('b', '<f4')]"), 32), r"\[\('a', '<f4'\), .* of shape"),
    (npy(header("(1, 4)", "('<f4', (2,))"), 32), "of shape|damaged npy header"),
    (npy(header("(1, 4)", "'nonsense'"), 16), r"damaged npy header \(.*nonsense"),
    (npy(header("(1, 4)"), 16, version=3), r"not an npy file of version 1 or 2 \(starts with b'.*NUMPY"),
    (npy(header("(1, 4)"), 16, version=2, length=(1 << 32) - 1), "declares a header of 4294967307 bytes"),
    (npy(header("(1, 4)"), 20_000, version=2, length=15_000), "declares a header of 15012 bytes"),
    (npy("(" * 3000), "damaged npy header"),
    (npy("-" * 9000 + "1"), r"damaged npy header \("),
    (npy("__import__('os').mkdir('it-ran')\n"), "damaged npy header"),
    (b"", r"not an npy file of version 1 or 2 \(starts with b''\)"),
    (b"<html>no such page</html>", "not an npy file .*b'<html>no suc"),
]


@pytest.mark.parametrize(("data", "text"), LIES)
def test_a_lying_npy_is_not_allocated(
    data: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e.npy").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(SampleError, match=rf"shard a\.tar, key 'k7', field 'emb\.npy': .*(?:{text})"):
        row_in(data)
    with pytest.raises(FeaturesError, match=rf"embeddings .*e\.npy: .*(?:{text})"):
        open_embeddings(tmp_path / "e.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert os.listdir() == ["e.npy"]


@pytest.mark.parametrize("shape", ["(4,)", "(1, 4)"])
def test_a_field_is_one_vector_of_c_order(shape: str) -> None:
    with pytest.raises(SampleError, match="Fortran order; expected one vector, "):
        row_in(npy(header(shape, fortran="True"), 16))
    with pytest.raises(SampleError, match=r"float32 of shape \(2, 2\); expected one vector"):
        row_in(of(np.ones((2, 2), np.float32)))
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(3.0), version=(2, 0))
    np.testing.assert_array_equal(row_in(file.getvalue()), [0, 1, 2])


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_npy_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    objects = np.array([[Hostile(tmp_path / "it-ran")]])
    with pytest.raises(FeaturesError, match="object of shape"):
        open_embeddings(saved(tmp_path / "e.npy", objects, allow_pickle=True))
    with pytest.raises(SampleError, match="object of shape"):
        row_in(of(objects, allow_pickle=True))
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_or_decoded_field_is_a_bad_sample() -> None:
    many = {f"f{i:02d}": b"" for i in range(12)}
    for sample, has in (
        ({"jpg": b"", "cls": b"1"}, "no such field; the sample has 'cls', 'jpg'; leave the sample out"),
        ({}, "no such field; the sample has no field; leave"),
        (many, r"no such field; the sample has 'f00', .*'f09' and 2 more; leave"),
        ({"emb.npy": np.ones(3)}, "holds ndarray, expected the bytes of a file; put this"),
    ):
        with pytest.raises(SampleError, match=rf"shard a\.tar, key 'k7', field 'emb\.npy': {has}"):
            FIELD.row({"__key__": "k7", "__url__": "/data/a.tar", **sample}, shard="a.tar", position=0)


def test_a_field_is_opened_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FieldEmbeddings("emb.npy") == FIELD
    assert (FIELD.name, FIELD.revision, FIELD.preprocessing_hash) == ("field:emb.npy", "field=emb.npy", "")
    monkeypatch.chdir(tmp_path)
    saved(Path("field:emb.npy"), H)
    for path in (Path("field:emb.npy"), "./field:emb.npy"):
        assert open_embeddings(path).name == "stored:field:emb.npy"


NO_FIELDS = [
    "", "emb", "emb.pkl", "a.npy;b.npy", ".npy", "emb..npy", "EMB.npy", "emb.npy ", "x/emb.npy", "emb.npy:a",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_FIELDS)
def test_a_name_that_is_no_npy_field_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"embeddings 'field:.*': expected field: and the name of one field"):
        open_embeddings(f"field:{name}")
