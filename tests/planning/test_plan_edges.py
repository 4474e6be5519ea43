"""What does the planner do at the edges? Strange numbers, odd sets, settings out of range: defined, or refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.files import canonical_json
from adq_wds.planning.build_plan import find_bins, make_plan
from adq_wds.planning.options import plan_options
from adq_wds.planning.table import check_size
from adq_wds.tables import bounds
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.plan_rows import NEVER
from tests.planning.conftest import mixed_labels

MakeFeatures = Callable[..., ShardFeatures]


# ---- Samples that could not be used


def test_bad_samples_stand_in_their_places_and_are_never_kept(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    made = make_features("a.tar", [0] * 12, bad=[0, 5, 13])
    make_features("b.tar", [1] * 6, bad=[6, 7])
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=1)
    shard = plan.shard("a.tar")
    assert shard.spans.index.tolist() == list(range(15))
    assert shard.spans.keys == [f"k{i:04d}" for i in range(15)]
    bad = [0, 5, 13]
    assert np.flatnonzero(~shard.kept).tolist() == bad
    assert shard.rank[bad].tolist() == [NEVER] * 3
    assert shard.bin[bad].tolist() == shard.label[bad].tolist() == [-1] * 3
    assert shard.spans.crc32[bad].tolist() == made.bad.crc32.tolist()  # type: ignore[union-attr]
    assert (plan.n_samples, len(plan), plan.header["bad"]) == (23, 18, 5)
    assert plan.header["bytes"]["all"] == sum(1024 + i for i in (*range(15), *range(8)))
    assert plan.header["bytes"]["kept"] == plan.header["bytes"]["all"] - sum(
        1024 + i for i in (0, 5, 13, 6, 7)
    )


# ---- Many classes


def test_a_plan_that_could_not_be_written_is_refused_before_it_is_binned(
    make_features: MakeFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_features("a.tar", list(range(40)) * 3)
    out = tmp_path / "plan" / "plan.parquet"
    header = adq.build_plan(tmp_path / "features", bins=3, keep=0.5, out=out).header
    cells = {name: header[name] for name in ("classes", "cells")}
    weight = bounds.header_weight(canonical_json(cells).encode())
    check_size(40, 3)
    monkeypatch.setattr(bounds, "MAX_HEADER_WEIGHT", weight)  # of what was written: never refused
    check_size(40, 3)
    monkeypatch.setattr(bounds, "MAX_HEADER_WEIGHT", weight * 9 // 10)
    monkeypatch.setattr("adq_wds.planning.build_plan.leave_out", None)  # called next
    with pytest.raises(adq.PlanError, match=r"40 classes of 3 bins .*\(bins=\).*\(classes=\)"):
        adq.build_plan(tmp_path / "features", bins=3, keep=0.5, out=out)


# ---- Numbers at the edge (F31, F32, F33)


def strange(kind: str, n: int) -> Any:
    rows = np.random.default_rng(5).normal(size=(n, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if kind == "zero":
        rows[:] = 0
    elif kind == "some zero":
        rows[::3] = 0
    elif kind == "denormal":
        rows = np.sign(rows) * 2.0**-24
    elif kind == "constant":
        rows[:] = rows[0]
    elif kind == "opposite":
        rows[::2], rows[1::2] = rows[0], -rows[0]
    elif kind == "largest":
        rows = np.sign(rows) * 65504
    return rows.astype(np.float16)


@pytest.mark.parametrize("kind", ["zero", "some zero", "denormal", "constant", "opposite", "largest"])
@pytest.mark.parametrize("n", [1, 2, 3, 24])
def test_strange_embeddings_have_a_defined_plan(
    kind: str, n: int, make_features: MakeFeatures, tmp_path: Path
) -> None:
    """F31, F32."""
    label = [i % 2 for i in range(n)]
    rows = strange(kind, n)
    make_features("a.tar", label, embedding=rows)
    plans = [adq.build_plan(tmp_path / "features", bins=4, keep=0.5, memory_bytes=m) for m in (0, 0, 1 << 20)]
    assert len({plan.hash for plan in plans}) == 1
    assert len(plans[0]) == round(0.5 * n)
    value = [entry["importance"] for entry in plans[0].header["bins"]]
    assert np.isfinite(value).all()
    assert sum(value) == pytest.approx(1)


def test_identical_samples_are_taken_in_their_order(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 10, embedding=np.full((10, 4), 0.5))
    bins = find_bins(Features(tmp_path / "features"), bins=3)
    assert bins.bin.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert bins.pick.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("column", ["embedding", "texture"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_with_its_sample(
    column: str,
    value: float,
    make_features: MakeFeatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F31: in a file whose hashes agree, as another program might have written it."""
    make_features("a.tar", [0] * 5)
    good = make_features("b.tar", [0, 1] * 6)
    getattr(good, column)[9] = value
    monkeypatch.setattr(ShardFeatures, "check", lambda self: None)
    good.save(tmp_path / "features" / "b.parquet")
    with pytest.raises(adq.FeaturesError, match=rf"b\.tar, key 'k0009': {column} holds NaN or infinity"):
        adq.build_plan(tmp_path / "features")


def test_empty_shards_among_others_change_nothing(make_features: MakeFeatures, tmp_path: Path) -> None:
    """F32."""
    make_features("b.tar", [0, 1, 1, 0, 1])
    without = adq.build_plan(tmp_path / "features", bins=2, keep=0.6)
    for name in ("a.tar", "c.tar"):
        make_features(name, [])
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.6, out=tmp_path / "plan.parquet")
    assert plan.shards == ["a.tar", "b.tar", "c.tar"]
    assert plan.table().equals(without.table())


def test_features_without_any_sample_are_refused(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [], bad=[0])
    with pytest.raises(adq.FeaturesError, match="no usable samples in 1 shards"):
        adq.build_plan(tmp_path / "features")


def check_many_classes(n_classes: int, make_features: MakeFeatures, tmp_path: Path) -> None:
    label = [c for c in range(n_classes) for _ in range(1 + c % 3)]
    order = np.random.default_rng(0).permutation(len(label))
    mixed = np.array(label)[order]
    for i, part in enumerate(np.array_split(mixed, 3)):
        make_features(f"s{i}.tar", part.tolist(), first=i * len(label))
    plans = [adq.build_plan(tmp_path / "features", bins=2, keep=0.5) for _ in range(2)]
    assert plans[0].hash == plans[1].hash
    assert len(plans[0]) == round(0.5 * len(label))
    assert len(plans[0].header["classes"]) == n_classes
    entries = plans[0].header["classes"]
    assert all(abs(entry["kept"] - 0.5 * entry["n"]) < 2 for entry in entries)


def test_a_thousand_small_classes(make_features: MakeFeatures, tmp_path: Path) -> None:
    check_many_classes(1000, make_features, tmp_path)


@pytest.mark.slow
def test_ten_thousand_small_classes(make_features: MakeFeatures, tmp_path: Path) -> None:
    check_many_classes(10_000, make_features, tmp_path)


@pytest.mark.parametrize("n_bins", [1, 2, 7, 23, 24, 25, 32767])
def test_bin_sizes_differ_by_one_at_most(
    n_bins: int, make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F33."""
    make_features("a.tar", [0] * 24 + [1] * 5)
    bins = find_bins(Features(tmp_path / "features"), bins=n_bins)
    for c, n in ((0, 24), (1, 5)):
        sizes = np.bincount(bins.bin[bins.label == c])
        assert len(sizes) == min(n, n_bins)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.tolist() == sorted(sizes, reverse=True)
    few = "classes have fewer samples than bins" in caplog.text
    assert few == (n_bins > 5)


@pytest.mark.parametrize("classes", [None, [0, 7]])
def test_progress_adds_up_to_twice_the_samples(
    classes: list[int] | None, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_bins(Features(mixed), bins=4, classes=classes, progress=True)
    assert "240/240" in capsys.readouterr().err


# ---- Settings


NUMBERS = r"{} must be a number in \[0, 1\], got {!r}"
WRONG: list[tuple[dict[str, Any], str]] = [
    *(({"keep": k}, NUMBERS.format("keep", k)) for k in (-0.1, 30, True, "0.5", math.nan, math.inf, None)),
    *(({"alpha": a}, NUMBERS.format("alpha", a)) for a in (-1, 2, math.nan, "x", True)),
    *(({"seed": s}, f"seed must be an integer, got {s!r}") for s in (1.0, "1", True, None)),
    ({"seed": 2**63}, "seed must fit into 64 bits, got 9223372036854775808"),
    *(({"bins": b}, f"bins must be an integer from 1 to 32,767, got {b!r}")
      for b in (0, -1, 32768, True, 1.5, "4", None, math.nan)),
    *(({"memory_bytes": m}, f"memory_bytes must be a number >= 0, got {m!r}") for m in (-1, True, "1 GiB", math.nan)),
    ({"balance": "classes"}, r"balance must be one of \('class', .*'none'\).*, got 'classes'"),
    ({"draw": None}, r"draw must be one of \('random', 'ordered'\), got None"),
    ({"normalise": "max"}, r"normalise must be one of \('sum', 'minmax'\), got 'max'"),
    ({"kernel": "gradients"}, r"kernel must be one of .*, got 'gradients'"),
    ({"dedup": "near"}, r"dedup must be one of .*exact.*, got 'near'"),
    ({"scores": ()}, r"scores must name one or more, each once, got \(\)"),
    ({"scores": ("texture", "texture")}, "scores must name one or more, each once"),
    ({"scores": "texture"}, r"scores must be a list, got the text 'texture'; write \['texture'\]"),
    ({"scores": ["textur"]}, "unknown score 'textur'; did you mean texture?"),
    ({"must_include": "12"}, r"must_include must be a list, got the text '12'"),
    ({"allocation": "adaptve"}, "unknown allocation 'adaptve'; did you mean adaptive?"),
    ({"diversity_head": "contrast"}, "unknown diversity head 'contrast'; did you mean contrastive"),
    ({"diversity_head": "paper"}, "no diversity head 'paper'; it is gone"),
    ({"diversity_head": "contrastive", "scores": ["texture"]}, "without 'diversity' among the scores"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_options_are_refused_with_their_values(change: dict[str, Any], text: str) -> None:
    """F33, F34."""
    with pytest.raises(ValueError, match=text):
        plan_options(**change)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="build_plan has no option 'binz'"):
        plan_options(binz=3)


def test_bins_of_other_features_are_refused(make_features: MakeFeatures, mixed: Path, tmp_path: Path) -> None:
    """F29."""
    bins = find_bins(Features(mixed), bins=4)
    make_features("y.tar", mixed_labels(50), first=1001)
    with pytest.raises(adq.PlanError, match="the bins were made from other features; bin these again"):
        adq.build_plan(mixed, bins=bins)


def test_bins_that_hold_other_samples_are_refused(mixed: Path) -> None:
    bins = find_bins(Features(mixed), bins=4, classes=[0, 1])
    bins.header["classes"] = [0, 1, 2, 7]
    with pytest.raises(ValueError, match="the bins hold other samples than these options leave in"):
        adq.build_plan(mixed, bins=bins)


def test_bins_kept_in_a_file_are_taken_where_they_fit(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="adq_wds")
    kept = tmp_path / "bins.parquet"
    expected = adq.build_plan(mixed, bins=4).hash
    for damaged, binned in ((False, True), (False, False), (True, True)):
        if damaged:
            kept.write_bytes(b"nothing")
        caplog.clear()
        assert make_plan(Features(mixed), plan_options(bins=4), bins_file=kept).plan().hash == expected
        assert ("binning 120 samples" in caplog.text) == binned
        assert ("binning again" in caplog.text) == damaged
    make_plan(Features(mixed), plan_options(bins=3), bins_file=kept)
    assert "binning 120 samples" in caplog.text


def test_a_score_of_another_revision_is_refused(make_features: MakeFeatures, tmp_path: Path) -> None:
    class Gloss(adq.Score):
        name = "gloss"

        def per_sample(self, image: Any, h: Any) -> float:
            return 0.0

    made = make_features("a.tar", [0] * 12, scores={"gloss": "1"})
    plan = adq.build_plan(tmp_path / "features", bins=2, scores=[Gloss()])
    bin = np.array(plan.table()["bin"].to_pylist())
    expected = [made.scores["gloss"][bin == k].mean() for k in range(2)]
    assert [entry["gloss"] for entry in plan.header["bins"]] == pytest.approx(expected, rel=1e-6)
    score = Gloss()
    score.revision = "2"
    with pytest.raises(ValueError, match="'gloss' has revision '2', the features hold '1'; embed again"):
        adq.build_plan(tmp_path / "features", bins=2, scores=[score])


def test_bins_of_other_shards_are_refused(mixed: Path) -> None:
    bins = find_bins(Features(mixed), bins=4)
    for shards in ([("x.tar", 60), ("y.tar", 60)], [("x.tar", 70), ("z.tar", 50)]):
        with pytest.raises(adq.PlanError, match="the bins were made from other features"):
            adq.build_plan(mixed, bins=replace(bins, shards=shards))


def test_equal_numbers_of_other_types_make_an_equal_plan(mixed: Path) -> None:
    plain = adq.build_plan(mixed, bins=4, keep=1.0, alpha=1.0, seed=3)
    other = adq.build_plan(
        mixed,
        bins=np.int64(4),
        keep=np.float32(1),
        alpha=1,
        seed=np.int64(3),
        scores=["diversity", "texture"],
    )
    assert other.hash == plain.hash


# ---- A user's allocation


def test_a_function_may_give_the_weights(mixed: Path) -> None:
    def last_bin_only(size: Any, importance: Any, keep: float) -> Any:
        assert size.shape == importance.shape == (4,)
        assert keep == 0.2
        weight = np.zeros(4)
        weight[3] = 1
        return weight

    plan = adq.build_plan(mixed, bins=4, keep=0.2, allocation=last_bin_only)
    assert [entry["kept"] for entry in plan.header["bins"]] == [0, 0, 0, 24]
    assert plan.header["settings"]["allocation"].endswith("last_bin_only")


def test_a_function_that_works_in_place_spoils_nothing(mixed: Path) -> None:
    def in_place(size: Any, importance: Any, keep: float) -> Any:
        size *= 0
        importance *= 0
        return np.ones(len(size))

    def afresh(size: Any, importance: Any, keep: float) -> Any:
        return [1] * len(size)

    a, b = (adq.build_plan(mixed, bins=4, keep=0.3, allocation=f) for f in (in_place, afresh))
    assert a.table().equals(b.table())
    assert a.header["bins"] == b.header["bins"]


@pytest.mark.parametrize(
    "weight",
    [[1.0] * 3, 1.0, [[1.0]] * 4, [1, 1, 1, math.nan], [1, 1, 1, math.inf], [1, 1, 1, -1e-9]],
    ids=["short", "scalar", "two axes", "nan", "inf", "negative"],
)
def test_weights_that_cannot_be_used_are_refused(weight: Any, mixed: Path) -> None:
    def mine(size: Any, importance: Any, keep: float) -> Any:
        return weight

    text = r"allocation 'function:.*mine' must give \(4,\) weights, finite and >= 0, got array"
    with pytest.raises(ValueError, match=text):
        adq.build_plan(mixed, bins=4, allocation=mine)
