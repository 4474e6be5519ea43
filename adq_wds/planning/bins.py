"""Cuts samples into bins, class by class, by exact GraphCut or by margin, and sums up each bin over all classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.core.graphcut import Binning, graphcut_bins
from adq_wds.core.kernel import unit_rows
from adq_wds.core.scores import EXACT_SUMS, BinSums, bin_scores, rounded
from adq_wds.core.strata import margin_strata
from adq_wds.errors import PlanError
from adq_wds.planning.buckets import LEFT_OUT, Column, DiskRows, embedding_column
from adq_wds.planning.class_rows import fits, mapped_unit_rows, unit_blocks
from adq_wds.planning.class_tasks import Arrays, run_classes
from adq_wds.planning.gradient_bins import cut_by_gradients, gradient_columns
from adq_wds.planning.options import Options
from adq_wds.planning.samples import Samples
from adq_wds.tables.bins import Bins, BinsSource
from adq_wds.tables.features_file import NO_LABEL

logger = logging.getLogger("adq_wds")


def bin_samples(samples: Samples, options: Options) -> Bins:
    """Bins of all N samples, with the mean texture (of images) and the diversity of each bin over all classes.

    Args:
        samples: of which `samples.binned` are binned.
        options: `bins`, `bins_by`, `kernel`, `memory_bytes` and `progress`: a bar, half of it reading, half picking.
            The scratch file takes N·(2·D + 4) bytes, and N·(2·C + 4) more with kernel "gradient".

    Raises:
        FeaturesError: damaged features, a NaN, or kernel "gradient" without logit gradients or with a head whose
            classes are not the labels.
    """
    features, classes = samples.features, samples.classes
    texture = features.texture()
    columns = [embedding_column(features)]
    if texture is not None:
        columns.append(Column.of_array("texture", texture))
    if options.kernel == "gradient":
        columns += gradient_columns(features, samples.label)
    if options.bins_by == "difficulty":
        assert samples.margin is not None  # measured before, and these samples were in the fit
        columns.append(Column.of_array("margin", samples.margin))
    label = np.where(samples.binned, samples.label, np.int32(LEFT_OUT))
    _say_what_it_takes(samples, options, columns)
    bin = np.full(len(samples), -1, dtype=np.int16)
    pick = np.full(len(samples), -1, dtype=np.int32)
    sums = BinSums.empty(options.bins, features.width, texture=texture is not None)
    margins = samples.margins["fit"] if options.bins_by == "difficulty" and samples.margins else None
    with tqdm(total=2 * len(samples), unit=" samples", desc="bins", disable=no_bar(options.progress)) as bar:
        bar.update(len(samples) - int(samples.binned.sum()))
        parts = run_classes(
            samples.place, "bins", BinClass(options.bins, options.bins_by, options.kernel, options.memory_bytes),
            features=features, label=label, classes=classes, names=samples.names, columns=columns,
            depends=[options.bins, options.bins_by, options.kernel, margins], progress=bar.update,
        )  # fmt: skip
        for where, part in parts:
            bin[where], pick[where] = part["bin"], part["pick"]
            sums.add_sums(part)
            if sums.texture is not None:
                for of_class in part["texture"]:  # (K,) each, in the order of classes: these sums are rounded
                    sums.texture += of_class
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


@dataclass(frozen=True)
class BinClass:
    """Cuts a class into bins, and sums up each bin; the options are those of `build_plan`."""

    bins: int
    bins_by: str
    kernel: str
    memory_bytes: int

    def of_class(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Arrays:
        """bin (n,) int16, pick (n,) int32, and the sums of `BinSums`; texture has an axis for the class, (1, K)."""
        embedding = rows["embedding"]
        sums = BinSums.empty(self.bins, embedding.width, texture="texture" in rows)
        if self.kernel == "features" and not fits(embedding, self.memory_bytes):
            cut = self._cut_large(rows, progress)
            for here, block in unit_blocks(embedding):
                sums.add_rows(cut.bin[here], block)
        else:
            unit = unit_rows(embedding[:])
            cut = self._cut(unit, rows, progress)
            sums.add_rows(cut.bin, unit)
        result: Arrays = {
            "bin": cut.bin,
            "pick": cut.pick,
            **{name: getattr(sums, name) for name in EXACT_SUMS},
        }
        if sums.texture is not None:
            sums.add_texture(cut.bin, rows["texture"][:].ravel())
            result["texture"] = sums.texture[None]
        return result

    def _cut(
        self, unit: NDArray[np.float64], rows: Mapping[str, DiskRows], progress: Callable[[int], object]
    ) -> Binning:
        if self.bins_by == "difficulty":
            return self._strata(rows, progress)
        if self.kernel == "gradient":
            columns = (rows["logit_grad"][:], rows["norm"][:])
            return cut_by_gradients(
                unit, *columns, self.bins, memory_bytes=self.memory_bytes, progress=progress
            )
        return graphcut_bins(unit, self.bins, memory_bytes=self.memory_bytes, progress=progress)

    def _cut_large(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Binning:
        """The bins of a class whose unit rows do not fit into the memory; they are those of `_cut`."""
        if self.bins_by == "difficulty":
            return self._strata(rows, progress)
        unit = mapped_unit_rows(rows["embedding"])
        return graphcut_bins(
            unit, self.bins, memory_bytes=self.memory_bytes, in_place=True, progress=progress
        )

    def _strata(self, rows: Mapping[str, DiskRows], progress: Callable[[int], object]) -> Binning:
        cut = margin_strata(rows["margin"][:].ravel(), self.bins)
        progress(len(cut.bin))
        return cut

    def joined(self, parts: Sequence[Arrays]) -> Arrays:
        """Of some classes: bins and texture one after another, and the exact sums as one."""
        whole: Arrays = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            whole[name] = np.sum(values, axis=0) if name in EXACT_SUMS else np.concatenate(values)
        return whole


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


def _say_what_it_takes(samples: Samples, options: Options, columns: Sequence[Column]) -> None:
    """Log the memory and disk that binning takes, and the options that it cannot follow, for classes of these sizes."""
    n_class = np.bincount(samples.row_of(samples.label[samples.binned]), minlength=len(samples.classes))
    largest = int(n_class.max(initial=0))
    width = sum(column.row_bytes for column in columns) // 2  # in float16s
    rows = largest * width * 10  # float16 as read, float64 as used
    matrix = largest * largest * 8 if options.bins_by == "graphcut" else 0
    beyond = "row by row" if options.kernel == "gradient" else "up to {:.2f} GiB (pooled)"
    gram = f"{matrix / 2**30:.2f} GiB"
    if matrix > options.memory_bytes:
        gram = beyond.format(options.memory_bytes / 2**30)
    logger.info(
        "binning %d samples in %d classes, largest %d: embeddings %.2f GiB, similarities %s, scratch file %.2f GiB",
        n_class.sum(), len(n_class), largest, rows / 2**30, gram, len(samples) * width * 2 / 2**30,
    )  # fmt: skip
    if samples.classes == [NO_LABEL]:
        logger.info("no labels: all samples are one class")
    few = np.flatnonzero(n_class < options.bins)
    if len(few):
        c = int(few[0])
        logger.warning(
            "%d classes have fewer samples than bins (class %d has %d): fewer bins there",
            len(few), samples.classes[c], n_class[c],
        )  # fmt: skip
