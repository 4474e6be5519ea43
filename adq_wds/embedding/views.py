"""Makes the views of a set: reads a keyed sample of its images, crops each twice, and embeds the crops."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.core.views import DEFINITION
from adq_wds.embedding.settings import encoder_header
from adq_wds.embedding.source import gpus_of
from adq_wds.embedding.views_batch import ViewJob, embed_view_batch
from adq_wds.engines.engine import Engine, Resources, Result, Task, ThisProcess
from adq_wds.engines.shared import lock_for
from adq_wds.engines.threads import in_order
from adq_wds.errors import FeaturesError
from adq_wds.protocols import Encoder
from adq_wds.remote.open_shard import open_shard
from adq_wds.remote.outputs import make_folder
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
    engine: Engine | None = None,
) -> Views:
    """Embed two augmented views of some samples, into the folder ``views`` of the features: one file per shard.

    The samples are those with the smallest draws keyed by seed, shard and key, so a larger number contains a smaller
    one; only they are read. Shards with a file of these views are skipped, so a killed job resumes, and loses at most
    the shards in progress (one per worker). Locks ``views`` and nothing else: the caller has the
    folder of the features.

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
        engine: does the shards; this process by default.

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

    runner = engine or ThisProcess()
    work = _ViewsWork(folder, features.folder, header, encoder, image, batch_size, workers)
    tasks = [
        Task(file.shard, (path_of[file.shard], rows.tolist()))
        for file, rows in zip(features, chosen_of, strict=True)
    ]
    with (
        lock_for(runner, folder, "views", {**header, "views": views}),
        tqdm(total=len(chosen), unit=" samples", desc="views", disable=no_bar(progress)) as bar,
    ):
        for _, result in runner.run(tasks, work, Resources(workers, gpus_of(encoder))):
            bar.update(result["n"])
    return Views(features)


@dataclass
class _ViewsWork:
    """Tasks of a shard's path and chosen rows, to files of views."""

    folder: AnyPath
    features: AnyPath
    header: ViewsSource
    encoder: Encoder
    image: FieldSpec
    batch_size: int
    workers: int

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        passed: deque[tuple[Task, Result]] = deque()
        task_of: dict[str, Task] = {}

        def jobs() -> Iterator[ViewJob]:
            for task in tasks:
                path, rows = task.what
                file = FeaturesFile(self.features / file_name(task.name))
                spans = file.spans().take(np.array(rows, dtype=np.int64))
                if _already_done(self.folder / file_name(task.name), file, spans, self.header):
                    passed.append((task, {"n": len(rows)}))
                    continue
                close = ExitStack()
                buffer = close.enter_context(open_shard(path)) if rows else b""
                task_of[task.name] = task
                yield ViewJob(path, task.name, spans, buffer, close)

        def embed(job: ViewJob, rows: range) -> NDArray[np.float16]:
            header = self.header
            return embed_view_batch(
                job, rows, self.encoder, self.image, seed=header["seed"], width=header["width"]
            )

        batches = in_order(
            jobs(), lambda job: len(job.spans), embed,
            batch_size=self.batch_size, workers=self.workers, name="adq-views",
        )  # fmt: skip
        with closing(batches):
            for job, _, z, is_last in batches:
                while passed:
                    yield passed.popleft()
                job.parts.append(z)
                if is_last:
                    z, spans = np.concatenate(job.parts), job.spans
                    made = ShardViews(job.name, spans.index, spans.keys, spans.crc32, z, self.header)
                    made.save(self.folder / file_name(job.name))
                    job.close.close()
                    yield task_of.pop(job.name), {"n": len(z)}
        yield from passed


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
