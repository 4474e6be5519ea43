"""Does Decode take exactly the fields it names, and are wrong arguments met before the first sample?"""

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
def test_the_fields_that_were_read_go_and_others_pass(label: Any, image: Any, left: set[str]) -> None:
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


def test_a_function_gets_a_copy_without_forged_fields() -> None:
    def label(sample: Sample) -> int:
        assert "__adq_keep__" not in sample
        return int(sample.pop("cls"))

    sample = make(cls=b"7", __adq_keep__=b"1")
    before = dict(sample)
    assert decoded(sample, label=label)["label"] == 7
    assert sample == before


def test_a_users_functions_are_called_once_a_sample() -> None:
    calls: list[str] = []
    options: Any = {
        "image": lambda s: calls.append("image") or PPM,
        "label": lambda s: calls.append("label") or 3,
    }
    list(adq.Decode(**options)([make(), make(), make()]))
    assert sorted(calls) == ["image"] * 3 + ["label"] * 3


def test_fields_named_image_and_label_can_be_what_is_read() -> None:
    sample = {"__key__": "a", "__url__": "a.tar", "image": PPM, "label": b"cat"}
    out = decoded(sample, image="image", label="label")
    assert (out["image"].shape, out["label"]) == ((1, 1, 3), "cat")
    options = {"max_pixels": np.int64(1), "background": (0, 255, np.uint8(7))}
    assert decoded(make(cls=b"1"), **options)["image"].shape == (1, 1, 3)


def test_whole_images_asked_for_patches_say_that_they_are_whole() -> None:
    def patches_of(sample: Sample) -> Sample:
        return adq.Decode(label=None, to="patches").apply([sample])[0]

    text = r"^shard a.tar, key 'a', field '{}': a whole image, not kept patches, .* without to='patches'$"
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


def patched(**fields: Any) -> Sample:
    """A sample whose image keeps the first and the last of four patches."""
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    patches = encode(pixels, np.array([0, 3]), 16)
    return {"__key__": "a", "__url__": "x/a.tar", "patches.jpg": patches, "cls": b"1", **fields}


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
    with pytest.raises(adq.SampleError, match=r"'cls': label ('gnu'|1) is none of the 2 names in classes="):
        decoded(make(cls=label), classes=["cat", "dog"])
