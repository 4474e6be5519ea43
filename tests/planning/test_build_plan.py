"""A folder of features becomes one plan file, the same one wherever and however often it is made."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.files import lock
from adq_wds.planning import build_plan as plan_job
from adq_wds.planning.buckets import Buckets
from adq_wds.planning.build_plan import find_bins
from adq_wds.tables.bins import Bins
from adq_wds.tables.features import Features, file_name
from adq_wds.tables.features_file import ShardFeatures

MakeFeatures = Callable[..., ShardFeatures]
SHARDS = {"a.tar": 50, "deep/b.tar": 30, "c.tar": 40}


def fill(make_features: MakeFeatures, folder: Path, shards: list[str]) -> Path:
    for shard in shards:
        label = np.random.default_rng(SHARDS[shard]).integers(0, 3, SHARDS[shard]).tolist()
        make_features(shard, label, folder=folder, bad=[3], signed=True)
    return folder


@pytest.fixture
def folder(make_features: MakeFeatures, tmp_path: Path) -> Path:
    return fill(make_features, tmp_path / "features", list(SHARDS))


# ---- Repeatable (F26)


def test_order_place_and_dates_of_files_change_no_byte(
    make_features: MakeFeatures, folder: Path, tmp_path: Path
) -> None:
    other = fill(make_features, tmp_path / "elsewhere" / "f", list(SHARDS)[::-1])
    for i, path in enumerate(sorted(other.iterdir())):
        os.utime(path, (1e9 - i, 1e9 - i))
    first, again, moved = tmp_path / "1.parquet", tmp_path / "2.parquet", tmp_path / "far" / "3.parquet"
    plans = [
        adq.build_plan(folder, bins=4, out=first),
        adq.build_plan(str(folder), bins=4, out=str(again)),
        adq.build_plan(Features(other), bins=4, out=moved),
    ]
    assert len({plan.hash for plan in plans}) == 1
    assert first.read_bytes() == again.read_bytes() == moved.read_bytes()


def test_features_written_by_another_packing_make_the_same_plan(folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    other = tmp_path / "packed"
    other.mkdir()
    for path in folder.iterdir():
        file = pq.ParquetFile(path)
        table = file.read_row_group(0)
        with pq.ParquetWriter(other / path.name, file.schema_arrow, compression="gzip") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(file.metadata.metadata)
    assert adq.build_plan(other).hash == adq.build_plan(folder).hash


def test_threads_of_the_blas_and_hash_seeds_change_nothing(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    for shard, n in (("a.tar", 500), ("b.tar", 300)):
        make_features(shard, [0] * n, width=96, signed=True)
    code = (
        "import sys, adq_wds\n"
        "for memory in (0, 1 << 30):\n"
        "    plan = adq_wds.build_plan(sys.argv[1], bins=7, memory_bytes=memory, must_include=['k0400', 'k0450'])\n"
        "    print(plan.hash)\n"
    )
    said = []
    for threads, seed in (("1", "1"), ("2", "2")):
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, threads), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(tmp_path / "features")]
        said += subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
    assert len(said) == 4
    assert len(set(said)) == 1


def test_bins_made_once_give_the_same_plans(folder: Path, tmp_path: Path) -> None:
    features = Features(folder)
    bins = find_bins(features, bins=6)
    bins.save(tmp_path / "bins.parquet")
    for keep in (0.1, 0.6):
        fresh = adq.build_plan(folder, bins=6, keep=keep)
        assert adq.build_plan(folder, bins=bins, keep=keep).hash == fresh.hash
        loaded = Bins.load(tmp_path / "bins.parquet")
        assert adq.build_plan(features, bins=loaded, keep=keep).hash == fresh.hash


# ---- The file


def test_the_plan_is_opened_from_its_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folders" / "plan.parquet"
    plan = adq.build_plan(folder, keep=0.3, out=out)
    assert plan.path == out
    in_memory = adq.build_plan(folder, keep=0.3)
    assert in_memory.path is None
    assert adq.load_plan(out).hash == plan.hash == in_memory.hash
    assert plan.table().equals(in_memory.table())
    assert sorted(p.name for p in out.parent.iterdir()) == ["plan.parquet"]


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("features/plan.parquet", "lies among the features"),
        (".", "a folder; give a file name"),
        ("file/plan.parquet", r"cannot make the folder .*file"),
        ("read-only/plan.parquet", r"cannot write into the folder .*: permission denied"),
    ],
)
def test_a_place_where_no_plan_can_lie_is_refused(
    out: str, text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "bin_samples", lambda *a, **k: pytest.fail("worked for nothing"))
    (tmp_path / "file").write_text("")
    if out.startswith("read-only"):
        monkeypatch.setattr(os, "access", lambda *a: False)
    with pytest.raises(adq.AdqError, match=text):
        adq.build_plan(folder, out=tmp_path / out)


def test_of_two_jobs_the_second_is_told_at_once_who_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "bin_samples", lambda *a, **k: pytest.fail("worked for nothing"))
    out = tmp_path / "out" / "plan.parquet"
    out.parent.mkdir()
    with (
        lock(out.parent),
        pytest.raises(adq.AdqError, match=rf"out is in use by pid {os.getpid()} on .*; wait for it"),
    ):
        adq.build_plan(folder, out=out)
    assert not out.exists()


def test_a_plan_that_cannot_be_met_leaves_the_old_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.parquet"
    before = adq.build_plan(folder, keep=0.2, out=out).hash
    with pytest.raises(adq.PlanError, match="not among the usable samples"):
        adq.build_plan(folder, keep=0.4, must_include=["k0003"], out=out)
    assert adq.load_plan(out).hash == before
    assert adq.build_plan(folder, keep=0.4, out=out).hash != before


def test_nothing_is_written_beside_the_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder of features will do."""
    used: list[Path] = []
    real = Buckets.write
    monkeypatch.setattr(
        Buckets, "write", lambda self, *a, **k: (used.append(self.path.parent.parent), real(self, *a, **k))
    )
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    folder_date = folder.stat().st_mtime_ns
    adq.build_plan(folder, out=tmp_path / "out" / "plan.parquet")
    adq.build_plan(folder)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before
    assert folder.stat().st_mtime_ns == folder_date
    assert used == [tmp_path / "out", Path(tempfile.gettempdir())]


# ---- Arguments


def test_wrong_arguments_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown allocation 'dq'; did you mean adaptive, published, uniform"
    ):
        adq.build_plan(folder, out=tmp_path / "out" / "plan.parquet", allocation="dq")
    assert not (tmp_path / "out").exists()


def test_classes_are_chosen_with_the_bins(folder: Path) -> None:
    bins = find_bins(Features(folder), bins=3)
    with pytest.raises(ValueError, match="classes= is chosen when bins are made"):
        adq.build_plan(folder, bins=bins, classes=[0])


def test_a_bar_is_shown_only_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adq.build_plan(folder, progress=False)
    adq.build_plan(folder)  # not a terminal
    assert capsys.readouterr().err == ""
    adq.build_plan(folder, progress=True)
    assert "240/240" in capsys.readouterr().err


# ---- Sets that changed (F29)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "regrown", "label", "byte", "encoder"])
def test_changed_features_have_another_plan_and_no_old_bins(
    change: str, make_features: MakeFeatures, folder: Path
) -> None:
    old_hash = adq.build_plan(folder, keep=1).hash
    bins = find_bins(Features(folder), bins=10)
    label = np.random.default_rng(40).integers(0, 3, 40)
    options: dict[str, Any] = {"bad": [3], "signed": True}
    if change == "added":
        make_features("d.tar", [0, 1])
    elif change == "removed":
        (folder / "c.parquet").unlink()
    elif change == "renamed":
        made = make_features("e.tar", label.tolist(), **options)
        (folder / "c.parquet").unlink()
        assert file_name(made.shard) == "e.parquet"
    elif change == "regrown":
        make_features("c.tar", [*label.tolist(), 0], **options)
    elif change == "label":
        label[5] = (label[5] + 1) % 3
        make_features("c.tar", label.tolist(), **options)
    elif change == "byte":
        made = make_features("c.tar", label.tolist(), **options)
        made.spans.crc32[7] += 1
        made.save(folder / "c.parquet")
    else:
        shutil.rmtree(folder)
        for shard in SHARDS:
            other = np.random.default_rng(SHARDS[shard]).integers(0, 3, SHARDS[shard])
            make_features(shard, other.tolist(), encoder="another", **options)
    assert adq.build_plan(folder, keep=1).hash != old_hash
    with pytest.raises(adq.PlanError, match="the bins were made from other features"):
        adq.build_plan(folder, bins=bins)
