"""Writes variants of images to shards, each with its scores, the job behind `adq vary`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from adq_wds.checks import Count, positive
from adq_wds.errors import SampleError
from adq_wds.files import canonical_json
from adq_wds.pipes.cosine import CosineScore
from adq_wds.pipes.embed import EMBEDDING_FIELD, Embed
from adq_wds.pipes.vary import Vary
from adq_wds.protocols import Encoder, VariantEngine
from adq_wds.samples.fields import IMAGE_FIELDS, Sample, check_absent, image_value, place_error
from adq_wds.samples.label import read_json
from adq_wds.shards.names import expand_urls
from adq_wds.stream.dataset import ShardDataset
from adq_wds.tables.plan import Plan
from adq_wds.writing.report import WriteReport
from adq_wds.writing.tars import ShardPattern
from adq_wds.writing.write_shards import MAX_SAMPLES, refuse_sources, write_shards

_SCORES = ("cos", "agree")


def vary_shards(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    engine: VariantEngine,
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    variants: Count = 1,
    label: str | None = "cls",
    image: str = IMAGE_FIELDS,
    seed: int = 0,
    batch_size: Count = 64,
    max_samples: Count = MAX_SAMPLES,
    overwrite: bool = False,
    progress: bool | None = None,
) -> list[WriteReport]:
    """Write variants of the images of some shards: a set of shards each, ``OUT/variant-0/%06d.tar`` and so on.

    A variant is a ``png`` in its parent's place, under the parent's key. The ``json`` beside it has ``cos``, the cosine
    of both embeddings, and, where the encoder has a head and the label is one of its classes, ``agree``; entries that
    the parent's json had stay. `select_samples` chooses by either. Other fields stay as they are. Nothing is written
    over: a parent with such an entry, or with a field ``png`` beside its image, ``cos``, ``agree`` or ``emb.npy``, is an
    error.

    Args:
        urls: the parents' shards, as `expand_urls` reads them.
        engine: what makes variants, as `Vary` takes it.
        encoder: what embeds parents and variants.
        out: folder for the sets; the variant's number goes on from 0.
        plan: the plan of the parents that are varied; all by default.
        variants: how many sets.
        label: field with the class, a number; "none" for unlabelled data.
        image: field with the image.
        seed: of the noise.
        batch_size: images per call of the engine, at most.
        max_samples: samples in a shard, at most.
        overwrite: replace the shards of an earlier run.
        progress: show a bar; only on a terminal by default.

    Raises:
        ValueError: an argument is out of range, or a new shard would replace one of `urls`.
        SampleError: an image cannot be varied or scored, see `Vary` and `CosineScore`; the parent has a field or entry of
            the names above.
        AdqError: a folder holds an earlier run's shards, or cannot be written.
    """
    paths = expand_urls(urls)
    spec = None if label == "none" else label
    reports = []
    for variant in range(positive("variants", variants)):
        pattern = Path(out) / f"variant-{variant}" / "%06d.tar"
        refuse_sources(paths, ShardPattern(str(pattern)))
        stages = (
            Embed(encoder, image, batch_size=batch_size),
            Vary(engine, spec, seed, variant, batch_size, image=image),
            CosineScore(encoder, image, batch_size=batch_size, label=spec),
        )
        stream: Iterable[Sample] = _parents(ShardDataset(paths, plan=plan, rank=0, world=1), image)
        for stage in stages:
            stream = stage(stream)
        options: Any = {"max_samples": max_samples, "overwrite": overwrite, "progress": progress}
        reports.append(write_shards(_stored(stream, image), pattern, **options))
    return reports


def _parents(stream: Iterable[Sample], image: str) -> Iterator[Sample]:
    """The parents, none of which has a field or entry that a variant's would replace."""
    for sample in stream:
        name, _ = image_value(sample, image)
        check_absent(
            sample, [field for field in (*_SCORES, EMBEDDING_FIELD, "png") if field != name], "adq vary"
        )
        if entries := [f"json:{name}" for name in _SCORES if name in _entries(sample)]:
            check_absent({**sample, entries[0]: None}, entries, "adq vary")
        yield sample


def _stored(stream: Iterable[Sample], image: str) -> Iterator[Sample]:
    """The samples as they are written: the variant as ``png``, its scores in ``json``."""
    for sample in stream:
        name, variant = image_value(sample, image)
        replaced = (name, "json", *_SCORES, EMBEDDING_FIELD)
        others = {field: value for field, value in sample.items() if field not in replaced}
        yield {**others, "png": _png(variant), "json": _with_scores(sample)}


def _with_scores(sample: Sample) -> bytes:
    """The parent's json with the scores among its entries."""
    scores = {name: sample[name] for name in _SCORES if name in sample}
    return canonical_json({**_entries(sample), **scores}).encode("utf-8")


def _entries(sample: Sample) -> dict[str, Any]:
    """The entries of a sample's json, none without one."""
    try:
        entries = read_json(sample.get("json", b"{}"))
        if not isinstance(entries, dict):
            raise ValueError
        canonical_json(entries)
        return entries
    except (ValueError, RecursionError):  # no object, NaN in it, or too deep to be written
        error = SampleError("no JSON object, to which cos could be added")
        raise place_error(error, sample, "json") from None
    except SampleError as error:
        raise place_error(error, sample, "json") from error.__cause__


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
