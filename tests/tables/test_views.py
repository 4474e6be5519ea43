"""Views are read as they were written or not at all, and belong to the features they were made beside."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.core.rng import draws
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.views import ShardViews, Views, choose_rows, views_folder
from tests.tampering import VIEWS, some_views, unit_views

MakeFeatures = Callable[..., Any]
Rows = np.ndarray[Any, Any]


def make_views(features: Features, n: int, **header: Any) -> Views:
    """Views of the n chosen samples, without images."""
    header = {**VIEWS, **header}
    views_folder(features).mkdir(exist_ok=True)
    chosen, first = choose_rows(features, n, seed=header["seed"]), 0
    for file in features:
        mine = chosen[(chosen >= first) & (chosen < first + file.n)] - first
        spans = file.spans().take(mine)
        z = unit_views(len(mine), seed=first)
        ShardViews(file.shard, spans.index, spans.keys, spans.crc32, z, header).save(
            views_folder(features) / file_name(file.shard)
        )
        first += file.n
    return Views(features)


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> Features:
    """Three shards of 30, 0 and 40 usable samples, some unusable ones between them."""
    make_features("a.tar", [0] * 30, bad=[0, 7, 31])
    make_features("b.tar", [])
    make_features("c.tar", [1] * 40, bad=[3], first=500)
    return Features(tmp_path / "features")


@pytest.mark.parametrize("n", [0, 5])
def test_writing_and_reading_changes_nothing(n: int, tmp_path: Path) -> None:
    made = some_views(n)
    made.save(tmp_path / "a.parquet")
    again = ShardViews.load(tmp_path / "a.parquet")
    assert (again.shard, again.keys, again.header) == (made.shard, made.keys, made.header)
    for name, kind in (("index", np.int32), ("crc32", np.uint32), ("z", np.float16)):
        assert getattr(again, name).dtype == kind
        assert np.array_equal(getattr(again, name), getattr(made, name))


def change_row(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["z"].__setitem__((1, 1), value)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "NaN": (change_row(np.nan), "shard a.tar, key 'k2': view 1 has squared length nan, expected 1, or 0"),
    "infinity": (change_row(np.inf), "key 'k2': view 1 has squared length inf"),
    "too long": (change_row(1.0), "key 'k2': view 1 has squared length 6, expected 1"),
    "too short": (change_row(1e-3), "key 'k2': view 1 has squared length"),
    "another width": (lambda f: f.update(z=unit_views(5, 7)), r"\(5, 2, 7\) float16, expected \(5, 2, 6\)"),
    "one view": (lambda f: f.update(z=f["z"][:, :1]), r"views are \(5, 1, 6\) float16"),
    "float32": (lambda f: f.update(z=f["z"].astype(np.float32)), r"views are \(5, 2, 6\) float32"),
    "rows missing": (lambda f: f.update(z=f["z"][:4]), r"columns of \[5, 5, 4\] rows for views of 5 samples"),
    "falling positions": (lambda f: f.update(index=f["index"][::-1].copy()), "positions do not rise"),
    "a position twice": (lambda f: f["index"].__setitem__(1, 0), "positions do not rise"),
    "a position below 0": (lambda f: f["index"].__setitem__(0, -1), "positions do not rise from 0"),
    "no seed": (
        lambda f: f.update(header={k: v for k, v in VIEWS.items() if k != "seed"}),
        "header has no 'seed'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_views_is_refused_when_made(name: str) -> None:
    change, text = WRONG[name]
    good = some_views()
    fields = {field: getattr(good, field) for field in ("shard", "index", "keys", "crc32", "z", "header")}
    change(fields)
    with pytest.raises(adq.FeaturesError, match=text):
        ShardViews(**fields)


def test_rows_are_those_with_the_smallest_draws(features: Features) -> None:
    position, z = make_views(features, 25).rows()
    drawn = []
    for file in features:
        keys = file.read_columns(["key"])["key"].to_pylist()
        drawn += draws(3, 0, file.shard, keys, purpose="choose views").tolist()
    assert position.tolist() == sorted(np.argsort(drawn)[:25].tolist())
    assert (position.dtype, z.shape, z.dtype) == (np.dtype(np.int64), (25, 2, 6), np.float16)
    assert np.array_equal(z, np.concatenate([file.z for file in Views(features).files]))


def test_a_larger_choice_contains_a_smaller(features: Features) -> None:
    chosen = [set(choose_rows(features, n, seed=3).tolist()) for n in (0, 1, 20, 69, 70, 20_000)]
    assert [len(rows) for rows in chosen] == [0, 1, 20, 69, 70, 70]
    assert all(a <= b for a, b in itertools.pairwise(chosen))
    assert chosen[2] != set(choose_rows(features, 20, seed=4).tolist())


def test_a_choice_does_not_depend_on_folders(make_features: MakeFeatures, tmp_path: Path) -> None:
    for name in ("a.tar", "x/a.tar"):
        make_features(name, [0] * 30, folder=tmp_path / name.replace("/", "-"))
    plain, moved = Features(tmp_path / "a.tar"), Features(tmp_path / "x-a.tar")
    assert np.array_equal(choose_rows(plain, 9, seed=0), choose_rows(moved, 9, seed=0))


def test_the_choice_is_independent_of_the_draw_of_a_plan(features: Features) -> None:
    keys = features.files[0].read_columns(["key"])["key"].to_pylist()
    ranks = draws(0, 0, "a.tar", keys)
    assert not np.isin(draws(0, 0, "a.tar", keys, purpose="choose views"), ranks).any()


def test_views_of_first_samples_equal_views_of_limited_features(features: Features) -> None:
    limited = Features(features.folder, limit=50)
    views = make_views(limited, 12)
    position, _ = views.rows()
    assert len(position) == 12
    assert position.max() < len(limited)
    with pytest.raises(adq.FeaturesError, match="not one keyed sample of the 70 samples"):
        Views(Features(features.folder)).rows()


def test_equal_views_have_equal_hashes_and_others_have_not(features: Features) -> None:
    first = make_views(features, 25).hash
    assert make_views(features, 25).hash == first
    assert len({first, make_views(features, 24).hash, make_views(features, 25, view="2").hash}) == 3


def test_no_views_say_how_to_make_them(features: Features) -> None:
    with pytest.raises(adq.FeaturesError, match=r"views: no views here .* 2 more .*embed with views=20_000"):
        Views(features)
    make_views(features, 25)
    (views_folder(features) / "c.parquet").unlink()
    with pytest.raises(adq.FeaturesError, match=r"no views here \(c\.parquet is missing"):
        Views(features)


def test_views_of_two_kinds_do_not_belong_together(features: Features) -> None:
    make_views(features, 25)
    old = ShardViews.load(views_folder(features) / "c.parquet")
    again = ShardViews(old.shard, old.index, old.keys, old.crc32, old.z, {**old.header, "revision": "2"})
    again.save(views_folder(features) / "c.parquet")
    with pytest.raises(
        adq.FeaturesError, match=r"a\.parquet and .*c\.parquet do not belong together: .* '1' and '2'"
    ):
        Views(features)


@pytest.mark.parametrize("name", ["encoder", "revision", "preprocessing_hash", "image"])
def test_views_of_another_encoder_are_refused(features: Features, name: str) -> None:
    with pytest.raises(adq.FeaturesError, match=f"do not belong together: {name} .* and 'other'; embed with"):
        make_views(features, 25, **{name: "other"})


def test_a_sample_that_is_another_is_named(features: Features, make_features: MakeFeatures) -> None:
    make_views(features, 70)
    make_features("c.tar", [1] * 40, bad=[5], first=500)  # sample 3 is usable now, and 5 is not
    with pytest.raises(adq.FeaturesError, match=r"shard c\.tar, key 'k0505': has views, but is .* or none"):
        Views(Features(features.folder)).rows()
    make_features("c.tar", [1] * 40, bad=[3], first=501)  # the same payloads under other keys
    with pytest.raises(adq.FeaturesError, match=r"shard c\.tar, key 'k0500': has views, but is .* sample"):
        Views(Features(features.folder)).rows()


def test_views_of_half_a_job_are_no_sample_of_the_set(features: Features) -> None:
    make_views(features, 60)
    whole = (views_folder(features) / "a.parquet").read_bytes()
    make_views(features, 20)
    (views_folder(features) / "a.parquet").write_bytes(whole)
    with pytest.raises(adq.FeaturesError, match=r"views are not one keyed sample .* embed with .* again"):
        Views(features).rows()


def test_views_of_further_shards_are_left_alone(features: Features) -> None:
    make_views(features, 70)
    fewer = Features(features.folder, shards=["a.tar", "b.tar"])
    assert len(Views(fewer).rows()[0]) == 30
