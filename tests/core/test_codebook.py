"""What one embedding says of its bin is exact, whatever stands around it; rates keep what they are asked to."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adq_wds.core import codebook
from adq_wds.core.codebook import QUERY_STEP, Checkpoints, bin_checkpoints, solve_rates
from adq_wds.core.graphcut import Binning, graphcut_bins
from adq_wds.core.kernel import ROW_STEP, unit_rows

Half = NDArray[np.float16]


def relu(rng: np.random.Generator, n: int, width: int) -> Half:
    return np.maximum(rng.normal(size=(n, width)) + 0.3, 0).astype(np.float16)


def signed(rng: np.random.Generator, n: int, width: int) -> Half:
    return rng.normal(size=(n, width)).astype(np.float16)


def nearly_equal(rng: np.random.Generator, n: int, width: int) -> Half:
    return (rng.normal(size=width) + 0.01 * rng.normal(size=(n, width))).astype(np.float16)


def few_kinds(rng: np.random.Generator, n: int, width: int) -> Half:
    """Many rows alike, and zero rows: ties everywhere."""
    return np.concatenate([np.zeros((1, width)), rng.normal(size=(4, width))])[rng.integers(0, 5, n)].astype(
        np.float16
    )


def tiny_and_huge(rng: np.random.Generator, n: int, width: int) -> Half:
    """Lengths from the smallest float16 to the largest."""
    return (
        (rng.normal(size=(n, width)) * 10.0 ** rng.integers(-7, 4, (n, 1)))
        .clip(-60000, 60000)
        .astype(np.float16)
    )


KINDS = [relu, signed, nearly_equal, few_kinds, tiny_and_huge]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def fitted(rows: list[Half], bins: int, checkpoints: int) -> Checkpoints:
    """A rule for each of some classes."""
    made = [bin_checkpoints(r, graphcut_bins(r, bins), checkpoints) for r in map(unit_rows, rows)]
    return Checkpoints(np.stack([q for q, _ in made]), np.stack([t for _, t in made]))


def slow_bin(rules: Checkpoints, x: Half, r: int) -> int:
    """The first bin with a checkpoint that is met, in fractions."""
    row = [int(v) for v in (unit_rows(x[None])[0] / ROW_STEP).tolist()]
    for k in range(rules.query.shape[1]):
        for q, t in zip(rules.query[r, k].tolist(), rules.threshold[r, k].tolist(), strict=True):
            product = sum(Fraction(a) * Fraction(v) for a, v in zip(q, row, strict=True)) * Fraction(ROW_STEP)
            if product >= Fraction(t):
                return k
    return rules.query.shape[1]


@kinds
def test_queries_and_thresholds_are_those_of_the_greedy(kind: Callable[..., Half]) -> None:
    rows = unit_rows(kind(np.random.default_rng(1), 53, 7))
    binning = graphcut_bins(rows, 5)
    query, threshold = bin_checkpoints(rows, binning, 3)
    assert query.shape == (4, 3, 7)
    assert query.dtype == np.float32
    for k in range(4):
        members = [
            np.flatnonzero((binning.bin == k) & (binning.pick == p))[0]
            for p in range((binning.bin == k).sum())
        ]
        free = binning.bin >= k
        for j, place in enumerate(
            [-(-len(members) // 3) - 1, -(-2 * len(members) // 3) - 1, len(members) - 1]
        ):
            q = (rows[free].sum(axis=0) - 2 * rows[members[:place]].sum(axis=0)) / 53
            assert np.abs(query[k, j] - q).max() <= QUERY_STEP / 2
            assert (query[k, j] / QUERY_STEP % 1 == 0).all()
            exact = sum(
                Fraction(a) * Fraction(b)
                for a, b in zip(rows[members[place]].tolist(), query[k, j].tolist(), strict=True)
            )
            assert Fraction(float(threshold[k, j])) == exact


def test_checkpoints_at_every_pick_give_the_pilots_bins() -> None:
    for seed in range(3):
        embedding = relu(np.random.default_rng(seed), 60, 16)
        rows = unit_rows(embedding)
        binning = graphcut_bins(rows, 6)
        query, threshold = bin_checkpoints(rows, binning, 10)
        rules = Checkpoints(query[None], threshold[None])
        assert (rules.assign(embedding, np.zeros(60, int)) == binning.bin).all()


@kinds
@pytest.mark.parametrize(("bins", "checkpoints"), [(2, 1), (5, 3), (4, 40)])
def test_assigned_bins_equal_fractions(kind: Callable[..., Half], bins: int, checkpoints: int) -> None:
    rng = np.random.default_rng(2)
    rules = fitted([kind(rng, 40, 6), kind(rng, 31, 6)], bins, checkpoints)
    x, row = kind(rng, 60, 6), rng.integers(0, 2, 60)
    found = rules.assign(x, row)
    assert found.dtype == np.int16
    assert found.tolist() == [slow_bin(rules, v, r) for v, r in zip(x, row.tolist(), strict=True)]


@kinds
@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_a_threshold_is_met_or_missed_by_its_last_bit(kind: Callable[..., Half], steps: int) -> None:
    """Thresholds that are the very products of the samples asked for, one float64 more or less."""
    rng = np.random.default_rng(3)
    x = kind(rng, 50, 64)
    query = (np.rint(rng.normal(size=(1, 1, 1, 64)) / 9 / QUERY_STEP) * QUERY_STEP).astype(np.float32)
    product = unit_rows(x) @ query[0, 0, 0].astype(np.float64)
    for i in range(50):
        limit = product[i] if steps == 0 else np.nextafter(product[i], steps * np.inf)
        rules = Checkpoints(query, np.full((1, 1, 1), limit))
        assert rules.assign(x, np.zeros(50, int)).tolist() == np.where(product >= limit, 0, 1).tolist()


def test_float32_never_decides_against_float64() -> None:
    """Wide rows, a hundred queries: the certified part and the exact one give one answer."""
    rng = np.random.default_rng(4)
    rules = fitted([relu(rng, 300, 512)], 10, 12)
    x = relu(rng, 2000, 512)
    found = rules.assign(x, np.zeros(2000, int))
    met = rules.query[0].reshape(-1, 512).astype(np.float64) @ unit_rows(x).T >= rules.threshold[0].reshape(
        -1, 1
    )
    by_bin = np.concatenate([met.reshape(9, 12, -1).any(axis=1), np.ones((1, 2000), bool)])
    assert (found == by_bin.argmax(axis=0)).all()
    assert len(set(found.tolist())) == 10


@kinds
def test_the_samples_around_never_change_an_answer(
    kind: Callable[..., Half], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    rules = fitted([kind(rng, 50, 24) for _ in range(3)], 5, 4)
    x, row = kind(rng, 200, 24), rng.integers(0, 3, 200)
    whole = rules.assign(x, row)
    order = rng.permutation(200)
    assert (rules.assign(x[order], row[order]) == whole[order]).all()
    assert (
        np.concatenate([rules.assign(x[i : i + 1], row[i : i + 1]) for i in range(200)]).tolist()
        == whole.tolist()
    )
    for n_bytes in (1, 2000, 20_000):
        monkeypatch.setattr(codebook, "_BLOCK_BYTES", n_bytes)
        assert (rules.assign(x, row) == whole).all()


def test_one_bin_takes_all_and_no_sample_has_no_bin() -> None:
    rows = unit_rows(np.eye(3, dtype=np.float16))
    query, threshold = bin_checkpoints(rows, Binning(np.zeros(3, np.int16), np.arange(3, dtype=np.int32)), 2)
    rules = Checkpoints(query[None], threshold[None])
    assert rules.query.shape == (1, 0, 2, 3)
    assert rules.assign(np.eye(3, dtype=np.float16), np.zeros(3, int)).tolist() == [0, 0, 0]
    assert rules.assign(np.empty((0, 3), np.float16), np.zeros(0, int)).shape == (0,)


def test_wrong_embeddings_and_rows_are_named() -> None:
    rules = Checkpoints(np.zeros((2, 1, 1, 3), np.float32), np.zeros((2, 1, 1)))
    x = np.ones((4, 3), np.float16)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) and dtype float32, expected \(N, 3\) float16"):
        rules.assign(x.astype(np.float32), np.zeros(4, int))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(4, 2\) and dtype float16, expected \(N, 3\) float16"):
        rules.assign(x[:, :2], np.zeros(4, int))
    for row in (np.zeros(3, int), np.array([0, 1, 2, 0]), np.array([0, -1, 0, 0])):
        with pytest.raises(ValueError, match=r"row must hold 4 integers in 0 \.\.\. 1"):
            rules.assign(x, row)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[[1, 3], [2, 0]] = value
        with pytest.raises(ValueError, match="embedding 1 holds NaN or Inf, expected finite numbers"):
            rules.assign(bad, np.array([1, 1, 0, 0]))


cells = st.lists(
    st.tuples(st.integers(0, 1000), st.one_of(st.just(0.0), st.floats(1e-6, 1e6))), min_size=1, max_size=12
).filter(lambda pairs: sum(n for n, _ in pairs) > 0)


@given(cells, st.one_of(st.just(0.0), st.floats(1e-9, 1)))
def test_rates_keep_what_is_asked_in_proportion_to_the_weights(
    pairs: list[tuple[int, float]], keep: float
) -> None:
    count, weight = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    frequency = count / count.sum()
    rate = solve_rates(frequency, weight, keep)
    assert ((rate >= 0) & (rate <= 1)).all()
    assert frequency @ rate == pytest.approx(keep, abs=1e-9)
    open_ = (rate < 1) & (weight > 0)
    if open_.any():
        level = (rate[open_] / weight[open_]).max()
        assert np.allclose(rate[open_], level * weight[open_], rtol=1e-9, atol=0)
        assert (level * weight[(rate == 1) & (weight > 0)] >= 1 - 1e-9).all()
        if keep < 1:
            assert (rate[weight == 0] == 0).all() or (frequency[open_].sum() == 0)


@given(cells, st.floats(0, 1), st.floats(0, 1))
def test_no_rate_falls_when_more_is_kept(pairs: list[tuple[int, float]], a: float, b: float) -> None:
    count, weight = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    low, high = (solve_rates(count / count.sum(), weight, keep) for keep in sorted((a, b)))
    assert (low <= high + 1e-12).all()


def test_bins_of_weight_zero_are_kept_from_last() -> None:
    rate = solve_rates(np.array([0.25, 0.5, 0.25]), np.array([1.0, 0.0, 3.0]), 0.75)
    assert rate.tolist() == [1.0, 0.5, 1.0]
    assert solve_rates(np.array([0.5, 0.5]), np.zeros(2), 0.25).tolist() == [0.25, 0.25]
