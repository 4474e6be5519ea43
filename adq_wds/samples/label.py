"""Reads the label of a sample: an integer, a name, or none."""

from __future__ import annotations

import json
import operator
import re
from typing import Any

import numpy as np

from adq_wds.errors import SampleError, shorten
from adq_wds.protocols import Label
from adq_wds.samples.fields import BYTES, JSON_FIELDS, FieldSpec, Sample, field_value, place_error

CLASS_FIELDS = frozenset({"cls", "cls2", "class", "count", "index", "inx", "id"})
"""What WebDataset reads as integers; here a word in them is a class too."""
MAX_LABEL = 2**31 - 1
"""Integer labels are 0 ... MAX_LABEL - 1."""
MAX_JSON_BYTES = 4 * 1024 * 1024
_TEXT = (*BYTES, str)


def read_label(sample: Sample, spec: FieldSpec | None) -> Label:
    """The label of `sample`: an integer, a name, or None for unlabelled data.

    Args:
        sample: fields as bytes, or as WebDataset decodes them (an int in "cls", a dict in "json").
        spec: None or "none" for no label. Else alternatives separated by ";", each read by its last
            extension: `CLASS_FIELDS` as an integer from 0 where they hold ASCII digits, and as a name where
            they hold a word (with a letter in it, and no number such as "3.0" or "nan"); "json:label",
            "json:a.b" as the entry at that path, an integer or a name by its JSON type; every other one
            ("txt") as a name. Names are UTF-8; white space around them, and a byte-order mark in front, are
            taken off. Or a function of the sample, giving int, str or None.

    Raises:
        SampleError: no such field, several of them, or a value that is no label. Located.
        SpecError: `spec` is malformed, or names a field that would have to be unpickled.

    >>> read_label({"cls": b"7\\n"}, "cls"), read_label({"json": b'{"a": {"b": "cat"}}'}, "cls;json:a.b")
    (7, 'cat')
    >>> read_label({"cls": b"\\xef\\xbb\\xbfcat\\r\\n"}, "cls")
    'cat'
    """
    return find_label(sample, spec)[1]


def find_label(sample: Sample, spec: FieldSpec | None) -> tuple[str | None, Label]:
    """The label's field, None without a spec, and the result of `read_label`.

    >>> find_label({"json": b'{"label": 7}'}, ".JSON:label; txt")
    ('json', 7)
    """
    if spec is None or spec == "none":
        return None, None
    field, path, value = field_value(sample, spec, "label")
    try:
        if callable(spec):
            return None, None if value is None else _typed(value)
        return field, _by_extension(value, field, path)
    except SampleError as error:
        raise place_error(error, sample, field) from error.__cause__


def _by_extension(value: Any, field: str, path: str) -> Label:
    kind = field.rpartition(".")[2]
    if kind in CLASS_FIELDS:
        return _class(value)
    if kind in JSON_FIELDS:
        return _typed(json_entry(value, path))
    if field == "label" and not isinstance(value, BYTES):  # set by `Decode` from another field
        return _typed(value)
    return _name(value)


def _typed(value: Any) -> Label:
    """An integer or a name by its Python type."""
    return _name(value) if isinstance(value, str) else _number(value)


def _class(value: Any) -> Label:
    """A number where there are digits, a name where there is a word."""
    if not isinstance(value, _TEXT):
        return _number(value)
    text = _text(value)
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        return _number(int(text))
    if any(letter.isalpha() for letter in text) and not _is_number(text):
        return _name(text)
    raise SampleError(f"{shorten(text)} is neither a class number (digits) nor a word; {_remedy(text)}")


def _number(value: Any) -> int:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError):
        kind = "null" if value is None else type(value).__name__
        remedy = _remedy(str(value) if isinstance(value, float) else "")
        text = f"label {shorten(value)} is of type {kind}, expected an integer or a name; {remedy}"
        raise SampleError(text) from None
    if not 0 <= number < MAX_LABEL:
        raise SampleError(f"label {number} is out of range; expected 0 to {MAX_LABEL - 1}")
    return number


def _is_number(text: str) -> bool:
    """Whether Python reads a number, NaN and infinity included."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _remedy(text: str) -> str:
    """The remedy for a label of another kind; some tools store 3 as "3.0"."""
    whole = re.fullmatch(r"\+?([0-9]{1,10})(?:\.0*)?", text)
    write = f"write {int(whole[1])}, or in a program read it by a function of your own; " if whole else ""
    return write + "for several labels, a regression or none, use label=None"


def _text(value: bytes | bytearray | memoryview | str) -> str:
    """UTF-8 text, without white space around it and without a byte-order mark in front."""
    if not isinstance(value, str):
        data = bytes(value)
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"label {shorten(data)} is not UTF-8 text") from error
    return value.strip().lstrip("\ufeff").strip()


def _name(value: Any) -> str:
    if not isinstance(value, _TEXT):
        raise SampleError(f"label {shorten(value)} is of type {type(value).__name__}, expected text")
    name = _text(value)
    if not name:
        raise SampleError("the label is empty; for unlabelled data, label=None")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SampleError(f"label {shorten(name)} is not valid Unicode (half a surrogate pair)")
    return name


def read_json(value: Any) -> Any:
    """A JSON document, given as bytes, as text or parsed.

    Raises:
        SampleError: it is larger than `MAX_JSON_BYTES`, nested too deeply, or no JSON.
    """
    if not isinstance(value, _TEXT):
        return value
    if len(value) > MAX_JSON_BYTES:
        raise SampleError(f"{len(value)} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    try:
        return json.loads(value.lstrip("\ufeff") if isinstance(value, str) else bytes(value))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON that can be read: {shorten(str(error), 200)}") from error


def json_entry(value: Any, path: str) -> Any:
    """The value at `path` ("a.b") of a JSON document, given as bytes, as text or parsed."""
    value = read_json(value)
    for step in path.split(".") if path else ():
        if not isinstance(value, dict) or step not in value:
            is_object = isinstance(value, dict)
            there = f"has {shorten(sorted(map(str, value)))}" if is_object else f"is {shorten(value)}"
            raise SampleError(f"no entry {step!r} on the way to {path!r}: the document there {there}")
        value = value[step]
    if isinstance(value, dict):
        raise SampleError("the entry is an object; name one inside it, such as 'json:label'")
    return value
