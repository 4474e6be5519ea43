"""Are the bins exactly those of the naive greedy, whatever the data, the evaluator and the number of threads?"""

import hashlib
import logging
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core import graphcut, graphcut_pool, kernel
from adq_wds.core.graphcut import bin_sizes, graphcut_bins, graphcut_bins_gram
from adq_wds.core.graphcut_pool import Outside
from adq_wds.core.kernel import unit_rows
from tests.core.greedy import GRAM, lists, naive_bins, printed_with


def features(kind: str, n: int = 150, D: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixture = rng.normal(size=(n, 5)) @ rng.normal(size=(5, D)) + rng.normal(size=D)
    x = {
        "relu": np.maximum(mixture, 0),
        "sparse": np.maximum(rng.normal(size=(n, D)) - 1.5, 0),
        "signed": mixture + 1.0,
        "centred": mixture - mixture.sum(axis=0) / max(n, 1),
        "gaussian": rng.normal(size=(n, D)),
        "opposite": np.where(np.arange(n) % 2, 1, -1)[:, None]
        * (np.ones(D) + 0.05 * rng.normal(size=(n, D))),
        "collapsed": np.ones(D) + 0.01 * rng.random((n, D)),
        "duplicated": np.maximum(mixture, 0)[rng.integers(0, max(1, n // 5), n)],
        "identical": np.ones((n, D)),
        "zero": np.zeros((n, D)),
        "some zero": np.maximum(mixture, 0) * (rng.random((n, 1)) < 0.7),
        "one-hot": np.eye(D)[rng.integers(0, D, n)],
    }[kind]
    return unit_rows(x.astype(np.float16))


KINDS = [
    "relu", "sparse", "signed", "centred", "gaussian", "opposite", "collapsed", "duplicated", "identical", "zero",
    "some zero", "one-hot",
]  # fmt: skip
POOL = {"rows on demand": 0, "pool of 1": 32, "pool of 8": 32 * 64, "pool of 40": 32 * 1600}


@pytest.fixture
def small_pools(monkeypatch):
    """Pools that must be refreshed even among a few hundred rows, and that are never given up."""
    monkeypatch.setattr(graphcut_pool, "WHOLE_POOL", 0)
    monkeypatch.setattr(graphcut_pool, "FEW_PICKS", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [1, 4, 7])
def test_bins_and_pick_order_equal_the_naive_greedy(kind, bins, small_pools):
    rows = features(kind)
    expected = naive_bins(rows @ rows.T, bin_sizes(len(rows), bins).tolist())
    assert lists(graphcut_bins(rows, bins, memory_bytes=GRAM)) == expected
    for name, memory_bytes in POOL.items():
        assert lists(graphcut_bins(rows, bins, memory_bytes=memory_bytes)) == expected, name


@settings(max_examples=60)
@given(
    n=st.integers(0, 40),
    D=st.integers(1, 6),
    bins=st.integers(1, 12),
    pool=st.integers(0, 12),
    spread=st.sampled_from([0.0, 0.01, 1.0]),
    offset=st.sampled_from([0.0, 1.0, -1.0]),
    signed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_small_input_is_exact_on_both_sides(n, D, bins, pool, spread, offset, signed, seed):
    x = offset + spread * np.random.default_rng(seed).integers(-3, 4, size=(n, D))  # few values: many ties
    rows = unit_rows(x if signed else np.maximum(x, 0))
    expected = naive_bins(rows @ rows.T, bin_sizes(n, bins).tolist())
    assert lists(graphcut_bins(rows, bins, memory_bytes=GRAM)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphcut_pool, "WHOLE_POOL", 0)
        assert lists(graphcut_bins(rows, bins, memory_bytes=32 * pool * pool)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole_pool", [0, 64])
def test_pools_given_up_and_rows_moved_agree_with_the_matrix(kind, whole_pool, monkeypatch):
    monkeypatch.setattr(graphcut_pool, "WHOLE_POOL", whole_pool)
    monkeypatch.setattr(graphcut_pool, "_BLOCK_ROWS", 17)
    rows = features(kind, n=1201, D=40)
    before = rows.copy()
    for bins in (1, 10):
        gram = graphcut_bins(rows, bins, memory_bytes=GRAM)
        pooled = graphcut_bins(rows, bins, memory_bytes=32 * 128**2)
        assert lists(pooled) == lists(gram)
    assert np.array_equal(rows, before)  # the caller's rows are never written


def test_a_hand_worked_case():
    # Four unit vectors at 0, 60, 90 and 180 degrees. Twice the sum of cos over V: 0: 1+.5+0-1, 60: .5+1+.87-.5, ...
    # First 60 (1.87), leaving 0: .5-1, 90: 1.87-1.73, 180: -.63+1 -> 180 joins it. Left: 0 and 90, a tie: lowest first.
    angle = np.deg2rad([0, 60, 90, 180])
    rows = unit_rows(np.column_stack([np.cos(angle), np.sin(angle)]))
    assert lists(graphcut_bins(rows, 2)) == ([1, 0, 1, 0], [0, 0, 1, 1])


THREADS = """
import hashlib, sys
import numpy as np
from adq_wds.core.graphcut import graphcut_bins
from adq_wds.core.kernel import unit_rows
x = np.random.default_rng(5).integers(-40, 41, size=(2600, 96)).astype(np.float16)
for shift in (0, 30):
    for memory_bytes in (1 << 30, 1 << 20):
        b = graphcut_bins(unit_rows(np.maximum(x + shift, -40 if shift else 0)), 10, memory_bytes=memory_bytes)
        print(hashlib.sha256(b.bin.tobytes() + b.pick.tobytes()).hexdigest())
"""


def test_one_and_two_blas_threads_give_the_same_bytes():
    one = printed_with(1, THREADS)
    assert one == printed_with(2, THREADS)
    assert one[:1] + one[2:3] == one[1:2] + one[3:]  # Gram matrix and pool


def test_the_budget_chooses_the_evaluator_at_its_exact_edge(monkeypatch):
    used = []
    pool = lambda rows, sizes, **options: used.append("pool") or np.arange(len(rows))  # noqa: E731
    monkeypatch.setattr(graphcut, "pool_order", pool)
    rows = features("relu", n=30)
    graphcut_bins(rows, 3, memory_bytes=30 * 30 * 8)
    assert used == []
    graphcut_bins(rows, 3, memory_bytes=30 * 30 * 8 - 1)
    assert used == ["pool"]


def test_large_matrices_by_blocks_equal_one_product(monkeypatch):
    rows = features("signed", n=150)
    monkeypatch.setattr(kernel, "_ONE_PRODUCT_BYTES", 0)
    for n_rows in (1, 64, 150, 151):
        monkeypatch.setattr(kernel, "_PRODUCT_ROWS", n_rows)
        assert kernel.gram(rows).tobytes() == (rows @ rows.T).tobytes()


def test_cosine_and_similarity_give_the_same_bins():
    rows = features("signed")
    assert lists(graphcut_bins_gram(0.5 + 0.5 * (rows @ rows.T), 6)) == lists(graphcut_bins(rows, 6))


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    D=st.integers(2, 8),
    n_query=st.integers(0, 40),
    n_picked=st.integers(0, 40),
    offset=st.sampled_from([0.0, 0.5, 3.0]),
    nonnegative=st.booleans(),
)
def test_nothing_outside_ever_exceeds_the_bound(seed, D, n_query, n_picked, offset, nonnegative):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, D)) + offset
    rows = unit_rows(np.maximum(x, 0) if nonnegative else x)
    query = rows[:n_query].sum(axis=0) - 2 * rows[100 : 100 + n_query // 3].sum(axis=0)
    picked = rows[200 : 200 + n_picked].sum(axis=0)
    gain = rows @ query
    threshold = float(np.quantile(gain, rng.random()))
    radius = float(np.linalg.norm(rows, axis=1).max()) * (1 + 1e-12)
    bound = Outside(query, threshold, radius, nonnegative).bound(picked)
    assert (rows[gain <= threshold] @ (query - 2 * picked)).max() <= bound


def test_the_bound_is_reached_by_the_worst_row():
    # The query (2, 0) turns by 30 degrees; an outsider at 60 degrees from it comes within 30 degrees of the new one.
    query = np.array([2.0, 0.0])
    picked = 0.5 * (query - 2 * np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)]))
    assert Outside(query, 1.0, 1.0, False).bound(picked) == pytest.approx(2 * np.cos(np.pi / 6), rel=1e-12)


@given(n=st.integers(0, 500), bins=st.integers(1, 600))
def test_bin_sizes_sum_to_n_differ_by_at_most_one_and_descend(n, bins):
    sizes = bin_sizes(n, bins).tolist()
    assert sum(sizes) == n
    assert len(sizes) == min(n, bins)
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("memory_bytes", [GRAM, 32 * 64, 0])
def test_progress_adds_up_to_n(memory_bytes):
    steps: list[int] = []
    graphcut_bins(features("relu", n=120), 7, memory_bytes=memory_bytes, progress=steps.append)
    assert sum(steps) == 120
    assert min(steps) > 0


def test_rows_on_demand_are_told_once_with_their_time(caplog, monkeypatch):
    monkeypatch.setattr(graphcut_pool, "WHOLE_POOL", 0)
    monkeypatch.setattr(graphcut_pool, "WARN_SECONDS", 0.0)
    monkeypatch.setattr(graphcut_pool, "WARN_BREAK", 16)
    rows = features("identical", n=400)
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        graphcut_bins(rows, 4, memory_bytes=32 * 64)
    assert len(caplog.messages) == 1
    assert "rows are taken on demand: 3" in caplog.messages[0]
    assert "samples are left, about 0 s" in caplog.messages[0]


def test_breaks_double_while_pools_fail():
    pace = graphcut_pool._Pace(largest=100)

    def break_after(n_picks: int) -> int:
        assert pace.pool_size(10_000) == 100
        pace.pooled(n_picks, 10_000)
        length = 0
        while pace.pool_size(10_000) == 0:
            length += 1
        return length

    assert [break_after(1) for _ in range(3)] == [8, 16, 32]
    pace.pooled(50, 10_000)
    assert break_after(50) == 0
    assert break_after(2) == 8
    assert [break_after(1) for _ in range(12)][-2:] == [4096, 4096]


def test_a_pool_holds_no_more_than_is_left_or_fits():
    for n_left in range(1, 5000, 7):
        assert 1 <= graphcut_pool._Pace(largest=1000).pool_size(n_left) <= min(n_left, 1000)
    assert graphcut_pool._Pace(largest=0).pool_size(50) == 0
    assert graphcut_pool._Pace(largest=5000).pool_size(2048) == 2048
    assert graphcut_pool._Pace(largest=5000).pool_size(10_000) == 400


def test_easy_data_falls_back_nowhere_and_needs_few_refreshes(caplog, monkeypatch):
    monkeypatch.setattr(graphcut_pool, "WARN_SECONDS", 0.0)
    refreshes: list[int] = []
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        graphcut_bins(features("collapsed", n=4000), 10, memory_bytes=32 * 512**2, progress=refreshes.append)
    assert caplog.messages == []
    assert len(refreshes) < 400


def test_more_rows_than_sums_are_exact_for_are_warned_about(monkeypatch):
    monkeypatch.setattr(graphcut, "EXACT_ROWS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphcut_bins(features("relu", n=10), 2)
    with pytest.warns(UserWarning, match="11 rows in one GraphCut, exact up to 10"):
        graphcut_bins(features("relu", n=11), 2)


def test_golden_order():
    # Whole-number features made without a generator: any machine must give this digest, taken from this very code.
    x = (np.arange(700 * 16).reshape(700, 16) * 7919 % 1009 - 300).astype(np.float32)
    got = graphcut_bins(unit_rows(x), 9)
    digest = hashlib.sha256(got.bin.astype("<i2").tobytes() + got.pick.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "601e15288d9e1cfc"
