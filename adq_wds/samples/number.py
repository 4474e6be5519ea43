"""Reads a number that a sample stores, such as ``json:cos``."""

from __future__ import annotations

import math
from typing import Any

from adq_wds.errors import SampleError, shorten
from adq_wds.samples.fields import BYTES, JSON_FIELDS, Sample, field_value, place_error
from adq_wds.samples.label import json_entry


def read_number(sample: Sample, spec: str) -> float:
    """The number in the field that `spec` names; true and false in a json field are 1 and 0.

    Args:
        sample: fields as bytes, or as WebDataset decodes them.
        spec: a field of text such as "txt", or a path into a json field such as "json:cos"; alternatives separated
            by ";".

    Raises:
        SampleError: no such field, or what it holds is no finite number. Located.
        SpecError: `spec` is malformed.

    >>> read_number({"json": b'{"cos": 0.5}'}, "json:cos"), read_number({"txt": b"1e3 "}, "txt")
    (0.5, 1000.0)
    """
    field, path, value = field_value(sample, spec, "number")
    try:
        if field.rpartition(".")[2] in JSON_FIELDS:
            value = json_entry(value, path)
            if isinstance(value, str):
                raise SampleError(f"{shorten(value)} is text, expected a number")
        return _finite(value)
    except SampleError as error:
        raise place_error(error, sample, f"{field}:{path}" if path else field) from error.__cause__


def _finite(value: Any) -> float:
    try:
        number = float(bytes(value) if isinstance(value, BYTES) else value)
    except (TypeError, ValueError, OverflowError):
        raise SampleError(f"{shorten(value)} is no number") from None
    if not math.isfinite(number):
        raise SampleError(f"{number} is not a finite number")
    return number
