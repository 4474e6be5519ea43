"""Files of features, bins and views are read as they were written, or not at all."""

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
    rewritten,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    KINDS[kind].make(tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_equal_tables_are_equal_bytes_and_a_rewrite_no_damage(kind: str, path: Path) -> None:
    expected, data = KINDS[kind].read(path), path.read_bytes()
    KINDS[kind].make(path)
    assert path.read_bytes() == data
    rewritten(path, lambda header, tables: None)
    assert KINDS[kind].read(path) == expected


def test_no_truncation_is_ever_loaded(kind: str, path: Path) -> None:
    """F30."""
    data = path.read_bytes()
    for length in np.random.default_rng(0).choice(len(data), 100, replace=False):
        path.write_bytes(data[:length])
        with pytest.raises(KINDS[kind].error, match=r"x\.parquet"):
            KINDS[kind].read(path)


def test_no_bit_flip_is_ever_loaded_as_another_table(kind: str, path: Path) -> None:
    """F30."""
    expected, data, refused = KINDS[kind].read(path), path.read_bytes(), 0
    for bit in np.random.default_rng(1).choice(len(data) * 8, 100, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert KINDS[kind].read(path) == expected, f"flipped bit {bit} went through"
        except KINDS[kind].error:
            refused += 1
    assert refused > 50


def two_shards(header: dict[str, Any], tables: list[pa.Table]) -> None:
    header["shards"] *= 2
    tables *= 2


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
    "fewer rows": (put_entry("n", 1), "row groups are not those its header lists"),
    "rows of text": (put_entry("n", "8"), r"damaged header: .*shards\[0\]\.n is '8'"),
    "rows true": (put_entry("n", True), r"damaged header: .*shards\[0\]\.n is True"),
    "no shards": (put("shards", []), "row groups are not those its header lists"),
    "shards no list": (put("shards", 3), "damaged header: .*shards is 3"),
    "no hashes": (put_entry("columns", {}), "damaged: column .* does not match its hash"),
    "hashes no object": (put_entry("columns", None), r"damaged header: .*columns is None"),
    "name of a number": (put_entry("name", 5), r"damaged header: .*name is 5"),
}
OF_ONE: dict[str, dict[str, tuple[Change, str]]] = {
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
        "empty label": (put_column("label", lambda values: [None, *values[1:]]), "damaged: .*column label"),
        "a NaN": (put_column("embedding", lists(8, 6, np.nan)), "key 'k0000': embedding holds NaN or infinity"),
        "an infinite norm": (put_column("norm", lambda values: [*values[:7], np.inf]), "key 'k0009': norm holds NaN"),
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
        "bin out of range": (put_column("bin", lambda values: [3, *values[1:]]), "bins must lie in 0 … 2, got -1 … 3"),
        "bin below": (put_column("bin", lambda values: [-2, *values[1:]]), "bins must lie in 0 … 2, got -2 … 1"),
        "no pick": (put_column("pick", lambda values: [-1, *values[1:]]), "a binned sample has no pick"),
        "unknown class": (put_column("label", lambda values: [2, *values[1:]]), "of a class that the header does not list"),
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
}  # fmt: skip


def cases() -> Iterator[Any]:
    for kind in KINDS:
        for name, (change, text) in (OF_ALL | OF_ONE[kind]).items():
            yield pytest.param(kind, change, text, id=f"{kind}: {name}")


@pytest.mark.parametrize(("kind", "change", "text"), list(cases()))
def test_what_contradicts_itself_is_refused(kind: str, path: Path, change: Change, text: str) -> None:
    rewritten(path, change)
    with pytest.raises(KINDS[kind].error, match=text) as caught:
        KINDS[kind].read(path)
    assert "x.parquet" in str(caught.value) or "shard deep/a.tar, key" in str(caught.value)


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
