"""Samples that a plan leaves out are listed; a plan that contradicts itself is named."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.report.left_out import left_out_samples, show_left_out


@pytest.mark.parametrize("there", ["a.tar/x", "a.tar/z", "x"])
def test_a_copy_of_a_sample_that_is_not_there_is_named(there: str) -> None:
    columns: dict[str, list[Any]] = {
        "shard": ["a.tar", "a.tar"],
        "key": ["x", "y"],
        "label": [0, 1],
        "reason": ["kept", "duplicate"],
        "duplicate_of": ["", there],
    }
    plan: Any = SimpleNamespace(table=lambda: pa.table(columns), header={})
    if there == "a.tar/x":
        assert [(entry["duplicate_of"], entry["label_there"]) for entry in left_out_samples(plan)] == [
            (there, 0)
        ]
    else:
        with pytest.raises(
            adq.PlanError, match=rf"shard a.tar, key 'y': .*'{there}' names no sample of the plan"
        ):
            list(left_out_samples(plan))


def test_each_sample_left_out_has_a_line_with_its_reason() -> None:
    columns: dict[str, list[Any]] = {
        "shard": ["a.tar"] * 5,
        "key": ["x", "copy", "same", "odd", "bad"],
        "label": [0, 1, 0, 1, -1],
        "reason": ["kept", "duplicate", "duplicate", "label", "bad"],
        "duplicate_of": ["", "a.tar/x", "a.tar/x", "", ""],
        "margin": [0.5, None, None, -0.25, None],
    }
    plan: Any = SimpleNamespace(table=lambda: pa.table(columns), header={"names": ["cat", "dog"]})
    entries = list(left_out_samples(plan))
    assert [(entry["reason"], entry["key"], entry["label"]) for entry in entries] == [
        ("duplicate", "copy", "dog"), ("duplicate", "same", "cat"), ("label", "odd", "dog"), ("bad", "bad", None),
    ]  # fmt: skip
    assert show_left_out(entries).split("\n") == [
        "duplicate\ta.tar\tcopy\tdog\tof a.tar/x, whose label is cat",
        "duplicate\ta.tar\tsame\tcat\tof a.tar/x",
        "label\ta.tar\todd\tdog\tmargin -0.250",
        "bad\ta.tar\tbad",
    ]
    of_version_1: Any = SimpleNamespace(table=lambda: pa.table({"shard": ["a.tar"]}), header={})
    assert show_left_out(left_out_samples(of_version_1)) == "no sample is left out"
