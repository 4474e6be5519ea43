"""Makes soft labels from features: by a leave-one-out fit on the embeddings, or of embeddings that are logits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adq_wds.checks import no_bar
from adq_wds.core.copies import first_of
from adq_wds.core.margin import ridge_margins
from adq_wds.core.soft_labels import top_probabilities
from adq_wds.errors import FeaturesError, shorten
from adq_wds.planning.output import locked_folder
from adq_wds.planning.samples import global_labels
from adq_wds.tables.features import Features, as_features
from adq_wds.tables.features_file import NO_LABEL, FeaturesFile
from adq_wds.tables.soft_labels import MAX_CLASSES, SOURCES, ShardSoftLabels, save_soft_labels

Source = Literal["ridge", "logits", "probabilities"]
_LEAST = 1e-12  # a probability of 0 has no logarithm
_ROUNDING = 0.01  # of the sum of stored probabilities

Rows = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True)
class SoftReport:
    """What a file of soft labels holds.

    Attributes:
        path: the file.
        shards: shards in it.
        samples: samples in it.
        n_classes: C.
        source: "ridge", "logits" or "probabilities".
        temperature: by which scores were divided before the softmax.
        agreement: share of samples whose likeliest class is their label; None without labels.
    """

    path: str
    shards: int
    samples: int
    n_classes: int
    source: str
    temperature: float
    agreement: float | None

    def __str__(self) -> str:
        agree = (
            "" if self.agreement is None else f"; the likeliest class is the label of {self.agreement:.1%}"
        )
        return (
            f"{self.samples:,} samples of {self.shards:,} shards, {self.n_classes:,} classes, in {self.path} "
            f"({self.source} at temperature {self.temperature:.3g}{agree})"
        )


def soften_labels(
    features: Features | str | os.PathLike[str],
    *,
    source: Source = "ridge",
    temperature: float | None = None,
    out: str | os.PathLike[str] = "soft.parquet",
    progress: bool | None = None,
) -> SoftReport:
    """Write the probabilities of the likeliest classes of every sample, which `SoftLabels` joins to a stream.

    Stored are the 8 likeliest classes of each sample; their probabilities are renormalised to sum to 1, and all other
    classes get nothing. "ridge" needs no other network: each sample's class is predicted by a ridge fit on the
    embeddings and labels of all other samples; byte-identical copies count as one sample.

    Args:
        features: a folder of features, or its path.
        source: where they come from: "ridge" predicts each label from all other samples; "logits" and "probabilities"
            take the embeddings themselves as those of a trained network, one number per class. Classes are in the order
            of their numbers, or of their names in the alphabet.
        temperature: divides predictions or logits; by default the likeliest for "ridge", 1 for the others.
        out: file to write.
        progress: show a bar; only on a terminal by default.

    Raises:
        ValueError: an option is out of range.
        FeaturesError: damaged features or none usable; for "ridge" no labels, or fewer than two classes; for the others
            embeddings with fewer numbers than there are classes (where classes have names, another number), or (with its
            key) no probabilities.
        AdqError: `out` cannot be written, or another job works in its folder.

    Source: ours; renormalised top classes as in Shen and Xing 2022 (arXiv 2112.01528), marginal re-norm.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {shorten(source)}")
    if temperature is not None and not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be a number > 0, got {temperature!r}")
    opened = as_features(features)
    if not len(opened):
        raise FeaturesError(f"{opened.folder}: no usable samples in {len(opened.files)} shards")
    label, names = global_labels(opened)
    is_labelled = label[0] != NO_LABEL
    n_classes = len(names) if names is not None else int(label.max()) + 1 if is_labelled else opened.width
    if source != "ridge" and names is None:  # a network may know more classes than these samples have
        n_classes = max(n_classes, opened.width)
    if n_classes > MAX_CLASSES:
        raise FeaturesError(
            f"{opened.folder}: labels up to {n_classes - 1:,}; at most {MAX_CLASSES:,} classes are held"
        )
    with locked_folder(out, FeaturesError, beside=opened):
        if source == "ridge":
            top, probability, temperature = _by_ridge(opened, label, temperature, progress)
        else:
            temperature = 1.0 if temperature is None else float(temperature)
            top, probability = _by_network(opened, n_classes, source, temperature, progress)
        agreement = float(np.mean(top[:, 0] == label)) if is_labelled else None
        save_soft_labels(
            out,
            list(_by_shard(opened, top, probability)),
            {
                "source": source,
                "temperature": temperature,
                "agreement": agreement,
                "features": opened.hash,
                "encoder": opened.header["encoder"],
                "revision": opened.header["revision"],
                "label": opened.header["label"],
                "n_classes": n_classes,
                "names": names,
            },
        )
    return SoftReport(
        os.fspath(out), len(opened.files), len(opened), n_classes, source, temperature, agreement
    )


def _by_ridge(
    features: Features, label: NDArray[np.int32], temperature: float | None, progress: bool | None
) -> tuple[NDArray[np.int32], NDArray[np.float32], float]:
    """(N, T) classes and probabilities by the leave-one-out fit, and the temperature."""
    first = _first_copies(features)
    in_fit = first == np.arange(len(label))
    classes, row = np.unique(label[in_fit], return_inverse=True)
    if label[0] == NO_LABEL:
        raise FeaturesError(f"{features.folder}: no labels, which source='ridge' needs; embed with label=")
    if len(classes) < 2:
        raise FeaturesError(f"{features.folder}: one class, and source='ridge' needs two or more")
    with tqdm(total=3 * len(features.files), unit="shard", desc="soften", disable=no_bar(progress)) as bar:

        def rows() -> Iterator[NDArray[np.float16]]:
            start = 0
            for file in features:
                yield file.embedding()[in_fit[start : start + file.n]]
                start += file.n
                bar.update()

        margins = ridge_margins(rows, row)
    if temperature is not None:
        margins = replace(margins, temperature=float(temperature))
    of_sample = (np.cumsum(in_fit) - 1)[first]
    top = classes[margins.top].astype(np.int32)
    return top[of_sample], margins.probability()[of_sample], margins.temperature


def _first_copies(features: Features) -> NDArray[np.int64]:
    """(N,) the first sample of the same contents, which is itself where it is no copy."""
    digest = features.digests()
    if digest is None:
        return np.arange(len(features))
    return first_of(digest, np.ones(len(digest), dtype=bool))


def _by_network(
    features: Features, n_classes: int, source: str, temperature: float, progress: bool | None
) -> Rows:
    """(N, T) classes and probabilities of embeddings that are logits or probabilities."""
    if features.width != n_classes:
        raise FeaturesError(
            f"{features.folder}: embeddings of {features.width} numbers (encoder {features.header['encoder']!r}) are no "
            f"{source} of {n_classes} classes; embed with a network that gives {source} as its embeddings"
        )
    parts = []
    for file in tqdm(features.files, unit="shard", desc="soften", disable=no_bar(progress)):
        rows = file.embedding().astype(np.float64) * file.norm()[:, None]
        if source == "probabilities":
            _check_probabilities(file, rows)
            rows = np.log(np.maximum(rows, _LEAST))
        parts.append(top_probabilities(rows, temperature))
    return np.concatenate([top for top, _ in parts]), np.concatenate([p for _, p in parts])


def _check_probabilities(file: FeaturesFile, rows: NDArray[np.float64]) -> None:
    total = rows.sum(axis=1)
    bad = (rows < 0).any(axis=1) | (abs(total - 1.0) > _ROUNDING)
    if bad.any():
        i = int(bad.argmax())
        raise FeaturesError(
            f"shard {file.shard}, key {shorten(file.spans().keys[i])}: no probabilities (least {rows[i].min():.3g}, sum "
            f"{total[i]:.3g}); if these are logits, take source='logits'"
        )


def _by_shard(
    features: Features, top: NDArray[np.int32], probability: NDArray[np.float32]
) -> Iterator[ShardSoftLabels]:
    start = 0
    for file in features:
        rows = slice(start, start + file.n)
        yield ShardSoftLabels(
            file.shard, file.read_columns(["key"])["key"].to_pylist(), top[rows], probability[rows]
        )
        start += file.n
