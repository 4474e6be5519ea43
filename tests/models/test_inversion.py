"""The losses of inversion are those of a plain hand computation, and descending on them makes what was asked for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adq_wds as adq
from adq_wds.models.adversaries import (
    Contrast,
    Seen,
    kl_adversary,
    rotated,
    rotation_adversary,
    rotation_loss,
)
from adq_wds.models.inversion import (
    Generator,
    Recipe,
    augmented,
    batchnorm_loss,
    invert,
    latent_source,
    noisy_source,
    pixel_source,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def net(classes: int = 3, seed: int = 0) -> nn.Sequential:
    """A small classifier with BatchNorm, its statistics not the usual 0 and 1."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, classes),
    )  # fmt: skip
    layers.train()
    for _ in range(4):
        layers(torch.rand(16, 3, 8, 8))
    layers.eval().requires_grad_(False)
    layers[-1].weight.mul_(40)  # surer of itself
    return layers


def seen(n: int = 6, seed: int = 1) -> Seen:
    torch.manual_seed(seed)
    images = torch.rand(n, 3, 8, 8)
    return Seen(images, torch.arange(n) % 3, net()(images), images.flatten(1)[:, :7])


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_batchnorm_loss_is_the_distance_of_both_statistics() -> None:
    network, x = net(), seen().images
    with batchnorm_loss(network) as loss:
        network(x * 0)
        network(x)  # the last pass counts
        value = float(loss())
    expected = 0.0
    for i in (1, 6):
        inputs, layer = network[:i](x).numpy().astype(np.float64), network[i]
        axes = (0, 2, 3) if inputs.ndim == 4 else (0,)
        for of_batch, kept in (
            (inputs.mean(axes), layer.running_mean),
            (inputs.var(axes), layer.running_var),
        ):
            expected += math.sqrt(((of_batch - kept.numpy()) ** 2).sum())
    assert value == pytest.approx(expected, rel=1e-6)
    assert not network[1]._forward_pre_hooks, "hooks are removed"


def test_without_statistics_the_losses_that_remain_are_named() -> None:
    for network in (nn.Linear(3, 2), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))):
        with (
            pytest.raises(ValueError, match="folded into other weights; with bn=0 the cross-entropy remains"),
            batchnorm_loss(network),
        ):
            pass


def test_the_kl_adversary_looks_where_both_agree() -> None:
    shown, student = seen(), net(seed=5)
    t, s = shown.logits.softmax(1).double(), student(shown.images).softmax(1).double()
    each = (t * (t / s).log()).sum(1)
    agree = t.argmax(1) == s.argmax(1)
    assert 0 < int(agree.sum()) < 6
    assert float(kl_adversary(student)(shown)) == pytest.approx(
        -1.33 * float((each * agree).mean()), abs=1e-6
    )
    plain = kl_adversary(student, weight=2.0, masked=False)
    assert float(plain(shown)) == pytest.approx(-2 * float(each.mean()), abs=1e-6)


@pytest.mark.parametrize("bounded", [False, True])
def test_the_rotation_adversary_is_a_joint_class_and_turn(bounded: bool) -> None:
    shown, head = seen(), nn.Linear(192, 12).requires_grad_(False)
    features = nn.Flatten()
    expected = 0.0
    for i in range(6):
        for k in range(4):
            turned = torch.from_numpy(np.rot90(shown.images[i].numpy(), k, (1, 2)).copy())
            logits = head(turned.flatten()[None])[0].double()
            logits = logits / logits.norm() if bounded else logits
            expected -= float(logits.log_softmax(0)[4 * int(shown.labels[i]) + k])
    value = float(rotation_adversary(features, head, bounded=bounded)(shown))
    assert value == pytest.approx(-10 * expected / 24, abs=1e-5)
    assert [len(part) for part in rotated(shown.images, shown.labels)] == [24, 24]


def test_a_trained_head_leaves_the_adversary_less_to_find() -> None:
    shown, head = seen(), nn.Linear(192, 12)
    adversary, descent = rotation_adversary(nn.Flatten(), head), torch.optim.SGD(head.parameters(), 0.01)
    before = float(adversary(shown).detach())
    for _ in range(20):
        descent.zero_grad()
        rotation_loss(nn.Flatten(), head, shown.images, shown.labels).backward()
        descent.step()
    assert before < float(adversary(shown).detach()) < 0


def test_the_contrastive_term_tells_images_of_a_round_apart() -> None:
    shown, term = seen(), Contrast(nn.Flatten(), 192)

    def z(images: torch.Tensor) -> Any:
        rows = images.flatten(1).double() @ term.head.double()
        return rows / rows.norm(dim=1, keepdim=True)

    likeness = (z(shown.images) @ z(shown.images.flip(3)).T / 0.2).exp()
    expected = -(likeness.diagonal() / likeness.sum(1)).log().mean()
    assert float(term(shown)) == pytest.approx(0.8 * float(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["pixels", "generator", "noisy"])
def test_a_round_descends_to_the_wanted_classes(kind: str) -> None:
    teacher, labels, losses = net(), torch.arange(12) % 3, []

    def watch(shown: Seen) -> torch.Tensor:
        losses.append(F.cross_entropy(shown.logits, shown.labels).item())
        assert shown.features.shape == (12, 5)
        assert 0 <= shown.images.min() <= shown.images.max() <= 1
        return torch.zeros(())

    if kind == "noisy":
        source = noisy_source(labels, 3, Generator(8, draws()), draws())
    else:
        source = (pixel_source if kind == "pixels" else latent_source)(12, 8, draws(), CPU)
    recipe = Recipe(60, 0.05 if kind == "pixels" else 4e-3, bn=0.01)
    images = invert(teacher, labels, source, recipe, draws(), terms=[watch])
    assert losses[-1] < 0.75 * losses[0]
    assert images.dtype == torch.uint8
    assert images.shape == (12, 3, 8, 8)
    assert F.cross_entropy(teacher(images / 255), labels).item() < 0.75 * losses[0]


def test_the_images_are_those_of_the_best_step_rounded() -> None:
    teacher, labels = net(), torch.arange(4) % 3
    made: list[tuple[float, torch.Tensor]] = []

    def jump(shown: Seen) -> torch.Tensor:
        step = len(made)
        extra = torch.tensor([5.0, 3.0, -9.0, 4.0][step])
        made.append((float(extra), shown.images.detach().clone()))
        return extra

    images = invert(teacher, labels, pixel_source(4, 8, draws(), CPU), Recipe(4, 0.05), draws(), terms=[jump])
    assert (images == (made[2][1] * 255).round()).all()


def test_shifts_and_mirrorings_are_drawn() -> None:
    images = seen().images
    assert augmented(images, Recipe(1, 1.0), draws()) is images
    recipe = Recipe(1, 1.0, shift=1, flip=True)
    views = [augmented(images, recipe, draws(i)) for i in range(40)]
    assert {view.shape for view in views} == {images.shape}
    assert len({view.numpy().tobytes() for view in views}) > 8
    assert (augmented(images, recipe, draws(3)) == views[3]).all()


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    def fail(shown: Seen) -> torch.Tensor:
        return torch.tensor(float("nan"))

    source = pixel_source(3, 8, draws(), CPU)
    with pytest.raises(adq.AdqError, match=r"step 0: the loss is nan; lower the rate \(0.1\)"):
        invert(net(), torch.arange(3), source, Recipe(2, 0.1), draws(), terms=[fail])


@pytest.mark.parametrize("side", [2, 6, 10])
def test_a_generator_refuses_a_side_it_cannot_make(side: int) -> None:
    with pytest.raises(ValueError, match=f"makes no images of {side} x {side}; use pixels"):
        Generator(side, draws())


def test_a_generator_is_drawn_from_its_own_numbers() -> None:
    torch.manual_seed(1)
    first = Generator(8, draws(4)).state_dict()
    torch.manual_seed(2)
    again = Generator(8, draws(4)).state_dict()
    assert all((first[name] == again[name]).all() for name in first)
    assert float(first["linear.weight"].std()) == pytest.approx(0.02, rel=0.05)
