"""Bad input to the embedding job: named, counted, never half-written."""

import bz2
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.tables.features_file import FeaturesFile
from tests.conftest import write_tar
from tests.embedded import Fields, files, png, shard_of

# ---- Samples

BAD_SAMPLES: list[tuple[Fields, str]] = [
    ({"png": None}, r"shard a.tar, key 'k4': no image field: looked for jpg, .*; the sample has 'cls'"),
    ({"png": b""}, r"shard a.tar, key 'k4', field 'png': "),
    ({"png": b"<html>404"}, r"shard a.tar, key 'k4', field 'png': not an image .*<html>"),
    ({"png": png(4)[:60]}, r"shard a.tar, key 'k4', field 'png': "),
    ({"jpg": png(4)}, r"shard a.tar, key 'k4': fields 'jpg' and 'png' are both there; name one"),
    ({"cls": None}, r"shard a.tar, key 'k4': no label field: looked for cls; .*label=None"),
    ({"cls": b"3.5"}, r"shard a.tar, key 'k4', field 'cls': '3.5' is neither a class number"),
    ({"cls": b"-1"}, r"shard a.tar, key 'k4', field 'cls': label -1 is out of range"),
    ({"__bad__": b""}, r"shard a.tar, key 'k4', field '__bad__': reserved"),
]


@pytest.mark.parametrize(("fields", "text"), BAD_SAMPLES)
def test_a_bad_sample_is_an_error_or_listed(
    tmp_path: Path, fields: Fields, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard_of(tmp_path / "a.tar", 10, {4: fields, 8: {"png": b"later"}})
    for workers in (1, 3):
        with pytest.raises(adq.SampleError, match=text):
            adq.embed_shards(path, out=tmp_path / "f", workers=workers, batch_size=3)
    assert not files(tmp_path / "f")
    path = shard_of(tmp_path / "a.tar", 10, {4: fields})
    features = adq.embed_shards(path, out=tmp_path / "f", on_error="skip", batch_size=3)
    (file,) = features
    assert (len(features), file.n_read, len(file.bad)) == (9, 10, 1)
    (line,) = [r.message for r in caplog.records if r.message.startswith("{")]
    said = json.loads(line)
    assert (said["skipped_by"], *file.bad[0][:2], file.bad[0][5]) == ("embed", 4, "k4", said["error"])
    assert re.search(text, said["error"])
    assert "read 10 = kept 9 + dropped 0 + bad 1" in caplog.text
    (rows,) = adq.build_plan(features, bins=2, keep=1.0)
    assert rows.kept.tolist() == [key != "k4" for key in rows.spans.keys]


def test_a_function_decides_what_is_skipped(tmp_path: Path) -> None:
    seen = []

    def skip_images(error: adq.AdqError) -> bool:
        seen.append(str(error))
        return "field 'png'" in str(error)

    path = shard_of(tmp_path / "a.tar", 20, {4: {"png": b"x"}, 9: {"png": b"y"}})
    assert len(adq.embed_shards(path, out=tmp_path / "f", on_error=skip_images)) == 18
    path = shard_of(tmp_path / "b.tar", 20, {4: {"png": b"x"}, 9: {"cls": b"y"}})
    with pytest.raises(adq.SampleError, match=r"b.tar, key 'k9'"):
        adq.embed_shards(path, out=tmp_path / "f", on_error=skip_images)
    assert len(seen) == 4


def test_a_strict_job_does_not_take_over_what_another_skipped(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", 20, {4: {"png": b"x"}})
    adq.embed_shards(path, out=tmp_path / "f", on_error="skip")
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k4', field 'png': .*skipped when .* made"):
        adq.embed_shards(path, out=tmp_path / "f")
    assert len(adq.embed_shards(path, out=tmp_path / "f", on_error="skip")) == 19
    assert len(adq.embed_shards(path, out=tmp_path / "f", limit=4)) == 4  # the bad one is the fifth


def test_bad_samples_are_counted_over_all_shards(tmp_path: Path) -> None:
    """Ten small shards of which a fifth is bad: none is large enough to be judged alone."""
    bad: dict[int, Fields] = {i: {"png": b"x"} for i in range(0, 20, 5)}
    paths = [shard_of(tmp_path / f"{i}.tar", 20, bad) for i in range(10)]
    for _ in range(2):  # shards done before count too
        with pytest.raises(adq.SampleError, match=r"samples are bad, more than max_bad_fraction=0.1"):
            adq.embed_shards(paths, "thumbnail", tmp_path / "f", on_error="skip")


def test_shards_with_equal_base_names_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shard_of(tmp_path / folder / "t.tar", 5, {3: {"png": b"x"}} if folder == "b" else {})
    with pytest.raises(adq.SampleError, match=r"^shard b/t.tar, key 'k3', field 'png': not an image"):
        adq.embed_shards([tmp_path / "a" / "t.tar", tmp_path / "b" / "t.tar"], "thumbnail", tmp_path / "f")


def test_a_shard_without_one_usable_sample_is_an_error_even_so(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("k0.txt", b"x"), ("k1.txt", b"y")])
    with pytest.raises(adq.ShardError, match=r"shard a.tar: none of its 2 samples can be used; the .*'k0'"):
        adq.embed_shards(path, out=tmp_path / "f", on_error="skip")


def test_labels_of_two_kinds_in_a_shard_are_refused(tmp_path: Path) -> None:
    odd: Fields = {"json": b'{"y": "b"}'}
    path = shard_of(tmp_path / "a.tar", 4, {i: odd if i == 2 else {"json": b'{"y": 1}'} for i in range(4)})
    with pytest.raises(adq.SampleError, match=r"shard a.tar, key 'k2': label 'b', but the shard's .* is 1"):
        adq.embed_shards(path, out=tmp_path / "f", label="json:y")


TWICE = [("k0.png", png(0)), ("k0.cls", b"0"), ("k1.png", png(1)), ("k0.txt", b"")]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: p.write_bytes(bz2.compress(p.read_bytes())), r"b.tar: bzip2: unpack it"),
        (lambda p: p.write_bytes(p.read_bytes()[:5000]), r"shard b.tar"),
        (lambda p: p.write_bytes(b""), r"b.tar: empty file"),
        (lambda p: write_tar(p, TWICE), r"shard b.tar, key 'k0': key twice"),
        (lambda p: p.write_bytes(b"x" * 10240), r"shard b.tar"),
        (Path.unlink, r"b.tar: cannot be opened: No such file"),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_are_kept(
    tmp_path: Path, damage: Callable[[Path], object], text: str
) -> None:
    paths = [shard_of(tmp_path / f"{name}.tar", 20) for name in "abc"]
    damage(paths[1])
    with pytest.raises(adq.ShardError, match=text):
        adq.embed_shards(paths, out=tmp_path / "f", on_error="skip", workers=1)
    assert [path.name for path in (tmp_path / "f").glob("*.parquet")] == ["a.parquet"]
    shard_of(paths[1], 20)
    assert len(adq.embed_shards(paths, out=tmp_path / "f")) == 60


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, r"batch_size must be an integer >= 1, got 0"),
        ({"workers": 0}, r"workers must be an integer >= 1, got 0"),
        ({"limit": -5}, r"limit must be an integer >= 1, got -5"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction must lie in \[0, 1\], got 1.5"),
        ({"max_bad_fraction": float("nan")}, r"max_bad_fraction must lie in \[0, 1\], got nan"),
        ({"on_error": "ignore"}, r"on_error must be 'raise', 'skip' or a function, got 'ignore'"),
        ({"encoder": "tumbnail"}, r"unknown encoder 'tumbnail'; did you mean thumbnail"),
        ({"encoder": 7}, r"encoder must be a name, an encoder or a function, got 7"),
        ({"label": "pyd"}, r"would run what a pickle says"),
        ({"image": ""}, r"field spec ''"),
    ],
)
def test_wrong_arguments_are_value_errors(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    path = shard_of(tmp_path / "a.tar", 3)
    with pytest.raises(ValueError, match=text):
        adq.embed_shards(path, out=tmp_path / "f", **options)
    assert not list(tmp_path.glob("f/*.parquet"))


def test_a_skip_is_one_line_even_for_a_hostile_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    members = [("k\n1.png", b"x"), ("k\n1.cls", b"1"), ("k2.png", png(2)), ("k2.cls", b"1")]
    write_tar(tmp_path / "a.tar", members)
    adq.embed_shards(tmp_path / "a.tar", out=tmp_path / "f", on_error="skip")
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert FeaturesFile(tmp_path / "f" / "a.parquet").bad[0][1] == "k\n1"
