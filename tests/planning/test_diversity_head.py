"""A head learns to tell images apart, is the same on one machine however it is called, and takes any input."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from adq_wds.core.scores import diversity_of_views
from adq_wds.planning import diversity_head as heads
from adq_wds.planning.diversity_head import contrastive, head_diversity, info_nce, new_head, project

Rows = np.ndarray[Any, Any]


def views(n: int, width: int = 12, *, seed: int = 0, noise: float = 0.5) -> Rows:
    """Two noisy views of n images, unit rows."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 1, width)) + noise * rng.normal(size=(n, 2, width))
    return (z / np.linalg.norm(z, axis=2, keepdims=True)).astype(np.float16)


def weights(head: torch.nn.Module) -> list[Rows]:
    return [parameter.detach().numpy() for parameter in head.parameters()]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def loss_by_hand(rows: Rows) -> float:
    """NT-Xent, row by row: −log of the other view's share among all other rows."""
    flat = [(i, row / np.linalg.norm(row)) for i, both in enumerate(rows) for row in both]
    total = 0.0
    for a, (i, row) in enumerate(flat):
        share = {b: math.exp(float(row @ other) / 0.07) for b, (_, other) in enumerate(flat) if b != a}
        (partner,) = [b for b in share if flat[b][0] == i]
        total -= math.log(share[partner] / sum(share.values()))
    return total / len(flat)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_the_loss_is_that_of_the_definition(images: int) -> None:
    rows = np.random.default_rng(images).normal(size=(images, 2, 5))
    found = float(info_nce(torch.tensor(rows, dtype=torch.float32)))
    assert found == pytest.approx(loss_by_hand(rows), rel=1e-4, abs=1e-6)


def test_training_is_adam_on_the_loss() -> None:
    """By hand in float64, three steps on all images at once: the order plays no part then."""
    z = views(60)
    params = [
        torch.tensor(w, dtype=torch.float64, requires_grad=True)
        for w in weights(new_head(z.shape[2], seed=3))
    ]
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    for step in (1, 2, 3):
        w1, b1, w2, b2 = params
        loss = info_nce(torch.relu(torch.tensor(z).double() @ w1.T + b1) @ w2.T + b2)
        for p, m, v, g in zip(params, first, second, torch.autograd.grad(loss, params), strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= 1e-3 * (m / (1 - 0.9**step)) / (torch.sqrt(v / (1 - 0.999**step)) + 1e-8)
    for found, expected in zip(weights(contrastive(z, seed=3, epochs=3)), params, strict=True):
        apart = np.abs(found - expected.detach().numpy())
        assert np.quantile(apart, 0.99) < 1e-5  # where a gradient is nearly 0, float32 may turn its sign


def test_training_lowers_the_loss_on_images_never_seen() -> None:
    """Half of the numbers tell images apart, the other half are noise twice as strong."""
    z = views(500, 16, noise=0.1)
    z[..., 8:] = 2 * np.random.default_rng(1).normal(size=(500, 2, 8)) / 4
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    train, test = z[:300], z[300:]

    def loss(head: torch.nn.Sequential) -> float:
        return float(info_nce(torch.tensor(project(head, test))))

    assert loss(contrastive(train, seed=3, epochs=40)) < loss(new_head(train.shape[2], seed=3)) - 0.5


def test_no_epochs_or_one_image_leave_the_head_untrained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    z = views(40)
    assert same(contrastive(z, seed=5, epochs=0), new_head(z.shape[2], seed=5))
    pairs = zip(weights(contrastive(z, seed=5, epochs=1)), weights(new_head(z.shape[2], seed=5)), strict=True)
    assert all((a != b).any() for a, b in pairs)
    assert not caplog.records
    assert same(contrastive(views(1), seed=2), new_head(12, seed=2))
    assert "views of 1 images: no two to tell apart" in caplog.text


def test_equal_seeds_give_equal_heads_for_any_threads() -> None:
    z = views(700, 32)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inside: list[int] = []
        made.append(
            contrastive(z, seed=1, epochs=2, progress=lambda _, to=inside: to.append(torch.get_num_threads()))
        )
        assert (inside, torch.get_num_threads()) == ([1, 1], threads)
    torch.set_num_threads(before)
    assert same(made[0], made[1])
    assert same(made[0], made[2])
    assert not same(made[0], contrastive(z, seed=2, epochs=2))
    assert not same(new_head(z.shape[2], seed=1), new_head(z.shape[2], seed=2))


def test_the_callers_random_state_and_modes_are_left_alone() -> None:
    z = views(30)
    expected = contrastive(z, epochs=2)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            found = contrastive(z, epochs=2)
            rows = project(found, z)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(found, expected)
    assert found[0].weight.dtype == torch.float32
    assert np.array_equal(rows, project(expected, z))


def test_projections_are_the_heads_and_of_length_one() -> None:
    z = views(1300, 8)  # more than two batches
    head = new_head(z.shape[2], seed=4)
    w1, b1, w2, b2 = (values.astype(np.float64) for values in weights(head))
    plain = np.maximum(z.astype(np.float64) @ w1.T + b1, 0) @ w2.T + b2
    plain /= np.linalg.norm(plain, axis=2, keepdims=True)
    found = project(head, z)
    assert found.dtype == np.float64
    assert np.abs(found - plain).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=2) - 1).max() < 1e-12
    for parameter in head.parameters():
        parameter.zero_()
    assert not project(head, z).any()


def test_head_diversity_is_the_mean_and_spread_over_three_seeds() -> None:
    z, bin = views(90), np.arange(90) % 4 - 1
    each = [diversity_of_views(project(contrastive(z, seed=seed, epochs=2), z), bin, 3) for seed in (5, 6, 7)]
    value, spread = head_diversity(z, bin, 3, seed=5, epochs=2)
    assert value == pytest.approx(sum(each) / 3, rel=1e-12)
    squares = sum((one - value) ** 2 for one in each)
    assert spread == pytest.approx(np.sqrt(squares / 2), rel=1e-9)
    assert (spread > 0).all()


EDGES = {
    "no image": np.zeros((0, 2, 6), np.float16),
    "one image": views(1, 6),
    "two images": views(2, 6),
    "a batch and one": views(513, 6),
    "constant": np.broadcast_to(views(1, 6)[0, 0], (30, 2, 6)).copy(),
    "zero": np.zeros((30, 2, 6), np.float16),
    "width one": np.ones((9, 2, 1), np.float16),
    "denormal": np.full((9, 2, 3), 6e-8, np.float16),
}


@pytest.mark.parametrize("edge", EDGES)
def test_every_input_gives_finite_values_again_and_again(edge: str) -> None:
    z = EDGES[edge]
    bin, size = np.zeros(len(z), np.int16), np.array([max(1, len(z)), 0])
    found = [head_diversity(z, bin, 2, size=size, epochs=2) for _ in range(2)]
    assert np.array_equal(found[0], found[1], equal_nan=True)
    value, spread = found[0]
    assert 0.9 < value[0] < 100
    assert 0 <= spread[0] < 100
    assert np.isnan([value[1], spread[1]]).all()


@pytest.mark.parametrize("n", [20, 1])
def test_progress_adds_up_to_three_trainings(n: int) -> None:
    told: list[int] = []
    head_diversity(views(n), np.zeros(n, np.int16), 1, epochs=4, progress=told.append)
    assert sum(told) == 3 * 4 == heads.N_SEEDS * 4
