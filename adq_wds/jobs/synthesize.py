"""Makes a bank of images from a classifier alone: ordinary tar shards, one a round."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from adq_wds.checks import Count, integer, no_bar, positive
from adq_wds.core.rng import check_seed, draw
from adq_wds.errors import AdqError, shorten
from adq_wds.files import atomic_path, canonical_json, make_folder, write_text
from adq_wds.models.adversaries import Term
from adq_wds.models.inversion import (
    RECIPES,
    Generator,
    Kind,
    Recipe,
    batchnorm_loss,
    invert,
    latent_source,
    noisy_source,
    pixel_source,
)
from adq_wds.remote.url_path import AnyPath
from adq_wds.writing.tars import ShardPattern, WrittenShard, write_tars
from adq_wds.writing.write_shards import describe_shards

PATTERN, BANK, KEPT = "round-%06d.tar", "bank.json", "generator.safetensors"
NEW_GENERATOR = 20  # rounds after which a "noisy" generator is made anew


def synthesize(
    teacher: nn.Module,
    out: str | os.PathLike[str],
    *,
    side: Count,
    kind: Kind = "pixels",
    rounds: Count = 10,
    images: Count = 200,
    recipe: Recipe | None = None,
    classes: Sequence[str] | None = None,
    terms: Sequence[Term] = (),
    seed: int = 0,
    rank: int = 0,
    world: Count = 1,
    progress: bool | None = None,
) -> list[str]:
    """Make a bank: ``OUT/round-%06d.tar`` with ``png`` and ``cls``, complete or absent, which anything reads.

    Rounds that are there are not made again, so a killed job goes on, and a bank grows with `rounds`. Without `terms`,
    and with another kind than "noisy", a round depends on teacher, settings, seed and its number alone: processes may
    share them by `rank` and `world`. ``bank.json`` holds the teacher's hash and the settings; ``index.parquet`` and
    ``_info.json`` come when all rounds are there; ``_info.json`` goes when a bank begins to grow.

    Args:
        teacher: a classifier; takes (B, 3, side, side) in [0, 1] (its normalisation inside), gives (B, C) logits. On the
            device where it is to run. Rounds run it frozen and in evaluation mode; at the end it is as it was.
        out: folder of the bank.
        side: height and width of the images.
        kind: "pixels", "generator" or "noisy"; see `RECIPES`.
        rounds: how many there shall be.
        images: of a round; classes take turns.
        recipe: steps, rate and weights; those of the kind in `RECIPES` by default.
        classes: names of the teacher's classes, for ``_info.json``.
        terms: further losses, such as `kl_adversary(student)`. The bank then depends on what they see.
        seed: of all draws.
        rank, world: this process makes the rounds whose number is `rank` modulo `world`.
        progress: show a bar; only on a terminal by default.

    Returns:
        the rounds that are there, as paths of their shards: fewer than `rounds` while other processes' are missing.

    Raises:
        ValueError: an argument is out of range; the teacher gives other classes than `classes`, or has no BatchNorm
            (with ``recipe.bn`` 0 the other losses remain); a generator for a side that it cannot make.
        AdqError: the folder holds a bank of another teacher or other settings; a loss is not finite (round, step).

    Source: the loops of CSD (arXiv 2307.04542) and NAYER (arXiv 2310.00258); keyed rounds are ours.
    """
    if kind not in RECIPES:
        raise ValueError(f"kind must be one of {', '.join(RECIPES)}, got {shorten(kind)}")
    recipe = RECIPES[kind] if recipe is None else recipe
    integer("rank", rank, least=0, most=positive("world", world) - 1)
    if kind == "noisy" and world > 1:
        raise ValueError(
            "rounds of kind 'noisy' hand a generator on, so one process makes them; give world=1"
        )
    with _frozen(teacher):
        n, rounds = positive("images", images), positive("rounds", rounds)
        n_classes = _n_classes(teacher, positive("side", side), classes)
        _check_losses(teacher, kind, side, recipe)
        folder = make_folder(out)
        settings = {"kind": kind, "side": side, "images": n, "seed": check_seed(seed), "n_classes": n_classes}
        named = [getattr(term, "__qualname__", type(term).__qualname__) for term in terms]
        _settle(folder, {"teacher": hash_of(teacher), **settings, **asdict(recipe), "terms": named})
        pattern = ShardPattern(str(folder / PATTERN))
        kept, start = _load_kept(folder, side) if kind == "noisy" else (None, 0)
        device = next(teacher.parameters()).device
        missing = [r for r in range(start, rounds) if r % world == rank]
        if kind != "noisy":
            missing = [r for r in missing if not pattern.path(r).exists()]
        if missing:  # until `_finish` the set is not complete
            (folder / "_info.json").unlink(missing_ok=True)
        for r in tqdm(missing, desc="rounds", disable=no_bar(progress)):
            draws = torch.Generator().manual_seed(draw(seed, r, "", kind, purpose="synthesize") >> 1)
            labels = ((torch.arange(n) + r * n) % n_classes).to(device)
            if kind == "noisy":
                kept = (Generator(side, draws) if kept is None or r % NEW_GENERATOR == 0 else kept).to(device)
                source = noisy_source(labels, n_classes, kept, draws)
            else:
                source = (pixel_source if kind == "pixels" else latent_source)(n, side, draws, device)
            try:
                made = invert(teacher, labels, source, recipe, draws, terms=terms)
            except AdqError as error:
                raise AdqError(f"round {r}, {error}") from None
            _write_round(made, labels.tolist(), r, pattern)
            if kept is not None:
                _save_kept(folder, kept, r)
        return _finish(folder, [pattern.path(r) for r in range(rounds)], n, classes)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode and without gradients; afterwards each part is as it was."""
    training = [(module, module.training) for module in network.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def hash_of(network: nn.Module) -> str:
    """SHA-256 of a network's weights and statistics: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _n_classes(teacher: nn.Module, side: int, classes: Sequence[str] | None) -> int:
    with torch.inference_mode():
        shape = tuple(teacher(torch.zeros(2, 3, side, side, device=next(teacher.parameters()).device)).shape)
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"the teacher gives {shape} for 2 images, expected logits (2, C)")
    if classes is not None and len(classes) != shape[1]:
        raise ValueError(f"the teacher tells {shape[1]} classes apart, and classes= names {len(classes)}")
    return int(shape[1])


def _check_losses(teacher: nn.Module, kind: Kind, side: int, recipe: Recipe) -> None:
    """Raise `ValueError` before anything is written, where a round would."""
    if kind != "pixels":
        Generator(side, torch.Generator())
    if recipe.bn:
        with batchnorm_loss(teacher):
            pass


def _settle(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new bank, or compare them with those of the bank that is there."""
    path = folder / BANK
    settings = json.loads(canonical_json({"format": "adq_wds.bank", "version": 1, **settings}))
    if not path.exists():
        write_text(path, canonical_json(settings) + "\n")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in settings if old.get(name) != settings[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise AdqError(
            f"{path}: damaged: {shorten(str(error))}; make the bank anew in another folder"
        ) from None
    if differ:
        name = differ[0]
        raise AdqError(
            f"{folder} holds a bank of another {name}, {shorten(old.get(name))}, not {shorten(settings[name])}; give "
            "another folder"
        )


def _write_round(images: torch.Tensor, labels: list[int], r: int, pattern: ShardPattern) -> None:
    """One tar of (B, 3, S, S) uint8 images."""
    samples = []
    for i, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        samples.append({"__key__": f"r{r:06d}-{i:05d}", "png": png.getvalue(), "cls": b"%d" % label})
    list(write_tars(samples, pattern, max_samples=len(samples), max_bytes=1 << 60, first=r))


def _save_kept(folder: Path, generator: Generator, r: int) -> None:
    """Save the generator behind its round: a job that is killed between both makes that round again."""
    with atomic_path(folder / KEPT) as partial:
        state = {name: value.cpu().contiguous() for name, value in generator.state_dict().items()}
        safetensors.torch.save_file(state, partial, {"round": str(r)})


def _load_kept(folder: Path, side: int) -> tuple[Generator | None, int]:
    """The generator that the last round left, and the round to go on with."""
    path = folder / KEPT
    if not path.exists():
        return None, 0
    try:
        with safetensors.safe_open(path, "pt") as file:
            r = int(file.metadata()["round"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        generator = Generator(side, torch.Generator())
        generator.load_state_dict(state)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise AdqError(
            f"{path}: damaged: {shorten(str(error))}; make the bank anew in another folder"
        ) from error
    return generator, r + 1


def _finish(folder: Path, paths: Sequence[AnyPath], n: int, classes: Sequence[str] | None) -> list[str]:
    """The rounds that are there; when all are, described as a set of shards."""
    there = [path for path in paths if path.exists()]
    if len(there) == len(paths) and not (folder / "_info.json").exists():
        describe_shards(folder, [WrittenShard(path, n, 0) for path in paths], None, "train", classes)
    return list(map(str, there))
