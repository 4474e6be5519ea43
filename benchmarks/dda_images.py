"""Distils a student without data on any shards: a teacher is trained, then rounds of synthesis and distillation take turns.

The bank grows by rounds of kind "noisy" (`synthesize`), whose adversary looks for images on which teacher and student
differ; after each the student learns the teacher's answers on all of it. Real images train the teacher and are the test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.models.adversaries import Seen, kl_adversary
from adq_wds.models.inversion import RECIPES, Recipe
from benchmarks.dda_nets import Trainer, accuracy, build, distillation_loss, label_loss
from benchmarks.training import Images, read_images

_TIMED_STEPS = 3


@dataclass(frozen=True)
class Schedule:
    """The budget, by default that of NAYER (Tran et al. 2024, arXiv 2310.00258).

    Attributes:
        teacher, student: names in `benchmarks.dda_nets.NETS`.
        teacher_steps: of 128 real images.
        epochs: of the student.
        warmup: first epochs, which only synthesize, without the adversary.
        warmup_rounds, rounds: of synthesis in each of these, and in each later epoch.
        images: of a round.
        inversion_steps: of a round.
        steps, batch: of distillation in each later epoch.
        seed: of everything.
    """

    teacher: str = "wrn40-2"
    student: str = "wrn16-1"
    teacher_steps: int = 78_000
    epochs: int = 400
    warmup: int = 20
    warmup_rounds: int = 10
    rounds: int = 2
    images: int = 400
    inversion_steps: int = 40
    steps: int = 400
    batch: int = 512
    seed: int = 0

    def rounds_until(self, epoch: int) -> int:
        """Rounds that the bank has after so many epochs.

        >>> Schedule(warmup=2, warmup_rounds=10, rounds=3).rounds_until(4)
        26
        """
        return self.warmup_rounds * min(epoch, self.warmup) + self.rounds * max(0, epoch - self.warmup)


def distil(train: Images, test: Images, work: Path, plan: Schedule) -> dict[str, Any]:
    """Train teacher and student; killed and started again, it goes on from the last epoch of either.

    Args:
        train: real images, for the teacher alone, on the device where all runs.
        test: real images, to judge by.
        work: folder of teacher, bank and states.
        plan: the budget.

    Returns:
        accuracies on `test` in percent: the teacher's, the student's at its last epoch and at its best one (chosen by
        the test set, as papers do), and all of its epochs; `seconds` of this process.
    """
    device, n_classes, side = train.pixels.device, train.n_classes, train.pixels.shape[-1]
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    teacher = _teacher(train, work / "teacher.pt", plan)
    student = build(plan.student, n_classes, plan.seed + 1).to(device)
    n_steps = plan.steps * (plan.epochs - plan.warmup)
    options: dict[str, Any] = {"rate": 0.2, "weight_decay": 1e-4, "n_steps": n_steps, "batch": plan.batch}
    trainer = Trainer(student, distillation_loss(teacher), seed=plan.seed, **options)
    curve, first, path = [], 0, work / "student.pt"
    if (saved := _load(path, device, plan)) is not None:
        trainer.load(saved["trainer"])
        curve, first = saved["curve"], saved["epoch"]
    adversary = kl_adversary(student.eval())
    epoch = first

    def after_warmup(seen: Seen) -> torch.Tensor:
        return adversary(seen) if epoch >= plan.warmup else torch.zeros((), device=device)

    bank: list[Images] = []
    n_read = 0
    for epoch in range(first, plan.epochs):
        shards = adq.synthesize(
            teacher, work / "bank", side=side, kind="noisy", rounds=plan.rounds_until(epoch + 1), images=plan.images,
            recipe=_recipe(plan), terms=[after_warmup], seed=plan.seed, progress=False,
        )  # fmt: skip
        if epoch >= plan.warmup:
            bank.append(read_images([Path(shard) for shard in shards[n_read:]], device))
            n_read = len(shards)
            pixels, labels = (
                torch.cat([part.pixels for part in bank]),
                torch.cat([part.label for part in bank]),
            )
            bank = [Images(pixels, labels, {})]
            trainer.train(pixels, labels, plan.steps)
            curve.append(accuracy(student, test.pixels, test.label))
            print(
                f"epoch {epoch + 1} of {plan.epochs}: {len(labels)} images, student {curve[-1]:.2f} %",
                flush=True,
            )
        _save(path, plan, trainer=trainer.state(), curve=curve, epoch=epoch + 1)
    return {
        "schedule": asdict(plan),
        "teacher": accuracy(teacher, test.pixels, test.label),
        "student": {"last": curve[-1], "best": max(curve), "curve": curve},
        "seconds": round(time.monotonic() - start),
    }


def hours(train: Images, plan: Schedule) -> dict[str, float]:
    """What the whole budget takes on this device, from a few steps of each kind, in hours."""
    device, side, seconds = train.pixels.device, train.pixels.shape[-1], {}
    nets = [build(name, train.n_classes, 0).to(device) for name in (plan.teacher, plan.student)]
    labels = torch.arange(plan.images, device=device) % train.n_classes
    pixels = torch.rand(plan.images, 3, side, side, device=device).requires_grad_()

    def inversion() -> None:
        nn.functional.cross_entropy(nets[0](pixels), labels).backward()  # type: ignore[no-untyped-call]

    options: dict[str, Any] = {"rate": 0.0, "weight_decay": 0.0, "n_steps": 1_000, "seed": 0}
    taught = Trainer(nets[0], label_loss, batch=128, **options)
    learnt = Trainer(nets[1], distillation_loss(nets[0]), batch=plan.batch, **options)
    n_rounds, n_steps = plan.rounds_until(plan.epochs), plan.steps * (plan.epochs - plan.warmup)
    work: dict[str, tuple[int, Callable[[], None]]] = {
        "teacher": (plan.teacher_steps, lambda: taught.train(train.pixels, train.label, 1)),
        "synthesis": (n_rounds * plan.inversion_steps, inversion),
        "distillation": (n_steps, lambda: learnt.train(train.pixels, train.label, 1)),
    }
    for name, (times, step) in work.items():
        step()  # warms up
        _wait(device)
        start = time.monotonic()
        for _ in range(_TIMED_STEPS):
            step()
        _wait(device)
        seconds[name] = times * (time.monotonic() - start) / _TIMED_STEPS
    return {name: value / 3600 for name, value in seconds.items()}


def _recipe(plan: Schedule) -> Recipe:
    return Recipe(**{**asdict(RECIPES["noisy"]), "steps": plan.inversion_steps, "flip": True})


def _teacher(train: Images, path: Path, plan: Schedule) -> nn.Module:
    """The teacher, trained on real images; saved a hundred times on the way."""
    device = train.pixels.device
    net = build(plan.teacher, train.n_classes, plan.seed).to(device)
    options: dict[str, Any] = {"rate": 0.1, "weight_decay": 5e-4, "n_steps": plan.teacher_steps, "batch": 128}
    trainer = Trainer(net, label_loss, seed=plan.seed, **options)
    if (saved := _load(path, device, plan)) is not None:
        trainer.load(saved["trainer"])
    part = max(1, plan.teacher_steps // 100)
    while (left := plan.teacher_steps - trainer.schedule.last_epoch) > 0:
        trainer.train(train.pixels, train.label, min(part, left))
        _save(path, plan, trainer=trainer.state())
    return net.eval()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _save(path: Path, plan: Schedule, **parts: Any) -> None:
    torch.save({"schedule": asdict(plan), **parts}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _load(path: Path, device: torch.device, plan: Schedule) -> dict[str, Any] | None:
    if not path.exists():
        return None
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if saved["schedule"] != asdict(plan):
        raise AdqError(f"{path} was made with {saved['schedule']}, now {asdict(plan)}; give another --work")
    return saved
