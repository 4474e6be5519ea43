"""Are stored embeddings found by shard and key, or by position, and is no file believed on its word?"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from adq_wds.embedding.stored import open_embeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.embedding.stored_parquet import MAX_HELD
from adq_wds.errors import FeaturesError

KEYS = ["a", "b", "c", "d", "e"]
H = np.arange(15, dtype=np.float32).reshape(5, 3) - 7


def write(path: Path, h: NDArray[Any] = H, keys: list[str] = KEYS, *, group: int = 2, **columns: Any) -> Path:
    pq.write_table(pa.table({"key": keys, "embedding": list(h), **columns}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("of", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda of: pa.list_(of, 3)])
def test_lists_of_any_float_are_read_in_the_order_of_the_keys(
    tmp_path: Path, of: pa.DataType, kind: Callable[[pa.DataType], pa.DataType]
) -> None:
    values = pa.array(list(H.astype(of.to_pandas_dtype())), type=kind(of))
    pq.write_table(pa.table({"key": KEYS, "embedding": values}), tmp_path / "e.parquet", row_group_size=2)
    opened = open_embeddings(tmp_path / "e.parquet")
    got = opened.rows("any.tar", ["d", "a", "e"], 0)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, H[[3, 0, 4]])
    assert (opened.width, opened.n_rows) == (3, 5)


def test_tensor_columns_are_read(tmp_path: Path) -> None:
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(H)
    pq.write_table(pa.table({"key": KEYS, "embedding": column}), tmp_path / "e.parquet")
    np.testing.assert_array_equal(open_embeddings(tmp_path / "e.parquet").rows("s", KEYS, 0), H)


def test_one_key_in_two_shards_is_told_apart_by_the_shards_file_name(tmp_path: Path) -> None:
    shards = ["/data/x.tar", "https://host/y.tar?sig=1", "/data/x.tar", "z", "/data/x.tar"]
    opened = open_embeddings(write(tmp_path / "e.parquet", keys=["a", "a", "b", "a", "c"], shard=shards))
    np.testing.assert_array_equal(opened.rows("elsewhere/x.tar", ["c", "a", "b"], 99), H[[4, 0, 2]])
    np.testing.assert_array_equal(opened.rows("y.tar", ["a"], 0), H[[1]])
    np.testing.assert_array_equal(opened.rows("z.tar", ["a"], 0), H[[3]])


def test_rows_agree_with_a_dictionary_whatever_the_order_and_the_row_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 500
    shards = [f"s{i}.tar" for i in rng.integers(0, 7, n)]
    keys = [f"k{i % 90}-{i // 490}" for i in range(n)]
    keys = [f"{key}-{i}" for i, key in enumerate(keys)]
    h = rng.normal(size=(n, 4)).astype(np.float32)
    opened = open_embeddings(write(tmp_path / "e.parquet", h, keys, group=n // (3 * MAX_HELD), shard=shards))
    oracle = {(s, k): row for s, k, row in zip(shards, keys, h, strict=True)}
    for shard in rng.permutation(sorted(set(shards)) * 2):
        asked = [key for s, key in oracle if s == shard]
        asked = [str(key) for key in rng.permutation(asked)]
        np.testing.assert_array_equal(opened.rows(shard, asked, 0), [oracle[shard, key] for key in asked])
    assert len(opened._rows._held) <= MAX_HELD  # type: ignore[union-attr]


def test_a_norm_column_scales_the_rows(tmp_path: Path) -> None:
    norms = np.linalg.norm(H, axis=1)
    path = write(tmp_path / "e.parquet", H / norms[:, None], norm=norms.astype(np.float64))
    np.testing.assert_allclose(open_embeddings(path).rows("s", KEYS, 0), H, rtol=1e-5)


def test_dictionary_encoded_keys_and_shards_are_read(tmp_path: Path) -> None:
    coded = pa.array(KEYS).dictionary_encode()
    table = pa.table(
        {"key": coded, "embedding": list(H), "shard": pa.array(["x.tar"] * 5).dictionary_encode()}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    np.testing.assert_array_equal(open_embeddings(tmp_path / "e.parquet").rows("x.tar", ["c"], 0), H[[2]])


def test_no_keys_give_no_rows(tmp_path: Path) -> None:
    assert open_embeddings(write(tmp_path / "e.parquet")).rows("s", [], 0).shape == (0, 3)


def test_a_missing_key_or_shard_is_named(tmp_path: Path) -> None:
    opened = open_embeddings(write(tmp_path / "e.parquet", shard=["x.tar"] * 5))
    with pytest.raises(FeaturesError, match=r"shard x\.tar, key 'zz': not in embeddings .*e\.parquet"):
        opened.rows("x.tar", ["a", "zz"], 0)
    with pytest.raises(
        FeaturesError, match=r"shard y\.tar: not in embeddings .*which has 1 shards \('x', \.\.\.\)"
    ):
        opened.rows("y.tar", ["a"], 0)


def test_a_key_that_stands_twice_is_refused_with_the_remedy(tmp_path: Path) -> None:
    keys = ["a", "b", "a", "c", "a"]
    with pytest.raises(FeaturesError, match="key 'a' stands 3 times; add a shard column"):
        open_embeddings(write(tmp_path / "e.parquet", keys=keys))
    shards = ["1/x.tar", "x.tar", "2/x.tar", "x.tar", "y.tar"]
    with pytest.raises(
        FeaturesError, match="shard 'x', key 'a' stands 2 times; shards are told apart by file name"
    ):
        open_embeddings(write(tmp_path / "e.parquet", keys=keys, shard=shards))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"key": ["a"]}, r"0 columns 'embedding' among \['key'\]"),
        ({"embedding": [[1.0]]}, "0 columns 'key'"),
        ({"key": ["a"], "embedding": [1.0]}, "column 'embedding' is double, expected lists of floats"),
        ({"key": ["a"], "embedding": [[1]]}, "column 'embedding' is list<.*int64>, expected lists of floats"),
        ({"key": [1], "embedding": [[1.0]]}, "column 'key' is int64, expected strings"),
        ({"key": ["a"], "embedding": [[1.0]], "shard": [1]}, "column 'shard' is int64, expected strings"),
        ({"key": ["a"], "embedding": [[1.0]], "norm": ["1"]}, "column 'norm' is string, expected floats"),
        ({"key": ["a", None], "embedding": [[1.0], [2.0]]}, "an empty key or shard"),
        (
            {"key": ["a"], "embedding": [pa.scalar([], pa.list_(pa.float32()))]},
            "holds no numbers",
        ),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    with pytest.raises(FeaturesError, match=message):
        open_embeddings(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, 2.0], "row 3, key 'd', has 2 numbers, expected 3 numbers"),
        (None, "row 3, key 'd', has an empty entry, expected 3"),
        ([1.0, None, 2.0], "row 3, key 'd', has an empty entry, expected 3"),
    ],
)
def test_an_odd_row_is_named_when_it_is_met(tmp_path: Path, row: list[float] | None, message: str) -> None:
    rows = [list(map(float, r)) for r in H]
    table = pa.table({"key": KEYS, "embedding": [*rows[:3], row, rows[4]]})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=2)
    opened = open_embeddings(tmp_path / "e.parquet")
    np.testing.assert_array_equal(opened.rows("s", ["a"], 0), H[[0]])
    with pytest.raises(FeaturesError, match=message):
        opened.rows("s", ["d"], 0)


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_every_truncation_is_refused_when_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path) if name == "e.parquet" else np.save(path, H)
    whole = path.read_bytes()
    for n_bytes in range(0, len(whole), 7):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(FeaturesError, match=f"embeddings .*{name}: "):
            open_embeddings(path)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_rows_are_found_by_position(tmp_path: Path, dtype: str, order: Any) -> None:
    np.save(tmp_path / "e.npy", np.asarray(H, dtype=dtype, order=order))
    opened = open_embeddings(tmp_path / "e.npy")
    assert (opened.width, opened.n_rows) == (3, 5)
    got = opened.rows("s.tar", ["x", "y"], 3)
    assert got.dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(got, H[3:5])


@pytest.mark.parametrize("start", [4, 5, -1, 10**12])
def test_npy_positions_outside_the_file_are_refused(tmp_path: Path, start: int) -> None:
    np.save(tmp_path / "e.npy", H)
    with pytest.raises(FeaturesError, match=r"shard s\.tar: .*e\.npy holds 5 embeddings, and samples"):
        open_embeddings(tmp_path / "e.npy").rows("s.tar", ["x", "y"], start)


def test_numbers_beyond_float32_become_inf_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.full((1, 2), 1e300))
    assert np.isinf(open_embeddings(tmp_path / "e.npy").rows("s", ["a"], 0)).all()
    path = write(tmp_path / "e.parquet", np.full((1, 2), 1e300), ["a"])
    assert np.isinf(open_embeddings(path).rows("s", ["a"], 0)).all()


def npy(header: str, body: bytes = b"", *, version: int = 1, length: int | None = None) -> bytes:
    n_bytes = len(header) if length is None else length
    prefix = b"\x93NUMPY" + bytes([version, 0]) + n_bytes.to_bytes(2 if version == 1 else 4, "little")
    return prefix + header.encode() + body


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy(header("(16777216, 1024)"), b"\0" * 64),
            r"declares 68719476736 bytes of numbers, .* and holds 64",
        ),
        (npy(header("(4611686018427387904, 4)"), b"\0" * 64), "bytes of numbers"),
        (npy(header("(2, 2)"), b"\0" * 17), "declares 16 bytes of numbers, shape .* and holds 17"),
        (
            npy(header("(2, 2)"), b"\0" * 16, version=2, length=(1 << 32) - 1),
            "declares a header of 4294967307 bytes",
        ),
        (npy(header("(2, 2)"), b"\0" * 20_000, version=2, length=15_000), "declares a header of 15012 bytes"),
        (npy(header("(2, 2)"), version=9), "not an npy file of version 1 or 2"),
        (npy(header("(4,)"), b"\0" * 16), r"float32 of shape \(4,\); expected \(N, D\)"),
        (npy(header("(2, 0)")), r"float32 of shape \(2, 0\)"),
        (npy(header("(True, 4)"), b"\0" * 16), r"float32 of shape \(True, 4\); expected \(N, D\)"),
        (npy(header("(4, True)"), b"\0" * 16), r"float32 of shape \(4, True\)"),
        (npy(header("(2, 2)", "'<i4'"), b"\0" * 16), "int32 of shape"),
        (npy(header("(2, 2)", "'|O'"), b"\0" * 16), "object of shape"),
        (npy(header("(-2, -2)"), b"\0" * 16), "damaged npy header|of shape"),
        (npy("(" * 3000), "damaged npy header"),
        (npy("__import__('os')\n"), "damaged npy header"),
        (b"<html>no such page</html>", "not an npy file"),
    ],
)
def test_an_npy_header_that_lies_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(FeaturesError, match=message):
        open_embeddings(tmp_path / "e.npy")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_npy_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.array([[Hostile(tmp_path / "it-ran")]]), allow_pickle=True)
    with pytest.raises(FeaturesError, match="object of shape"):
        open_embeddings(tmp_path / "e.npy")
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_file_and_another_suffix_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.npy: no such file"):
        open_embeddings(tmp_path / "nowhere.npy")
    (tmp_path / "e.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"e\.pkl: expected a name in \.parquet or \.npy"):
        open_embeddings(tmp_path / "e.pkl")


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_it_is_named_after_its_file_and_pickles_as_that_file_and_no_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path) if name == "e.parquet" else np.save(path, H)
    opened = open_embeddings(path)
    assert opened.name == f"stored:{name}"
    assert opened.revision == hashlib.sha256(path.read_bytes()).hexdigest()
    data = pickle.dumps(opened)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).rows("s", ["b"], 1), H[[1]])  # noqa: S301 - our own bytes
    path.unlink()
    write(path, H + 1) if name == "e.parquet" else np.save(path, H + 1)
    with pytest.raises(FeaturesError, match=f"{name}: the file changed while it was in use"):
        pickle.loads(data)  # noqa: S301


# ---- Folders of npy files, and the types of other writers


def write_folder(
    folder: Path, sizes: list[int], *, name: str = "img_emb_{}.npy", dtype: Any = np.float16
) -> NDArray[Any]:
    folder.mkdir()
    h = np.random.default_rng(0).normal(size=(sum(sizes), 4)).astype(dtype)
    for i, rows in enumerate(np.split(h, np.cumsum(sizes)[:-1])):
        np.save(folder / name.format(i), rows)
    return h


@pytest.mark.parametrize("name", ["img_emb_{}.npy", "img_emb_{:04}.npy", "{}.npy"])
def test_a_folder_of_npy_files_is_one_array_in_the_order_of_the_numbers(tmp_path: Path, name: str) -> None:
    sizes = [3, 1, 4, 1, 5, 0, 9, 2, 6, 5, 3, 5]  # 10 comes after 9, not after 1
    h = write_folder(tmp_path / "img_emb", sizes, name=name).astype(np.float32)
    opened = open_embeddings(tmp_path / "img_emb")
    assert not isinstance(opened, FieldEmbeddings)
    assert (opened.name, opened.n_rows, opened.width, opened.by_position) == (
        "stored:img_emb",
        len(h),
        4,
        True,
    )
    for start in range(len(h)):
        for n in (0, 1, 2, 13):
            keys = [""] * min(n, len(h) - start)
            np.testing.assert_array_equal(opened.rows("a.tar", keys, start), h[start : start + len(keys)])
    with pytest.raises(FeaturesError, match=rf"samples {len(h)} to {len(h)} are"):
        opened.rows("a.tar", ["k"], len(h))
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301 - ours
    assert again.revision == opened.revision
    np.save(tmp_path / "img_emb" / name.format(0), h[:3] + 1)
    assert open_embeddings(tmp_path / "img_emb").revision != opened.revision


def test_a_folder_of_many_files_is_read(tmp_path: Path) -> None:
    h = write_folder(tmp_path / "e", [1] * 48, dtype=np.float64)
    rows = open_embeddings(tmp_path / "e").rows("a.tar", [""] * len(h), 0)
    np.testing.assert_array_equal(rows, h.astype(np.float32))


def test_rows_of_an_array_whose_columns_lie_together_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.asfortranarray(H))
    opened = open_embeddings(tmp_path / "e.npy")
    np.testing.assert_array_equal(opened.rows("a.tar", [""] * 3, 1), H[1:4])


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path, order: Any) -> None:
    path = tmp_path / "e.npy"
    np.save(path, np.asarray(H, order=order))
    opened = open_embeddings(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(FeaturesError, match=r"e\.npy: truncated while it was read"):
        opened.rows("a.tar", [""] * 5, 0)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a_0.npy", "a_2.npy"], r"2 files, numbered 0 to 2, and number 1 is missing"),
        (["a_0.npy", "b_1.npy"], r"a_0\.npy and b_1\.npy are not of one series"),
        (["a_0.npy", "a_00.npy"], r"a_0\.npy and a_00\.npy are not of one series"),
        (["a_0.npy", "b.npy"], r"b\.npy: no number at the end of its name"),
        (["img_emb/a_0.npy", "text_emb/a_0.npy"], r"without \.npy files; its folders \['img_emb', 'text_emb'\] have some"),
        (["a_0.parquet"], r"a folder without \.npy files$"),
    ],
)  # fmt: skip
def test_a_folder_whose_order_is_unknown_is_refused(tmp_path: Path, names: list[str], text: str) -> None:
    for name in names:
        (tmp_path / "e" / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / "e" / name).open("wb") as file:
            np.save(file, np.ones((2, 3), np.float32))
    with pytest.raises(FeaturesError, match=text):
        open_embeddings(tmp_path / "e")


def test_a_damaged_or_wider_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "e", [2, 2])
    np.save(tmp_path / "e" / "img_emb_1.npy", np.ones((2, 5), np.float32))
    with pytest.raises(
        FeaturesError, match=r"img_emb_1\.npy: rows of 5 numbers, img_emb_0\.npy has rows of 4"
    ):
        open_embeddings(tmp_path / "e")
    data = (tmp_path / "e" / "img_emb_0.npy").read_bytes()
    (tmp_path / "e" / "img_emb_1.npy").write_bytes(data[:-1])
    with pytest.raises(FeaturesError, match=r"img_emb_1\.npy: declares 16 bytes of numbers.*and holds 15"):
        open_embeddings(tmp_path / "e")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_keys_and_shards_of_any_text_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table(
        {"key": pa.array(KEYS, kind), "shard": pa.array(["x.tar"] * 5, kind), "embedding": list(H)}
    )
    pq.write_table(table, tmp_path / "e.parquet")
    np.testing.assert_array_equal(
        open_embeddings(tmp_path / "e.parquet").rows("x.tar", ["c", "a"], 0), H[[2, 0]]
    )
