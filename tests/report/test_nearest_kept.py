"""The nearest kept sample of a class is that of the double loop."""

from pathlib import Path

import numpy as np

import adq_wds as adq
from adq_wds.report.neighbours import nearest_kept
from adq_wds.report.samples import Samples
from tests.conftest import MakeFeatures


def test_it_is_the_double_loops(make_features: MakeFeatures, tmp_path: Path) -> None:
    for shard, labels in (("a.tar", [0, 1, 2] * 20), ("b.tar", [1, 0, 3] * 15)):
        make_features(shard, labels, bad=[4])
    features = adq.Features(tmp_path / "features")
    plan = adq.build_plan(features, keep=0.3, bins=2, balance="equal")
    samples = Samples.of_plan(plan)
    table = plan.table()
    usable = np.array([reason != "bad" for reason in table["reason"].to_pylist()])
    rows = np.zeros((len(table), features.width), dtype=np.float32)
    rows[usable] = np.concatenate([file.embedding() for file in features])
    label, kept = table["label"].to_numpy(), np.array(table["kept"])
    expected = {}
    for i in np.flatnonzero(usable).tolist():
        others = [j for j in np.flatnonzero(kept & (label == label[i])).tolist() if j != i]
        if others:
            expected[i] = max(others, key=lambda j: (rows[i] @ rows[j], -j))
    got = nearest_kept(samples, features, range(len(table)))
    assert got.keys() == expected.keys()
    close = [abs(rows[i] @ rows[got[i]] - rows[i] @ rows[expected[i]]) for i in got]
    assert max(close) < 1e-6
    assert nearest_kept(samples, features, []) == {}
