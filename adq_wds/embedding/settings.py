"""Checks the arguments of `embed_shards` before any sample is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from adq_wds.checks import listed, positive
from adq_wds.embedding.source import Source, StoredEmbeddings
from adq_wds.embedding.stored import open_embeddings
from adq_wds.engines.threads import cores
from adq_wds.errors import FeaturesError, shorten
from adq_wds.pipes.base import OnError, check_on_error
from adq_wds.protocols import Encoder
from adq_wds.registry import encoder as named_encoder
from adq_wds.registry import score as named_score
from adq_wds.remote.open_shard import open_shard
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.samples.fields import IMAGE_FIELDS, WHOLE_FIELDS, FieldSpec, check_spec
from adq_wds.score import Score
from adq_wds.shards.names import expand_urls, plain_shard_names
from adq_wds.shards.samples_in_tar import iter_spans
from adq_wds.tables.column import Column
from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import LOGIT_GRAD, FeaturesFile
from adq_wds.tables.headers import EmbeddedBy

logger = logging.getLogger("adq_wds")

_MAX_NAME_BYTES = 255  # of a file, on the usual file systems


@dataclass(frozen=True)
class EmbedSettings:
    """The options of `embed_shards`, as its signature names them; made by `settings_of`."""

    image: FieldSpec | None  # None where images are not read
    label: FieldSpec | None
    embeddings: str | os.PathLike[str] | None
    batch_size: int
    workers: int
    on_error: OnError
    max_bad_fraction: float
    limit: int | None
    scores: tuple[Score, ...]
    logit_grad: bool
    views: int

    def __post_init__(self) -> None:
        check_on_error(self.on_error, self.max_bad_fraction)
        if self.embeddings is None and self.image is None:
            raise ValueError(
                "image=None (--image none) needs embeddings made elsewhere, embeddings= (--embeddings): an encoder "
                "looks at images"
            )
        if self.embeddings is not None and self.views:
            raise ValueError(
                "views need an encoder, and embeddings made elsewhere have none: leave one of them out"
            )
        if self.image is not None:
            check_spec(self.image, "image")
        check_spec(self.label, "label")
        names = [score.name for score in self.scores]
        if len(set(names)) != len(names):
            raise ValueError(f"scores must each be named once, got {names}")
        if self.logit_grad and self.label in (None, "none"):
            raise ValueError("logit gradients need labels: logit_grad=True and label=None exclude each other")
        for score in self.scores:
            if isinstance(score, Column):
                raise ValueError(
                    f"{score} holds numbers that are there already; give it to the plan, not here"
                )
            if self.image is None and score.needs_image:
                raise ValueError(f"score {score.name!r} looks at images, and image=None leaves them out")

    def header(self, source: Source, first: int) -> dict[str, Any]:
        """The entries that must agree for a file to be reused; `first` is its first sample's position in the set."""
        by_position = isinstance(source, StoredEmbeddings) and source.by_position
        return {
            **({"first_row": first} if by_position else {}),
            **encoder_header(source, self.image),
            "label": _spec_name(self.label),
            **({"logit_grad": LOGIT_GRAD} if self.logit_grad else {}),
            **({"scores": {score.name: score.revision for score in self.scores}} if self.scores else {}),
        }


def settings_of(
    *, image: Any, workers: Any, limit: Any, batch_size: Any, scores: Any, views: Any, **others: Any
) -> EmbedSettings:
    """The keyword arguments of `embed_shards` but `progress`, checked."""
    return EmbedSettings(
        image=None if image == "none" else image,
        batch_size=positive("batch_size", batch_size),
        workers=positive("workers", cores() if workers is None else workers),
        limit=None if limit is None else positive("limit", limit),
        scores=tuple(map(named_score, listed("scores", scores))),
        views=positive("views", views) if views else 0,
        **others,
    )


def encoder_header(source: Source, image: FieldSpec | None) -> EmbeddedBy:
    """The header's entries on encoder and field."""
    return {
        "encoder": source.name,
        "revision": source.revision,
        "preprocessing_hash": getattr(source, "preprocessing_hash", ""),
        "image": _spec_name(image),
    }


def _spec_name(spec: FieldSpec | None) -> str:
    if callable(spec):
        return f"function:{spec.__module__}.{getattr(spec, '__qualname__', type(spec).__qualname__)}"
    if spec == IMAGE_FIELDS:  # under its first name: features from before it had stored patches too stay good
        return WHOLE_FIELDS
    return "none" if spec is None else spec


@dataclass(frozen=True)
class Request:
    """The shards to embed, with their names, and the encoder."""

    paths: list[str]
    names: list[str]
    source: Source
    settings: EmbedSettings


def check_request(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: str | Encoder,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Request:
    """The arguments of `embed_shards`, checked; no folder is made.

    With stored embeddings and the default image, the first shard's features in `out` decide whether there are images,
    or without these the first shard that holds samples.
    """
    settings = settings_of(**options)
    paths = expand_urls(urls)
    names = names_of_features(paths)
    if settings.embeddings is None:
        return Request(paths, names, named_encoder(encoder), settings)
    source = open_embeddings(settings.embeddings)
    asks_images = settings.image != IMAGE_FIELDS or any(score.needs_image for score in settings.scores)
    made = None if out is None else as_path(out) / file_name(names[0])
    if not asks_images and not _has_images(paths, names, made):
        settings = replace(settings, image=None)
    return Request(paths, names, source, settings)


def _has_images(paths: Sequence[str], shards: Sequence[str], made: AnyPath | None) -> bool:
    """Whether `made` features used images; without features, whether the first shard that holds samples has images."""
    if made is not None and made.exists():
        with suppress(FeaturesError):
            return bool(FeaturesFile(made).header["image"] != "none")
    fields = set(IMAGE_FIELDS.split(";"))
    for path, shard in zip(paths, shards, strict=True):
        n_samples = 0
        with open_shard(path) as buffer:
            for span in iter_spans(buffer, shard=shard):
                n_samples += 1
                if not fields.isdisjoint(member.field for member in span.members):
                    return True
        if n_samples:
            logger.info(
                "shard %s has no image field: samples are taken without images, and have no texture", shard
            )
            return False
    return True


def names_of_features(paths: list[str]) -> list[str]:
    """The shards' names, none too long for a file of features, and no two for the same (`a/b.tar` and `a--b.tar`)."""
    names = plain_shard_names(paths)
    shard_of: dict[str, str] = {}
    for name in names:
        file = file_name(name)
        other = shard_of.setdefault(file, name)
        if other != name:
            raise ValueError(f"shards {other!r} and {name!r} would both be {file}; rename one")
        if len(os.fsencode(file)) > _MAX_NAME_BYTES:
            raise ValueError(
                f"shard {shorten(name)}: its features would be a file whose name is too long; rename it"
            )
    return names
