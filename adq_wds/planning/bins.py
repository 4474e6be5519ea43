"""Cuts samples into bins, class by class, by exact GraphCut or by margin, and sums up each bin over all classes."""

from __future__ import annotations

import logging
import os
from contextlib import closing

import numpy as np
from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.core.kernel import unit_rows
from adq_wds.core.scores import BinSums, bin_scores, rounded
from adq_wds.core.strata import margin_strata
from adq_wds.errors import PlanError
from adq_wds.planning.buckets import BY_EMBEDDINGS, ClassBinner, ClassBuckets
from adq_wds.planning.gradient_bins import by_gradients
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples
from adq_wds.tables.bins import Bins, BinsSource
from adq_wds.tables.features_file import NO_LABEL

_LEFT_OUT = -2  # class of a sample that is left out

logger = logging.getLogger("adq_wds")


def bin_samples(samples: Samples, options: Options, *, scratch: str | os.PathLike[str] | None = None) -> Bins:
    """Bins of all N samples, with the mean texture (of images) and the diversity of each bin over all classes.

    Args:
        samples: of which `samples.binned` are binned.
        options: `bins`, `bins_by`, `kernel`, `memory_bytes` and `progress`: a bar, half of it reading, half picking.
        scratch: folder for a scratch file of N·D·2 bytes, N·(2·D + 2·C + 4) with kernel "gradient".

    Raises:
        FeaturesError: damaged features, a NaN, or kernel "gradient" without logit gradients or with a head whose
            classes are not the labels.
    """
    features, classes = samples.features, samples.classes
    binner = by_gradients(features, samples.label) if options.kernel == "gradient" else BY_EMBEDDINGS
    label = np.where(samples.binned, samples.label, _LEFT_OUT)
    _say_what_it_takes(samples, [int((label == c).sum()) for c in classes], options, binner)
    texture = features.texture()
    bin = np.full(len(samples), -1, dtype=np.int16)
    pick = np.full(len(samples), -1, dtype=np.int32)
    sums = BinSums.empty(options.bins, features.width, texture=texture is not None)
    with tqdm(total=2 * len(samples), unit=" samples", desc="bins", disable=no_bar(options.progress)) as bar:
        bar.update(len(samples) - int(samples.binned.sum()))
        columns = binner.columns
        buckets = ClassBuckets(
            features, label, classes, columns=columns, scratch=scratch, progress=bar.update
        )
        with closing(buckets):
            for c in classes:
                where, (embedding, *further) = buckets.rows_of(c)
                if not len(where):
                    continue  # all are left out
                rows, memory = unit_rows(embedding), options.memory_bytes
                if options.bins_by == "difficulty":
                    assert samples.margin is not None  # measured before, and these samples were in the fit
                    cut = margin_strata(samples.margin[where], options.bins)
                    bar.update(len(where))
                else:
                    cut = binner.cut(rows, *further, options.bins, memory_bytes=memory, progress=bar.update)
                bin[where], pick[where] = cut.bin, cut.pick
                sums.add(cut.bin, rows, None if texture is None else texture[where])
    header: BinsSource = {
        "n_bins": options.bins,
        "kernel": options.kernel,
        "dedup": options.dedup,
        "features": features.hash,
        "classes": classes,
        "names": samples.names,
        "scores": {name: rounded(score) for name, score in bin_scores(sums).items()},
    }
    if options.bins_by != "graphcut":
        header["bins_by"] = options.bins_by
    if samples.margins is not None:
        header["margins"] = samples.margins
    shards = [(file.shard, file.n) for file in features]
    return Bins(shards, samples.label, bin, pick, header, samples.margin)


def check_fit(bins: Bins, samples: Samples, options: Options) -> None:
    """Raise unless earlier bins were made from these samples with these options.

    Raises:
        PlanError: they were made from other features.
        ValueError: they were made with other options.
    """
    features = samples.features
    if bins.header["features"] != features.hash or bins.shards != [(file.shard, file.n) for file in features]:
        raise PlanError(f"{features.folder}: the bins were made from other features; bin these again")
    n_bins = bins.n_bins if isinstance(options.bins, Bins) else options.bins
    asked = {"n_bins": n_bins, "bins_by": options.bins_by, "kernel": options.kernel, "dedup": options.dedup}
    for name, value in asked.items():
        made = bins.header.get(name, "graphcut" if name == "bins_by" else None)
        if made != value:
            raise ValueError(f"the bins were made with {name}={made!r}, not {value!r}")
    if ((bins.bin >= 0) != samples.binned).any():
        raise ValueError("the bins hold other samples than these options leave in; bin again")


def _say_what_it_takes(samples: Samples, counts: list[int], options: Options, binner: ClassBinner) -> None:
    """Log the memory and disk that binning takes, and the options that it cannot follow, for classes of these sizes."""
    largest = max(counts, default=0)
    width = samples.features.width + sum(column.row_bytes for column in binner.columns) // 2  # in float16s
    rows = largest * width * 10  # float16 as read, float64 as used
    matrix = largest * largest * 8 if options.bins_by == "graphcut" else 0
    beyond = binner.without_matrix.format(options.memory_bytes / 2**30)
    gram = f"{matrix / 2**30:.2f} GiB" if matrix <= options.memory_bytes else beyond
    logger.info(
        "binning %d samples in %d classes, largest %d: embeddings %.2f GiB, similarities %s, scratch file %.2f GiB",
        sum(counts), len(counts), largest, rows / 2**30, gram, len(samples) * width * 2 / 2**30,
    )  # fmt: skip
    if samples.classes == [NO_LABEL]:
        logger.info("no labels: all samples are one class")
    few = [(c, n) for c, n in zip(samples.classes, counts, strict=True) if n < options.bins]
    if few:
        logger.warning(
            "%d classes have fewer samples than bins (class %d has %d): fewer bins there", len(few), *few[0]
        )
