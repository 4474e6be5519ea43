"""Does Decode take exactly the fields it names, and are wrong arguments met before the first sample?"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
from adq_wds.samples.fields import Sample
from adq_wds.samples.patch_file import encode
from adq_wds.samples.whole_image import whole_image
from tests.conftest import jpeg, write_tar

PPM = b"P6 1 1 255 abc"


def make(**fields: Any) -> Sample:
    return {"__key__": "a", "__url__": "x/a.tar", "ppm": PPM, **fields}


def decoded(sample: Sample, **options: Any) -> Sample:
    (out,) = adq.Decode(to="numpy", **options)([sample])
    return out


@pytest.mark.parametrize(
    ("label", "image", "left"),
    [
        ("cls", "ppm", {"json", "txt"}),
        (".cls", ".PPM", {"json", "txt"}),
        ("CLS; missing", "jpg; ppm", {"json", "txt"}),
        ("json:label", "ppm", {"cls", "txt"}),
        ("missing;.Json:label", "ppm", {"cls", "txt"}),
        ("txt", "ppm", {"cls", "json"}),
        (None, "ppm", {"cls", "json", "txt"}),
        ("none", "ppm", {"cls", "json", "txt"}),
        (lambda sample: 7, "ppm", {"cls", "json", "txt"}),
        ("cls", lambda sample: sample["ppm"], {"ppm", "json", "txt"}),
    ],
)
def test_the_fields_that_were_read_are_dropped_and_all_others_pass(
    label: Any, image: Any, left: set[str]
) -> None:
    out = decoded(make(cls=b"7", json=b'{"label": 7}', txt=b"7"), label=label, image=image)
    read = {"image"} if label in (None, "none") else {"image", "label"}
    assert set(out) == {"__key__", "__url__"} | left | read
    assert out["image"].tolist() == [[[97, 98, 99]]]
    assert int(out.get("label", 7)) == 7


def test_a_function_named_like_a_field_drops_nothing() -> None:
    def cls(sample: Sample) -> int:
        return 3

    def ppm(sample: Sample) -> bytes:
        return bytes(sample["jpg"])

    out = decoded(make(cls=b"7", jpg=PPM), label=cls, image=ppm)
    assert set(out) == {"__key__", "__url__", "ppm", "jpg", "cls", "image", "label"}
    assert (out["cls"], out["label"]) == (b"7", 3)


def test_a_function_that_changes_its_sample_changes_no_input_and_sees_nothing_forged() -> None:
    def label(sample: Sample) -> int:
        assert "__adq_keep__" not in sample
        return int(sample.pop("cls"))

    sample = make(cls=b"7", __adq_keep__=b"1")
    before = dict(sample)
    assert decoded(sample, label=label)["label"] == 7
    assert sample == before


def test_a_users_functions_are_called_once_a_sample() -> None:
    calls: list[str] = []

    def image(sample: Sample) -> bytes:
        calls.append("image")
        return PPM

    def label(sample: Sample) -> int:
        calls.append("label")
        return 3

    list(adq.Decode(image=image, label=label)([make(), make(), make()]))
    assert sorted(calls) == ["image"] * 3 + ["label"] * 3


def test_fields_named_image_and_label_can_be_what_is_read() -> None:
    out = decoded(
        {"__key__": "a", "__url__": "a.tar", "image": PPM, "label": b"cat"}, image="image", label="label"
    )
    assert (out["image"].shape, out["label"]) == ((1, 1, 3), "cat")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"to": "jpeg"}, r"to must be one of .* got 'jpeg'"),
        ({"image": "pkl"}, "would run what a pickle says"),
        ({"image": 3}, "image=3 names no field"),
        ({"image": None}, "image=None names no field"),
        ({"image": "json:a"}, "a path, 'a', leads to a label, never to an image"),
        ({"label": "cls;CLS"}, "is empty or named twice"),
        ({"label": "cls:a"}, "only leads into a json field"),
        ({"label": ["cls"]}, r"label=\['cls'\] names no field"),
        ({"label": "x.pth"}, "would run what a pickle says"),
        ({"max_pixels": 0}, "max_pixels must be an integer >= 1, got 0"),
        ({"max_pixels": 1.5}, "max_pixels must be an integer >= 1, got 1.5"),
        ({"max_pixels": True}, "max_pixels must be an integer >= 1, got True"),
        ({"max_pixels": "9"}, "max_pixels must be an integer >= 1, got '9'"),
        ({"background": (300, 0, 0)}, r"background must be .* 0 to 255, got \(300, 0, 0\)"),
        ({"background": (-1, 0, 0)}, r"got \(-1, 0, 0\)"),
        ({"background": (0, 0)}, r"got \(0, 0\)"),
        ({"background": (0.5, 0, 0)}, r"got \(0.5, 0, 0\)"),
        ({"background": "red"}, "got 'red'"),
        ({"background": 7}, "got 7"),
        ({"on_error": "ignore"}, "on_error must be 'raise', 'skip' or a function, got 'ignore'"),
    ],
)
def test_a_wrong_argument_is_met_when_the_stage_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adq.Decode(**{"on_error": "skip", **options})


def test_bounds_that_are_just_right_are_taken() -> None:
    options = {"max_pixels": np.int64(1), "background": (0, 255, np.uint8(7))}
    assert decoded(make(cls=b"1"), **options)["image"].shape == (1, 1, 3)


def test_a_class_used_as_a_stage_is_no_silent_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image=<list_iterator .* names no field"):
        adq.Decode(iter([make()]))  # type: ignore[arg-type]


def test_whole_images_asked_for_patches_say_that_they_are_whole() -> None:
    def patches_of(sample: Sample) -> Sample:
        return adq.Decode(label=None, to="patches").apply([sample])[0]

    text = (
        r"^shard a.tar, key 'a', field '{}': a whole image, not kept patches, which are stored as "
        r"'patches.jpg': drop patches with DropPatches, or decode it without to='patches'$"
    )
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "JPEG")
    for sample in ({"ppm": PPM}, {"jpg": picture.getvalue()}):
        (name,) = sample
        with pytest.raises(adq.SampleError, match=text.format(name)):
            patches_of({"__key__": "a", "__url__": "x/a.tar", **sample})
    renamed = {"__key__": "a", "__url__": "x/a.tar", "jpg": patched()["patches.jpg"]}
    assert patches_of(renamed)["positions"].tolist() == [0, 3]
    renamed["jpg"] = renamed["jpg"].replace(b"ADQP\0\1", b"ADQP\0\7")
    with pytest.raises(adq.SampleError, match="field 'jpg': patch mask of version 7"):
        patches_of(renamed)
    with pytest.raises(adq.SampleError, match=r"field 'patches.jpg': no patch mask: .* metadata"):
        patches_of(patched(**{"patches.jpg": picture.getvalue()}))


# ---- An image of any kind, for other stages and jobs


def patched(**fields: Any) -> Sample:
    """A sample whose image keeps the first and the last of four patches."""
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    return {
        "__key__": "a",
        "__url__": "x/a.tar",
        "patches.jpg": encode(pixels, np.array([0, 3]), 16),
        "cls": b"1",
        **fields,
    }


def test_the_whole_image_is_what_decode_gives_of_every_sample() -> None:
    for sample, field in ((make(cls=b"1"), "ppm"), (patched(), "patches.jpg")):
        name, image = whole_image(sample)
        assert (name, image.mode) == (field, "RGB")
        assert np.array_equal(np.asarray(image), decoded(sample)["image"])
    name, image = whole_image(patched(), "patches.jpg", fill=(1, 2, 3))
    assert (name, image.size) == ("patches.jpg", (32, 32))
    assert np.array_equal(np.asarray(image), decoded(patched(), fill=(1, 2, 3))["image"])
    assert (np.asarray(image)[:16, 16:] == (1, 2, 3)).all()
    name, image = whole_image(patched(), lambda sample: sample["patches.jpg"])
    assert (name, image.size) == (None, (32, 16))  # a function's bytes are a picture: here the tiles


def test_of_several_images_none_is_taken_and_damaged_places_are_named() -> None:
    with pytest.raises(adq.SampleError, match=r"fields 'ppm' and 'patches.jpg' are both there; name one"):
        whole_image(patched(ppm=PPM))
    assert whole_image(patched(ppm=PPM), "ppm")[1].size == (1, 1)
    stripped = io.BytesIO()
    Image.open(io.BytesIO(patched()["patches.jpg"])).save(stripped, "JPEG")
    with pytest.raises(adq.SampleError, match=r"key 'a', field 'patches.jpg': no patch mask: .* metadata"):
        whole_image(patched(**{"patches.jpg": stripped.getvalue()}))
    with pytest.raises(
        adq.SampleError, match=r"field 'patches.jpg': too large: .* 1024 pixels, at most 1023"
    ):
        whole_image(patched(), max_pixels=1023)


# ---- Words as classes


def test_words_are_the_numbers_that_a_plan_gives_their_classes(tmp_path: Path) -> None:
    words = ["dog", "cat", "emu", "cat", "dog", "emu"]
    shards = []
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 6))):
        members = [(f"{name}{i}.{field}", data) for i, word in enumerate(words[part])
                   for field, data in (("jpg", jpeg(i + 3 * (name == "b"))), ("cls", b"\xef\xbb\xbf" + word.encode()))]  # fmt: skip
        shards.append(str(write_tar(tmp_path / f"{name}.tar", members)))
    plan = adq.build_plan(adq.embed_shards(shards, "thumbnail", tmp_path / "f"), bins=1, keep=1.0)
    names = plan.header["names"]
    assert names == ["cat", "dog", "emu"]
    by_key = {row["key"]: row["label"] for row in plan.table().to_pylist()}
    decode = pickle.loads(pickle.dumps(adq.Decode(to="numpy", classes=names)))  # noqa: S301 - as workers get it
    samples = list(adq.ShardDataset(shards, plan=plan, pipes=[decode]))
    assert {sample["__key__"]: sample["label"] for sample in samples} == by_key
    plain = list(adq.ShardDataset(shards, plan=plan, pipes=[adq.Decode(to="numpy")]))
    assert {sample["label"] for sample in plain} == {"cat", "dog", "emu"}


@pytest.mark.parametrize("label", [b"gnu", b"1"])
def test_a_label_that_is_none_of_the_classes_is_a_bad_sample(label: bytes) -> None:
    with pytest.raises(
        adq.SampleError, match=r"field 'cls': label ('gnu'|1) is none of the 2 names in classes="
    ):
        decoded(make(cls=label), classes=["cat", "dog"])


@pytest.mark.parametrize("classes", ["cat", [1, 2], ["cat", "cat"], {"cat": 0}])
def test_classes_are_a_list_of_different_names(classes: Any) -> None:
    with pytest.raises(ValueError, match="classes must be a list of different names"):
        adq.Decode(classes=classes)
