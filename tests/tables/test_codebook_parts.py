"""Margins, copies and balance of a codebook are saved and checked like the rest of it, and asked for by nobody else."""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import adq_wds as adq
from adq_wds.core.known_copies import KnownCopies
from adq_wds.core.margin_rule import MarginRule
from tests.tampering import codebook as made_codebook
from tests.tampering import rewritten_codebook

CLEAN = {"accuracy": 0.9, "wrong": [0.1, 0.0, 0.2], "left_out": [5, 0, 20], "of": [50, 10, 100]}


def margins() -> MarginRule:
    """Of 5 numbers, 7 more at random, and 3 classes."""
    rng = np.random.default_rng(0)
    solution = (np.rint(rng.normal(size=(13, 3)) * 2.0**20) / 2.0**20).astype(np.float32)
    return MarginRule(rng.normal(size=5), rng.random(5), solution, np.array([0.25, -np.inf, -0.5]))


def copies() -> KnownCopies:
    return KnownCopies(np.array([3, 9, 2**64 - 1], np.uint64), np.array([8, 1, 2], np.uint64))


def whole(**changed: Any) -> adq.Codebook:
    """With all that a codebook may have."""
    header = {
        "n": [45, 10, 80],
        "balance": "equal",
        "clean": CLEAN,
        "random_layer": margins().layer_hash(),
        "image": "jpg",
        **changed.pop("header", {}),
    }
    parts = {"margins": margins(), "copies": copies(), **changed}
    return made_codebook(header={name: value for name, value in header.items() if value is not None}, **parts)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "codebook.safetensors"
    whole().save(path)
    return path


def test_what_is_saved_is_loaded_and_pickled(saved: Path) -> None:
    loaded = adq.load_codebook(saved)
    for one in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(whole()))):  # noqa: S301
        assert one.hash == whole().hash
        assert one.header == whole().header
        for name in ("mean", "scale", "solution", "least"):
            assert np.array_equal(getattr(one.margins, name), getattr(margins(), name))
        assert np.array_equal(one.copies.digest, copies().digest)
        assert np.array_equal(one.copies.stays, copies().stays)
    again = saved.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == saved.read_bytes()
    assert {"margins.mean", "copies.stays"} <= set(safetensors.numpy.load_file(saved))


def test_a_codebook_without_them_is_of_version_1(saved: Path) -> None:
    assert whole()._whole_header()["version"] == 2
    assert made_codebook()._whole_header()["version"] == 1
    assert made_codebook(header={"n": [1, 2, 3]})._whole_header()["version"] == 2
    assert whole().hash != whole(copies=None).hash != made_codebook().hash


def test_classes_have_numbers_rows_and_rates() -> None:
    codebook = whole()
    assert [codebook.class_number(c) for c in (None, 0, 1, 3, 2)] == [0, 1, 2, 3, None]
    assert codebook.rows.tolist() == [0, 0, 1, 2]
    assert np.array_equal(made_codebook().class_rates(0.3), made_codebook().rates(0.3)[[0, 0, 1, 2]])
    for keep in (0.1, 0.4, 0.84):
        rates = codebook.class_rates(keep)
        assert np.array_equal(rates[0], codebook.rates(keep)[0])
        of_class = (rates * codebook.frequency()[codebook.rows])[1:].sum(axis=1)
        assert of_class @ np.array([45, 10, 80]) == pytest.approx(keep * 160)
    assert (codebook.class_rates(0.85)[1:] == 1).all()
    with pytest.raises(ValueError, match="keep must be a number"):
        codebook.class_rates(1.5)


def changed(name: str, value: Any) -> dict[str, Any]:
    return {"margins": dataclasses.replace(margins(), **{name: value})}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed("mean", np.full(5, np.nan)), "a mean or scale of margins is not finite"),
        (changed("mean", np.zeros((5, 1))), r"margins of shapes \(5, 1\), \(3,\), \(13, 3\)"),
        (changed("mean", np.zeros(4)), "a solution of shape .* for 4 numbers"),
        (changed("scale", np.zeros(4)), "a solution of shape .* for 5 numbers"),
        (changed("solution", np.zeros((6, 3), np.float32)), "a solution of shape"),
        (
            changed("solution", np.full((13, 3), np.nan, np.float32)),
            "a coefficient of margins is not a multiple",
        ),
        (changed("solution", np.full((13, 3), 2.0**-21, np.float32)), "a coefficient of margins"),
        (changed("solution", np.full((13, 3), 16, np.float32)), "a coefficient of margins"),
        (changed("solution", np.zeros((13, 3))), "margins.solution is float64, expected float32"),
        (changed("least", np.array([0.0, np.nan, 0.0])), "a least margin is not a number below infinity"),
        (changed("least", np.zeros(2)), "a solution of shape"),
        ({"copies": KnownCopies(np.array([9, 3], np.uint64), np.zeros(2, np.uint64))}, "are not ascending"),
        ({"copies": KnownCopies(np.array([3], np.uint64), np.zeros(2, np.uint64))}, "digests for .* samples"),
        ({"header": {"random_layer": "0"}}, "this numpy draws other random numbers .* fit it again"),
        ({"header": {"image": None}}, "digests, and not of which field"),
        ({"header": {"clean": None}}, "margins, and nothing of what was doubted"),
        ({"header": {"n": [1, 2]}}, "the counts of classes are not of 3"),
        ({"header": {"n": [0, 0, 0]}}, "no samples of any class"),
        ({"header": {"n": None}}, "no samples of any class"),
        ({"header": {"n": [1, -2, 3]}}, r"header.n\[1\] is -2, expected int"),
        ({"header": {"clean": {**CLEAN, "left_out": [1]}}}, "the counts of classes are not of 3"),
        ({"header": {"balance": "even"}}, "header.balance is 'even'"),
        ({"header": {"balance": 1.5}}, "a balance of 1.5"),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(adq.CodebookError, match=f"^codebook: .*{text}"):
        whole(**change)


def drop(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        del arrays[name]

    return change


@pytest.mark.parametrize("name", ["margins.least", "copies.stays"])
def test_a_file_with_a_part_of_a_part_is_refused(saved: Path, name: str) -> None:
    rewritten_codebook(saved, drop(name))
    with pytest.raises(adq.CodebookError, match=f"no array '{name}'"):
        adq.load_codebook(saved)


def test_damage_is_never_read_as_something_else(saved: Path) -> None:
    data, expected = saved.read_bytes(), whole().hash
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(data), 150).tolist():
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        saved.write_bytes(flipped)
        try:
            loaded = adq.load_codebook(saved)
        except adq.CodebookError:
            continue
        assert loaded.hash == expected
