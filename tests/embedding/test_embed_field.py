"""Embeddings that lie in the shards become features as any others do."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.embedding.batch import embed_batch
from adq_wds.embedding.estimate import estimate
from adq_wds.embedding.settings import request
from adq_wds.embedding.shard import open_job
from adq_wds.registry import encoder
from adq_wds.signatures import EMBED, options_of

D = 6


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def write(path: Path, rows: Any, *, first: int = 0, field: str = "emb.npy") -> Path:
    """A shard by WebDataset's own writer; a row is an array, the field's bytes, or None for no field."""
    with wds.TarWriter(str(path)) as sink:
        for i, row in enumerate(rows, first):
            sample: dict[str, Any] = {"__key__": f"s{i:03d}", "png": picture(i), "cls": i % 2}
            if row is not None:
                sample[field] = row
            sink.write(sample)
    return path


def unit(h: NDArray[Any]) -> NDArray[np.float16]:
    wide = h.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)


def embed(path: Path | list[Path], out: Path, **options: Any) -> adq.Features:
    return adq.embed_shards(path, out=out, embeddings="field:emb.npy", **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("two_axes", [False, True])
def test_what_webdatasets_writer_stores_becomes_the_features(
    tmp_path: Path, dtype: Any, two_axes: bool
) -> None:
    h = vectors(9).astype(dtype)
    (file,) = embed(write(tmp_path / "a.tar", h[:, None] if two_axes else h), tmp_path / "f", batch_size=4)
    np.testing.assert_array_equal(file.embedding(), unit(h))
    assert (file.header["encoder"], file.header["revision"]) == ("field:emb.npy", "field=emb.npy")


def test_features_are_those_of_the_same_embeddings_in_a_file(tmp_path: Path) -> None:
    h = vectors(23)
    shards = [write(tmp_path / "b.tar", h[:14]), write(tmp_path / "a.tar", h[14:], first=14)]
    np.save(tmp_path / "e.npy", h)
    stored = adq.embed_shards(shards, out=tmp_path / "stored", embeddings=tmp_path / "e.npy")
    for workers, batch_size in ((1, 64), (3, 2)):
        inside = embed(shards, tmp_path / f"inside{workers}", workers=workers, batch_size=batch_size)
        for ours, theirs in zip(inside, stored, strict=True):
            for column in theirs.header["columns"]:
                assert ours.read([column])[column].equals(theirs.read([column])[column]), column


def test_the_image_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path)) as sink:
        sink.write({"__key__": "good", "png": picture(0), "cls": 0, "emb.npy": vectors(1)[0]})
        sink.write({"__key__": "bare", "cls": 0, "emb.npy": vectors(1)[0]})
    with pytest.raises(adq.SampleError, match=r"shard a\.tar, key 'bare': no image field"):
        embed(path, tmp_path / "f")


BAD = [
    (None, r"no such field; the sample has 'cls', 'png'; leave the sample out"),
    (b"<html>", "not an npy file"),
    (np.arange(D), r"int64 of shape \(6,\); expected one vector"),
    (np.ones((2, D)), r"float64 of shape \(2, 6\)"),
    (np.ones(D + 1, np.float32), "7 numbers, and the shard's first embedding has 6"),
    (np.full(D, np.nan), "its embedding holds NaN or infinity"),
    (np.full(D, 1e300), "its embedding holds NaN or infinity"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_bad_embedding_is_a_bad_sample_named_or_skipped(
    tmp_path: Path, row: Any, message: str, batch_size: int
) -> None:
    h = vectors(12)
    path = write(tmp_path / "a.tar", [*h[:7], row, *h[8:]])
    place = r"shard a\.tar, key 's007'(, field 'emb\.npy')?: "
    with pytest.raises(adq.SampleError, match=place + message):
        embed(path, tmp_path / "strict", batch_size=batch_size)
    skipped = embed(path, tmp_path / "f", on_error="skip", batch_size=batch_size, max_bad_fraction=0.5)
    (file,) = skipped
    np.testing.assert_array_equal(file.embedding(), unit(np.delete(h, 7, axis=0)))
    assert [entry[1] for entry in file.bad] == ["s007"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_first_that_can_be_read_sets_the_width_whatever_comes_before(
    tmp_path: Path, batch_size: int
) -> None:
    h = vectors(8)
    path = write(tmp_path / "a.tar", [None, b"no npy", *h[2:], np.ones(D - 1)])
    for workers in (1, 4):
        (file,) = embed(
            path, tmp_path / f"f{workers}", on_error="skip", batch_size=batch_size, workers=workers,
            max_bad_fraction=0.5,
        )  # fmt: skip
        np.testing.assert_array_equal(file.embedding(), unit(h[2:]))
        assert [entry[1] for entry in file.bad] == ["s000", "s001", "s008"]


def test_a_batch_that_comes_first_is_judged_by_the_first_sample(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.tar", [*vectors(4), *np.ones((4, D - 1))]))
    usual = {name: option.default for name, option in options_of(EMBED).items() if name != "progress"}
    job = open_job(request(path, "", **usual | {"embeddings": "field:emb.npy"}), path, "a.tar", 0, None)
    with job.close:
        batches = [embed_batch(job, rows) for rows in (range(4, 8), range(4))]
    assert [batch.good for batch in batches] == [[], [0, 1, 2, 3]]
    assert [list(batch.bad) for batch in batches] == [[4, 5, 6, 7], []]


def test_a_shard_without_the_field_ends_the_job_and_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", vectors(3), field="vec.npy")
    with pytest.raises(
        adq.ShardError, match=r"shard a\.tar: none of its 3 samples can be used; .*no such field"
    ):
        embed(path, tmp_path / "f", on_error="skip", max_bad_fraction=1.0)


def test_shards_of_two_widths_are_refused(tmp_path: Path) -> None:
    shards = [write(tmp_path / "a.tar", vectors(3)), write(tmp_path / "b.tar", vectors(3)[:, :4], first=3)]
    with pytest.raises(adq.FeaturesError, match=r"4.*6|6.*4"):
        embed(shards, tmp_path / "f")


def test_changed_embeddings_are_embedded_again_and_equal_ones_are_not(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.tar", vectors(5)), tmp_path / "f"
    first = embed(path, out).hash
    made = os.stat(next(out.glob("*.parquet"))).st_mtime_ns
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert embed(path, out).hash == first
    assert os.stat(next(out.glob("*.parquet"))).st_mtime_ns == made
    write(path, vectors(5, seed=1))  # as many bytes, another date
    assert embed(path, out).hash != first


def test_another_field_or_an_encoder_needs_another_folder(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.tar", vectors(5)), tmp_path / "f"
    embed(path, out)
    with pytest.raises(adq.FeaturesError, match=r"made with encoder 'field:emb\.npy', now 'field:vec\.npy'"):
        adq.embed_shards(path, out=out, embeddings="field:vec.npy")
    with pytest.raises(adq.FeaturesError, match=r"made with encoder 'field:emb\.npy', now 'thumbnail'"):
        adq.embed_shards(path, "thumbnail", out)


def test_a_name_that_is_no_field_is_refused_before_any_shard_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", vectors(2))
    with pytest.raises(ValueError, match=r"embeddings 'field:emb\.pkl': expected field: and the name"):
        adq.embed_shards(path, out=tmp_path / "f", embeddings="field:emb.pkl")
    assert not (tmp_path / "f").exists()


def test_adq_run_plans_from_them_and_repeats_from_its_own_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(write(tmp_path / "a.tar", vectors(12))), str(tmp_path / "out")
    run = ["run", path, "-o", out, "--embeddings", "field:emb.npy", "--bins", "2", "--keep", "0.5", "--json"]
    assert main(run) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["kept"], first["source"]) == (6, ["field:emb.npy", "field=emb.npy"])
    assert main(["run", "--from", f"{out}/run.json", "-o", out, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nothing_to_do"]
    assert again["plan"] == first["plan"]


def test_an_estimate_knows_their_width_and_writes_nothing(tmp_path: Path) -> None:
    shards = [write(tmp_path / f"{D}.tar", vectors(5)), write(tmp_path / "3.tar", vectors(5)[:, :3], first=5)]
    thumbnail = encoder("thumbnail")
    wide, narrow = (estimate(s, thumbnail, embeddings="field:emb.npy")["features_bytes"] for s in shards)
    assert wide - narrow == 5 * 3 * 2  # samples, numbers fewer, bytes of each
    with pytest.raises(adq.SampleError, match=r"field 'vec\.npy': no such field"):
        estimate(shards[0], thumbnail, embeddings="field:vec.npy")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".tar", ".tar"]
