"""Before bins, samples are left out for a reason that the plan records: named ones, copies, doubted labels."""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.planning import doubts
from adq_wds.planning.build_plan import find_bins
from adq_wds.report.text import describe_plan, show_plan
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]
SIZES = (500, 320, 180)


def clusters(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Unit rows around a centre for each class, and the right labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    x = 2.5 * rng.normal(size=(len(sizes), 12))[y] + rng.normal(size=(len(y), 12))
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


@pytest.fixture
def noisy(make_features: MakeFeatures, tmp_path: Path) -> tuple[Path, list[str]]:
    """Two shards of 1,000 samples, a bad one among them, and the keys of the 150 whose labels are wrong."""
    x, y = clusters()
    wrong = np.random.default_rng(1).choice(1000, 150, replace=False)
    y[wrong] = (y[wrong] + 1) % 3
    make_features("a.tar", y[:600].tolist(), embedding=x[:600], bad=[600])
    make_features("b.tar", y[600:].tolist(), embedding=x[600:], first=1000)
    return tmp_path / "features", [f"k{i:04d}" if i < 600 else f"k{i + 400}" for i in sorted(wrong)]


def rows_of(plan: adq.Plan) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in plan.table().to_pylist()}


def keys_of(plan: adq.Plan, reason: str) -> set[str]:
    return {key for key, row in rows_of(plan).items() if row["reason"] == reason}


# ---- Doubted labels


def test_a_share_of_each_class_is_left_out_by_lowest_margin(noisy: tuple[Path, list[str]]) -> None:
    folder, wrong = noisy
    plan = adq.build_plan(folder, bins=3, keep=0.5, clean=0.25)
    rows, out = rows_of(plan), keys_of(plan, "label")
    assert len(plan) == 500  # half of all usable samples, not of what is left
    n = Counter(row["label"] for row in rows.values() if row["reason"] != "bad")
    assert Counter(rows[key]["label"] for key in out) == {c: round(0.25 * n[c]) for c in n}
    for c in n:
        margin = {key: row["margin"] for key, row in rows.items() if row["label"] == c}
        assert max(margin[k] for k in margin if k in out) <= min(margin[k] for k in margin if k not in out)
    assert len(set(wrong) & out) >= 0.85 * len(wrong)
    assert all((rows[key]["bin"], rows[key]["pick"], rows[key]["kept"]) == (-1, -1, False) for key in out)
    assert plan.header["settings"]["clean"] == 0.25
    assert np.isnan(rows["k0600"]["margin"])  # the bad one


def test_auto_finds_wrong_labels_and_leaves_right_ones(
    noisy: tuple[Path, list[str]], make_features: MakeFeatures, tmp_path: Path
) -> None:
    folder, wrong = noisy
    found = keys_of(adq.build_plan(folder, bins=3, clean="auto"), "label")
    assert len(found & set(wrong)) / len(found) > 0.95
    assert len(found & set(wrong)) >= 0.5 * len(wrong)
    x, y = clusters()
    make_features("a.tar", y.tolist(), embedding=x, folder=tmp_path / "right")
    plan = adq.build_plan(tmp_path / "right", bins=3, clean="auto")
    assert plan.header["reasons"]["label"] <= 0.02 * len(y)


@pytest.mark.parametrize("n", [40, 100, 400, 3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_auto_is_right_at_any_size(n: int, make_features: MakeFeatures, tmp_path: Path) -> None:
    """Four classes apart from each other, with right labels and with a fifth of them wrong."""
    rng = np.random.default_rng(n)
    centre = rng.normal(size=(4, 64))
    true = np.arange(n) % 4
    x = (6 * centre / np.linalg.norm(centre, axis=1, keepdims=True))[true] + rng.normal(size=(n, 64))
    label = true.copy()
    wrong = rng.permutation(n)[: n // 5]
    label[wrong] = (label[wrong] + rng.integers(1, 4, len(wrong))) % 4
    options: dict[str, Any] = {"bins": 1, "scores": ["diversity"], "clean": "auto"}
    for name, y in (("right", true), ("wrong", label)):
        make_features("a.tar", y.tolist(), embedding=x, folder=tmp_path / name)
    clean = adq.build_plan(tmp_path / "right", **options).header["clean"]
    assert all(out <= 0.05 * of for out, of in zip(clean["left_out"], clean["of"], strict=True))
    reason = adq.build_plan(tmp_path / "wrong", **options).table()["reason"].to_pylist()
    out = np.array(reason) == "label"
    assert (label != true)[out].mean() >= (0.7 if n < 100 else 0.9)  # a fifth by chance
    assert out[wrong].mean() >= 0.6


def test_plans_with_a_share_are_nested_and_keep_their_hash(noisy: tuple[Path, list[str]]) -> None:
    features, inside = Features(noisy[0]), set[str]()
    bins = find_bins(features, bins=3, clean=0.2)
    for keep in (0.1, 0.4, 0.8):
        plan = adq.build_plan(features, bins=bins, keep=keep, clean=0.2)
        assert plan.hash == adq.build_plan(features, bins=3, keep=keep, clean=0.2).hash
        assert inside <= set(plan.keys())
        inside = set(plan.keys())
    with pytest.raises(ValueError, match="the bins hold other samples than these options leave in"):
        adq.build_plan(features, bins=bins, clean=0.3)


def test_margins_in_bins_are_reused_for_equal_samples_only(
    noisy: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_bins(Features(noisy[0]), bins=3, clean="auto").save(tmp_path / "bins.parquet")
    bins = Bins.load(tmp_path / "bins.parquet")
    fresh = [adq.build_plan(noisy[0], bins=3, keep=keep, clean="auto") for keep in (0.2, 0.6)]
    monkeypatch.setattr(doubts, "fit_ridge", lambda *_: pytest.fail("fitted again"))
    again = [adq.build_plan(noisy[0], bins=bins, keep=keep, clean="auto") for keep in (0.2, 0.6)]
    assert [plan.hash for plan in again] == [plan.hash for plan in fresh]
    with pytest.raises(pytest.fail.Exception):
        adq.build_plan(noisy[0], bins=bins, clean="auto", exclude=["k0003"])


def test_without_clean_nothing_is_said_of_labels(noisy: tuple[Path, list[str]]) -> None:
    plan = adq.build_plan(noisy[0], bins=3)
    assert "margin" not in plan.table().column_names
    assert "clean" not in {*plan.header, *plan.header["settings"]}
    assert plan.header["reasons"]["label"] == 0


def test_more_doubts_than_the_budget_leaves_keep_all_others(
    noisy: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    plan = adq.build_plan(noisy[0], bins=3, keep=0.9, clean=0.5)
    assert len(plan) == 1000 - plan.header["reasons"]["label"]
    assert "keep=0.9 of 1000 samples is 900" in caplog.text


def test_one_sample_of_a_class_stays(make_features: MakeFeatures, tmp_path: Path) -> None:
    x, y = clusters((30, 20, 1))
    make_features("a.tar", y.tolist(), embedding=x)
    plan = adq.build_plan(tmp_path / "features", bins=1, keep=1.0, clean=0.99)
    assert [entry["kept"] for entry in plan.header["classes"]] == [1, 1, 1]


def test_a_must_include_sample_stays_whatever_its_margin(noisy: tuple[Path, list[str]]) -> None:
    folder, wrong = noisy
    plan = adq.build_plan(folder, bins=3, keep=0.3, clean=0.3, must_include=wrong[:5])
    rows = rows_of(plan)
    assert all(rows[key]["kept"] and rows[key]["margin"] < 0.5 for key in wrong[:5])
    assert len(plan) == 300


def test_labels_are_held_against_the_samples_that_are_left(noisy: tuple[Path, list[str]]) -> None:
    folder, wrong = noisy
    rows = rows_of(adq.build_plan(folder, bins=3, clean=0.1, exclude=wrong))
    assert all(np.isnan(rows[key]["margin"]) for key in wrong)
    left = [row["margin"] for row in rows.values() if row["reason"] not in ("bad", "excluded")]
    assert np.mean(np.array(left) > 0) > 0.95  # no wrong label is in the fit


def test_a_plan_is_loaded_with_its_margins_and_says_them(
    noisy: tuple[Path, list[str]], tmp_path: Path
) -> None:
    plan = adq.build_plan(noisy[0], bins=3, keep=0.3, clean=0.25, out=tmp_path / "plan.parquet")
    in_memory = adq.build_plan(noisy[0], bins=3, keep=0.3, clean=0.25)
    assert plan.hash == in_memory.hash == adq.load_plan(tmp_path / "plan.parquet").hash
    for other in (in_memory, pickle.loads(pickle.dumps(in_memory))):  # noqa: S301 - ours
        assert other.table().schema == plan.table().schema
        assert repr(other.table().to_pylist()) == repr(plan.table().to_pylist())
    about, text = describe_plan(plan)["clean"], show_plan(plan)
    assert sum(about["left_out"]) == plan.header["reasons"]["label"] == 250
    assert "250 samples are left out whose labels are doubted (25.0 %; by class 2" in text
    assert "doubted" in next(
        line for line in text.splitlines() if "must include" in line or "samples  kept" in line
    )


def test_an_encoder_that_tells_no_classes_apart_is_warned_of(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_features("a.tar", [0, 1, 2] * 40, signed=True)  # embeddings that know nothing of labels
    asked: list[tuple[Any, int]] = [(0.1, 12), ("auto", 0)]
    for clean, n_out in asked:
        caplog.clear()
        plan = adq.build_plan(tmp_path / "features", bins=2, clean=clean)
        assert "margins say little of labels" in caplog.text
        assert plan.header["reasons"]["label"] == n_out


@pytest.mark.parametrize(
    ("label", "match"),
    [
        (-1, "needs labels, and these features have none"),
        (4, "needs samples of two or more classes; the 20 that"),
    ],
)
def test_clean_without_classes_is_an_error(
    label: int, match: str, make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features("a.tar", [label] * 20)
    asked: dict[str, dict[str, Any]] = {
        "clean='auto'": {"clean": "auto"},
        "the score 'difficulty'": {"scores": ["difficulty"]},
        "bins_by='difficulty'": {"bins_by": "difficulty"},
    }
    for name, options in asked.items():
        with pytest.raises(adq.PlanError, match=f"^{name} {match}"):
            adq.build_plan(tmp_path / "features", bins=2, **options)
    assert len(adq.build_plan(tmp_path / "features", bins=2, keep=0.5, dedup=0.9)) > 0
    pq.write_table(
        pa.table({"key": [f"k{i:04d}" for i in range(20)], "loss": range(20)}), tmp_path / "l.parquet"
    )
    loss = adq.Column(tmp_path / "l.parquet", "loss")  # difficulty from elsewhere
    assert len(adq.build_plan(tmp_path / "features", bins=2, keep=0.5, scores=[loss])) == 10


def test_difficulty_is_a_score_that_needs_no_cleaning(noisy: tuple[Path, list[str]]) -> None:
    plan = adq.build_plan(noisy[0], bins=4, scores=["difficulty", "diversity"])
    rows = [row for row in plan.table().to_pylist() if row["bin"] >= 0]
    for k, entry in enumerate(plan.header["bins"]):
        inside = [max(1 - row["margin"], 0) for row in rows if row["bin"] == k]
        assert entry["difficulty"] == pytest.approx(np.mean(inside), rel=1e-6)
    assert plan.header["reasons"]["label"] == 0
    assert "clean" not in plan.header
    cleaned = adq.build_plan(noisy[0], bins=4, scores=["difficulty"], clean=0.2)
    hardest = [max(entry["difficulty"] for entry in each.header["bins"]) for each in (cleaned, plan)]
    assert hardest[0] < hardest[1]


# ---- Named samples


def test_excluded_samples_are_never_kept(noisy: tuple[Path, list[str]]) -> None:
    plan = adq.build_plan(noisy[0], bins=3, keep=1.0, exclude=["k0003", ("b.tar", "k1001")])
    assert keys_of(plan, "excluded") == {"k0003", "k1001"}
    assert len(plan) == 998
    assert plan.header["settings"]["exclude"] != plan.header["settings"]["must_include"]
    assert "2 samples on the exclude list, or of other classes, are left out" in show_plan(plan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"exclude": ["k0003"], "must_include": ["k0003"]},
            r"'a\.tar/k0003' is both must-include and exclude",
        ),
        ({"exclude": ["none"]}, "exclude sample 'none' is not among the usable samples"),
        ({"exclude": ["k0600"]}, "exclude sample 'k0600' is not among the usable samples"),
    ],
)
def test_an_exclude_list_that_cannot_be_followed_is_an_error(
    options: dict[str, Any], match: str, noisy: tuple[Path, list[str]]
) -> None:
    with pytest.raises(adq.PlanError, match=match):
        adq.build_plan(noisy[0], bins=3, **options)


# ---- Near copies


@pytest.fixture
def near(make_features: MakeFeatures, tmp_path: Path) -> Path:
    """40 samples: k1000 near k0000, k1001 with the bytes of k1000, k1002 near k0001 but of another class."""
    x, y = clusters((20, 20))
    more = np.stack([x[0], x[0], x[1]]) + 1e-3
    make_features("a.tar", y.tolist(), embedding=x, contents=range(40))
    label = [int(y[0]), int(y[0]), 1 - int(y[1])]
    make_features("b.tar", label, embedding=more, first=1000, contents=[90, 90, 91])
    return tmp_path / "features"


def test_near_copies_inside_a_class_are_left_out(near: Path) -> None:
    plan = adq.build_plan(near, bins=2, keep=1.0, dedup=0.999)
    rows = rows_of(plan)
    copies = {key: row["duplicate_of"] for key, row in rows.items() if row["reason"] == "duplicate"}
    assert copies == {"k1000": "a.tar/k0000", "k1001": "a.tar/k0000"}
    assert len(plan) == 41
    assert plan.header["settings"]["dedup"] == 0.999
    exact = keys_of(adq.build_plan(near, bins=2, keep=1.0), "duplicate")
    assert exact == {"k1001"}


def test_a_must_include_near_copy_stays_and_the_first_goes(near: Path) -> None:
    rows = rows_of(adq.build_plan(near, bins=2, keep=1.0, dedup=0.999, must_include=["k1001"]))
    assert rows["k1001"]["kept"]
    assert {rows[key]["duplicate_of"] for key in ("k0000", "k1000")} == {"b.tar/k1001"}


def test_where_everything_is_a_copy_one_of_each_class_is_left(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features("a.tar", [0, 1] * 10, embedding=np.ones((20, 6)))
    plan = adq.build_plan(tmp_path / "features", bins=3, keep=1.0, dedup=1.0)
    assert plan.keys() == ["k0000", "k0001"]


def test_copies_with_two_labels_are_warned_of_first(
    make_features: MakeFeatures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_features("a.tar", [0, 1] * 10, contents=[0] * 20)
    with pytest.raises(adq.PlanError, match="two or more classes; the 1 that earlier reasons leave in"):
        adq.build_plan(tmp_path / "features", bins=2, clean="auto")
    assert "10 copies have another label" in caplog.text


# ---- Balance


def seats(folder: Path, **options: Any) -> list[int]:
    plan = adq.build_plan(folder, bins=2, **options)
    return [entry["kept"] for entry in plan.header["classes"]]


def test_balance_lies_between_equal_seats_and_proportion(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 160 + [1] * 40 + [2] * 10)
    folder = tmp_path / "features"
    assert seats(folder, keep=0.1, balance="equal") == [7, 7, 7]
    assert seats(folder, keep=0.2, balance="equal") == [16, 16, 10]  # a class that runs out gives all it has
    assert seats(folder, keep=0.1, balance=0.5) == pytest.approx([12, 6, 3], abs=1)
    same: list[tuple[Any, Any]] = [("equal", 0), ("class", 1), ("equal", np.float32(0))]
    for word, number in same:
        plans = [adq.build_plan(folder, bins=2, balance=b) for b in (word, number)]
        assert plans[0].keys() == plans[1].keys()


def test_equal_balance_is_nested(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 160 + [1] * 40 + [2] * 10)
    inside: set[str] = set()
    for keep in np.linspace(0.05, 1, 8):
        plan = adq.build_plan(tmp_path / "features", bins=3, keep=float(keep), balance="equal", seed=3)
        assert inside <= set(plan.keys())
        inside = set(plan.keys())


# ---- Arguments


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clean", [0, 1, 1.5, -0.1, float("nan"), "none", "all"]),
        ("dedup", [0, 1.01, -0.5, float("nan"), "near"]),
        ("balance", [-0.1, 1.1, float("nan"), "even", None]),
    ],
)
def test_values_out_of_range_are_named(name: str, values: list[Any], noisy: tuple[Path, list[str]]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            adq.build_plan(noisy[0], **{name: value})
    with pytest.raises(ValueError, match="exclude must be a list"):
        adq.build_plan(noisy[0], exclude="k0003")


def test_the_command_takes_words_and_numbers(
    noisy: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.txt").write_text("k0003\nb.tar\tk1001\n")
    asked = ["--clean", "20%", "--dedup", "0.99", "--balance", "0.5", "--exclude", str(tmp_path / "out.txt")]
    out = tmp_path / "plan.parquet"
    assert main(["plan", str(noisy[0]), "--bins", "3", *asked, "-o", str(out)]) == 0
    assert "labels are doubted (20." in capsys.readouterr().out
    same = adq.build_plan(
        noisy[0], bins=3, clean=0.2, dedup=0.99, balance=0.5, exclude=["k0003", ("b.tar", "k1001")]
    )
    assert adq.load_plan(out).hash == same.hash
    words = ["--clean", "none", "--dedup", "none", "--balance", "none"]
    assert main(["plan", str(noisy[0]), *words, "-o", str(out)]) == 0
    assert adq.load_plan(out).hash == adq.build_plan(noisy[0], dedup=None, balance="none").hash
    with pytest.raises(SystemExit):
        main(["plan", str(noisy[0]), "--clean", "much", "-o", str(out)])
    assert "--clean: 'much' is neither auto, none nor a number" in capsys.readouterr().err


def test_labels_are_checked_once(noisy: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        adq.build_plan(noisy[0], bins=3, clean="auto")
    assert caplog.text.count("checking 1000 labels by a fit") == 1


# ---- The list of them


def test_samples_left_out_are_listed_with_their_reason(
    make_features: MakeFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = clusters((60, 60))
    make_features("a.tar", y.tolist(), embedding=x, contents=range(120), bad=[120], names=["cat", "dog"])
    make_features("b.tar", [1 - y[0]], embedding=x[:1], first=1000, contents=[0], names=["cat", "dog"])
    out = tmp_path / "plan.parquet"
    plan = adq.build_plan(tmp_path / "features", bins=2, keep=0.5, clean=0.1, exclude=["k0003"], out=out)
    rows = rows_of(plan)
    assert main(["show", str(out), "--left-out", "--json"]) == 0
    listed = {entry["key"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {key: entry["reason"] for key, entry in listed.items()} == {
        key: row["reason"] for key, row in rows.items() if row["reason"] not in ("kept", "quota")
    }
    there, here = ["cat", "dog"][y[0]], ["cat", "dog"][1 - y[0]]
    assert listed["k1000"] == {
        "reason": "duplicate", "shard": "b.tar", "key": "k1000", "label": here, "duplicate_of": "a.tar/k0000",
        "label_there": there,
    }  # fmt: skip
    assert main(["show", str(out), "--left-out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"duplicate\tb.tar\tk1000\t{here}\tof a.tar/k0000, whose label is {there}"
    assert {"bad\ta.tar\tk0120", f"excluded\ta.tar\tk0003\t{['cat', 'dog'][y[3]]}"} <= set(lines)
    doubted = [line.split("\t") for line in lines if line.startswith("label")]
    assert [why for *_, why in doubted] == [f"margin {rows[key]['margin']:.3f}" for _, _, key, *_ in doubted]


def test_a_plan_that_leaves_nothing_out_says_so(
    make_features: MakeFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_features("a.tar", [0, 1] * 10)
    adq.build_plan(tmp_path / "features", bins=2, keep=0.5, out=tmp_path / "plan.parquet")
    assert main(["show", str(tmp_path / "plan.parquet"), "--left-out"]) == 0
    assert capsys.readouterr().out == "no sample is left out\n"
