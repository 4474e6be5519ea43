"""Is the field that a spec names found, and is every label right or refused, with shard, key and field in the text?"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adq_wds.errors import SampleError
from adq_wds.samples.fields import (
    IMAGE_FIELDS,
    WHOLE_FIELDS,
    Sample,
    SpecError,
    check_spec,
    clean_fields,
    image_bytes,
)
from adq_wds.samples.label import CLASS_FIELDS, MAX_JSON_BYTES, MAX_LABEL, find_label, read_label
from adq_wds.samples.whole_image import whole_image


def make(**fields: Any) -> Sample:
    return {"__key__": "n01/7", "__url__": "/data/train-000012.tar", **fields}


def png(colour: tuple[int, ...] = (1, 2, 3), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------ images
@pytest.mark.parametrize("field", WHOLE_FIELDS.split(";"))
def test_the_one_image_field_is_found_whatever_its_extension(field: str) -> None:
    sample = make(**{field: png(), "cls": b"1", "json": b"{}", "seg.png": png()})
    assert image_bytes(sample) == (field, png())
    assert whole_image(sample)[1].getpixel((0, 0)) == (1, 2, 3)


def test_a_spec_is_read_as_webdataset_users_write_it() -> None:
    sample = make(**{"jpg": b"j", "seg.png": b"s", "png": b"p"})
    assert image_bytes(sample, "seg.png") == ("seg.png", b"s")
    assert image_bytes(sample, "WEBP; .PNG") == ("png", b"p")
    field, data = image_bytes(sample, lambda s: bytearray(s["jpg"]))
    assert (field, data, type(data)) == ("<lambda>", b"j", bytes)


def test_no_image_names_the_fields_there_are() -> None:
    text = (
        r"^shard train-000012.tar, key 'n01/7': no image field: looked for jpg, png; "
        r"the sample has 'cls', 'txt'$"
    )
    with pytest.raises(SampleError, match=text):
        image_bytes(make(txt=b"", cls=b""), "jpg;png")
    with pytest.raises(SampleError, match=r"the sample has no field"):
        image_bytes(make())
    many = {f"f{i:02}": b"" for i in range(50)} | {"a" * 20_000_000: b""}
    with pytest.raises(SampleError, match=r"'f08' and 41 more") as caught:
        image_bytes(make(**many))
    assert len(str(caught.value)) < 1000


def test_two_images_are_both_named_with_the_remedy() -> None:
    text = r"key 'n01/7': fields 'jpg' and 'png' are both there; name one, such as image='jpg'"
    with pytest.raises(SampleError, match=text):
        image_bytes(make(png=b"", jpg=b""))
    with pytest.raises(
        SampleError, match="fields 'cls' and 'txt' are both there; name one, such as label='cls'"
    ):
        read_label(make(cls=b"1", txt=b"a"), "cls;txt")


def test_a_decoded_image_is_refused_with_the_remedy() -> None:
    with pytest.raises(SampleError, match=r"field 'jpg': holds Image, expected .* before \.decode\(\)"):
        image_bytes(make(jpg=Image.new("RGB", (1, 1))))


def test_a_damaged_image_is_named_by_shard_key_and_field() -> None:
    text = r"^shard train-000012.tar, key 'n01/7', field 'jpg': not an image \(starts with b'<html>'\)"
    with pytest.raises(SampleError, match=text):
        whole_image(make(jpg=b"<html>"))
    with pytest.raises(SampleError, match=r"field 'png': too large: 3 x 2 = 6 pixels, at most 5"):
        whole_image(make(png=png()), max_pixels=5)


def test_the_background_reaches_the_decoder() -> None:
    clear = make(png=png((9, 9, 9, 0), "RGBA"))
    assert whole_image(clear)[1].getpixel((0, 0)) == (255, 255, 255)
    assert whole_image(clear, background=(1, 2, 3))[1].getpixel((0, 0)) == (1, 2, 3)


def test_a_samples_place_may_be_unknown() -> None:
    with pytest.raises(SampleError, match=r"^shard \?: no image field"):
        image_bytes({"cls": b"1"})


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("", "is empty or named twice"),
        ("jpg;;png", "is empty or named twice"),
        ("jpg;JPG", "'JPG' is empty or named twice"),
        ("json:a;json:b", "'json:b' is empty or named twice"),
        ("cls:a", "a path, 'a', only leads into a json field"),
        ("pyd", "would run what a pickle says"),
        ("cls;pickle", "would run what a pickle says"),
        ("label.pkl", "would run what a pickle says"),
        ("pyd.gz", "would run what a pickle says"),
        ("pth", "would run what a pickle says"),
        (7, "=7 names no field"),
        (["jpg", "png"], "names no field"),
    ],
)
def test_a_malformed_spec_is_the_programs_error(spec: Any, text: str) -> None:
    for read in (image_bytes, whole_image, read_label):
        with pytest.raises(SpecError, match=text):
            read(make(jpg=b"", cls=b"1"), spec)
    for what in ("image", "label"):
        with pytest.raises(ValueError, match=text):
            check_spec(spec, what)


def test_what_can_be_read_passes_the_check_and_an_image_has_no_path() -> None:
    for spec in (IMAGE_FIELDS, ".PNG; seg.png", lambda sample: b""):
        check_spec(spec, "image")
    for spec in ("cls", "CLS; json:a.b", "none", None, lambda sample: 3):
        check_spec(spec, "label")
    with pytest.raises(SpecError, match="image=None names no field"):
        check_spec(None, "image")
    for read in (image_bytes, check_spec):
        with pytest.raises(SpecError, match="'jpg;json:a': a path, 'a', leads to a label, never to an image"):
            read(*((make(jpg=b""), "jpg;json:a") if read is image_bytes else ("jpg;json:a", "image")))  # type: ignore[operator]


def test_a_function_with_a_malformed_spec_inside_is_the_programs_error_too() -> None:
    with pytest.raises(SpecError, match="would run what a pickle says"):
        read_label(make(cls=b"1"), lambda sample: read_label(sample, "pkl"))


@pytest.mark.parametrize(
    ("spec", "field", "label"),
    [
        (".cls", "cls", 7),
        ("CLS; missing", "cls", 7),
        ("json:a.b", "json", "cat"),
        ("missing;.JSON:a.b", "json", "cat"),
        (lambda sample: 3, None, 3),
        (lambda sample: None, None, None),
        (None, None, None),
        ("none", None, None),
    ],
)
def test_the_field_that_was_read_is_told_by_its_name_in_the_sample(spec: Any, field: Any, label: Any) -> None:
    sample = make(cls=b"7", json=b'{"a": {"b": "cat"}}', png=png())
    assert find_label(sample, spec) == (field, label)
    assert read_label(sample, spec) == label
    assert whole_image(sample, "JPG; .Png")[0] == "png"
    assert whole_image(sample, lambda s: s["png"])[0] is None


# ------------------------------------------------------------------------------------------ labels
@given(st.integers(0, MAX_LABEL - 1), st.sampled_from(sorted(CLASS_FIELDS)))
def test_an_integer_label_is_what_was_written_however_it_was_stored(number: int, field: str) -> None:
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


BAD_LABELS: list[tuple[Any, str | Callable[[Sample], Any], str]] = [
    (b"", "cls", "field 'cls': '' is neither a class number"),
    (
        b"7.0",
        "cls",
        r"field 'cls': '7\.0' is neither a class number \(digits\) nor a word; write 7, or in a program read it by a function",
    ),
    (b"7.", "cls", "write 7, or in a program read it by a function"),
    (b"+7", "cls", "write 7, or in a program read it by a function"),
    (b"7.5", "cls", "nor a word; .*regression.*label=None"),
    (b"1_000", "cls", "nor a word"),
    ("٣", "cls", "nor a word"),
    (b"1 2", "cls", "nor a word.*several labels"),
    (b"[1, 2]", "cls", "nor a word"),
    (b"1e3", "cls", "nor a word"),
    (b"NaN", "cls", "nor a word"),
    (b"-inf", "cls", "nor a word"),
    (b"?", "cls", "nor a word"),
    (b"9" * 5000, "cls", "nor a word"),
    (b"cat\xff", "cls", "is not UTF-8 text"),
    ("\ud800a", "cls", "is not valid Unicode"),
    (b"-1", "cls", "label -1 is out of range; expected 0 to 2147483646"),
    (str(MAX_LABEL), "cls", "label 2147483647 is out of range"),
    (-1, "cls", "label -1 is out of range"),
    (2**80, "cls", "is out of range"),
    (True, "cls", "of type bool, expected an integer or a name"),
    (np.bool_(True), "cls", "expected an integer or a name"),
    (1.0, "cls", "of type float, expected an integer or a name"),
    ([1], "cls", "of type list"),
    (None, "cls", "of type null"),
    (b"\xff\xfe", "txt", r"field 'txt': label b'\\xff\\xfe' is not UTF-8 text"),
    (b" \n", "txt", "the label is empty"),
    (7, "txt", "of type int, expected text"),
    (
        b'{"a": [1, 2]}',
        "json:a",
        r"field 'json': label \[1, 2\] is of type list, .*several labels.*label=None",
    ),
    (b'{"a": 0.5}', "json:a", "of type float, .*regression.*label=None"),
    (
        b'{"a": 3.0}',
        "json:a",
        "of type float, expected an integer or a name; write 3, or in a program read it by a function",
    ),
    (b'{"a": true}', "json:a", "of type bool"),
    (b'{"a": null}', "json:a", "label None is of type null"),
    (b'{"a": {"b": 1}}', "json:a", "the entry is an object; name one inside it, such as 'json:label'"),
    (b'{"a": 1}', "json", "the entry is an object; name one inside it"),
    (b'{"a": 1, "c": 2}', "json:b", r"no entry 'b' on the way to 'b': the document there has \['a', 'c'\]"),
    (b'{"a": 1}', "json:a.b", "no entry 'b' on the way to 'a.b': the document there is 1"),
    (b'{"a": -1}', "json:a", "label -1 is out of range"),
    (b'{"a": "\\ud800"}', "json:a", "is not valid Unicode"),
    (b'{"a": 1', "json:a", "not JSON that can be read: "),
    (b"\xff", "json:a", "not JSON that can be read: "),
    (b"9" * 5000, "json", "not JSON that can be read: "),
    (b"[" * 200_000, "json:a", "not JSON that can be read: "),
    (b'{"a":' * 200_000, "json:a", "not JSON that can be read: "),
    (b" " * (MAX_JSON_BYTES + 1), "json:a", "4194305 bytes of JSON, at most 4194304"),
    (b"", lambda sample: [1, 2], "field '<lambda>': label .* of type list, .*label=None"),
    (b"", lambda sample: True, "of type bool"),
    (b"", lambda sample: -1, "label -1 is out of range"),
    (b"", lambda sample: sample["nothing"], "field '<lambda>': label function raised KeyError: .*nothing"),
]


@pytest.mark.parametrize(("stored", "spec", "text"), BAD_LABELS)
def test_what_is_no_label_is_refused_where_it_stands(stored: Any, spec: Any, text: str) -> None:
    field = "x" if callable(spec) else spec.partition(":")[0]
    with pytest.raises(SampleError, match=text) as caught:
        read_label(make(**{field: stored}), spec)
    assert str(caught.value).startswith("shard train-000012.tar, key 'n01/7', field '")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_missing_label_names_the_fields_and_the_way_out() -> None:
    text = r"no label field: looked for cls; the sample has 'jpg'; for unlabelled data, label=None"
    with pytest.raises(SampleError, match=text):
        read_label(make(jpg=b""), "cls")


def test_the_cause_is_chained() -> None:
    for spec in ("json:a", "txt"):
        with pytest.raises(SampleError) as caught:
            read_label(make(**{spec.partition(":")[0]: b"\xff"}), spec)
        assert isinstance(caught.value.__cause__, UnicodeDecodeError)
    with pytest.raises(SampleError) as caught:
        whole_image(make(jpg=b"\xff\xd8\xff"))
    assert isinstance(caught.value.__cause__, SampleError)
    assert isinstance(caught.value.__cause__.__cause__, SyntaxError | OSError)


# ---------------------------------------------------------------------------------------- security
class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("field", ["pyd", "pickle", "pkl", "pth", "pt", "pyd.gz"])
def test_no_pickle_is_ever_loaded(field: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    payload = pickle.dumps(Trap(trap))
    sample = make(**{field: payload, "png": png(), "cls": b"4"})
    assert whole_image(sample)[1].size == (3, 2)
    assert read_label(sample, "cls") == 4
    for name in ("jpg", "cls", "txt", "json", "json:a"):
        with pytest.raises(SampleError):
            read_label(make(**{name.partition(":")[0]: payload}), name)
    with pytest.raises(SampleError, match="not an image"):
        whole_image(make(jpg=payload))
    assert not trap.exists()
    pickle.loads(payload)  # noqa: S301 - the trap works
    assert trap.exists()


def test_forged_fields_are_dropped_and_the_sample_left_alone() -> None:
    sample = make(jpg=b"j", __adq_keep__=b"1", __adq_=b"", adq=b"2", __adq_epoch__="1")
    before = dict(sample)
    assert clean_fields(sample) == make(jpg=b"j", adq=b"2")
    assert sample == before


@given(
    st.dictionaries(
        st.sampled_from(["jpg", "a__adq_", "__adq_", "__adq_x__", "__ADQ_x__", "_", "_adq_"]),
        st.sampled_from([b"1", "1", 1, None, 0.5]),
    )
)
def test_only_our_names_with_what_a_tar_can_bring_are_dropped_and_the_order_stays(sample: Sample) -> None:
    kept = [(k, v) for k, v in sample.items() if not (k.startswith("__adq_") and isinstance(v, (bytes, str)))]
    out = clean_fields(sample)
    assert list(out.items()) == kept
    assert out is not sample
