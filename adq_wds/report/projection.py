"""Projects embeddings onto a plane, for a map of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adq_wds.core.rng import check_seed
from adq_wds.errors import AdqError, shorten
from adq_wds.tables.features import Features

Projection = Literal["pca", "umap"]
F64 = NDArray[np.float64]

_BLOCK_ROWS = 4096
_UMAP_WIDTH = 50  # UMAP takes the first principal components, so that memory does not grow with D
_NO_SPREAD = 1e-12  # of the mean squared length: below it a direction holds rounding errors alone


def project(features: Features, how: Projection = "pca", seed: int = 0) -> NDArray[np.float32]:
    """A place on a plane for each usable sample.

    "pca" takes the two directions of the largest variance, exactly, in float64, with two passes over the files: memory
    for one shard and for D × D numbers. The sign of a direction is such that its largest entry is positive. A direction
    without spread gives 0. "umap" keeps neighbours together and needs the package umap-learn; it takes the first 50
    principal components, so memory for N × 50 numbers.

    Args:
        features: N usable samples.
        how: "pca" or "umap".
        seed: of "umap", which then runs in one thread; at most 32 bits.

    Returns:
        (N, 2) float32.

    Raises:
        ValueError: another `how`, or a seed out of range.
        FeaturesError: damaged features.
        AdqError: umap-learn is not installed.

    Source: principal component analysis; McInnes et al. 2018 (arXiv 1802.03426).
    """
    if how == "pca":
        return principal_components(features, 2)
    if how != "umap":
        raise ValueError(f"projection must be pca or umap, got {shorten(how)}")
    if not 0 <= check_seed(seed) < 2**32:
        raise ValueError(f"seed must lie in [0, 2³²) for umap, got {seed}")
    try:
        from umap import UMAP
    except ImportError as error:
        raise AdqError(f"projection umap comes with umap-learn ({error}): pip install umap-learn") from error
    rows = principal_components(features, min(_UMAP_WIDTH, features.width))
    if len(rows) < 5:  # too few for a graph of neighbours
        return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, 2)))[:, :2])
    neighbours = min(15, len(rows) - 1)
    init = "spectral" if len(rows) > _UMAP_WIDTH else "random"
    places = UMAP(n_neighbors=neighbours, init=init, random_state=seed, n_jobs=1).fit_transform(rows)
    return np.asarray(places, dtype=np.float32)


def principal_components(features: Features, n_components: int) -> NDArray[np.float32]:
    """The first principal components of the embeddings, see `project`: (N, n_components) float32, 0 beyond their rank."""
    D, N = features.width, len(features)
    total, product = np.zeros(D), np.zeros((D, D))
    for block in _blocks(features):
        total += block.sum(axis=0)
        product += block.T @ block
    mean = total / max(1, N)
    variance, directions = np.linalg.eigh(product / max(1, N) - np.outer(mean, mean))
    floor = _NO_SPREAD * np.trace(product) / max(1, N)
    n_found = min(n_components, int((variance > floor).sum()))
    chosen: F64 = directions[:, ::-1][:, :n_found]  # eigh sorts upwards
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(n_found)])
    out, first = np.zeros((N, n_components), dtype=np.float32), 0
    for block in _blocks(features):
        out[first : first + len(block), :n_found] = (block - mean) @ chosen
        first += len(block)
    return out


def _blocks(features: Features) -> Iterator[F64]:
    """The embeddings in the order of samples, some thousand rows at a time."""
    for file in features:
        rows = file.embedding()
        for first in range(0, len(rows), _BLOCK_ROWS):
            yield rows[first : first + _BLOCK_ROWS].astype(np.float64)
