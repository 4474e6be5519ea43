"""Is a sample's own npy read as it was written, and no header believed on its word?"""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adq_wds.embedding.stored import open_embeddings
from adq_wds.embedding.stored_field import FieldEmbeddings
from adq_wds.errors import SampleError

SOURCE = FieldEmbeddings("emb.npy")


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def row(data: object) -> np.ndarray[Any, Any]:
    return SOURCE.row({"__key__": "k7", "__url__": "/data/a.tar", "emb.npy": data, "jpg": b""})


floats = st.sampled_from(["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])


@given(floats.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=1, max_dims=1, max_side=40))))
def test_every_vector_that_numpy_saves_is_read_back_as_float32(vector: np.ndarray[Any, Any]) -> None:
    with np.errstate(over="ignore"):
        wanted = vector.astype(np.float32)
    for array in (vector, vector[None]):
        got = row(saved(array))
        assert got.dtype == np.dtype("=f4")
        np.testing.assert_array_equal(got, wanted)


def test_the_row_is_the_readers_own_and_may_be_written_to() -> None:
    data = saved(np.ones(3, np.float32))
    row(data)[:] = 5
    np.testing.assert_array_equal(row(data), [1, 1, 1])


def test_version_two_headers_are_read() -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(3.0), version=(2, 0))
    np.testing.assert_array_equal(row(file.getvalue()), [0, 1, 2])


def test_every_truncation_is_a_bad_sample() -> None:
    whole = saved(np.arange(5, dtype=np.float32))
    for n_bytes in range(len(whole)):
        with pytest.raises(SampleError, match=r"shard a\.tar, key 'k7', field 'emb\.npy': "):
            row(whole[:n_bytes])


@given(st.integers(0, 147), st.integers(0, 255))
def test_a_changed_byte_gives_a_vector_or_a_bad_sample_and_nothing_else(at: int, value: int) -> None:
    data = bytearray(saved(np.arange(5, dtype=np.float32)))
    data[at] = value
    try:
        got = row(bytes(data))
    except SampleError:
        return
    assert got.ndim == 1
    assert 1 <= len(got) <= 10


def npy(header: str, body: bytes = b"", *, version: int = 1, length: int | None = None) -> bytes:
    n_bytes = len(header) if length is None else length
    prefix = b"\x93NUMPY" + bytes([version, 0]) + n_bytes.to_bytes(2 if version == 1 else 4, "little")
    return prefix + header.encode() + body


def header(shape: str, descr: str = "'<f4'", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


LIES = [
    (npy(header("(17179869184,)"), b"\0" * 64), r"declares 68719476736 bytes of numbers, .* and holds 64"),
    (npy(header("(1, 17179869184)"), b"\0" * 64), r"declares 68719476736 bytes of numbers"),
    (npy(header("(4611686018427387904,)"), b"\0" * 64), "bytes of numbers"),
    (npy(header("(4,)"), b"\0" * 17), r"declares 16 bytes of numbers, shape \(4,\), and holds 17"),
    (npy(header("(-4,)"), b"\0" * 16), r"damaged npy header|float32 of shape \(-4,\)"),
    (npy(header("(0,)")), r"float32 of shape \(0,\); expected one vector, \(D,\) or \(1, D\)"),
    (npy(header("(1, 0)")), r"float32 of shape \(1, 0\)"),
    (npy(header("()"), b"\0" * 4), r"float32 of shape \(\); expected one vector"),
    (npy(header("(2, 2)"), b"\0" * 16), r"float32 of shape \(2, 2\); expected one vector"),
    (npy(header("(1, 1, 4)"), b"\0" * 16), r"float32 of shape \(1, 1, 4\)"),
    (
        npy(header("(1, 4)", fortran="True"), b"\0" * 16),
        r"shape \(1, 4\), Fortran order; expected one vector",
    ),
    (npy(header("(4,)", fortran="True"), b"\0" * 16), r"shape \(4,\), Fortran order; expected one vector"),
    (npy(header("(True,)"), b"\0" * 4), r"float32 of shape \(True,\)"),
    (npy(header("(4,)", "'<i4'"), b"\0" * 16), r"int32 of shape \(4,\); expected one vector"),
    (npy(header("(4,)", "'<c8'"), b"\0" * 32), "complex64 of shape"),
    (npy(header("(4,)", "'<f16'"), b"\0" * 64), "float128 of shape|longdouble of shape|damaged npy header"),
    (npy(header("(4,)", "'|O'"), b"\0" * 16), "object of shape"),
    (npy(header("(4,)", "[('a', '<f4'), ('b', '<f4')]"), b"\0" * 32), r"\[\('a', '<f4'\), .* of shape"),
    (npy(header("(4,)", "('<f4', (2,))"), b"\0" * 32), "of shape|damaged npy header"),
    (npy(header("(4,)", "'nonsense'"), b"\0" * 16), r"damaged npy header \(.*nonsense"),
    (
        npy(header("(4,)"), b"\0" * 16, version=3),
        r"not an npy file of version 1 or 2 \(starts with b'.*NUMPY",
    ),
    (npy(header("(4,)"), b"\0" * 16, version=9), "not an npy file of version 1 or 2"),
    (
        npy(header("(4,)"), b"\0" * 16, version=2, length=(1 << 32) - 1),
        r"declares a header of 4294967307 bytes in a file of \d+$",
    ),
    (npy(header("(4,)"), b"\0" * 20_000, version=2, length=15_000), "declares a header of 15012 bytes"),
    (npy("(" * 3000), "damaged npy header"),
    (npy("-" * 9000 + "1"), r"damaged npy header \(MemoryError|damaged npy header \("),
    (npy("__import__('os').mkdir('it-ran')\n"), "damaged npy header"),
    (b"", r"not an npy file of version 1 or 2 \(starts with b''\)"),
    (b"<html>no such page</html>", r"not an npy file .*b'<html>no suc"),
]


@pytest.mark.parametrize(("data", "message"), LIES)
def test_a_file_that_lies_is_a_bad_sample_before_anything_is_allocated(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    with pytest.raises(SampleError, match=rf"shard a\.tar, key 'k7', field 'emb\.npy': .*(?:{message})"):
        row(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert list(tmp_path.iterdir()) == []


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_an_array_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="object of shape"):
        row(saved(np.array([Hostile(tmp_path / "it-ran")]), allow_pickle=True))
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_field_says_what_the_sample_has() -> None:
    many = {f"f{i:02d}": b"" for i in range(12)}
    for sample, has in (
        ({"jpg": b"", "cls": b"1"}, r"the sample has 'cls', 'jpg'; leave the sample out, or take an encoder"),
        ({}, "the sample has no field; leave"),
        (many, r"the sample has 'f00', .*'f09' and 2 more; leave"),
    ):
        with pytest.raises(
            SampleError, match=rf"shard a\.tar, key 'k7', field 'emb\.npy': no such field; {has}"
        ):
            SOURCE.row({"__key__": "k7", "__url__": "/data/a.tar", **sample})


def test_a_decoded_field_is_refused() -> None:
    with pytest.raises(
        SampleError, match=r"field 'emb\.npy': holds ndarray, expected the bytes of a file; put this"
    ):
        row(np.ones(3))


def test_float64_beyond_float32_is_infinite_without_a_warning() -> None:
    np.testing.assert_array_equal(row(saved(np.array([1e300, -1e300, 1.0]))), [np.inf, -np.inf, 1])


def test_it_is_opened_by_name_and_pickles() -> None:
    opened = open_embeddings("field:emb.npy")
    assert opened == SOURCE
    assert (opened.name, opened.revision, opened.preprocessing_hash) == ("field:emb.npy", "field=emb.npy", "")
    assert pickle.loads(pickle.dumps(opened)) == SOURCE  # noqa: S301 - our own
    other = open_embeddings("field:npy")
    assert isinstance(other, FieldEmbeddings)
    assert (other.field, other.revision) == ("npy", "field=npy")


def test_a_file_of_that_name_is_still_a_file_when_it_is_given_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("field:emb.npy", np.ones((2, 3), np.float32))
    for path in (Path("field:emb.npy"), "./field:emb.npy"):
        assert open_embeddings(path).name == "stored:field:emb.npy"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "emb",
        "emb.pkl",
        "emb.pth",
        "a.npy;b.npy",
        ".npy",
        "emb..npy",
        "EMB.npy",
        "emb.npy ",
        "x/emb.npy",
        "emb.npy:a",
    ],
)
def test_a_name_that_is_no_npy_field_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"embeddings 'field:.*': expected field: and the name of one field"):
        open_embeddings(f"field:{name}")
