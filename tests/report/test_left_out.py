"""Samples that a plan leaves out are listed; a plan that contradicts itself is named."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.report.left_out import left_out_samples


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
