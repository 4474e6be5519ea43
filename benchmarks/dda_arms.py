"""Trains every student of one seed of `benchmarks.dda digits`, and measures the sets they are trained on.

All networks and losses are those of `examples/dda.py`. Each arm trains on the bank and one further set, for as many steps.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.core.rng import generator
from adq_wds.demo.digits import write_digits
from adq_wds.jobs.vary import vary_shards
from adq_wds.models.diffusion import load_sdedit
from adq_wds.tables.plan import Plan
from adq_wds.writing.write_shards import write_shards
from benchmarks.dda_measures import frechet_distance, mean_cosine

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from dda import RECIPE, Encode, Net, agreement_loss, fit, label_loss, load
from train_unet import train_unet

TEST = 539  # held-out real images
COMPARED = 500  # images of a set whose features are compared: the Fréchet distance depends on their number
NOISE = 0.1  # deviation of the noise copies, of images in [0, 1]
CE = ", CE on labels"
BANK, REAL, VARIANTS, NOISY, MORE = "bank alone", "real images", "variants", "noise copies", "more synthesis"
TOP, LOW, RANDOM, ORACLE = "top half by cosine", "dropped half", "random half", "oracle: "
CHOSEN, DRAWN = "variants of ADQ's half of the bank", "variants of a random half of the bank"
PLAIN = (MORE, CHOSEN, DRAWN)  # sets whose students are not trained on labels also
Set = tuple[torch.Tensor, torch.Tensor]
"""(N, 3, 8, 8) images in [0, 1], and (N,) labels."""


@dataclass(frozen=True)
class Budget:
    """How much of everything; `more` rounds take about the time of one UNet and its variants."""

    rounds: int = 10
    more: int = 55
    teacher_steps: int = 1500
    unet_steps: int = 600
    steps: int = 1500
    strength: float = 0.5


def one_seed(seed: int, work: Path, budget: Budget) -> dict[str, Any]:
    """Teacher, bank, variants and students of a seed.

    Args:
        seed: decides on the split and all that follows.
        work: folder; a bank and networks that are there are not made again.
        budget: how much of everything.

    Returns:
        `arms`: accuracy on held-out images and agreement with the teacher on all 1,797, in percent; `sets`: mean cosine
        of pairs, Fréchet distance to held-out real images, mean cosine with the parents and agreement of the
        teacher with their label; `seconds`: CPU seconds of each step.
    """
    seconds: dict[str, float] = {}

    def timed(step: str, make: Callable[[], Any]) -> Any:
        start = time.process_time()
        made = make()
        seconds[step] = round(time.process_time() - start, 1)
        return made

    paths = write_digits(work / "digits")
    images, labels = load([*paths["train"], *paths["test"]])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, real = ((images[rows], labels[rows]) for rows in (order[:TEST], order[TEST:]))
    teacher = timed("teacher", lambda: fit(16, real[0], budget.teacher_steps, seed, label_loss(real[1])))
    encoder = adq.encoder(Encode(teacher), name="teacher", revision=f"seed {seed}")

    options: dict[str, Any] = {"side": 8, "recipe": RECIPE, "seed": seed, "progress": False}
    bank = timed("bank", lambda: adq.synthesize(teacher, work / "bank", rounds=budget.rounds, **options))
    every = budget.rounds + budget.more
    more = timed(MORE, lambda: adq.synthesize(teacher, work / "bank", rounds=every, **options))
    sets = {BANK: load(bank), REAL: real, MORE: load(more[budget.rounds :])}
    sets[NOISY] = _noise_copies(sets[BANK], seed)
    scores: dict[str, dict[str, float]] = {}
    for prefix, shards in (("", bank), (ORACLE, _write(real, work / "real"))):
        unet = work / f"{prefix[:6]}unet"
        timed(
            f"{prefix}UNet",
            lambda: train_unet(shards, unet, side=8, classes=10, steps=budget.unet_steps, seed=seed),
        )
        engine, out = load_sdedit(unet, strength=budget.strength), work / f"{prefix[:6]}variants"
        made: dict[str, Any] = {"overwrite": True, "seed": seed, "batch_size": 200, "progress": False}
        timed(f"{prefix}variants", lambda: vary_shards(bank, engine, encoder, out, **made))
        sets |= _filtered(out, prefix, seed, scores)
    sets |= _of_chosen_parents(bank, encoder, work, seed)

    answers, nets = teacher(images).argmax(1), {"teacher": teacher}
    for name in [name for name in sets if not name.endswith(LOW)]:
        data = sets[name] if name in (BANK, REAL) else _join(sets[BANK], sets[name])
        for ce in (0.0,) if name in PLAIN else (0.0, 1.0):
            arm = name + (CE if ce else "")
            nets[arm] = timed(f"student: {arm}", lambda: _student(teacher, data, budget.steps, seed, ce))
    compared = {
        name: _compared(teacher, data, held_out, seed) | scores.get(name, {}) for name, data in sets.items()
    }
    return {
        "arms": {
            arm: {
                "accuracy": _percent(net(held_out[0]).argmax(1) == held_out[1]),
                "agreement": _percent(net(images).argmax(1) == answers),
            }
            for arm, net in nets.items()
        },
        "sets": compared,
        "seconds": seconds,
    }


# ---- Networks


def _student(teacher: Net, data: Set, steps: int, seed: int, ce: float) -> Net:
    images, labels = data
    agreement, of_labels = agreement_loss(teacher), label_loss(labels)

    def loss(student: Net, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        total = agreement(student, x, rows)
        return total + ce * of_labels(student, x, rows) if ce else total

    return fit(8, images, steps, seed, loss)


# ---- Sets


def _join(*sets: Set) -> Set:
    images, labels = zip(*sets, strict=True)
    return torch.cat(images), torch.cat(labels)


def _noise_copies(data: Set, seed: int) -> Set:
    images, labels = data
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return ((images + NOISE * noise).clamp(0, 1) * 255).round() / 255, labels


def _filtered(out: Path, prefix: str, seed: int, scores: dict[str, dict[str, float]]) -> dict[str, Set]:
    """The variants in a folder: all, both halves by cosine, and a random half; `scores` gets the stored numbers."""
    shards = sorted(map(str, (out / "variant-0").glob("*.tar")))
    top = adq.select_samples(shards, by="json:cos", keep=0.5)
    chosen = {row["key"] for row in top.table().to_pylist() if row["kept"]}
    samples = [(sample["__key__"], json.loads(sample["json"])) for sample in adq.ShardDataset(shards)]
    kept = np.array([key in chosen for key, _ in samples])
    cos, agree = (np.array([float(stored[name]) for _, stored in samples]) for name in ("cos", "agree"))
    some = np.zeros(len(kept), dtype=bool)
    some[generator(seed, 0, "", "", purpose="random half").permutation(len(kept))[: int(kept.sum())]] = True
    whole = load(shards)
    halves = {VARIANTS: np.ones(len(kept), dtype=bool), TOP: kept, LOW: ~kept, RANDOM: some}
    for name, mask in halves.items():
        scores[prefix + name] = {
            "cos": round(float(cos[mask].mean()), 3),
            "agree": round(100 * float(agree[mask].mean()), 1),
        }
    return {prefix + name: (whole[0][mask], whole[1][mask]) for name, mask in halves.items()}


def _of_chosen_parents(bank: list[str], encoder: Any, work: Path, seed: int) -> dict[str, Set]:
    """The variants of half the bank, by ADQ's bins over the teacher's embeddings, and of a random half."""
    features = adq.embed_shards(bank, encoder, out=work / "features", progress=False)
    variants = sorted(map(str, (work / "variants" / "variant-0").glob("*.tar")))
    sets = {}
    for name, bins in ((CHOSEN, 10), (DRAWN, 1)):
        plan = adq.build_plan(features, bins=bins, keep=0.5, seed=seed, progress=False)
        keys = [row["key"] for row in plan.table().to_pylist() if row["kept"]]
        sets[name] = load(variants, Plan.from_keys(variants, keys))
    return sets


def _write(data: Set, folder: Path) -> list[str]:
    """Real images as shards, for the oracle's UNet."""
    pixels = (data[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    samples = (
        {"__key__": f"{i:05d}", "png": _png(image), "cls": b"%d" % label}
        for i, (image, label) in enumerate(zip(pixels, data[1].tolist(), strict=True))
    )
    write_shards(samples, folder / "%06d.tar", overwrite=True, progress=False)
    return sorted(map(str, folder.glob("*.tar")))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# ---- Measures


def _compared(teacher: Net, data: Set, held_out: Set, seed: int) -> dict[str, float]:
    rows = generator(seed, 0, "", "", purpose="compared").permutation(len(data[0]))[:COMPARED]
    features, real = (teacher.features(images).double().numpy() for images in (data[0][rows], held_out[0]))
    return {
        "images": len(data[0]),
        "cosine of pairs": round(mean_cosine(features), 3),
        "Fréchet distance": round(frechet_distance(features, real), 2),
    }


def _percent(right: torch.Tensor) -> float:
    return round(100 * float(right.float().mean()), 2)
