"""Makes the views of a set: reads a keyed sample of its images, crops each twice, and embeds the crops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.core.views import DEFINITION
from adq_wds.embedding.settings import encoder_header
from adq_wds.embedding.views_batch import ViewJob, embed_view_batch
from adq_wds.engines.threads import in_order
from adq_wds.errors import FeaturesError
from adq_wds.protocols import Encoder
from adq_wds.remote.open_shard import open_shard
from adq_wds.remote.outputs import lock, make_folder
from adq_wds.remote.url_path import AnyPath
from adq_wds.samples.fields import FieldSpec
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.spans import Spans
from adq_wds.tables.views import ShardViews, Views, ViewsSource, choose_rows, views_folder

logger = logging.getLogger("adq_wds")

N_VIEWS = 20_000


def embed_views(
    features: Features,
    path_of: Mapping[str, str],
    encoder: Encoder,
    *,
    views: int,
    image: FieldSpec,
    batch_size: int,
    workers: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Views:
    """Embed two augmented views of some samples, into the folder ``views`` of the features: one file per shard.

    The samples are those with the smallest draws keyed by seed, shard and key, so a larger number contains a smaller
    one; only they are read. Shards with a file of these views are skipped, so a killed job resumes, and loses at most
    the shards in progress (one per worker). Locks ``views`` and nothing else: the caller has the folder of the features.

    Args:
        features: of the samples; with a `limit`, its samples alone are chosen from.
        path_of: the path of each shard of the features, by name.
        encoder: the one that embedded them.
        views: how many samples; all when there are fewer.
        image: field with the image, as for the features.
        batch_size: images per call of the encoder; batches are cut inside a shard.
        workers: threads; results do not depend on their number.
        seed: of the choice, of crops and flips.
        progress: show a bar; only on a terminal by default.

    Returns:
        the views of all shards of the features.

    Raises:
        ShardError: a shard changed since it was embedded.
        SampleError: a sample's view cannot be embedded, with shard and key.
        AdqError: the folder cannot be written, or another job works in it.
    """
    header: ViewsSource = {
        **encoder_header(encoder, image),
        "width": features.width,
        "seed": seed,
        "view": DEFINITION,
    }
    chosen = choose_rows(features, views, seed=seed)
    starts = np.cumsum([0, *(file.n for file in features)])
    chosen_of = [
        rows - start
        for rows, start in zip(np.split(chosen, np.searchsorted(chosen, starts[1:-1])), starts, strict=False)
    ]
    folder = make_folder(views_folder(features))

    def work(job: ViewJob, rows: range) -> NDArray[np.float16]:
        return embed_view_batch(job, rows, encoder, image, seed=seed, width=features.width)

    with (
        lock(folder),
        tqdm(total=len(chosen), unit=" samples", desc="views", disable=no_bar(progress)) as bar,
    ):
        jobs = _jobs_to_do(features, path_of, chosen_of, header, bar.update)
        batches = in_order(
            jobs, lambda job: len(job.spans), work, batch_size=batch_size, workers=workers, name="adq-views"
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
    return Views(features)


def _jobs_to_do(
    features: Features,
    path_of: Mapping[str, str],
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
        path = path_of[file.shard]
        buffer = close.enter_context(open_shard(path)) if len(spans) else b""
        yield ViewJob(path, file.shard, spans, buffer, close)


def _already_done(path: AnyPath, file: FeaturesFile, spans: Spans, header: ViewsSource) -> bool:
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
