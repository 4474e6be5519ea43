"""Features are what a plain loop over the samples gives, and nothing is done twice."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
from adq_wds.core.texture import texture
from adq_wds.embedding.estimate import estimate
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.spans import scan_spans
from adq_wds.writing.write_shards import write_kept
from tests.conftest import Caplog, MakeShard, jpeg, write_tar
from tests.embedded import Watching, embed_views, files, png
from tests.folders import dates, flip, spans_of

# ---- What is in them


def test_features_are_those_of_a_plain_loop(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f", batch_size=16)
    assert [file.shard for file in features] == ["a.tar", "b.tar", "c.tar"]
    assert len(features) == 123
    for file, path in zip(features, sorted(shards), strict=True):
        with tarfile.open(path) as tar:
            payload = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
            images = [Image.open(tar.extractfile(m)).convert("RGB") for m in tar if m.name.endswith("jpg")]
        h = np.concatenate([Thumbnail()([image])[0] for image in images]).astype(np.float64)
        norm = np.linalg.norm(h, axis=1)
        table = file.read_columns(["label", "norm", "texture", "key"])
        assert np.array_equal(file.embedding(), (h / norm[:, None]).astype(np.float16))
        assert table["norm"].to_numpy() == pytest.approx(norm, rel=1e-6)
        single = [texture(np.asarray(image)[None])[0] for image in images]
        assert table["texture"].to_pylist() == single
        keys = [name[:-4] for name in payload if name.endswith(".jpg")]
        assert table["key"].to_pylist() == keys
        assert table["label"].to_pylist() == [int(payload[f"{key}.cls"]) for key in keys]
        assert file.spans().rows() == scan_spans(path, shard=path.name).rows()
        digest = file.digest()
        assert digest is not None
        digests = [hashlib.blake2b(payload[f"{key}.jpg"], digest_size=16).digest() for key in keys]
        assert [row.tobytes() for row in digest] == digests


def test_one_file_for_each_shard_named_after_it(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [make_shard("x/t.tar", 5), make_shard("y/t.tar", 5, first=5), make_shard("y/u.tar", 5)]
    adq.embed_shards(paths, out=tmp_path / "f")
    assert list(files(tmp_path / "f")) == ["u.parquet", "x--t.parquet", "y--t.parquet"]


def test_bytes_depend_neither_on_workers_nor_order_nor_batches(
    shards: list[Path], tmp_path: Path, caplog: Caplog
) -> None:
    """F26."""
    adq.embed_shards(shards, "thumbnail", tmp_path / "f", workers=1, batch_size=64)
    expected = files(tmp_path / "f")
    for i, (workers, batch_size) in enumerate([(1, 1), (2, 7), (3, 50), (4, 1000), (8, 33)]):
        out = tmp_path / f"again{i}"
        order = shards[::-1] if i % 2 else sorted(shards)
        adq.embed_shards(order, "thumbnail", out, workers=workers, batch_size=batch_size)
        assert files(out) == expected
    assert "patches" not in caplog.text


def test_a_networks_bytes_depend_neither_on_workers_nor_order(shards: list[Path], tmp_path: Path) -> None:
    """Batches are cut inside a shard, and each runs in one thread."""
    adq.embed_shards(shards, "builtin", tmp_path / "f", workers=1, batch_size=16)
    for workers in (2, 3):
        adq.embed_shards(shards[::-1], "builtin", tmp_path / f"f{workers}", workers=workers, batch_size=16)
        assert files(tmp_path / f"f{workers}") == files(tmp_path / "f")


def test_images_of_odd_sizes_have_features(tmp_path: Path) -> None:
    images = [Image.new("RGB", size, (200, 10, 10)) for size in ((1, 1), (1, 900), (600, 2), (300, 299))]
    path = write_tar(tmp_path / "odd.tar", [(f"k{i}.png", png(image)) for i, image in enumerate(images)])
    (file,) = adq.embed_shards(path, out=tmp_path / "f", label=None)
    assert file.read_columns(["texture"])["texture"].to_pylist() == [0.0] * 4


@pytest.mark.parametrize(
    ("field", "values", "spec", "names", "numbers"),
    [
        ("cls", [b"3", b"0\n", b"3"], "cls", None, [3, 0, 3]),
        ("txt", [b"cat", b" ant ", b"cat"], "txt", ["ant", "cat"], [1, 0, 1]),
        ("json", [b'{"y": 5}', b'{"y": 1}', b'{"y": 5}'], "json:y", None, [5, 1, 5]),
        ("json", [b'{"y": "b"}', b'{"y": "a"}', b'{"y": "b"}'], "json:y", ["a", "b"], [1, 0, 1]),
        ("cls", [b"3", b"x", b"?"], None, None, [-1, -1, -1]),
        ("cls", [b"3", b"x", b"?"], "none", None, [-1, -1, -1]),
        ("cls", [b"3", b"x", b"?"], lambda sample: sample["__key__"], ["k0", "k1", "k2"], [0, 1, 2]),
    ],
)
def test_labels(
    tmp_path: Path, field: str, values: list[bytes], spec: Any, names: Any, numbers: list[int]
) -> None:
    members = []
    for i, value in enumerate(values):
        members += [(f"k{i}.png", png(Image.new("RGB", (8, 8)))), (f"k{i}.{field}", value)]
    (file,) = adq.embed_shards(write_tar(tmp_path / "l.tar", members), out=tmp_path / "f", label=spec)
    assert file.names == names
    assert file.read_columns(["label"])["label"].to_pylist() == numbers


# ---- What is not done twice


def test_a_second_run_makes_only_what_is_missing(shards: list[Path], tmp_path: Path) -> None:
    encoder, out = Watching(), tmp_path / "f"
    first = adq.embed_shards(shards, encoder, out)
    whole = files(out)
    (out / "b.parquet").unlink()
    adq.embed_shards(shards, encoder, out)
    assert (encoder.n, files(out)) == (123 + 50, whole)
    before = dates(out)
    for path in shards:
        os.utime(path, ns=(1, 1))  # a new date alone is no change
    again = adq.embed_shards(shards[::-1], encoder, out, batch_size=5, workers=1)
    assert (encoder.n, dates(out), again.hash) == (123 + 50, before, first.hash)


@pytest.mark.parametrize(("before", "after"), [(20, 30), (1, 2)])
def test_a_grown_shard_is_made_again(make_shard: MakeShard, tmp_path: Path, before: int, after: int) -> None:
    """tar pads to 10,240 bytes: the size of the file may stay while it gains a sample."""
    encoder, out = Watching(), tmp_path / "f"
    path = make_shard("a.tar", before)
    size = path.stat().st_size
    adq.embed_shards(path, encoder, out)
    make_shard("a.tar", after)
    os.utime(path, ns=(1, 1))
    assert (path.stat().st_size == size) == (before == 1)
    assert len(adq.embed_shards(path, encoder, out)) == after
    assert encoder.n == before + after


def test_a_shard_with_one_byte_changed_is_embedded_again(shards: list[Path], tmp_path: Path) -> None:
    encoder, out = Watching(), tmp_path / "f"
    adq.embed_shards(shards, encoder, out)
    span = spans_of(shards[0])[0]
    flip(shards[0], next(member.offset for member in span.members if member.field == "cls"))
    os.utime(shards[0], ns=(1, 1))
    features = adq.embed_shards(shards, encoder, out)
    assert encoder.n == 123 + 50
    assert features.files[1].spans().rows() == scan_spans(shards[0], shard="b.tar").rows()
    assert features.files[1].read_columns(["label"])["label"][0].as_py() == 1


def test_a_shard_replaced_meanwhile_is_embedded_again(make_shard: MakeShard, tmp_path: Path) -> None:
    path = make_shard("a.tar", 20)
    later = make_shard("later.tar", 20, first=100)

    def answer(images: Sequence[Image.Image]) -> Any:
        if later.exists():
            os.replace(later, path)
        return Thumbnail()(images)

    (old,) = adq.embed_shards(path, Watching(answer), tmp_path / "f")
    (new,) = adq.embed_shards(path, Watching(answer), tmp_path / "f")
    assert old.spans().keys[0] == "s00000"
    assert new.spans().keys[0] == "s00100"


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_shards_than_workers_are_open(make_shard: MakeShard, tmp_path: Path, workers: int) -> None:
    """So a job that is killed loses at most one shard for each worker."""
    paths = [make_shard(f"t-{i}.tar", 4) for i in range(12)]
    unsaved = []

    def answer(images: Sequence[Image.Image]) -> Any:
        unsaved.append(len(encoder.calls) - len(files(tmp_path / "f")))  # one call a shard
        return Thumbnail()(images)

    encoder = Watching(answer)
    adq.embed_shards(paths, encoder, tmp_path / "f", workers=workers)
    assert len(unsaved) == 12
    assert max(unsaved) <= workers


def test_damaged_features_are_made_again_warned(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    out = tmp_path / "f"
    adq.embed_shards(shards, "thumbnail", out)
    whole = files(out)
    data = bytearray(whole["b.parquet"])
    data[len(data) // 3] ^= 1  # in the embeddings
    (out / "a.parquet").write_bytes(b"")
    (out / "b.parquet").write_bytes(data)
    adq.embed_shards(shards, "thumbnail", out)
    assert files(out) == whole
    for name in ("a", "b"):
        assert f"{name}.parquet" in caplog.text
    assert caplog.text.count("embedding the shard again") == 2


@pytest.mark.parametrize(
    ("encoder", "options", "text"),
    [
        (Watching(name="other"), {}, r"made with encoder 'watching', now 'other'"),
        (Watching(revision="2"), {}, r"made with revision '1', now '2'"),
        (Watching(preprocessing_hash="abc"), {}, r"made with preprocessing_hash '', now 'abc'"),
        (Watching(), {"image": "jpg"}, r"made with image 'jpg;.*', now 'jpg'"),
    ],
)
def test_other_settings_in_one_folder_are_refused(
    shards: list[Path], tmp_path: Path, encoder: Watching, options: dict[str, Any], text: str
) -> None:
    adq.embed_shards(shards, Watching(), tmp_path / "f")
    before = files(tmp_path / "f")
    with pytest.raises(adq.FeaturesError, match=text + ".*give another folder"):
        adq.embed_shards(shards, encoder, tmp_path / "f", **options)
    assert files(tmp_path / "f") == before


def test_a_limit_runs_over_the_shards_and_is_completed_later(shards: list[Path], tmp_path: Path) -> None:
    encoder, out = Watching(), tmp_path / "f"
    first = adq.embed_shards(shards, encoder, out, limit=60)  # b.tar has 50, then 10 of a.tar
    assert [(file.shard, file.n) for file in first] == [("a.tar", 10), ("b.tar", 50)]
    whole = adq.embed_shards(shards, encoder, out)
    assert len(whole) == 123
    assert encoder.n == 60 + 70 + 3  # a.tar was cut, so it is made anew; b.tar is not
    before = dates(out)
    view = adq.embed_shards(shards, encoder, out, limit=60)
    assert (len(view), encoder.n, dates(out)) == (60, 133, before)
    for a, b in zip(view, first, strict=True):  # a view of the whole is what a fresh folder holds
        assert a.spans().rows() == b.spans().rows()
        assert np.array_equal(a.embedding(), b.embedding())
    assert view.hash != whole.hash


def test_a_header_says_what_was_done(shards: list[Path], tmp_path: Path) -> None:
    adq.embed_shards(shards[0], Watching(), tmp_path / "f", limit=20)
    header = FeaturesFile(tmp_path / "f" / "b.parquet").header
    status = shards[0].stat()
    assert header["source"] == {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert (header["encoder"], header["complete"], header["width"]) == ("watching", False, 192)
    json.dumps(header)


# ---- Images without some of their patches


@pytest.fixture
def patched(make_shard: MakeShard, tmp_path: Path) -> list[Path]:
    """Two shards of 20 images, half of whose patches are dropped."""
    whole = make_shard("whole.tar", 40, side=64)
    options: Any = {"patch_keep": 0.5, "importance": "random", "size": 64, "max_samples": 20}
    write_kept(whole, None, tmp_path / "p" / "%d.tar", **options)
    return sorted((tmp_path / "p").glob("*.tar"))


@pytest.mark.parametrize("image", [None, "patches.jpg"])
def test_missing_patches_are_embedded_as_grey(
    patched: list[Path], tmp_path: Path, image: str | None, caplog: Caplog
) -> None:
    options: Any = {} if image is None else {"image": image}
    features = adq.embed_shards(patched, "thumbnail", tmp_path / "f", batch_size=7, workers=2, **options)
    samples = list(adq.ShardDataset(patched, shuffle=False, pipes=[adq.Decode()]))
    alone = [Thumbnail()([sample["image"]])[0][0] for sample in samples]
    units = [row / np.linalg.norm(row) for row in alone]
    assert np.array_equal(np.concatenate([file.embedding() for file in features]), np.float16(units))
    levels = [texture(np.asarray(sample["image"])[None])[0] for sample in samples]
    assert [v for file in features for v in file.read_columns(["texture"])["texture"].to_pylist()] == levels
    said = [r.getMessage() for r in caplog.records if "patches" in r.getMessage()]
    text = "images are stored without some of their patches, which encoders and scores see as grey"
    assert said == [f"shard 0.tar: {text}"]


def test_estimates_and_views_see_the_filled_image_too(patched: list[Path], tmp_path: Path) -> None:
    found = estimate(patched, Thumbnail())
    assert (found["shards"], found["samples"]) == (2, 40)
    features = adq.embed_shards(patched, "thumbnail", tmp_path / "f")
    seen = Seen()
    embed_views(features, patched, seen, views=5)
    sizes = {size for size, _ in seen.images}
    assert sizes == {(64, 64)}, "views have the side of the image, not of a row of tiles"
    assert np.mean([colours for _, colours in seen.images]) > 0.2, "half of each image is grey"


class Seen(Thumbnail):
    """The thumbnail, which keeps each image's size and the share of it that is the grey of a missing patch."""

    def __init__(self) -> None:
        self.images: list[tuple[tuple[int, int], float]] = []

    def __call__(self, images: Any) -> Any:
        self.images += [(i.size, float((np.asarray(i) == 128).all(2).mean())) for i in images]
        return super().__call__(images)


def test_two_images_or_lost_places_are_a_bad_sample(patched: list[Path], tmp_path: Path) -> None:
    (sample, *_) = adq.ShardDataset(patched, shuffle=False)
    stripped = io.BytesIO()
    Image.open(io.BytesIO(sample["patches.jpg"])).save(stripped, "JPEG")
    patches = sample["patches.jpg"]
    fields = [("a.patches.jpg", patches), ("a.jpg", jpeg(0)), ("b.patches.jpg", stripped.getvalue())]
    shard = write_tar(tmp_path / "bad.tar", [*fields, ("c.patches.jpg", patches)])
    with pytest.raises(adq.SampleError, match=r"key 'a': fields 'jpg' and 'patches.jpg' are both .* name"):
        adq.embed_shards(shard, "thumbnail", tmp_path / "f", label=None)
    options: Any = {"label": None, "on_error": "skip", "max_bad_fraction": 1.0}
    (file,) = adq.embed_shards(shard, "thumbnail", tmp_path / "f", **options)
    assert file.read_columns(["key"])["key"].to_pylist() == ["c"]
    assert [row[1] for row in file.bad] == ["a", "b"]
    assert "field 'patches.jpg': no patch mask" in file.bad[1][5]


def test_features_from_before_stored_patches_stay_good(shards: list[Path], tmp_path: Path) -> None:
    """The image's spec stands in every file, and the default has grown since: its name there has not."""
    first = "jpg;jpeg;png;webp;gif;bmp;tif;tiff;avif;ppm;pgm;pbm;pnm;pfm"
    old = adq.embed_shards(shards, Watching(), tmp_path / "old", image=first)
    before = files(tmp_path / "old")
    again = Watching()
    adq.embed_shards(shards, again, tmp_path / "old")
    new = adq.embed_shards(shards, Watching(), tmp_path / "new")
    assert again.n == 0
    assert files(tmp_path / "old") == before == files(tmp_path / "new")
    assert old.header["image"] == new.header["image"] == first
