"""Is the one field found that a spec names, and is every other sample refused by shard, key and field?"""

import io
import pickle
from pathlib import Path
from typing import Any

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
    check_absent,
    check_spec,
    clean_fields,
    content_digest,
    image_bytes,
)
from adq_wds.samples.label import find_label, read_label
from adq_wds.samples.whole_image import whole_image


def make(**fields: Any) -> Sample:
    return {"__key__": "n01/7", "__url__": "/data/train-000012.tar", **fields}


def png(colour: tuple[int, ...] = (1, 2, 3), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(file, "PNG")
    return file.getvalue()


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
    text = r"^shard train-000012.tar, key 'n01/7': no image field: looked for jpg, png; .* has 'cls', 'txt'$"
    with pytest.raises(SampleError, match=text):
        image_bytes(make(txt=b"", cls=b""), "jpg;png")
    with pytest.raises(SampleError, match=r"the sample has no field"):
        image_bytes(make())
    with pytest.raises(SampleError, match=r"^shard \?: no image field"):
        image_bytes({"cls": b"1"})
    many = {f"f{i:02}": b"" for i in range(50)} | {"a" * 20_000_000: b""}
    with pytest.raises(SampleError, match=r"'f08' and 41 more") as caught:
        image_bytes(make(**many))
    assert len(str(caught.value)) < 1000


def test_two_images_or_a_decoded_one_are_named_with_the_remedy() -> None:
    text = r"key 'n01/7': fields 'jpg' and 'png' are both there; name one, such as image='jpg'"
    with pytest.raises(SampleError, match=text):
        image_bytes(make(png=b"", jpg=b""))
    with pytest.raises(SampleError, match=r"'cls' and 'txt' are both there; .* label='cls'"):
        read_label(make(cls=b"1", txt=b"a"), "cls;txt")
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


MALFORMED: list[tuple[str, list[Any]]] = [
    ("is empty or named twice", ["", "jpg;;png", "jpg;JPG", "json:a;json:b"]),
    ("a path, 'a', only leads into a json field", ["cls:a"]),
    ("would run what a pickle says", ["pyd", "cls;pickle", "label.pkl", "pyd.gz", "pth"]),
    ("names no field", [7, ["jpg", "png"]]),
]


@pytest.mark.parametrize(("text", "specs"), MALFORMED)
def test_a_malformed_spec_is_the_programs_error(text: str, specs: list[Any]) -> None:
    for spec in specs:
        for read in (image_bytes, whole_image, read_label):
            with pytest.raises(SpecError, match=text):
                read(make(jpg=b"", cls=b"1"), spec)
        for what in ("image", "label"):
            with pytest.raises(ValueError, match=text):
                check_spec(spec, what)


def test_right_specs_pass_the_check() -> None:
    for spec in (IMAGE_FIELDS, ".PNG; seg.png", lambda sample: b""):
        check_spec(spec, "image")
    for spec in ("cls", "CLS; json:a.b", "none", None, lambda sample: 3):
        check_spec(spec, "label")
    with pytest.raises(SpecError, match="image=None names no field"):
        check_spec(None, "image")
    for read in (image_bytes, check_spec):
        with pytest.raises(SpecError, match="'jpg;json:a': a path, 'a', leads to a label, never to an image"):
            read(*((make(jpg=b""), "jpg;json:a") if read is image_bytes else ("jpg;json:a", "image")))  # type: ignore[operator]
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
def test_the_field_that_was_read_is_named(spec: Any, field: Any, label: Any) -> None:
    sample = make(cls=b"7", json=b'{"a": {"b": "cat"}}', png=png())
    assert find_label(sample, spec) == (field, label)
    assert read_label(sample, spec) == label
    assert whole_image(sample, "JPG; .Png")[0] == "png"
    assert whole_image(sample, lambda s: s["png"])[0] is None


def test_the_cause_is_chained() -> None:
    for spec in ("json:a", "txt"):
        with pytest.raises(SampleError) as caught:
            read_label(make(**{spec.partition(":")[0]: b"\xff"}), spec)
        assert isinstance(caught.value.__cause__, UnicodeDecodeError)
    with pytest.raises(SampleError) as caught:
        whole_image(make(jpg=b"\xff\xd8\xff"))
    assert isinstance(caught.value.__cause__, SampleError)
    assert isinstance(caught.value.__cause__.__cause__, SyntaxError | OSError)


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


NAMES = st.sampled_from(["jpg", "a__adq_", "__adq_", "__adq_x__", "__ADQ_x__", "_", "_adq_"])


@given(st.dictionaries(NAMES, st.sampled_from([b"1", "1", 1, None, 0.5])))
def test_only_our_names_with_what_a_tar_can_bring_are_dropped(sample: Sample) -> None:
    kept = [(k, v) for k, v in sample.items() if not (k.startswith("__adq_") and isinstance(v, (bytes, str)))]
    out = clean_fields(sample)
    assert list(out.items()) == kept
    assert out is not sample


def test_equal_contents_have_equal_digests_and_no_others() -> None:
    """Of one image its bytes, whatever its name and neighbours; without one, of every field its name and its bytes."""
    image = content_digest(make(jpg=b"x", cls=b"0"))
    assert image == content_digest({"__key__": "other", "png": b"x"}) == content_digest(make(a=b"x"), "a")
    others = [
        {"jpg": b"y"},
        {"txt": b"x"},
        {"txt": b"x", "cls": b""},
        {"txt": b"", "cls": b"x"},
        {"tx": b"tx"},
        {},
    ]
    assert len({image, *(content_digest(make(**fields)) for fields in others)}) == 7
    assert content_digest(make(jpg=b"x", png=b"x")) != image, "none of two images is meant"
    with pytest.raises(SampleError, match=r"shard train-000012.tar, key 'n01/7', field 'txt'"):
        content_digest(make(txt=3.5))


def test_a_field_that_would_be_overwritten_is_named() -> None:
    check_absent(make(jpg=b"x"), ["png", "npy"], "Embed")
    with pytest.raises(SampleError, match=r"field 'npy': is there already; rename or drop it before Embed"):
        check_absent(make(npy=b"x"), ["png", "npy"], "Embed")
