"""A plan is the method, step by step: equal to a slow and plain oracle over a whole small set."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.core.rng import draw as keyed_draw
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.plan import Plan
from adq_wds.tables.plan_rows import ALWAYS, NEVER
from tests.core.test_allocation import slow_split

MakeFeatures = Callable[..., ShardFeatures]
K = 4
NAMES = ("allocation", "balance", "draw", "normalise")
VALUES = (("adaptive", "uniform"), ("class", "none"), ("random", "ordered"), ("sum", "minmax"))
SETTINGS = [dict(zip(NAMES, values, strict=True)) for values in itertools.product(*VALUES)]
KEEPS = (0.0, 0.04, 0.15, 0.3, 0.5, 0.77, 1.0)


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(settings.values())


# ---- The oracle: the method as it is written, one sample at a time

Row = dict[str, Any]


def units(embedding: Any) -> list[int]:
    """A float16 row made a unit row, in steps of 2^-16: whole numbers, so every sum below is exact."""
    values = [float(v) for v in embedding]
    norm = math.sqrt(math.fsum(v * v for v in values)) or 1.0
    return [round(v / norm * 2**16) for v in values]


def similarity(a: Row, b: Row) -> int:
    """0.5 + 0.5·cos, in steps of 2^-33."""
    return 2**32 + sum(x * y for x, y in zip(a["unit"], b["unit"], strict=True))


def oracle_rows(shards: Iterable[ShardFeatures]) -> list[Row]:
    rows = []
    for shard in sorted(shards, key=lambda s: s.shard):
        for i, key in enumerate(shard.spans.keys):
            row = {"shard": shard.shard, "key": key, "label": int(shard.label[i])}
            rows.append({**row, "texture": float(shard.texture[i]), "unit": units(shard.embedding[i])})
    return rows


def oracle_bins(rows: list[Row], n_bins: int) -> list[tuple[int, int]]:
    """(bin, pick) of each row: GraphCut, class by class, every gain a fresh sum."""
    found: dict[int, tuple[int, int]] = {}
    for c in {row["label"] for row in rows}:
        members = [i for i, row in enumerate(rows) if row["label"] == c]
        s = {(i, j): similarity(rows[i], rows[j]) for i in members for j in members}
        n_class, n_here = len(members), min(n_bins, len(members))
        left = list(members)
        for n in range(n_here):
            size = n_class // n_here + (1 if n < n_class % n_here else 0)
            V, S = list(left), []  # V is fixed when the bin starts
            for _ in range(size):
                gain = {x: sum(s[v, x] for v in V) - 2 * sum(s[u, x] for u in S) for x in V if x not in S}
                S.append(max(gain, key=lambda x: (gain[x], -x)))
            for pick, x in enumerate(S):
                found[x] = (n, pick)
                left.remove(x)
        assert not left
    return [found[i] for i in range(len(rows))]


def oracle_importance(
    rows: list[Row], bins: list[int], n_bins: int, normalise: str, scores: Iterable[str]
) -> list[float]:
    values: dict[str, list[float | None]] = {"texture": [], "diversity": []}
    for n in range(n_bins):
        members = [row for row, bin in zip(rows, bins, strict=True) if bin == n]
        pairs = [similarity(a, b) / 2**33 for a, b in itertools.combinations(members, 2)]
        values["texture"].append(sum(row["texture"] for row in members) / len(members) if members else None)
        values["diversity"].append(len(pairs) / sum(pairs) if pairs and sum(pairs) > 0 else None)
    known = [v for v in values["diversity"] if v is not None]
    for n in range(n_bins):
        if values["diversity"][n] is None and values["texture"][n] is not None:
            values["diversity"][n] = sum(known) / len(known) if known else 1.0
    total = [0.0] * n_bins
    for name in scores:
        filled = [v for v in values[name] if v is not None]
        low, high, whole = min(filled), max(filled), sum(filled)
        for n, v in enumerate(values[name]):
            if v is None:
                continue
            if high - low < 1e-11:
                total[n] += 1 / len(filled)
            else:
                total[n] += v / whole if normalise == "sum" else (v - low) / (high - low)
    return [round(t / sum(total), 12) for t in total]


def oracle_plan(
    rows: list[Row],
    binned: list[tuple[int, int]],
    n_bins: int,
    *,
    keep: float,
    allocation: str,
    balance: str,
    draw: str,
    normalise: str,
    seed: int = 0,
    alpha: float = 0.65,
    scores: Iterable[str] = ("texture", "diversity"),
    must: Iterable[tuple[str, str]] = (),
) -> dict[tuple[str, str], tuple[int, int, int, int, bool]]:
    """(shard, key) → (label, bin, pick, rank, kept)."""
    must = set(must)
    musts = [(row["shard"], row["key"]) in must for row in rows]
    classes = sorted({row["label"] for row in rows})
    value = oracle_importance(rows, [bin for bin, _ in binned], n_bins, normalise, scores)
    cells: dict[tuple[int, int], list[int]] = {(c, n): [] for c in classes for n in range(n_bins)}
    for i, row in enumerate(rows):
        if not musts[i]:
            cells[row["label"], binned[i][0]].append(i)
    size = {cell: len(members) for cell, members in cells.items()}
    a = alpha if allocation == "adaptive" else 0.0
    weight = {(c, n): size[c, n] * (a * n_bins * value[n] + (1 - a)) for c, n in cells}

    def split(size: list[int], weight: list[float], budget: int, name: str, low: Any = None) -> list[int]:
        """By the plain oracle of `split_budget`."""
        return slow_split(np.array(size), np.array(weight), budget, seed=seed, name=name, low=low)

    n_class = [sum(row["label"] == c for row in rows) for c in classes]
    n_must = [sum(m and row["label"] == c for m, row in zip(musts, rows, strict=True)) for c in classes]
    budget = round(keep * len(rows))
    if balance == "none":
        names = list(cells)
        left = budget - sum(n_must)
        seats = split([size[c] for c in names], [weight[c] for c in names], left, "")
        quota = dict(zip(names, seats, strict=True))
    else:
        quota = {}
        budgets = split(n_class, [float(n) for n in n_class], budget, "classes", np.array(n_must))
        for i, (c, b, m) in enumerate(zip(classes, budgets, n_must, strict=True)):
            names = [(c, n) for n in range(n_bins)]
            seats = split([size[x] for x in names], [weight[x] for x in names], b - m, f"class {i}")
            quota.update(zip(names, seats, strict=True))
    plan = {}
    for cell, members in cells.items():

        def order(i: int) -> tuple[int, int]:
            by_key = keyed_draw(seed, 0, rows[i]["shard"].split("/")[-1], rows[i]["key"])
            return (by_key if draw == "random" else binned[i][1]), i

        for rank, i in enumerate(sorted(members, key=order)):
            plan[i] = (cell[0], *binned[i], rank, rank < quota[cell])
    for i, row in enumerate(rows):
        if musts[i]:
            plan[i] = (row["label"], *binned[i], ALWAYS, True)
    return {(rows[i]["shard"], rows[i]["key"]): plan[i] for i in range(len(rows))}


def found_plan(plan: Plan) -> dict[tuple[str, str], tuple[int, int, int, int, bool]]:
    return {
        (row["shard"], row["key"]): (row["label"], row["bin"], row["pick"], row["rank"], row["kept"])
        for row in plan.table().to_pylist()
    }


# ---- One small set: three shards, classes of 1, 3, 14 and 26, twins, a zero row, samples that could not be used

LABELS = {
    "a.tar": [3, 2, 3, 0, 2, 3, 3, 2, 3, 1, 2, 3, 3, 3, 2],
    "deep/b.tar": [2, 3, 3, 1, 2, 3, 2, 3, 3, 2, 3, 3, 2],
    "c.tar": [3, 3, 2, 3, 1, 3, 2, 3, 2, 3, 3, 3, 2, 3, 2, 3],
}


def small_set(make_features: MakeFeatures, *, signed: bool = False) -> list[ShardFeatures]:
    made = []
    for first, (shard, label) in zip((0, 10, 0), LABELS.items(), strict=True):
        rng = np.random.default_rng(first + len(label))
        rows = rng.normal(size=(len(label), 5))
        rows = rows if signed else np.maximum(rows, 0)
        rows[7] = rows[5]  # twins: equal gains
        rows[2] = 0
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
        bad = [1, 6] if shard == "a.tar" else []
        made.append(make_features(shard, label, embedding=rows, bad=bad, first=first))
    return made


@pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])
@pytest.mark.parametrize("n_bins", [1, K, 9])
def test_bins_are_plain_greedys(
    n_bins: int, signed: bool, make_features: MakeFeatures, tmp_path: Path
) -> None:
    rows = oracle_rows(small_set(make_features, signed=signed))
    bins = find_bins(Features(tmp_path / "features"), bins=n_bins)
    assert list(zip(bins.bin.tolist(), bins.pick.tolist(), strict=True)) == oracle_bins(rows, n_bins)
    assert bins.label.tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])
def test_a_plan_is_the_method_step_by_step(signed: bool, make_features: MakeFeatures, tmp_path: Path) -> None:
    rows = oracle_rows(small_set(make_features, signed=signed))
    bad = {("a.tar", "k0001"), ("a.tar", "k0006")}
    features = Features(tmp_path / "features")
    for n_bins in (K, 9, 20):  # with 20, some bins hold one sample of all classes together
        binned, bins = oracle_bins(rows, n_bins), find_bins(features, bins=n_bins)
        for settings, keep in itertools.product(SETTINGS, KEEPS if n_bins == K else KEEPS[2:4]):
            plan = adq.build_plan(features, bins=bins, keep=keep, **settings)
            found = found_plan(plan)
            assert {found.pop(name) for name in bad} == {(-1, -1, -1, NEVER, False)}
            assert found == oracle_plan(rows, binned, n_bins, keep=keep, **settings), (settings, keep)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_plan_with_must_includes_is_the_method_too(
    settings: dict[str, Any], make_features: MakeFeatures, tmp_path: Path
) -> None:
    """Ties, seeds, alpha and single scores besides."""
    rows = oracle_rows(small_set(make_features))
    must = [("a.tar", "k0000"), ("c.tar", "k0003"), ("deep/b.tar", "k0022"), ("c.tar", "k0014")]
    asked = ["k0022", *(m for m in must if m[1] != "k0022")]  # k0022 stands in one shard only
    features = Features(tmp_path / "features")
    bins, binned = find_bins(features, bins=K), oracle_bins(rows, K)
    for seed, alpha, scores in [(1, 0.65, ["texture"]), (-7, 1.0, ["diversity"]), (2**62, 0.0, ["texture"])]:
        options: dict[str, Any] = {"seed": seed, "alpha": alpha, "scores": scores, **settings}
        for keep in (0.3, 0.5, 1.0):
            plan = adq.build_plan(features, bins=bins, keep=keep, must_include=asked, **options)
            found = {name: row for name, row in found_plan(plan).items() if row[3] != NEVER}
            assert found == oracle_plan(rows, binned, K, keep=keep, must=must, **options)
            assert {row[3:] for name, row in found.items() if name in must} == {(ALWAYS, True)}


def test_scores_in_the_header_are_means_over_the_bins(make_features: MakeFeatures, tmp_path: Path) -> None:
    rows = oracle_rows(small_set(make_features))
    plan = adq.build_plan(tmp_path / "features", bins=K, keep=0.3)
    bins = [bin for bin, _ in oracle_bins(rows, K)]
    for n, entry in enumerate(plan.header["bins"]):
        members = [row for row, bin in zip(rows, bins, strict=True) if bin == n]
        pairs = [similarity(a, b) / 2**33 for a, b in itertools.combinations(members, 2)]
        assert entry["texture"] == pytest.approx(np.mean([row["texture"] for row in members]), abs=1e-9)
        assert entry["diversity"] == pytest.approx(1 / np.mean(pairs), abs=1e-9)
