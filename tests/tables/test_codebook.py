"""A codebook is what it says or is refused: when made, when loaded, in another process."""

import dataclasses
import json
import os
import pickle
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import adq_wds as adq
from adq_wds.core.codebook import solve_rates
from adq_wds.files import canonical_json, sha256_text
from adq_wds.tables.codebook import _TENSORS, POOLED, as_codebook


def made(*, names: list[str] | None = None, bins: int = 4, **changed: Any) -> adq.Codebook:
    """Rules of two checkpoints over all classes, and for classes 1 and 3 of 0, 1 and 3; D = 5."""
    rng = np.random.default_rng(0)
    query = (np.rint(rng.normal(size=(3, bins - 1, 2, 5)) / 9 * 2.0**23) / 2.0**23).astype(np.float32)
    arrays: dict[str, Any] = {
        "query": query,
        "threshold": rng.normal(size=(3, bins - 1, 2)) / 9,
        "label": np.array([-1, 1, 3], dtype=np.int32),
        "held_out": rng.integers(1, 50, (3, bins)),
        "weight": rng.random((3, bins)),
    }
    header = {
        "encoder": "e", "revision": "1", "preprocessing_hash": "p", "label": "cls", "features": "f",
        "classes": [0, 1, 3], "names": names, "settings": {"seed": 0, "pilot": [9, 5, 5]}, "scores": {},
    }  # fmt: skip
    header |= changed.pop("header", {})
    return adq.Codebook(**{**arrays, **changed, "header": header})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "codebook.safetensors"
    made().save(path)
    return path


def same(a: adq.Codebook, b: adq.Codebook) -> bool:
    return a.header == b.header and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in _TENSORS)


def test_what_is_saved_is_loaded(saved: Path) -> None:
    loaded = adq.load_codebook(saved)
    assert same(loaded, made())
    assert loaded.hash == made().hash
    assert loaded.path == saved
    assert repr(loaded) == "<Codebook 4 bins, 2 classes, e, D = 5>"
    assert as_codebook(loaded) is loaded
    assert as_codebook(str(saved)).hash == loaded.hash


def test_equal_codebooks_have_equal_files(saved: Path, tmp_path: Path) -> None:
    adq.load_codebook(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    hashes = {made().hash, made(header={"classes": [0, 1, 3, 4]}).hash}
    for name in _TENSORS:
        array = getattr(made(), name).copy()
        array.flat[-1] += 1 if array.dtype.kind == "i" else 2.0**-20
        hashes.add(made(header={"classes": [0, 1, 3, 4]}, **{name: array}).hash)
    hashes.add(made(header={"encoder": "other"}).hash)
    assert len(hashes) == len(_TENSORS) + 3


def test_any_safetensors_reader_opens_it(saved: Path) -> None:
    arrays = safetensors.numpy.load_file(saved)
    assert set(arrays) == {"query", "threshold", "label", "held_out", "weight"}
    assert np.array_equal(arrays["query"], made().query)


def test_it_pickles_as_its_path_and_notices_a_change(saved: Path) -> None:
    loaded = adq.load_codebook(saved)
    data = pickle.dumps(loaded)
    assert len(data) < 400
    assert same(pickle.loads(data), loaded)  # noqa: S301 - our own bytes
    assert same(pickle.loads(pickle.dumps(made())), made())  # noqa: S301
    made(header={"encoder": "other"}).save(saved)
    with pytest.raises(adq.CodebookError, match=r"codebook.safetensors: changed since it was opened .* was"):
        pickle.loads(data)  # noqa: S301


def test_rows_of_labels() -> None:
    codebook = made()
    assert [codebook.row(label) for label in (None, 0, 1, 3, 2, 9)] == [POOLED, POOLED, 1, 2, None, None]
    named = made(names=["ant", "bee", "cow", "dog"])
    assert [named.row(label) for label in (None, "ant", "bee", "dog", "cow", "elk")] == [
        POOLED,
        POOLED,
        1,
        2,
        None,
        None,
    ]
    assert codebook.needs_label
    assert codebook.encoder == ("e", "1", "p")


def test_a_label_of_another_kind_is_an_error() -> None:
    text = "classes of this codebook are numbers, got the name 'dog'; .* label='cls'"
    with pytest.raises(adq.CodebookError, match=text):
        made().row("dog")
    with pytest.raises(adq.CodebookError, match="classes of this codebook are names, got the number 3"):
        made(names=["ant", "bee", "cow", "dog"]).row(3)


def test_rates_are_solved_for_each_row_from_its_own_counts() -> None:
    codebook = made()
    for keep in (0, 0.1, 0.7, 1):
        rates = codebook.rates(keep)
        for r in range(3):
            frequency = codebook.held_out[r] / codebook.held_out[r].sum()
            assert rates[r].tolist() == solve_rates(frequency, codebook.weight[r], keep).tolist()
            assert frequency @ rates[r] == pytest.approx(keep)
    for wrong in (-0.1, 1.1, float("nan"), True, "0.5", None):
        with pytest.raises(ValueError, match=r"keep must be a number in \[0, 1\], got "):
            codebook.rates(wrong)  # type: ignore[arg-type]


def lame(name: str, **fields: Any) -> Any:
    array = getattr(made(), name).copy()
    array.flat[0] = fields["first"]
    return array


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"query": made().query.astype(np.float64)}, "query is float64, expected float32"),
        ({"label": np.array([-1, 1, 3])}, "label is int64, expected int32"),
        ({"query": made().query[0]}, r"queries of shape \(3, 2, 5\), expected \(R, K-1, M, D\)"),
        ({"query": made().query[:, :, :0]}, r"queries of shape \(3, 3, 0, 5\)"),
        ({"query": made().query[:0]}, r"queries of shape \(0, 3, 2, 5\)"),
        ({"threshold": made().threshold[:, :2]}, r"threshold has shape \(3, 2, 2\), expected \(3, 3, 2\)"),
        ({"held_out": made().held_out[:, :3]}, r"held_out has shape \(3, 3\), expected \(3, 4\)"),
        ({"weight": made().weight[:2]}, r"weight has shape \(2, 4\), expected \(3, 4\)"),
        ({"query": lame("query", first=np.nan)}, "a query is not a multiple of 2"),
        ({"query": lame("query", first=2.0)}, "a query is not a multiple of 2"),
        ({"query": lame("query", first=2.0**-24)}, "a query is not a multiple of 2"),
        ({"threshold": lame("threshold", first=np.inf)}, "a threshold is not finite"),
        ({"weight": lame("weight", first=-1e-9)}, "a weight is negative or not finite"),
        ({"weight": lame("weight", first=np.nan)}, "a weight is negative or not finite"),
        ({"held_out": lame("held_out", first=-1)}, "counts of held-out samples are negative or all 0"),
        ({"held_out": np.zeros((3, 4), np.int64)}, "counts of held-out samples are negative or all 0"),
        ({"label": np.array([0, 1, 3], np.int32)}, "labels of the rows are not -1 and then ascending"),
        ({"label": np.array([-1, 3, 3], np.int32)}, "labels of the rows are not -1 and then ascending"),
        ({"header": {"encoder": 3}}, "header.encoder is 3, expected str"),
        ({"header": {"classes": [1, True, 3]}}, r"classes\[1\] is True, expected int"),
        ({"header": {"classes": "abc"}}, "classes is 'abc', expected list"),
        ({"header": {"classes": [0, 1]}}, "a class with a row is not among the classes"),
        ({"header": {"names": ["a", 3]}}, r"names\[1\] is 3, expected str"),
        ({"header": {"names": ["a", "b", "a", "c"]}}, "a name stands for two classes"),
        ({"header": {"names": ["a", "b", "c"]}}, "a class has no name"),
    ],
)
def test_what_contradicts_itself_is_refused_when_made(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(adq.CodebookError, match=f"^codebook: .*{text}"):
        made(**changed)


def test_a_header_that_lacks_something_is_refused() -> None:
    codebook = made()
    header = {name: value for name, value in codebook.header.items() if name != "revision"}
    with pytest.raises(adq.CodebookError, match="header has no 'revision'"):
        dataclasses.replace(codebook, header=header)


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codebook.parquet: a codebook's file ends in \.safetensors"):
        made().save(tmp_path / "codebook.parquet")


def signed(text: str) -> dict[str, str]:
    return {"adq_wds": f"{sha256_text(text)} {text}"}


def rewrite(path: Path, change: Any) -> None:
    """Write the file again with other metadata or tensors, the header's hash as it should be."""
    with safetensors.safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["adq_wds"].partition(" ")[2])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = change(header, arrays)
    if metadata is None:
        metadata = signed(canonical_json(header))
    path.write_bytes(safetensors.numpy.save(arrays, metadata))


def drop(what: dict[str, Any], name: str) -> None:
    del what[name]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h, a: {}, "not made by adq_wds .no header.; expected a codebook"),
        (lambda h, a: {"adq_wds": "0 {}"}, "damaged: the header does not match its hash"),
        (lambda h, a: h.update(format="adq_wds.plan"), "holds 'adq_wds.plan', expected adq_wds.codebook"),
        (
            lambda h, a: h.update(version=3),
            "version 3 of the codebook format; this adq_wds reads versions 1 to 2,",
        ),
        (lambda h, a: h.update(version=True), "version True of the codebook format"),
        (lambda h, a: drop(h, "tensors"), "damaged header: .*no 'tensors'"),
        (lambda h, a: drop(h, "encoder"), "header has no 'encoder'"),
        (lambda h, a: h.update(classes=[[]]), r"classes\[0\] is \[\], expected int"),
        (lambda h, a: a.update(weight=a["weight"] * 2), "damaged: an array does not match its hash"),
        (lambda h, a: drop(a, "weight"), "no array 'weight'"),
        (lambda h, a: a.update(more=a["weight"]), "array 'more', which no codebook has"),
        (lambda h, a: a.update(query=a["query"].astype(np.float16)), "array 'query' is 'F16', expected F32"),
        (lambda h, a: h["tensors"].update(query=[[1], "0"]), "damaged: an array does not match its hash"),
    ],
)
def test_a_file_that_says_something_else_is_refused(saved: Path, change: Any, text: str) -> None:
    rewrite(saved, change)
    with pytest.raises(adq.CodebookError, match=f"^{re.escape(str(saved))}: .*{text}"):
        adq.load_codebook(saved)


HOSTILE = [
    f'{{"format":"adq_wds.codebook","version":1,"tensors":{value}}}'
    for value in ("NaN", "1e999", '"\\ud800"')
]


@pytest.mark.parametrize("text", [*HOSTILE, "[1]", "3", "{", "", "[" * 5000])
def test_a_header_that_is_not_ours_is_refused(saved: Path, text: str) -> None:
    rewrite(saved, lambda h, a: signed(text))
    with pytest.raises(adq.CodebookError, match=str(saved)):
        adq.load_codebook(saved)


def test_damage_is_never_read_as_something_else(saved: Path) -> None:
    """F30, on the codebook: 150 truncations and 400 flips."""
    whole, expected = saved.read_bytes(), made()
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(whole), 150).tolist():
        saved.write_bytes(whole[:cut])
        with pytest.raises(adq.CodebookError, match=r"codebook.safetensors: "):
            adq.load_codebook(saved)
    n_loaded = 0
    for at in rng.integers(0, 8 * len(whole), 400).tolist():
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        saved.write_bytes(flipped)
        try:
            loaded = adq.load_codebook(saved)
        except adq.CodebookError:
            continue
        n_loaded += 1
        assert same(loaded, expected)
    assert n_loaded < 20  # white space in the safetensors header, at most


@pytest.mark.parametrize("declared", [2**63, 2**40, 10**8, 2**31, 0])
def test_a_lying_header_length_is_refused(saved: Path, declared: int) -> None:
    """S5."""
    saved.write_bytes(struct.pack("<Q", declared) + saved.read_bytes()[8:])
    with pytest.raises(adq.CodebookError, match=r"damaged, or no codebook"):
        adq.load_codebook(saved)


def test_arrays_larger_than_the_file_are_refused(saved: Path) -> None:
    """S5."""
    entry = {"dtype": "F32", "shape": [2**20, 2**10, 8, 8], "data_offsets": [0, 2**38]}
    header = json.dumps({"query": entry}).encode()
    saved.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(adq.CodebookError, match=r"damaged, or no codebook"):
        adq.load_codebook(saved)


def test_a_header_full_of_values_is_refused(saved: Path) -> None:
    header = b'{"__metadata__":' + b"[" + b"{}," * (1 << 20) + b"{}]}"
    saved.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(adq.CodebookError, match="a header of values of about"):
        adq.load_codebook(saved)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/adq-was-here",)


def test_a_pickle_under_its_name_runs_nothing(saved: Path) -> None:
    """S1."""
    seen: list[str] = []
    sys.addaudithook(
        lambda event, _: seen.append(event) if event in ("pickle.find_class", "os.system") else None
    )
    saved.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(adq.CodebookError, match="damaged, or no codebook"):
        adq.load_codebook(saved)
    assert seen == []


def test_a_missing_file_a_folder_and_an_empty_one_are_said(tmp_path: Path) -> None:
    with pytest.raises(adq.CodebookError, match=r"none.safetensors: no such file"):
        adq.load_codebook(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").touch()
    for name in ("folder", "empty"):
        with pytest.raises(adq.CodebookError, match=f"{name}.safetensors: damaged, or no codebook"):
            adq.load_codebook(tmp_path / f"{name}.safetensors")
