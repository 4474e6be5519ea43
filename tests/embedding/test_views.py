"""Views are what a plain loop over the chosen samples gives, from nothing but those samples, and made once."""

import os
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
import adq_wds.embedding.batch
from adq_wds.core.rng import generator
from adq_wds.core.views import crop_box
from adq_wds.embedding.views_batch import make_view
from adq_wds.files import lock
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.tables.views import choose_rows, views_folder
from tests.conftest import Caplog, MakeShard, MonkeyPatch
from tests.embedded import Watching, embed_views, files
from tests.folders import dates
from tests.programs import Program

Rows = np.ndarray[Any, Any]


@pytest.fixture
def features(shards: list[Path], tmp_path: Path) -> adq.Features:
    return adq.embed_shards(shards, Watching(), tmp_path / "f")


def images_of(path: Path) -> dict[str, Image.Image]:
    with tarfile.open(path) as tar:
        found = [m for m in tar if m.name.endswith("jpg")]
        return {m.name[:-4]: Image.open(tar.extractfile(m)).convert("RGB") for m in found}


# ---- What is in them


def test_views_are_those_of_a_plain_loop(features: adq.Features, shards: list[Path]) -> None:
    position, z = embed_views(features, shards, Watching(), views=40, seed=5, batch_size=7).rows()
    assert np.array_equal(position, choose_rows(features, 40, seed=5))
    samples = [(path, key) for path in sorted(shards) for key in images_of(path)]
    for row, at in enumerate(position.tolist()):
        path, key = samples[at]
        whole = images_of(path)[key]
        for number in (0, 1):
            rng = generator(5, number, path.name, key, purpose="view")
            box, flip = crop_box(*whole.size, rng)
            view = whole.crop(box).resize((min(whole.size),) * 2, Image.Resampling.BILINEAR)
            pixels = np.asarray(view)[:, ::-1] if flip else np.asarray(view)
            h = Thumbnail()([Image.fromarray(pixels)])[0][0].astype(np.float64)
            assert np.array_equal(z[row, number], (h / np.linalg.norm(h)).astype(np.float16))


def test_only_chosen_are_read(features: adq.Features, shards: list[Path], monkeypatch: MonkeyPatch) -> None:
    encoder, read = Watching(), []
    original = adq_wds.embedding.views_batch.read_sample

    def reading(data: memoryview, span: Any, *, url: str) -> Any:
        read.append((os.path.basename(url), span.key))
        return original(data, span, url=url)

    monkeypatch.setattr(adq_wds.embedding.views_batch, "read_sample", reading)
    embed_views(features, shards, encoder, views=60, batch_size=8)
    assert len(read) == len(set(read)) == 60
    assert encoder.n == 120
    assert max(encoder.calls) == 8


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3}, {"workers": 8}])
def test_workers_change_no_byte(features: adq.Features, shards: list[Path], options: dict[str, int]) -> None:
    embed_views(features, shards, Watching(), views=60, batch_size=8, workers=2)
    before = files(views_folder(features))
    for path in views_folder(features).iterdir():
        path.unlink()
    embed_views(features, shards[::-1], Watching(), views=60, batch_size=8, **options)
    assert files(views_folder(features)) == before


def test_a_network_gives_the_same_bytes_with_any_workers(shards: list[Path], tmp_path: Path) -> None:
    import torch

    features = adq.embed_shards(shards[0], "builtin-free", tmp_path / "g")
    before, made = torch.get_num_threads(), []
    for workers in (1, 3):
        torch.set_num_threads(2)
        embed_views(features, shards[0], "builtin-free", batch_size=16, workers=workers)
        with ThreadPoolExecutor(1) as fresh:  # where a new thread begins is torch's global number
            assert fresh.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
        made.append((views_folder(features) / "b.parquet").read_bytes())
        (views_folder(features) / "b.parquet").unlink()
    torch.set_num_threads(before)
    assert made[0] == made[1]


def test_large_images_are_cut(features: adq.Features, shards: list[Path], monkeypatch: MonkeyPatch) -> None:
    embed_views(features, shards, Watching(), views=60)
    before = files(views_folder(features))
    monkeypatch.setattr(adq_wds.embedding.batch, "PART_PIXELS", 16 * 16 * 2 * 3)
    (views_folder(features) / "a.parquet").unlink()
    encoder = Watching()
    embed_views(features, shards, encoder, views=60)
    assert max(encoder.calls) == 3
    assert files(views_folder(features)) == before


def test_a_larger_number_keeps_the_smaller_ones_views(features: adq.Features, shards: list[Path]) -> None:
    few, z_few = embed_views(features, shards, Watching(), views=20).rows()
    many, z_many = embed_views(features, shards, Watching(), views=60).rows()
    assert np.array_equal(z_many[np.isin(many, few)], z_few)
    other, _ = embed_views(features, shards, Watching(), views=20, seed=1).rows()
    assert not np.array_equal(few, other)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (640, 48)])
def test_a_view_of_any_image_is_a_square_of_its_short_side(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    views = [make_view(image, v, seed=s, shard="x/a.tar", key="k") for s in range(30) for v in (0, 1)]
    assert {view.size for view in views} == {(min(size), min(size))}
    assert {view.mode for view in views} == {"RGB"}


def test_a_view_depends_on_seed_key_number_and_base_name_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def pixels(number: int = 0, seed: int = 0, shard: str = "a.tar", key: str = "k") -> bytes:
        return make_view(image, number, seed=seed, shard=shard, key=key).tobytes()

    assert pixels() == pixels(shard="moved/a.tar")
    assert len({pixels(), pixels(1), pixels(seed=1), pixels(shard="b.tar"), pixels(key="l")}) == 5


def test_limited_features_have_views_of_their_own_samples(shards: list[Path], tmp_path: Path) -> None:
    limited = adq.embed_shards(shards, Watching(), tmp_path / "g", limit=60)  # b.tar's 50, then 10 of a.tar
    assert {file.shard for file in limited} == {"a.tar", "b.tar"}
    position, _ = embed_views(limited, shards, Watching(), views=30).rows()
    assert len(position) == 30
    whole = adq.embed_shards(shards, Watching(), tmp_path / "g")
    assert len(embed_views(whole, shards, Watching(), views=30).rows()[0]) == 30


def test_features_with_bad_samples_have_views_of_the_good_ones(tmp_path: Path, make_shard: MakeShard) -> None:
    path = make_shard("a.tar", 12)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("s00003.jpg").offset_data
    data[at : at + 4] = b"hell"
    path.write_bytes(data)
    features = adq.embed_shards(path, Watching(), tmp_path / "g", on_error="skip", max_bad_fraction=1.0)
    assert (len(features), len(embed_views(features, path, Watching()).rows()[0])) == (11, 11)


# ---- Made once


def test_what_is_there_is_not_made_again(features: adq.Features, shards: list[Path]) -> None:
    embed_views(features, shards, Watching(), views=60)
    before = dates(views_folder(features))
    encoder = Watching()
    embed_views(features, shards, encoder, views=60)
    assert (encoder.calls, dates(views_folder(features))) == ([], before)


def test_only_damaged_or_missing_are_made(features: adq.Features, shards: list[Path], caplog: Caplog) -> None:
    embed_views(features, shards, Watching(), views=200)
    before = files(views_folder(features))
    (views_folder(features) / "b.parquet").unlink()
    (views_folder(features) / "c.parquet").write_bytes(before["c.parquet"][:-50])
    encoder = Watching()
    embed_views(features, shards, encoder, views=200)
    assert sum(encoder.calls) == 2 * (50 + 3)
    assert files(views_folder(features)) == before
    assert "c.parquet: not a readable Parquet file" in caplog.text
    assert "making the views of the shard again" in caplog.text


@pytest.mark.parametrize("change", [{"first": 40}, {"classes": 3}])
def test_other_samples_of_a_shard_are_viewed_anew(
    features: adq.Features, shards: list[Path], make_shard: MakeShard, change: dict[str, int]
) -> None:
    """Under other keys, or with another label under the same key."""
    embed_views(features, shards, Watching(), views=200)
    make_shard("c.tar", 3, side=17, **change)
    changed = adq.embed_shards(shards, Watching(), features.folder)
    encoder = Watching()
    embed_views(changed, shards, encoder, views=200).rows()
    assert sum(encoder.calls) == 6


def test_a_job_that_failed_goes_on_where_it_was(features: adq.Features, shards: list[Path]) -> None:
    def answer(images: Sequence[Image.Image]) -> Any:
        if images[0].size == (17, 17):  # c.tar, the last one
            raise KeyboardInterrupt
        return Thumbnail()(images)

    with pytest.raises(KeyboardInterrupt):
        embed_views(features, shards, Watching(answer), views=200, workers=1)
    assert sorted(files(views_folder(features))) == ["a.parquet", "b.parquet"]
    encoder = Watching()
    embed_views(features, shards, encoder, views=200)
    assert sum(encoder.calls) == 2 * 3


SLOW_JOB = """
import sys, time
import adq_wds as adq
from adq_wds.models.thumbnail import Thumbnail
fast = Thumbnail.__call__
def slow(self, images):
    time.sleep(0.002 * len(images))
    return fast(self, images)
Thumbnail.__call__ = slow
folder, *shards = sys.argv[1:]
print("ready", flush=True)
adq.embed_shards(shards, "thumbnail", folder, views=200, workers=2, batch_size=4)
"""


def test_a_killed_job_leaves_whole_files(make_shard: MakeShard, tmp_path: Path) -> None:
    """F25, for views: SIGKILL at three moments, each time resumed; then the bytes of one that was left alone."""
    shards = [make_shard(f"t-{i}.tar", 20, first=i * 100) for i in range(6)]
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "f")
    for wait in (0.05, 0.02, 0.08):
        before = files(views_folder(features))
        job = Program(SLOW_JOB, str(tmp_path / "f"), *map(str, shards))
        assert job.stdout.readline() == "ready\n"
        time.sleep(wait)
        job.kill()
        job.communicate()
        after = files(views_folder(features))
        assert after.items() >= before.items()
    survived = files(views_folder(features))
    views = embed_views(features, shards, "thumbnail", batch_size=4)
    assert len(views.rows()[0]) == 120
    assert files(views_folder(features)).items() >= survived.items()
    assert not list(views_folder(features).glob(".*.partial"))
    resumed = files(views_folder(features))
    for path in views_folder(features).glob("*.parquet"):
        path.unlink()
    embed_views(features, shards, "thumbnail", batch_size=4)
    assert files(views_folder(features)) == resumed


def test_only_the_folder_of_the_views_is_locked(features: adq.Features, shards: list[Path]) -> None:
    with lock(features.folder):
        embed_views(features, shards, Watching(), views=5)
    with lock(views_folder(features)), pytest.raises(adq.AdqError, match=r"views is in use by pid \d+"):
        embed_views(features, shards, Watching(), views=5)


# ---- What is refused


@pytest.mark.parametrize("change", ["byte", "another", "shorter", "gone"])
def test_a_changed_shard_is_refused(
    features: adq.Features, shards: list[Path], make_shard: MakeShard, change: str
) -> None:
    text = r"shard c\.tar.*(embed the shard again|embed it again)"
    if change == "byte":
        data = bytearray(shards[2].read_bytes())
        with tarfile.open(shards[2]) as tar:
            data[tar.getmember("s00001.cls").offset_data] ^= 1
        shards[2].write_bytes(data)
        text = r"shard c\.tar, key 's00001': the shard changed since .*embed it again"
    elif change == "another":
        make_shard("c.tar", 3, side=17, first=1)
    elif change == "shorter":
        shards[2].write_bytes(shards[2].read_bytes()[:1500])
    else:
        shards[2].unlink()
        text = r"c\.tar: cannot be opened"
    with pytest.raises(adq.ShardError, match=text):
        embed_views(features, shards, Watching(), views=200)


def failing(*, alone: bool) -> Callable[[Sequence[Image.Image]], Any]:
    def answer(images: Sequence[Image.Image]) -> Any:
        if any(image.size == (17, 17) for image in images) and (alone or len(images) > 1):
            raise RuntimeError("out of\n  luck")
        return Thumbnail()(images)

    return answer


def with_value(value: float) -> Callable[[Sequence[Image.Image]], Any]:
    def answer(images: Sequence[Image.Image]) -> Any:
        h = Thumbnail()(images)[0].astype(np.float64)
        h[[i for i, image in enumerate(images) if image.size == (17, 17)], 3] = value
        return h, None

    return answer


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (with_value(np.nan), adq.SampleError, r"shard c\.tar, key 's00000': the embedding of its view 0 holds NaN"),
        (failing(alone=True), adq.SampleError, r"key 's00000': encoder 'watching' fails on its view 0: .*: out of luck"),
        (failing(alone=False), adq.AdqError, r"fails on 3 images at once, and on none of them alone .*batch_size"),
        (lambda images: (np.ones((len(images), 5)), None), adq.FeaturesError, r"gives 5 numbers .* the features have 192"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_embedded_is_named(
    features: adq.Features, shards: list[Path], answer: Any, error: Any, text: str
) -> None:
    with pytest.raises(error, match=text):
        embed_views(features, shards, Watching(answer), views=200)
    assert "c.parquet" not in files(views_folder(features))


@pytest.mark.parametrize(("value", "unit"), [(1e30, 0.5), (1e-42, 0.5), (0, 0)])
def test_odd_numbers_are_unit_or_0(shards: list[Path], tmp_path: Path, value: float, unit: float) -> None:
    encoder = Watching(lambda images: (np.full((len(images), 4), value, np.float32), None))
    features = adq.embed_shards(shards, encoder, tmp_path / "g")
    assert (embed_views(features, shards, encoder, views=5).rows()[1] == unit).all()
