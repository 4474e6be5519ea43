"""Nearest samples and typicality are those of the slow and plain computation."""

from pathlib import Path

import numpy as np

import adq_wds as adq
from adq_wds.report.neighbours import nearest_samples, typicality
from adq_wds.report.samples import Samples
from tests.conftest import MakeFeatures


def test_nearest_and_typical_equal_the_plain_computation(make_features: MakeFeatures, tmp_path: Path) -> None:
    for shard, n in (("a.tar", 13), ("b.tar", 8)):
        make_features(shard, [i % 3 for i in range(n)], bad=[2] if shard == "a.tar" else [], signed=True)
    features = adq.Features(tmp_path / "features")
    samples = Samples.of_plan(adq.build_plan(features, keep=0.5, bins=2))
    rows = np.array([i for i in range(22) if i != 2])  # of the plan, where row 2 could not be used
    x = np.concatenate([file.embedding() for file in features]).astype(np.float32)
    asked = [0, 5, 21]
    near = nearest_samples(samples, features, [*asked, 2], 4)
    for row, got in zip(asked, near, strict=False):
        cosine = x @ x[rows == row][0]
        cosine[rows == row] = -np.inf
        assert [r for r, _ in got] == rows[np.argsort(-cosine, kind="stable")[:4]].tolist()
    assert near[-1] == []  # it has no features
    typical = typicality(samples, features, [int(np.flatnonzero(samples.classes == 1)[0])])
    mine = samples.class_row[rows] == np.flatnonzero(samples.classes == 1)[0]
    centre = x[mine].mean(axis=0)
    expected = x[mine] @ (centre / np.linalg.norm(centre))
    np.testing.assert_allclose(typical[rows[mine]], expected, rtol=1e-5)
    assert np.isnan(typical).sum() == 22 - mine.sum()
