"""Files of every kind are read as they were written, or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adq_wds.tables.parquet import list_array
from tests.tampering import (
    KINDS,
    Change,
    drop,
    lose_column,
    put,
    put_column,
    put_entry,
    put_value,
    rewritten,
    signed,
)  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / f"x{KINDS[kind].suffix}"
    KINDS[kind].make(path)
    return path


def test_equal_tables_are_equal_bytes_and_a_rewrite_no_damage(kind: str, path: Path) -> None:
    expected, data = KINDS[kind].read(path), path.read_bytes()
    KINDS[kind].make(path)
    assert path.read_bytes() == data
    KINDS[kind].rewritten(path, lambda header, tables: None)
    assert KINDS[kind].read(path) == expected


def test_no_truncation_is_ever_loaded(kind: str, path: Path) -> None:
    """F30: 500 of a plan, 150 of a codebook, 100 of the others."""
    data = path.read_bytes()
    for length in np.random.default_rng(0).integers(0, len(data), KINDS[kind].n_cuts):
        path.write_bytes(data[:length])
        with pytest.raises(KINDS[kind].error, match=path.name):
            KINDS[kind].read(path)


def test_no_bit_flip_is_ever_loaded_as_another_table(kind: str, path: Path) -> None:
    """F30: 1,000 of a plan, 400 of a codebook, 100 of the others."""
    expected, data, refused = KINDS[kind].read(path), path.read_bytes(), 0
    for bit in np.random.default_rng(1).choice(len(data) * 8, KINDS[kind].n_flips, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert KINDS[kind].read(path) == expected, f"flipped bit {bit} went through"
        except KINDS[kind].error:
            refused += 1
    assert refused > KINDS[kind].refused * KINDS[kind].n_flips


def two_shards(header: dict[str, Any], tables: list[pa.Table]) -> None:
    header["shards"] *= 2
    tables *= 2


def retype_column(header: dict[str, Any], tables: list[pa.Table]) -> None:
    i = tables[0].schema.get_field_index("bin")
    tables[:] = [t.set_column(i, "bin", t["bin"].cast(pa.int64())) for t in tables]


def lose_rank(header: dict[str, Any], tables: list[pa.Table]) -> None:
    tables[:] = [table.drop_columns(["rank"]) for table in tables]


def set_cells(quota: Any, **cells: Any) -> Change:
    return put("cells", {"quota": quota, **cells})


def set_share(share: Any) -> Change:
    return set_cells([[1]], size=[[2]], share=share)


def put_array(name: str, change: Any) -> Change:
    """Another array of a codebook."""
    return lambda header, arrays: arrays.__setitem__(name, change(arrays.get(name, arrays["weight"])))


def lists(rows: int, width: int, value: float) -> pa.Array:
    return list_array(np.full((rows, width), value, np.float16))


def soft_rows(name: str, second: list[float]) -> pa.Array:
    """The column of a file of soft labels with another second row."""
    top = name == "top"
    rows = [[0, 1], second, [1, 2]] if top else [[0.75, 0.25], second, [0.5, 0.5]]
    return list_array(np.array(rows, np.int32 if top else np.float32))


SPAN = [0, "k", 0, 512, 7, "why"]
OF_ALL: dict[str, tuple[Change, str]] = {
    "other format": (put("format", "adq_wds.other"), "holds 'adq_wds.other', expected adq_wds."),
    "newer version": (put("version", 9), r"version 9 of .* reads versions 1 to \d"),
    "version of text": (put("version", "1"), "version '1'"),
    "version true": (put("version", True), "version True"),
}  # fmt: skip
OF_PARQUET: dict[str, tuple[Change, str]] = {
    "fewer rows": (put_entry("n", 1), "row groups are not those its header lists"),
    "rows of text": (put_entry("n", "8"), r"damaged header: .*shards\[0\]\.n is '8'"),
    "rows true": (put_entry("n", True), r"damaged header: .*shards\[0\]\.n is True"),
    "no shards": (put("shards", []), "row groups are not those its header lists"),
    "shards no list": (put("shards", 3), "damaged header: .*shards is 3"),
    "no hashes": (put_entry("columns", {}), "damaged: column .* does not match its hash"),
    "hashes no object": (put_entry("columns", None), r"damaged header: .*columns is None"),
    "name of a number": (put_entry("name", 5), r"damaged header: .*name is 5"),
}
SIZE, QUOTA = [[3, 3], [3, 2]], [[1, 1], [1, 1]]
OF_ONE: dict[str, dict[str, tuple[Change, str]]] = {
    "plan": {
        "hostile shard name": (put_entry("name", "../a.tar"), "shard name '../a.tar' is refused"),
        "unsorted shards": (put_entry("name", "z.tar"), "contradict each other"),
        "wrong kept count": (put_entry("kept", 5), "contradict each other"),
        "wrong total": (put("n_samples", 25), "contradict each other"),
        "no cells": (put("cells", {}), "damaged header"),
        "quota of text": (set_cells([["x", 1], [1, 1]]), "damaged header"),
        "no sizes": (set_cells(QUOTA), "damaged header"),
        "sizes of another shape": (set_cells(QUOTA, size=[[3, 3]]), "damaged header"),
        "other quota": (set_cells([[2, 1], [1, 1]], size=SIZE), "does not follow from ranks and quotas"),
        "missing column": (lose_rank, "damaged"),
        "column of another type": (retype_column, "damaged"),
        "row groups swapped": (lambda header, tables: tables.reverse(), "rows of another shard"),
        "row group lost": (lambda header, tables: tables.pop(), "row groups are not those"),
        "key twice": (put_value("key", 1, "k0"), "a key is listed twice"),
        "overlapping spans": (put_value("n_bytes", 0, 2000), "spans overlap"),
        "negative offset": (put_value("byte_offset", 0, -512), "empty or out of range"),
        "position twice": (put_value("index", 1, 0), "positions are not ascending"),
        "bin out of range": (put_value("bin", 0, 2), "class or bin is not one of the plan's"),
        "unknown class": (put_value("label", 0, 9), "class or bin is not one of the plan's"),
        "kept against its rank": (put_value("kept", 4, True), "keeps 5 samples, its header says 4"),
        "rank below always": (put_value("rank", 0, -2), "rank is below"),
    },
    "explained plan": {
        "unknown reason": (put_value("reason", 1, "mood"), "a reason is not one of kept, quota, duplicate"),
        "a kept sample with a reason against it": (put_value("reason", 0, "quota"), "a reason contradicts"),
        "a binned sample without a quota": (put_value("reason", 1, "excluded"), "a reason contradicts"),
        "a sample outside that has a quota": (put_value("reason", 3, "quota"), "a reason contradicts"),
        "a sample outside that is kept": (put_value("reason", 3, "kept"), "a reason contradicts"),
        "a sample outside with a rank": (put_value("rank", 3, 7), "a reason contradicts"),
        "a copy of none": (put_value("duplicate_of", 2, ""), "a copy names no sample that stays"),
        "a copy that is none": (put_value("duplicate_of", 3, "a.tar/k0"), "or another sample names one"),
        "no shares": (set_cells([[1]], size=[[2]]), "damaged header"),
        "shares of another shape": (set_share([[0.5, 0.5]]), "damaged header"),
        "a share beyond its cell": (set_share([[3.0]]), "shares that contradict the sizes and quotas"),
        "a share below 0": (set_share([[-1.0]]), "shares that contradict"),
        "a share between the steps": (set_share([[1 + 2**-30]]), "shares that contradict"),
        "shares of another sum": (set_share([[0.5]]), "shares that contradict"),
        "a share of text": (set_share([["x"]]), "damaged header"),
        "no seed": (put("settings", {}), "damaged header"),
        "a seed of text": (put("settings", {"seed": "0"}), "damaged header: .*seed must be an integer"),
    },
    "index": {
        "a key twice": (put_value("key", 1, "k0"), "shard a.tar: damaged: a key is listed twice"),
        "a position left out": (put_value("index", 4, 5), "damaged: positions are not 0, 1, 2"),
        "overlapping spans": (put_value("byte_offset", 1, 512), "damaged: spans overlap"),
        "an offset below 0": (put_value("byte_offset", 0, -512), "damaged: a span is empty or out of range"),
        "an empty span": (put_value("n_bytes", 0, 0), "damaged: a span is empty or out of range"),
        "a span beyond all": (put_value("byte_offset", 4, 2**63 - 1), "damaged: a span is empty or out of range"),
        **{f"source {value!r}": (put_entry("source", value), r"damaged header: .*shards\[0\]\.source")
           for value in (3, {}, {"bytes": 1}, {"bytes": 1, "mtime_ns": True}, {"bytes": "1", "mtime_ns": 1})},
        "rows of another shard": (put_column("shard", lambda values: ["b.tar"] * 5), "shard a.tar: damaged: rows of another"),
        "no name": (lambda header, tables: header["shards"][0].pop("name"), "damaged header: .*no 'name'"),
        "hostile shard": (put_entry("name", "/etc/passwd"), "damaged header: .*'/etc/passwd' is refused"),
        "a shard twice": (lambda header, tables: header["shards"][1].update(name="a.tar"), "shard a.tar is listed twice"),
    },
    "features": {
        "hostile shard": (put_entry("name", "../../a.tar"), r"damaged header: .*shard name '\.\./\.\./a\.tar' is refused"),
        "two shards": (two_shards, "damaged header: .*too many values"),
        **{f"no {name}": (drop(name), f"damaged header: .*no '{name}'")
           for name in ("encoder", "label", "width", "columns", "label_names", "bad", "complete", "source")},
        **{f"width {value!r}": (put("width", value), "damaged header: .*width is") for value in ("6", 2**40, 0, -1, True, 6.0)},
        "width too small": (put("width", 5), "damaged: .*column embedding"),
        "width too large": (put("width", 2**20), "damaged: .*column embedding"),
        "names of numbers": (put("label_names", [1, 2, 3]), "damaged header: .*label_names"),
        "names as text": (put("label_names", "abc"), "damaged header: .*label_names"),
        **{f"complete {value!r}": (put("complete", value), "damaged header: .*complete is") for value in (1, "true", None)},
        **{f"source {value!r}": (put("source", value), "damaged header: .*source")
           for value in (3, None, [1], {"bytes": "1"}, {"bytes": True})},
        **{f"columns {value!r}": (put("columns", value), "damaged header: .*columns") for value in (3, None, ["nope"], [])},
        **{f"bad {value!r}": (put("bad", value), "damaged header: .*bad") for value in ({"a": 1}, 5, [1], [[1, "k"]])},
        **{f"bad sample {i} {value!r}": (put("bad", [[*SPAN[:i], value, *SPAN[i + 1:]]]), r"damaged header: .*bad\[0\]\[")
           for i, value in [(0, -5), (0, 2**40), (0, True), (0, 1.0), (1, 5), (2, -1), (3, "x"), (4, None), (4, 2**32), (5, 1)]},
        "classes of the head": (put("n_classes", 4), "damaged: .*column logit_grad"),
        "classes of text": (put("n_classes", "3"), "damaged header: .*n_classes is '3'"),
        "another gradient": (put("logit_grad", "gradient"), "damaged header: .*logit_grad is 'gradient'"),
        "right about more": (put("head_right", 9), "damaged header: .*head_right is 9, of 8"),
        "scores a list": (put("scores", ["sharp"]), "damaged header: .*scores is"),
        "revision no text": (put("scores", {"sharp": 1}), "damaged header: .*scores.sharp is 1"),
        "score of a path": (put("scores", {"../x": "1"}), r"damaged header: .*score name '\.\./x'"),
        "score of ours": (put("scores", {"label": "1"}), "damaged header: .*'label' is one of ours"),
        "score not there": (put("scores", {"other": "1"}), "damaged header: .*columns .* without"),
        "column lost": (lose_column("texture"), "damaged: .*no column 'texture'"),
        "embedding of any width": (
            put_column("embedding", pa.array([[1.0]] * 8, pa.list_(pa.float16()))), "damaged: .*column embedding"
        ),
        "embedding of another width": (put_column("embedding", lists(8, 3, 1)), "damaged: .*column embedding"),
        "empty label": (put_value("label", 0, None), "damaged: .*column label"),
        "a NaN": (put_column("embedding", lists(8, 6, np.nan)), "key 'k0000': embedding holds NaN or infinity"),
        "an infinite norm": (put_value("norm", 7, np.inf), "key 'k0009': norm holds NaN"),
    },
    "bins": {
        **{f"no {name}": (drop(name), f"damaged header: .*no '{name}'")
           for name in ("n_bins", "kernel", "features", "classes", "names", "scores")},
        "more bins than scores": (put("n_bins", 4), "damaged: .*classes or scores contradict it"),
        "bins of text": (put("n_bins", "many"), "damaged header: .*n_bins is 'many'"),
        "bins a list": (put("n_bins", [2]), r"damaged header: .*n_bins is \[2\]"),
        "classes unsorted": (put("classes", [1, 0]), "damaged: .*classes or scores contradict it"),
        "a class lost": (put("classes", [1]), "damaged: .*of a class that the header does not list"),
        **{f"class {value!r}": (put("classes", [value]), r"damaged header: .*classes\[0\] is") for value in ("cat", 2**31, 2**80, -2)},
        "scores a list": (put("scores", [1, 2]), "damaged header: .*scores is"),
        "scores of text": (put("scores", {"texture": ["x", "y", "z"]}), r"damaged header: .*texture\[0\] is 'x'"),
        "a score beyond all": (put("scores", {"t": [10**400, 1, 1]}), "damaged: .*int too large"),
        "bin out of range": (put_value("bin", 0, 3), "bins must lie in 0 … 2, got -1 … 3"),
        "bin below": (put_value("bin", 0, -2), "bins must lie in 0 … 2, got -2 … 1"),
        "no pick": (put_value("pick", 0, -1), "a binned sample has no pick"),
        "unknown class": (put_value("label", 0, 2), "of a class that the header does not list"),
    },
    "soft": {
        "hostile shard": (put_entry("name", "../a.tar"), r"damaged header: .*without '\.\.'"),
        "two shards": (two_shards, "damaged header: .*contradict each other"),
        **{f"no {name}": (drop(name), f"damaged header: .*no '{name}'")
           for name in ("source", "temperature", "agreement", "encoder", "n_classes", "names", "n_top")},
        **{f"classes {value!r}": (put("n_classes", value), "damaged header: .*n_classes is") for value in ("3", 0, 2**40, True)},
        **{f"top {value!r}": (put("n_top", value), "damaged header: .*n_top is") for value in ("2", 0, 2**20)},
        "fewer classes than stored": (put("n_classes", 1), "damaged header: .*contradict each other"),
        "a class less": (put("n_classes", 2), r"key 'k1': not the probabilities of different classes out of 2"),
        "another width": (put("n_top", 1), "damaged: .*column top.*expected"),
        "names too few": (put("names", ["cat", "dog"]), "damaged header: .*2 names of 3 classes"),
        "a name twice": (put("names", ["cat", "dog", "dog"]), "damaged header: .*2 names of 3 classes"),
        "another source": (put("source", "guess"), "damaged header: .*source is 'guess'"),
        "other types": (put_column("top", lists(3, 2, 0)), "damaged: .*column top.*expected"),
        "a key twice": (put_column("key", lambda values: ["k0", "k0", "k2"]), "a key stands twice"),
        **{f"{name} {value!r}": (put_column(name, soft_rows(name, value)), "key 'k1': not the probabilities of different")
           for name, value in (("top", [3, 0]), ("top", [-1, 0]), ("top", [1, 1]), ("probability", [0.5, 0.4]),
                               ("probability", [1.5, -0.5]), ("probability", [np.nan, 1]), ("probability", [np.inf, 0]))},
    },
    "views": {
        "hostile shard": (put_entry("name", "../a.tar"), r"damaged header: .*without '\.\.'"),
        "two shards": (two_shards, "damaged header: .*too many values"),
        **{f"no {name}": (drop(name), f"damaged header: .*no '{name}'") for name in ("encoder", "seed", "view", "columns")},
        **{f"width {value!r}": (put("width", value), "damaged header: .*width is") for value in ("6", 2**40, 0)},
        "another width": (put("width", 5), "damaged: .*column views.*expected"),
        **{f"seed {value!r}": (put("seed", value), "damaged header: .*seed is") for value in ("0", 0.5, -1)},
        "an encoder of lists": (put("encoder", [[1]]), "damaged header: .*encoder is"),
        "a NaN": (put_column("views", lists(5, 12, np.nan)), "damaged: .*squared length nan"),
        "long rows": (put_column("views", lists(5, 12, 1)), "damaged: .*squared length 6"),
        "other types": (put_column("index", pa.array(np.arange(5))), "damaged: .*column index.*expected"),
        "positions twice": (put_column("index", pa.array(np.zeros(5, np.int32))), "damaged: .*positions do not rise"),
    },
    "codebook": {
        "no header": (lambda header, arrays: {}, "not made by adq_wds .no header.; expected a codebook"),
        "another hash": (lambda header, arrays: {"adq_wds": "0 {}"}, "damaged: the header does not match its hash"),
        "no tensors": (drop("tensors"), "damaged header: .*no 'tensors'"),
        "no encoder": (drop("encoder"), "header has no 'encoder'"),
        "classes of lists": (put("classes", [[]]), r"classes\[0\] is \[\], expected int"),
        "another array": (put_array("weight", lambda old: old * 2), "damaged: an array does not match its hash"),
        "no array": (lambda header, arrays: arrays.__delitem__("weight"), "no array 'weight'"),
        "a further array": (put_array("more", lambda old: old), "array 'more', which no codebook has"),
        "float16": (put_array("query", lambda old: old.astype(np.float16)), "array 'query' is 'F16', expected F32"),
        "another array's hash": (lambda header, arrays: header["tensors"].update(query=[[1], "0"]), "does not match its hash"),
        **{f"header {text[-20:]!r}": (lambda header, arrays, text=text: signed(text), "x.safetensors")
           for text in [*(f'{{"format":"adq_wds.codebook","version":1,"tensors":{v}}}' for v in ("NaN", "1e999", '"\\ud800"')),
                        "[1]", "3", "{", "", "[" * 5000]},
    },
}  # fmt: skip


def cases() -> Iterator[Any]:
    for kind in KINDS:
        of_all = OF_ALL if kind == "codebook" else OF_ALL | OF_PARQUET
        for name, (change, text) in (of_all | OF_ONE[kind]).items():
            yield pytest.param(kind, change, text, id=f"{kind}: {name}")


@pytest.mark.parametrize(("kind", "change", "text"), list(cases()))
def test_what_contradicts_itself_is_refused(kind: str, path: Path, change: Change, text: str) -> None:
    """F30."""
    KINDS[kind].rewritten(path, change)
    with pytest.raises(KINDS[kind].error, match=text) as caught, np.errstate(over="ignore"):
        KINDS[kind].read(path)
    assert path.name in str(caught.value) or "shard deep/a.tar, key" in str(caught.value)


def test_a_column_that_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    made, path = KINDS["features"], tmp_path / "x.parquet"
    made.make(path)
    expected = made.read(path)[1:]

    def hardness(header: dict[str, Any], tables: list[pa.Table]) -> None:
        further = pa.field("hardness", pa.float32(), nullable=False)
        tables[0] = tables[0].append_column(further, pa.array(np.ones(8, np.float32)))
        header["columns"].append("hardness")

    rewritten(path, hardness)
    assert made.read(path)[1:] == expected
