"""Projections: PCA is the singular value decomposition's, with signs of its own; UMAP is asked for by name."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.report import projection
from adq_wds.report.projection import principal_components, project
from tests.conftest import MakeFeatures, MonkeyPatch


@pytest.fixture
def features(make_features: MakeFeatures, tmp_path: Path) -> adq.Features:
    for shard, n in (("a.tar", 40), ("b.tar", 0), ("c.tar", 25)):
        make_features(shard, [0] * n, width=7, signed=True)
    return adq.Features(tmp_path / "features")


def embeddings(features: adq.Features) -> Any:
    return np.concatenate([file.embedding() for file in features]).astype(np.float64)


@pytest.mark.parametrize("block", [1, 9, 4096])
def test_principal_components_are_those_of_the_svd(
    features: adq.Features, block: int, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_BLOCK_ROWS", block)
    rows = embeddings(features)
    centred = rows - rows.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    largest = np.abs(directions).argmax(axis=1)
    expected = centred @ (directions * np.sign(directions[np.arange(3), largest])[:, None]).T
    np.testing.assert_allclose(principal_components(features, 3), expected, atol=1e-6)


def test_equal_features_give_equal_places(features: adq.Features) -> None:
    places = project(features)
    assert places.dtype == np.float32
    assert places.shape == (65, 2)
    assert places.tobytes() == project(adq.Features(features.folder)).tobytes()


@pytest.mark.parametrize(
    ("rows", "rank"), [([[0.6, 0.8]] * 5, 0), ([[1, 0], [0, 1], [1, 0]], 1), ([[1, 0]], 0)]
)
def test_a_direction_without_spread_is_zero(
    rows: list[list[float]], rank: int, make_features: MakeFeatures, tmp_path: Path
) -> None:
    """All equal, all on a line, a single sample."""
    make_features("a.tar", [0] * len(rows), embedding=np.array(rows))
    places = project(adq.Features(tmp_path / "features"))
    assert int((places != 0).any(axis=0).sum()) == rank


def test_embeddings_of_one_number_lie_on_a_line(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0] * 4, embedding=np.array([[1.0], [-1.0], [1.0], [0.0]]))
    places = project(adq.Features(tmp_path / "features"))
    np.testing.assert_allclose(places, [[0.75, 0], [-1.25, 0], [0.75, 0], [-0.25, 0]], atol=1e-7)


def test_umap_that_is_not_installed_is_named(features: adq.Features, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(adq.AdqError, match="pip install umap-learn"):
        project(features, "umap")


def test_umap_is_seeded(features: adq.Features) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    a, b, other = (project(features, "umap", seed) for seed in (1, 1, 2))
    assert a.shape == (65, 2)
    assert np.isfinite(a).all()
    assert a.tobytes() == b.tobytes() != other.tobytes()


def test_options_out_of_range_are_refused(features: adq.Features) -> None:
    with pytest.raises(ValueError, match="must be pca or umap, got 'tsne'"):
        project(features, "tsne")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must lie in"):
        project(features, "umap", -1)
