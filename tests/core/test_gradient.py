"""Are last-layer gradients right however sure the network is, and are their bins exactly the naive greedy's?"""

import math
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq_wds.core import gradient, graphcut
from adq_wds.core.gradient import GradientKernel, gradient_bins, logit_gradients
from adq_wds.core.graphcut import bin_sizes
from adq_wds.core.kernel import unit_rows
from tests.core.greedy import GRAM, lists, naive_bins, printed_with


def plain_gradient(z: list[float], y: int) -> list[float]:
    """The definition in as many digits as it cancels, one row at a time."""
    with localcontext() as context:
        context.prec = int(2 * (max(z) - min(z)) / math.log(10)) + 60

        def softmax(values: list[Decimal]) -> list[Decimal]:
            powers = [(v - max(values)).exp() for v in values]
            return [power / sum(powers) for power in powers]

        p = softmax([Decimal(v) for v in z])
        b = [v - (c == y) for c, v in enumerate(p)]
        length = sum(v * v for v in b).sqrt()
        return [float(v / length) for v in b]


@settings(max_examples=40)
@given(
    C=st.integers(2, 6),
    gap=st.sampled_from([0.0, 1e-9, 0.01, 1.0, 30.0, 400.0, 1500.0]),
    few=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_directions_equal_the_definition_in_many_digits(C, gap, few, seed):
    rng = np.random.default_rng(seed)
    z = gap * (rng.integers(0, 3, size=(4, C)) / 2 if few else rng.random((4, C)))  # few values: classes tie
    labels = rng.integers(0, C, size=4)
    got = logit_gradients(z, labels)
    expected = [plain_gradient(row, y) for row, y in zip(z.tolist(), labels.tolist(), strict=True)]
    assert np.abs(got - np.array(expected)).max() <= 2e-7  # float32's last bit


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("gap", [1e3, 1e4, 6e4])
def test_rows_of_a_sure_network_are_defined(dtype, gap):
    z = np.array([[gap, 0, 0, 1], [gap, gap, 0, 0], [0, 0, 0, 0], [-gap, gap, 1, 0]], dtype=dtype)
    z = np.repeat(z, 4, axis=0)
    labels = np.tile(np.arange(4), 4)
    with np.errstate(invalid="raise", divide="raise"):
        b = logit_gradients(z, labels)
    assert b.dtype == np.float32
    assert np.abs(np.linalg.norm(b.astype(np.float64), axis=1) - 1).max() < 1e-6
    assert np.abs(b.astype(np.float64).sum(axis=1)).max() < 1e-6
    assert (b[np.arange(16), labels] <= -0.5).all()  # the loss falls as the label's logit rises


def test_the_widest_float64_logits_are_still_defined():
    wide = np.finfo(np.float64).max
    z = np.array([[wide, -wide], [-wide, wide]])
    b = logit_gradients(z, np.array([1, 1]))
    assert b == pytest.approx(np.array([[1, -1], [1, -1]]) / math.sqrt(2))


def test_directions_do_not_depend_on_the_rows_around():
    rng = np.random.default_rng(3)
    z, labels = rng.normal(size=(50, 7)) * 20, rng.integers(0, 7, size=50)
    before = z.copy()
    whole = logit_gradients(z, labels)
    for i in range(50):
        one = logit_gradients(z[i : i + 1], labels[i : i + 1])
        assert np.array_equal(one[0], whole[i])
    assert np.array_equal(z, before)
    assert logit_gradients(z[:0], labels[:0]).shape == (0, 7)


def stored(kind: str, n: int = 150, C: int = 5, D: int = 24, seed: int = 0):
    """Logit gradients (n, C) float16, norms (n,) float32 and embeddings (n, D) float16, as features files hold them."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, 5)) @ rng.normal(size=(5, D)) + rng.normal(size=D)
    h = np.maximum(h, 0) if kind == "relu" else h
    z = 4 * rng.normal(size=(n, C)) + h[:, :C]
    labels = np.zeros(n, dtype=np.int64) if kind != "many labels" else rng.integers(0, C, n)
    source = np.arange(n)
    if kind == "duplicated":
        source = rng.integers(0, max(1, n // 5), n)
    elif kind == "identical":
        source = np.zeros(n, dtype=np.int64)
    norm = np.linalg.norm(h, axis=1).astype(np.float32)
    norm = norm * np.float32({"short": 1e-3, "long": 1e37}.get(kind, 1.0))
    b = logit_gradients(z, labels)
    h /= np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-300)
    if kind == "some zero":
        b[rng.random(n) < 0.3] = 0
        flat = rng.random(n) < 0.3
        h[flat], norm[flat] = 0, 0
    return b[source].astype(np.float16), norm[source], h[source].astype(np.float16)


@pytest.mark.parametrize(("C", "labels"), [(1, [0, 0]), (3, [0, 3]), (3, [-1, 0]), (3, [0]), (3, [[0], [0]])])
def test_labels_that_are_no_classes_of_the_head_are_refused(C, labels):
    with pytest.raises(ValueError, match=f"2 rows of logits need as many labels from 0 to {C - 1}"):
        logit_gradients(np.zeros((2, C)), np.array(labels))


KINDS = ["relu", "signed", "many labels", "short", "long", "some zero", "duplicated", "identical"]


def kernel_from(b: np.ndarray, norm: np.ndarray, h: np.ndarray) -> GradientKernel:
    return GradientKernel.from_rows(unit_rows(b), norm, unit_rows(h))


def kernel_of(kind: str, **sizes: int) -> GradientKernel:
    return kernel_from(*stored(kind, **sizes))


def plain_matrix(logit_grad: np.ndarray, norm: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """The definition, one entry at a time, in Python's floats and whole numbers."""
    b, h = unit_rows(logit_grad), unit_rows(embedding)
    steps = [np.rint(x * 2**16).astype(np.int64) for x in (b, h)]
    cos_b, cos_h = (x @ x.T for x in steps)
    a = [1.0 / math.sqrt(1.0 + x * x) for x in norm.astype(np.float64).tolist()]
    c = [x * y for x, y in zip(norm.astype(np.float64).tolist(), a, strict=True)]
    n = len(norm)
    out = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            features = a[i] * a[j] + c[i] * c[j] * (int(cos_h[i, j]) / 2**32)
            out[i, j] = round(features * (int(cos_b[i, j]) / 2**32) * 2**32) / 2**32
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_equal_the_plain_definition_bit_for_bit(kind):
    arrays = stored(kind, n=60)
    assert np.array_equal(kernel_from(*arrays).matrix(), plain_matrix(*arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_are_those_of_the_gradients_built_in_full(kind):
    b, norm, h = stored(kind)
    kernel = kernel_from(b, norm, h)
    length = norm.astype(np.float64)[:, None]
    last_layer = np.concatenate([np.ones_like(length), unit_rows(h) * length], axis=1)
    last_layer /= np.sqrt(1 + length**2)
    e = np.einsum("nc,nd->ncd", unit_rows(b), last_layer).reshape(len(b), -1)
    assert np.abs(kernel.matrix() - e @ e.T).max() <= 2.0**-33 + 1e-14  # half a step
    lengths = np.linalg.norm(e, axis=1)
    assert np.abs(lengths[lengths > 0] - 1).max() < 1e-4


def test_stored_factors_keep_the_cosines_of_real_gradients():
    rng = np.random.default_rng(5)
    z, h = rng.normal(size=(100, 10)) * 8, np.maximum(rng.normal(size=(100, 64)), 0) * 2
    labels = rng.integers(0, 10, size=100)
    leaf = torch.tensor(z, requires_grad=True)
    torch.nn.functional.cross_entropy(leaf, torch.tensor(labels), reduction="sum").backward()
    e = np.einsum("nc,nd->ncd", leaf.grad.numpy(), np.column_stack([np.ones(100), h])).reshape(100, -1)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    norm = np.linalg.norm(h, axis=1).astype(np.float32)
    kernel = kernel_from(
        logit_gradients(z, labels).astype(np.float16), norm, (h / norm[:, None]).astype(np.float16)
    )
    assert np.abs(kernel.matrix() - e @ e.T).max() < 5e-4  # float16's share


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_and_rows_are_the_same_bits(kind, monkeypatch):
    kernel = kernel_of(kind, n=203)
    whole = kernel.matrix()
    assert np.array_equal(whole, whole.T)
    assert np.array_equal(whole * 2.0**32, np.rint(whole * 2.0**32))
    assert np.array_equal(whole, [kernel.row(u) for u in range(203)])
    keep = np.random.default_rng(0).permutation(203)[:70]
    assert np.array_equal(kernel.take(keep).matrix(), whole[np.ix_(keep, keep)])
    assert np.array_equal(kernel.sums(), whole.sum(axis=1))
    for rows, columns, tile in ((64, 64, 16), (64, 48, 50), (7, 100, 3), (1, 1, 1), (48, 64, 8192)):
        monkeypatch.setattr(gradient, "_BLOCK_ROWS", rows)
        monkeypatch.setattr(gradient, "_BLOCK_COLUMNS", columns)
        monkeypatch.setattr(gradient, "_TILE_COLUMNS", tile)
        assert np.array_equal(kernel.matrix(), whole)
        assert np.array_equal(kernel.sums(), whole.sum(axis=1))


def test_matrix_and_rows_are_the_same_bits_unrounded(monkeypatch):
    monkeypatch.setattr(gradient, "_TO_STEPS", 0.0)  # rounding hides a last bit nearly always, not always
    kernel = kernel_of("signed")
    whole = kernel.matrix()
    assert np.array_equal(whole, [kernel.row(u) for u in range(150)])
    assert np.array_equal(whole, whole.T)


def test_no_norm_overflows_or_vanishes():
    norm = np.array([0, 1e-45, 1e-20, 1e-3, 1, 1e3, 1e20, 1e38, np.finfo(np.float32).max], dtype=np.float32)
    b = np.tile(np.array([[1, -1]], dtype=np.float16), (9, 1))
    h = np.tile(np.array([[1, 0]], dtype=np.float16), (9, 1))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        whole = kernel_from(b, norm, h).matrix()
    angle = np.arctan(norm.astype(np.float64))  # of (1, norm)
    length = (unit_rows(b)[0] ** 2).sum()  # of a rounded row: not quite 1
    assert np.abs(whole - length * np.cos(angle[:, None] - angle)).max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [1, 4, 7])
def test_bins_equal_the_naive_greedys_for_any_memory(kind, bins):
    kernel = kernel_of(kind)
    expected = naive_bins(kernel.matrix(), bin_sizes(150, bins).tolist())
    for memory_bytes in (GRAM, 0):
        assert lists(gradient_bins(kernel, bins, memory_bytes=memory_bytes)) == expected


@settings(max_examples=40)
@given(
    n=st.integers(0, 40),
    C=st.integers(2, 4),
    D=st.integers(0, 4),
    bins=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_small_class_is_exact_on_both_sides(n, C, D, bins, seed):
    rng = np.random.default_rng(seed)
    b, h = rng.integers(-1, 2, size=(n, C)) / 2, rng.integers(-1, 2, size=(n, D)) / 2  # few values: many ties
    norm = rng.integers(0, 3, size=n).astype(np.float32)
    kernel = kernel_from(b, norm, h)
    expected = naive_bins(kernel.matrix(), bin_sizes(n, bins).tolist())
    for memory_bytes in (GRAM, 0):
        assert lists(gradient_bins(kernel, bins, memory_bytes=memory_bytes)) == expected


@pytest.mark.parametrize("memory_bytes", [GRAM, 0])
def test_progress_adds_up_to_n(memory_bytes):
    steps: list[int] = []
    gradient_bins(kernel_of("relu"), 7, memory_bytes=memory_bytes, progress=steps.append)
    assert sum(steps) == 150
    assert min(steps) > 0


THREADS = """
import hashlib
import numpy as np
from adq_wds.core.gradient import GradientKernel, gradient_bins
from adq_wds.core.kernel import unit_rows
rng = np.random.default_rng(5)
h = np.maximum(rng.integers(-40, 60, size=(1300, 96)), 0).astype(np.float16)
b = rng.integers(-9, 10, size=(1300, 10)).astype(np.float16)
kernel = GradientKernel.from_rows(unit_rows(b), rng.integers(0, 30, size=1300).astype(np.float32), unit_rows(h))
print(hashlib.sha256(kernel.matrix().tobytes()).hexdigest())
for memory_bytes in (1 << 30, 0):
    got = gradient_bins(kernel, 10, memory_bytes=memory_bytes)
    print(hashlib.sha256(got.bin.tobytes() + got.pick.tobytes()).hexdigest())
"""


def test_one_and_two_blas_threads_give_the_same_bytes():
    one = printed_with(1, THREADS)
    assert one == printed_with(2, THREADS)
    assert one[1] == one[2]  # matrix and rows on demand


@pytest.mark.parametrize("memory_bytes", [GRAM, 0])
def test_more_samples_than_sums_are_exact_for_are_warned_about(memory_bytes, monkeypatch):
    monkeypatch.setattr(graphcut, "EXACT_ROWS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_bins(kernel_of("relu", n=10), 2, memory_bytes=memory_bytes)
    with pytest.warns(UserWarning, match="11 rows in one GraphCut, exact up to 10") as caught:
        gradient_bins(kernel_of("relu", n=11), 2, memory_bytes=memory_bytes)
    assert caught[0].filename == __file__  # the line that called
