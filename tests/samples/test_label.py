"""Is every label right, or refused with shard, key and field in the text?"""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.errors import SampleError
from adq_wds.samples.fields import Sample
from adq_wds.samples.label import CLASS_FIELDS, MAX_JSON_BYTES, MAX_LABEL, read_label
from tests.samples.test_fields import make


@given(st.integers(0, MAX_LABEL - 1), st.sampled_from(sorted(CLASS_FIELDS)))
def test_an_integer_label_is_read_however_it_was_stored(number: int, field: str) -> None:
    text = f" {number}\n"
    for stored in (text.encode(), bytearray(text, "ascii"), text, number, np.int64(number), np.array(number)):
        label = read_label(make(**{field: stored}), field)
        assert (label, type(label)) == (number, int)
    assert read_label(make(json={"a": number}), "json:a") == number
    assert read_label(make(json=json.dumps({"a": number}).encode()), "json:a") == number


@given(st.text())
def test_a_name_is_the_text_without_the_white_space_around_it(text: str) -> None:
    ways: list[tuple[Sample, Any]] = [
        (make(txt=text.encode("utf-8")), "txt"),
        (make(transcript=text), "transcript"),
        (make(json=json.dumps([{"b": text}][0])), "json:b"),
        (make(), lambda sample: text),
    ]
    for sample, spec in ways:
        if text.strip():
            assert read_label(sample, spec) == text.strip()
        else:
            with pytest.raises(SampleError, match="the label is empty; for unlabelled data, label=None"):
                read_label(sample, spec)


@given(
    st.sampled_from(sorted(CLASS_FIELDS)),
    st.sampled_from(["cat", "n01440764", "Ölkanne", "two words", "3d", "e5"]),
)
def test_a_word_where_numbers_usually_stand_is_a_name(field: str, word: str) -> None:
    for stored in (word, word.encode(), f" {word}\r\n".encode(), np.str_(word)):
        label = read_label(make(**{field: stored}), field)
        assert (label, type(label)) == (word, str)


@pytest.mark.parametrize("before", ["", "\ufeff", " \ufeff ", "\ufeff\ufeff"])
@pytest.mark.parametrize("text", ["3", "cat"])
def test_a_byte_order_mark_is_no_part_of_a_label(before: str, text: str) -> None:
    for field in ("cls", "txt"):
        for stored in (before + text, (before + text).encode()):
            assert read_label(make(**{field: stored}), field) == read_label(make(**{field: text}), field)
    document = json.dumps({"a": before + text}, ensure_ascii=False)
    for whole in (document, "\ufeff" + document, "\ufeff".encode() + document.encode()):
        assert read_label(make(json=whole), "json:a") == text
    assert read_label(make(), lambda sample: before + text) == text


def test_no_label_is_asked_for_by_none() -> None:
    assert read_label(make(cls=b"junk"), None) is None
    assert read_label(make(), "none") is None
    assert read_label(make(), lambda sample: None) is None


def test_a_json_path_leads_down_and_its_case_counts() -> None:
    document = {"a": {"B": 5, "b": "five"}, "label": 3}
    for stored in (document, json.dumps(document), json.dumps(document).encode()):
        assert read_label(make(json=stored), "json:a.B") == 5
        assert read_label(make(json=stored), "JSON:a.b") == "five"
        assert read_label(make(**{"meta.json": stored}), "meta.json:label") == 3
    assert read_label(make(json=b"7"), "json") == 7
    assert read_label(make(**{"fine.cls": b"7"}), "cls;fine.cls") == 7


BAD_LABELS: list[tuple[Any, str, list[Any]]] = [
    ("cls", "nor a word; .*regression.*label=None",
     [b"", b"7.5", b"1_000", "٣", b"1 2", b"[1, 2]", b"1e3", b"NaN", b"-inf", b"?", b"9" * 5000]),
    ("cls", "nor a word; write 7, or in a program read it by a function", [b"7.0", b"7.", b"+7"]),
    ("cls", "is not UTF-8 text", [b"cat\xff"]),
    ("cls", "is not valid Unicode", ["\ud800a"]),
    ("cls", "is out of range; expected 0 to 2147483646", [b"-1", str(MAX_LABEL), -1, 2**80]),
    ("cls", "of type bool, expected an integer or a name", [True, np.bool_(True)]),
    ("cls", "of type (float|list|null), expected an integer or a name", [1.0, [1], None]),
    ("txt", r"label b'\\xff\\xfe' is not UTF-8 text", [b"\xff\xfe"]),
    ("txt", "the label is empty", [b" \n"]),
    ("txt", "of type int, expected text", [7]),
    ("json:a", r"label \[1, 2\] is of type list, .*several labels.*label=None", [b'{"a": [1, 2]}']),
    ("json:a", "of type float, .*regression.*label=None", [b'{"a": 0.5}']),
    ("json:a", "of type float, expected an integer or a name; write 3, or in a program", [b'{"a": 3.0}']),
    ("json:a", "of type (bool|null)", [b'{"a": true}', b'{"a": null}']),
    ("json:a", "the entry is an object; name one inside it, such as 'json:label'", [b'{"a": {"b": 1}}']),
    ("json", "the entry is an object; name one inside it", [b'{"a": 1}']),
    ("json:b", r"no entry 'b' on the way to 'b': the document there has \['a', 'c'\]", [b'{"a": 1, "c": 2}']),
    ("json:a.b", "no entry 'b' on the way to 'a.b': the document there is 1", [b'{"a": 1}']),
    ("json:a", "label -1 is out of range", [b'{"a": -1}']),
    ("json:a", "is not valid Unicode", [b'{"a": "\\ud800"}']),
    ("json:a", "not JSON that can be read: ", [b'{"a": 1', b"\xff", b"[" * 200_000, b'{"a":' * 200_000]),
    ("json", "not JSON that can be read: ", [b"9" * 5000]),
    ("json:a", "4194305 bytes of JSON, at most 4194304", [b" " * (MAX_JSON_BYTES + 1)]),
    (lambda sample: [1, 2], "field '<lambda>': label .* of type list, .*label=None", [b""]),
    (lambda sample: True, "of type bool", [b""]),
    (lambda sample: -1, "label -1 is out of range", [b""]),
    (lambda sample: sample["nothing"], "field '<lambda>': label function raised KeyError: .*nothing", [b""]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "text", "values"), BAD_LABELS)
def test_what_is_no_label_is_refused_where_it_stands(spec: Any, text: str, values: list[Any]) -> None:
    field = "x" if callable(spec) else spec.partition(":")[0]
    for stored in values:
        with pytest.raises(SampleError, match=text) as caught:
            read_label(make(**{field: stored}), spec)
        assert str(caught.value).startswith("shard train-000012.tar, key 'n01/7', field '")
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)


def test_a_missing_label_names_the_fields_and_the_way_out() -> None:
    text = r"no label field: looked for cls; the sample has 'jpg'; for unlabelled data, label=None"
    with pytest.raises(SampleError, match=text):
        read_label(make(jpg=b""), "cls")
