"""How do features become bins? Class by class, by exact GraphCut, and scored over all classes together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from adq_wds.checks import check_memory, integer, listed
from adq_wds.core.copies import first_of
from adq_wds.core.kernel import unit_rows
from adq_wds.core.scores import DECIMALS, BinSums, bin_scores
from adq_wds.errors import FeaturesError, shorten
from adq_wds.planning.buckets import ClassBuckets
from adq_wds.planning.class_binner import BY_EMBEDDINGS, ClassBinner
from adq_wds.planning.gradient_bins import by_gradients
from adq_wds.tables.bins import Bins, BinsSource
from adq_wds.tables.features import Features
from adq_wds.tables.features_file import NO_LABEL

Progress = Callable[[int], object]
_COPY = -2  # stands for the class of a copy that is left out

logger = logging.getLogger("adq_wds")


def bin_features(
    features: Features,
    *,
    bins: int,
    kernel: str = "features",
    classes: Iterable[int | str] | None = None,
    dedup: str | None = "exact",
    memory_bytes: int = 1 << 30,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bins:
    """Bin every class by exact GraphCut and score the bins.

    Args:
        features: the set; N samples of width D.
        bins: K, bins per class. A class with fewer samples gets fewer bins, said in a warning.
        kernel: "features" (cosine of the embeddings) or "gradient" (cosine of the gradients of the loss by the
            weights of a linear head, from logit gradients, norms and embeddings).
        classes: classes to bin, by number or name; the others are left out of the plan. All by default.
        dedup: "exact" leaves samples out whose digest an earlier sample of the chosen classes has; None bins all.
            Features without digests are binned as with None.
        memory_bytes: what one class's similarity matrix may take; larger classes are binned without one.
        scratch: folder for a scratch file of N·D·2 bytes, N·(2·D + 2·C + 4) with kernel "gradient".
        progress: called with numbers of samples done, which add up to 2·N: N read, N binned or left out.

    Returns:
        Bins of all N samples, with the mean texture (of images) and the diversity of each bin over all classes.

    Raises:
        ValueError: `bins` is not a positive integer below 32,768, `memory_bytes` is not a number >= 0, `dedup` or a
            class is unknown.
        FeaturesError: damaged features, a NaN, or kernel "gradient" without logit gradients or with a head whose
            classes are not the labels.
    """
    if kernel not in ("features", "gradient"):
        raise ValueError(f"kernel must be 'features' or 'gradient', got {kernel!r}")
    bins = integer("bins", bins, least=1, most=2**15 - 1)
    check_memory(memory_bytes)
    dedup = possible_dedup(features, dedup)
    if len(features) == 0:
        raise FeaturesError(f"{features.folder}: no usable samples in {len(features.files)} shards")
    label, names = global_labels(features)
    binner = by_gradients(features, label) if kernel == "gradient" else BY_EMBEDDINGS
    chosen = _chosen_classes(np.unique(label).tolist(), names, classes)
    copy = find_copies(features, label, chosen, dedup) != np.arange(len(label))
    binned = np.where(copy, _COPY, label)
    n_chosen = [int((binned == c).sum()) for c in chosen]
    _say_what_it_takes(features, chosen, n_chosen, int(bins), memory_bytes, binner)
    if progress is not None:
        progress(len(label) - sum(n_chosen))
    texture = features.texture()
    bin = np.full(len(label), -1, dtype=np.int16)
    pick = np.full(len(label), -1, dtype=np.int32)
    sums = BinSums.empty(int(bins), features.width, texture=texture is not None)
    buckets = ClassBuckets(
        features, binned, chosen, columns=binner.columns, scratch=scratch, progress=progress
    )
    try:
        for c in chosen:
            where, embedding = buckets.read(c)
            if not len(where):
                continue  # all are copies of samples of other classes
            rows = unit_rows(embedding)
            further = buckets.read_columns(c)
            binning = binner.cut(rows, further, int(bins), memory_bytes=memory_bytes, progress=progress)
            bin[where], pick[where] = binning.bin, binning.pick
            sums.add(binning.bin, rows, None if texture is None else texture[where])
    finally:
        buckets.close()
    header: BinsSource = {
        "n_bins": int(bins),
        "kernel": kernel,
        "dedup": dedup,
        "features": features.hash,
        "classes": chosen,
        "names": names,
        "scores": {name: rounded(score) for name, score in bin_scores(sums).items()},
    }
    return Bins([(file.shard, file.n) for file in features], label, bin, pick, header)


def possible_dedup(features: Features, dedup: str | None) -> str | None:
    """`dedup`, or None where the features have no digests to compare.

    Raises:
        ValueError: neither "exact" nor None.
    """
    check_dedup(dedup)
    return dedup if all("digest" in file.header["columns"] for file in features) else None


def check_dedup(dedup: object) -> None:
    """Raise `ValueError` unless it is "exact" or None."""
    if dedup not in ("exact", None):
        raise ValueError(f"dedup must be 'exact' or None, got {dedup!r}")


def find_copies(
    features: Features, label: NDArray[np.int32], classes: list[int], dedup: str | None
) -> NDArray[np.int64]:
    """(N,) int64: for each sample the first one of the chosen classes with an equal digest; itself with dedup None."""
    if dedup is None:
        return np.arange(len(label))
    digests = [rows for file in features if (rows := file.digest()) is not None]
    return first_of(np.concatenate(digests), np.isin(label, classes))


def global_labels(features: Features) -> tuple[NDArray[np.int32], list[str] | None]:
    """(N,) int32 class of every sample over the whole set, and the names of string labels, sorted."""
    kinds = {file.names is None for file in features if file.n}
    if len(kinds) > 1:
        raise FeaturesError(f"{features.folder}: some shards have integer labels and some string labels")
    labels = [file.read(["label"])["label"].to_numpy() for file in features]
    names = None
    if kinds == {False}:
        names = sorted({name for file in features for name in file.names or []})
        number = {name: i for i, name in enumerate(names)}
        for i, file in enumerate(features):
            known = np.array([number[name] for name in file.names or []], dtype=np.int32)
            if file.n and not 0 <= labels[i].min() <= labels[i].max() < len(known):
                raise FeaturesError(f"{file.path}: a label is not one of its {len(known)} names")
            labels[i] = known[labels[i]] if file.n else labels[i]
    label = np.concatenate(labels)
    if len(label) and label.min() == NO_LABEL and label.max() != NO_LABEL:
        raise FeaturesError(
            f"{features.folder}: some samples have labels and some have none; give all of them one"
        )
    return label, names


def _chosen_classes(
    present: list[int], names: list[str] | None, classes: Iterable[int | str] | None
) -> list[int]:
    """Those of the classes `present` that are asked for, ascending."""
    if classes is None:
        return present
    by_name = {names[c] if names is not None else str(c): c for c in present}  # "7" is class 7 without names
    known = set(present)
    chosen = set()
    for c in listed("classes", classes):
        number = by_name.get(c) if isinstance(c, str) else c
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number not in known:
            raise ValueError(
                f"class {c!r} has no samples here; the classes are {shorten(list(by_name) if names else present, 200)}"
            )
        chosen.add(int(number))
    if not chosen:
        raise ValueError("classes must name one or more, got none")
    return sorted(chosen)


def _say_what_it_takes(
    features: Features,
    classes: list[int],
    counts: list[int],
    bins: int,
    memory_bytes: int,
    binner: ClassBinner,
) -> None:
    """Memory and disk, before the work starts; and what will not be as asked."""
    largest = max(counts, default=0)
    width = features.width + sum(column.row_bytes for column in binner.columns) // 2  # in float16s
    rows = largest * width * 10  # float16 as read, float64 as used
    matrix = largest * largest * 8
    beyond = binner.without_matrix.format(memory_bytes / 2**30)
    gram = f"{matrix / 2**30:.2f} GiB" if matrix <= memory_bytes else beyond
    logger.info(
        "binning %d samples in %d classes, largest %d: embeddings %.2f GiB, similarities %s, scratch file %.2f GiB",
        sum(counts), len(classes), largest, rows / 2**30, gram, len(features) * width * 2 / 2**30,
    )  # fmt: skip
    if classes == [NO_LABEL]:
        logger.info("no labels: all samples are one class")
    few = [(c, n) for c, n in zip(classes, counts, strict=True) if n < bins]
    if few:
        logger.warning(
            "%d classes have fewer samples than bins (class %d has %d): fewer bins there", len(few), *few[0]
        )


def rounded(score: NDArray[np.float64]) -> list[float | None]:
    """For a header: rounded, so that equal features give equal headers on any machine; None for NaN."""
    return [None if np.isnan(v) else round(float(v), DECIMALS) for v in score]
