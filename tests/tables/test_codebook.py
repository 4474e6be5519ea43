"""A codebook is what it says or is refused: when made, when loaded, in another process."""

import dataclasses
import json
import os
import pickle
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
from adq_wds.tables.codebook import POOLED, as_codebook
from tests.tampering import TENSORS, codebook


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "codebook.safetensors"
    codebook().save(path)
    return path


def same(a: adq.Codebook, b: adq.Codebook) -> bool:
    return a.header == b.header and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in TENSORS)


def test_what_is_saved_is_loaded(saved: Path) -> None:
    loaded = adq.load_codebook(saved)
    assert same(loaded, codebook())
    assert loaded.hash == codebook().hash
    assert loaded.path == saved
    assert repr(loaded) == "<Codebook 4 bins, 2 classes, e, D = 5>"
    assert as_codebook(loaded) is loaded
    assert as_codebook(str(saved)).hash == loaded.hash


def test_equal_codebooks_have_equal_files(saved: Path, tmp_path: Path) -> None:
    adq.load_codebook(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()
    hashes = {codebook().hash, codebook(header={"classes": [0, 1, 3, 4]}).hash}
    for name in TENSORS:
        array = getattr(codebook(), name).copy()
        array.flat[-1] += 1 if array.dtype.kind == "i" else 2.0**-20
        hashes.add(codebook(header={"classes": [0, 1, 3, 4]}, **{name: array}).hash)
    hashes.add(codebook(header={"encoder": "other"}).hash)
    assert len(hashes) == len(TENSORS) + 3


def test_any_safetensors_reader_opens_it(saved: Path) -> None:
    arrays = safetensors.numpy.load_file(saved)
    assert set(arrays) == {"query", "threshold", "label", "held_out", "weight"}
    assert np.array_equal(arrays["query"], codebook().query)


def test_it_pickles_as_its_path_and_notices_a_change(saved: Path) -> None:
    loaded = adq.load_codebook(saved)
    data = pickle.dumps(loaded)
    assert len(data) < 400
    assert same(pickle.loads(data), loaded)  # noqa: S301 - our own bytes
    assert same(pickle.loads(pickle.dumps(codebook())), codebook())  # noqa: S301
    codebook(header={"encoder": "other"}).save(saved)
    with pytest.raises(adq.CodebookError, match=r"codebook.safetensors: changed since it was opened .* was"):
        pickle.loads(data)  # noqa: S301


def test_rows_of_labels() -> None:
    made = codebook()
    assert [made.row(label) for label in (None, 0, 1, 3, 2, 9)] == [POOLED, POOLED, 1, 2, None, None]
    named = codebook(names=["ant", "bee", "cow", "dog"])
    rows = [named.row(label) for label in (None, "ant", "bee", "dog", "cow", "elk")]
    assert rows == [POOLED, POOLED, 1, 2, None, None]
    assert made.needs_label
    assert made.encoder == ("e", "1", "p")


def test_a_label_of_another_kind_is_an_error() -> None:
    text = "classes of this codebook are numbers, got the name 'dog'; .* label='cls'"
    with pytest.raises(adq.CodebookError, match=text):
        codebook().row("dog")
    with pytest.raises(adq.CodebookError, match="classes of this codebook are names, got the number 3"):
        codebook(names=["ant", "bee", "cow", "dog"]).row(3)


def test_rates_are_solved_for_each_row_from_its_own_counts() -> None:
    made = codebook()
    for keep in (0, 0.1, 0.7, 1):
        rates = made.rates(keep)
        for r in range(3):
            frequency = made.held_out[r] / made.held_out[r].sum()
            assert rates[r].tolist() == solve_rates(frequency, made.weight[r], keep).tolist()
            assert frequency @ rates[r] == pytest.approx(keep)
    for wrong in (-0.1, 1.1, float("nan"), True, "0.5", None):
        with pytest.raises(ValueError, match=r"keep must be a number in \[0, 1\], got "):
            made.rates(wrong)  # type: ignore[arg-type]


def lame(name: str, first: float) -> dict[str, Any]:
    array = getattr(codebook(), name).copy()
    array.flat[0] = first
    return {name: array}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"query": codebook().query.astype(np.float64)}, "query is float64, expected float32"),
        ({"label": np.array([-1, 1, 3])}, "label is int64, expected int32"),
        ({"query": codebook().query[0]}, r"queries of shape \(3, 2, 5\), expected \(R, K-1, M, D\)"),
        ({"query": codebook().query[:, :, :0]}, r"queries of shape \(3, 3, 0, 5\)"),
        ({"query": codebook().query[:0]}, r"queries of shape \(0, 3, 2, 5\)"),
        ({"threshold": codebook().threshold[:, :2]}, r"threshold .* \(3, 2, 2\), expected \(3, 3, 2\)"),
        ({"held_out": codebook().held_out[:, :3]}, r"held_out has shape \(3, 3\), expected \(3, 4\)"),
        ({"weight": codebook().weight[:2]}, r"weight has shape \(2, 4\), expected \(3, 4\)"),
        (lame("query", np.nan), "a query is not a multiple of 2"),
        (lame("query", 2.0), "a query is not a multiple of 2"),
        (lame("query", 2.0**-24), "a query is not a multiple of 2"),
        (lame("threshold", np.inf), "a threshold is not finite"),
        (lame("weight", -1e-9), "a weight is negative or not finite"),
        (lame("weight", np.nan), "a weight is negative or not finite"),
        (lame("held_out", -1), "counts of held-out samples are negative or all 0"),
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
        codebook(**changed)


def test_a_header_without_something_or_another_name_is_refused(tmp_path: Path) -> None:
    made = codebook()
    header = {name: value for name, value in made.header.items() if name != "revision"}
    with pytest.raises(adq.CodebookError, match="header has no 'revision'"):
        dataclasses.replace(made, header=header)
    with pytest.raises(ValueError, match=r"codebook.parquet: a codebook's file ends in \.safetensors"):
        codebook().save(tmp_path / "codebook.parquet")


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
