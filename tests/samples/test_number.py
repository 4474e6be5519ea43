"""Is a number read from any field that can hold one, and is everything else refused by shard, key and field?"""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.errors import SampleError
from adq_wds.samples.number import read_number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_comes_back_from_text_and_json(number: float) -> None:
    text = repr(number)
    fields = {
        "txt": f" {text}\n".encode(),
        "json": f'{{"a": {{"cos": {text}}}}}'.encode(),
        "n": number,
        "s": text,
    }
    for spec in ("txt", "json:a.cos", "n", "s", "none;txt"):
        assert read_number(fields, spec) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"", "no number"),
        (b"0.5 0.5", "no number"),
        (b"\xff", "no number"),
        (b"nan", "nan is not a finite number"),
        (b"-inf", "-inf is not a finite number"),
        (b"1e999", "inf is not a finite number"),
        ([0.5], "no number"),
        (10**400, "no number"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, text: str) -> None:
    with pytest.raises(SampleError, match=f"^shard a.tar, key 'k', field 'txt': .*{text}"):
        read_number({"__key__": "k", "__url__": "x/a.tar", "txt": value}, "txt")


def test_in_json_true_is_one_and_text_is_none() -> None:
    sample = {
        "__key__": "k",
        "__url__": "a.tar",
        "json": b'{"yes": true, "no": false, "cos": "0.5", "list": [1]}',
    }
    assert [read_number(sample, f"json:{name}") for name in ("yes", "no")] == [1, 0]
    for name, text in (("cos", "'0.5' is text, expected a number"), ("list", ""), ("other", "")):
        with pytest.raises(SampleError, match=rf"^shard a\.tar, key 'k', field 'json:{name}': .*{text}"):
            read_number(sample, f"json:{name}")
    assert math.isclose(read_number({"m.json": {"cos": 0.5}}, "m.json:cos"), 0.5)
