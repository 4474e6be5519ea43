"""Makes the views of a set: reads a keyed sample of its images, crops each twice, and embeds the crops."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import no_bar, positive
from adq_wds.core.rng import check_seed
from adq_wds.core.views import DEFINITION
from adq_wds.embedding.settings import encoder_header
from adq_wds.embedding.views_batch import ViewJob, embed_view_batch
from adq_wds.engines.threads import cores, in_order
from adq_wds.errors import FeaturesError, shorten
from adq_wds.files import lock, make_folder
from adq_wds.protocols import Encoder
from adq_wds.registry import encoder as named_encoder
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, WHOLE_FIELDS, FieldSpec, check_spec
from adq_wds.shards.names import expand_urls, shard_names
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.headers import first_unlike
from adq_wds.tables.spans import Spans
from adq_wds.tables.views import ShardViews, Views, ViewsSource, choose_rows, views_folder

logger = logging.getLogger("adq_wds")

N_VIEWS = 20_000


def embed_views(
    features: Features,
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: str | Encoder,
    *,
    views: int = N_VIEWS,
    seed: int = 0,
    image: FieldSpec | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool | None = None,
) -> Views:
    """Embed two augmented views of some samples, into the folder ``views`` of the features: one file per shard.

    The samples are those with the smallest draws keyed by seed, shard and key, so a larger number contains a smaller
    one; only they are read. Shards with a file of these views are skipped, so a killed job resumes, and loses at most
    the shards in progress (one per worker). Locks ``views`` and nothing else: a caller may hold the folder of the
    features.

    Args:
        features: of the samples; with a `limit`, its samples alone are chosen from.
        urls: the shards that were embedded, as they were given to `embed_shards`.
        encoder: the one that embedded them.
        views: how many samples; all when there are fewer.
        seed: of the choice, of crops and flips.
        image: field with the image, as for the features; needed only where it was a function.
        batch_size: images per call of the encoder; batches are cut inside a shard.
        workers: threads; results do not depend on their number. As many as cores by default.
        progress: show a bar; only on a terminal by default.

    Returns:
        the views of all shards of the features.

    Raises:
        ValueError: an argument is out of range, or nothing matches `urls`.
        FeaturesError: the features are of another encoder or of stored embeddings, or `urls` are other shards.
        ShardError: a shard changed since it was embedded.
        SampleError: a sample's view cannot be embedded, with shard and key.
        AdqError: the folder cannot be written, or another job works in it.
    """
    positive("views", views)
    positive("batch_size", batch_size)
    n_workers = positive("workers", cores() if workers is None else workers)
    seed = check_seed(seed)
    _refuse_stored(features)
    source = named_encoder(encoder)
    spec = _image_spec(features, image)
    header = _checked_header(features, source, spec, seed)
    paths = _paths(features, urls)
    chosen = choose_rows(features, views, seed=seed)
    starts = np.cumsum([0, *(file.n for file in features)])
    chosen_of = [
        rows - start
        for rows, start in zip(np.split(chosen, np.searchsorted(chosen, starts[1:-1])), starts, strict=False)
    ]
    folder = make_folder(views_folder(features))

    def work(job: ViewJob, rows: range) -> NDArray[np.float16]:
        return embed_view_batch(job, rows, source, spec, seed=seed, width=features.width)

    with (
        lock(folder),
        tqdm(total=len(chosen), unit=" samples", desc="views", disable=no_bar(progress)) as bar,
    ):
        jobs = _jobs_to_do(features, paths, chosen_of, header, bar.update)
        batches = in_order(
            jobs, lambda job: len(job.spans), work, batch_size=batch_size, workers=n_workers, name="adq-views"
        )
        with closing(batches):
            for job, _, z, is_last in batches:
                job.parts.append(z)
                bar.update(len(z))
                if is_last:
                    z, spans = np.concatenate(job.parts), job.spans
                    made = ShardViews(job.name, spans.index, spans.keys, spans.crc32, z, header)
                    made.save(folder / file_name(job.name))
                    job.close.close()
    return Views.of(features)


def _refuse_stored(features: Features) -> None:
    name = str(features.header["encoder"])
    if name.startswith(("stored:", "field:")):
        raise FeaturesError(
            f"{features.folder}: made from the stored embeddings {shorten(name)}, and there is no encoder to embed "
            "views with: embed the shards with an encoder, or choose a score that needs no views"
        )


def _image_spec(features: Features, image: FieldSpec | None) -> FieldSpec:
    """The image field of the features."""
    if image is not None:
        check_spec(image, "image")
    spec = image if image is not None else features.header["image"]
    if image is None and (not isinstance(spec, str) or spec.startswith("function:")):
        raise ValueError(
            f"the images were found by {shorten(spec)} when they were embedded; give it as image="
        )
    return IMAGE_FIELDS if spec == WHOLE_FIELDS else spec  # headers hold the default's first name


def _checked_header(features: Features, source: Encoder, image: FieldSpec, seed: int) -> ViewsSource:
    """The views' header, checked to agree with the features', so that the two are comparable."""
    new, old = encoder_header(source, image), features.header
    if unlike := first_unlike([new, old], list(new)):
        was, now = (shorten(header.get(unlike[1])) for header in (old, new))
        raise FeaturesError(
            f"{features.folder}: made with {unlike[1]} {was} (encoder {shorten(old['encoder'])}), now {now} (encoder "
            f"{shorten(new['encoder'])}); views need the one of the features"
        )
    return {**new, "width": features.width, "seed": seed, "view": DEFINITION}


def _paths(
    features: Features, urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
) -> dict[str, str]:
    """The path of each shard of the features, by its name."""
    paths = expand_urls(urls)
    path_of = dict(zip(shard_names(paths), paths, strict=True))
    known = [file.shard for file in features]
    missing = [name for name in known if name not in path_of]
    if missing:
        raise FeaturesError(
            f"{features.folder}: shard {missing[0]} has features, but is not among the {len(paths)} shards given "
            f"({len(missing)} missing in all); name the shards that were embedded"
        )
    surplus = sorted(path_of.keys() - set(known))
    if surplus and features.limit is None:  # a limit ends before the last shards
        raise FeaturesError(
            f"{features.folder}: shard {surplus[0]} has no features ({len(surplus)} in all have none); embed it first, "
            "or leave it out"
        )
    return path_of


def _jobs_to_do(
    features: Features,
    paths: dict[str, str],
    rows: list[NDArray[np.int64]],
    header: ViewsSource,
    done: Callable[[int], object],
) -> Iterator[ViewJob]:
    """The shards without a usable file, each opened in turn."""
    for file, mine in zip(features, rows, strict=True):
        spans = file.spans().take(mine)
        if _already_done(views_folder(features) / file_name(file.shard), file, spans, header):
            done(len(spans))
            continue
        close = ExitStack()
        path = paths[file.shard]
        buffer = close.enter_context(open_shard(path)) if len(spans) else b""
        yield ViewJob(path, file.shard, spans, buffer, close)


def _already_done(path: Path, file: FeaturesFile, spans: Spans, header: ViewsSource) -> bool:
    """Whether a file holds the views of these samples with the same settings."""
    if not path.exists():
        return False
    try:
        old = ShardViews.load(path)
    except FeaturesError as error:
        logger.warning("%s; making the views of the shard again", error)
        return False
    same_rows = np.array_equal(old.index, spans.index) and np.array_equal(old.crc32, spans.crc32)
    return old.shard == file.shard and old.header == header and same_rows and old.keys == spans.keys
