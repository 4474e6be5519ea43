"""Embeddings made elsewhere become features as any others do: of a file, or of a field of the samples."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.embedding.estimate import estimate
from adq_wds.registry import encoder
from adq_wds.tables.spans import scan_spans
from tests.conftest import Caplog, Capsys, MonkeyPatch, jpeg, write_tar
from tests.embedded import npy, png, unit

D = 6


def vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def write(path: Path, rows: Any, *, first: int = 0, field: str = "emb.npy") -> Path:
    """A shard by WebDataset's own writer; a row is an array, the field's bytes, or None for no field."""
    with wds.TarWriter(str(path)) as sink:
        for i, row in enumerate(rows, first):
            sample: dict[str, Any] = {"__key__": f"s{i:03d}", "png": png(i), "cls": i % 2}
            if row is not None:
                sample[field] = row
            sink.write(sample)
    return path


def embed(path: Path | list[Path], out: Path, **options: Any) -> adq.Features:
    return adq.embed_shards(path, out=out, embeddings="field:emb.npy", **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("two_axes", [False, True])
def test_what_webdataset_writes_becomes_the_features(tmp_path: Path, dtype: Any, two_axes: bool) -> None:
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
                a, b = (each.read_columns([column])[column] for each in (ours, theirs))
                assert a.equals(b), column


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
def test_a_bad_embedding_is_named_or_skipped(tmp_path: Path, row: Any, message: str, batch_size: int) -> None:
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
def test_the_first_that_can_be_read_sets_the_width(tmp_path: Path, batch_size: int) -> None:
    h = vectors(8)
    path = write(tmp_path / "a.tar", [None, b"no npy", *h[2:], np.ones(D - 1)])
    for workers in (1, 4):
        (file,) = embed(
            path, tmp_path / f"f{workers}", on_error="skip", batch_size=batch_size, workers=workers,
            max_bad_fraction=0.5,
        )  # fmt: skip
        np.testing.assert_array_equal(file.embedding(), unit(h[2:]))
        assert [entry[1] for entry in file.bad] == ["s000", "s001", "s008"]


def test_a_shard_without_the_field_ends_the_job_and_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", vectors(3), field="vec.npy")
    with pytest.raises(adq.ShardError, match=r"shard a\.tar: none of its 3 samples can be .*no such field"):
        embed(path, tmp_path / "f", on_error="skip", max_bad_fraction=1.0)


def test_shards_of_two_widths_are_refused(tmp_path: Path) -> None:
    shards = [write(tmp_path / "a.tar", vectors(3)), write(tmp_path / "b.tar", vectors(3)[:, :4], first=3)]
    with pytest.raises(adq.FeaturesError, match=r"4.*6|6.*4"):
        embed(shards, tmp_path / "f")


def test_another_field_or_an_encoder_needs_another_folder(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.tar", vectors(5)), tmp_path / "f"
    embed(path, out)
    with pytest.raises(adq.FeaturesError, match=r"made with encoder 'field:emb\.npy', now 'field:vec\.npy'"):
        adq.embed_shards(path, out=out, embeddings="field:vec.npy")
    with pytest.raises(adq.FeaturesError, match=r"made with encoder 'field:emb\.npy', now 'thumbnail'"):
        adq.embed_shards(path, "thumbnail", out)


def test_adq_run_repeats_from_its_own_record(tmp_path: Path, capsys: Capsys) -> None:
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


# ---- Of a file


@pytest.fixture
def by_key(shards: list[Path], tmp_path: Path) -> NDArray[np.float32]:
    """The file e.parquet, of all samples in another order."""
    rows = [(s.name, key) for s in shards for key in scan_spans(s, shard=s.name).keys]
    h = np.random.default_rng(0).normal(size=(len(rows), 6)).astype(np.float32)
    order = np.random.default_rng(1).permutation(len(rows))
    shard, key = zip(*(rows[i] for i in order), strict=True)
    table = pa.table({"shard": shard, "key": key, "embedding": list(h[order])})
    pq.write_table(table, tmp_path / "e.parquet")
    return h


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_rows_of_a_file_go_to_their_samples(
    shards: list[Path], by_key: NDArray[np.float32], tmp_path: Path, name: str
) -> None:
    np.save(tmp_path / "e.npy", by_key)
    features = adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / name, batch_size=9)
    found = {file.shard: file.embedding() for file in features}
    for path, rows in zip(shards, np.split(unit(by_key), [50, 120]), strict=True):
        assert np.array_equal(found[path.name], rows)


def test_a_file_may_hold_more_keys_and_not_fewer(
    shards: list[Path], by_key: NDArray[np.float32], make_shard: Any, tmp_path: Path
) -> None:
    path = tmp_path / "e.parquet"
    assert len(adq.embed_shards(shards[:1], out=tmp_path / "f", embeddings=path)) == 50
    more = make_shard("d.tar", 3)
    with pytest.raises(adq.FeaturesError, match=r"embeddings .*: shard d\.tar is none of its"):
        adq.embed_shards([*shards, more], out=tmp_path / "f", embeddings=path)
    make_shard("c.tar", 5, side=17)
    with pytest.raises(adq.FeaturesError, match=r"shard c\.tar, key 's00003': not in embeddings"):
        adq.embed_shards(shards, out=tmp_path / "f", embeddings=path)


@pytest.mark.parametrize(
    ("n", "text"), [(122, "holds 122 embeddings|122 rows for 123"), (124, "124 rows for 123 samples")]
)
def test_an_npy_of_another_length_is_refused(shards: list[Path], tmp_path: Path, n: int, text: str) -> None:
    np.save(tmp_path / "e.npy", np.ones((n, 4), np.float32))
    with pytest.raises(adq.FeaturesError, match=text):
        adq.embed_shards(shards, out=tmp_path / "f", embeddings=tmp_path / "e.npy")


# ---- Samples without images

N = 30


class Length(adq.Score):
    """The norm of the embedding, for which no image is needed."""

    name = "length"
    needs_image = False

    def per_sample(self, image: Any, h: Any) -> float:
        assert image is None
        return float(np.linalg.norm(h))


class Bright(adq.Score):
    """Needs an image."""

    name = "bright"

    def per_sample(self, image: Any, h: Any) -> float:
        return float(np.asarray(image).mean())


H = np.random.default_rng(0).normal(size=(2 * N, 8)).astype(np.float32)


def texts(first: int) -> list[tuple[str, bytes]]:
    fields = [(i, {"json": b'{"text": "do %d"}' % i, "emb.npy": npy(H[i])}) for i in range(first, first + N)]
    return [(f"t{i:03d}.{name}", data) for i, sample in fields for name, data in sample.items()]


@pytest.fixture
def text_shards(tmp_path: Path) -> list[Path]:
    return [write_tar(tmp_path / f"{name}.tar", texts(N * i)) for i, name in enumerate("ab")]


@pytest.fixture(params=["parquet", "npy", "folder", "field"])
def embeddings(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same numbers in each form."""
    if request.param == "parquet":
        table = pa.table({"key": [f"t{i:03d}" for i in range(2 * N)], "embedding": list(H)})
        pq.write_table(table, tmp_path / "e.parquet")
        return str(tmp_path / "e.parquet")
    if request.param == "npy":
        np.save(tmp_path / "e.npy", H)
        return str(tmp_path / "e.npy")
    if request.param == "folder":
        (tmp_path / "img_emb").mkdir()
        for i in range(2):
            np.save(tmp_path / "img_emb" / f"img_emb_{i}.npy", H[N * i : N * (i + 1)])
        return str(tmp_path / "img_emb")
    return "field:emb.npy"


def test_text_is_planned_by_its_own_embeddings(
    text_shards: list[Path], embeddings: str, tmp_path: Path, caplog: Caplog
) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    options: Any = {"label": None, "embeddings": embeddings, "scores": [Length()]}
    features = adq.embed_shards(text_shards, out=tmp_path / "f", **options)
    assert features.header["image"] == "none"
    assert features.texture() is None
    assert "shard a.tar has no image field: samples are taken without images" in caplog.text
    rows = np.concatenate([file.embedding() for file in features])
    assert np.array_equal(rows, (H / np.linalg.norm(H, axis=1, keepdims=True)).astype(np.float16))
    assert features.score("length") == pytest.approx(np.linalg.norm(H, axis=1))
    plan = adq.build_plan(features, keep=0.2, bins=3)
    assert plan.n_kept == 12
    assert plan.header["settings"]["scores"] == ["diversity"]
    assert "made without images, so there is no texture: scored by diversity alone" in caplog.text
    named = adq.build_plan(features, keep=0.2, bins=3, scores=["diversity"])
    assert named.hash == plan.hash
    assert adq.build_plan(features, keep=0.2, bins=3, scores=[Length()]).n_kept == 12
    stream = adq.ShardDataset([str(s) for s in text_shards], plan=plan, shuffle=False)
    kept = [sample["__key__"] for sample in stream]
    rows = plan.table().to_pylist()
    assert sorted(kept) == sorted(row["key"] for row in rows if row["kept"])


def test_texture_asked_for_by_name_says_what_to_do(text_shards: list[Path], tmp_path: Path) -> None:
    features = embed(text_shards, tmp_path / "f", label=None)
    for scores in (["texture"], ["texture", "diversity"]):
        with pytest.raises(adq.FeaturesError, match=r"no texture here.*scores=\['diversity'\]"):
            adq.build_plan(features, scores=scores)
        with pytest.raises(adq.FeaturesError, match="no texture here"):
            adq.fit_codebook(features, bins=2, scores=scores)
    codebook = adq.fit_codebook(features, bins=2)
    assert codebook.header["settings"]["scores"] == ["diversity"]


@pytest.mark.parametrize("image", [None, "none"])
def test_no_image_may_be_said_and_then_none_is_decoded(tmp_path: Path, image: Any) -> None:
    """The second image is damaged, which nobody notices."""
    a, b = ("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)[:40])
    shard = write_tar(tmp_path / "a.tar", [a, ("a.emb.npy", npy(H[0])), b, ("b.emb.npy", npy(H[1]))])
    (file,) = embed(shard, tmp_path / "f", image=image, label=None)
    assert (file.n, file.has_texture) == (2, False)
    digest = file.digest()
    assert digest is not None
    assert digest[0].tobytes() == hashlib.blake2b(jpeg(0), digest_size=16).digest()
    with pytest.raises(adq.SampleError, match=r"key 'b'.*embeddings are given, so image=None .* none\)"):
        embed(shard, tmp_path / "g", label=None)
    with pytest.raises(adq.FeaturesError, match=r"made with image 'none', now 'jpg'"):
        embed(shard, tmp_path / "f", image="jpg", label=None)


def test_digests_of_text_are_of_every_field_and_no_key(tmp_path: Path) -> None:
    fields = [("json", b"x"), ("json", b"x"), ("json", b"y"), ("jsn", b"x")]
    members = [(f"k{i}.{n}", d) for i, field in enumerate(fields) for n, d in (field, ("emb.npy", npy(H[0])))]
    (file,) = embed(write_tar(tmp_path / "a.tar", members), tmp_path / "f", label=None)
    digest = file.digest()
    assert digest is not None
    a, b, c, d = (row.tobytes() for row in digest)
    assert a == b
    assert len({a, c, d}) == 3


def test_what_needs_images_refuses_to_go_without(text_shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image=None \(--image none\) needs embeddings made elsewhere"):
        adq.embed_shards(text_shards, "thumbnail", tmp_path / "f", image=None)
    with pytest.raises(ValueError, match="score 'bright' looks at images, and image=None leaves them out"):
        embed(text_shards, tmp_path / "f", image="none", scores=[Bright()])
    with pytest.raises(adq.SampleError, match="key 't000': no image field: looked for"):
        embed(text_shards, tmp_path / "f", label=None, scores=[Bright()])
    with pytest.raises(ValueError, match="views need an encoder"):
        embed(text_shards, tmp_path / "f", label=None, views=3)


def test_the_command_plans_text(
    text_shards: list[Path], tmp_path: Path, capsys: Capsys, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["run", "a.tar", "b.tar", "--label", "none", "--keep", "0.2", "-o", "r"]
    run += ["--embeddings", "field:emb.npy"]
    assert main([*run, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["samples"], said["kept"]) == (2 * N, 12)
    assert main([*run, "--bins", "3"]) == 0
    out = capsys.readouterr().out
    assert "keeps 12 of 60 samples" in out
    assert "texture" not in out
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "r" / "features").glob("*.parquet"))
    assert abs(said["features_bytes"] - 2 * N * (8 * 2 + 64 + 16)) == 0
    assert said["features_bytes"] < n_bytes + 20_000
    options: Any = {"image": "none", "label": None, "embeddings": "field:emb.npy"}
    assert estimate(["a.tar"], encoder("thumbnail"), **options)["samples"] == N


@pytest.mark.parametrize("with_images", [True, False])
def test_an_empty_first_shard_says_nothing_of_the_others(tmp_path: Path, with_images: bool) -> None:
    members = [(f"t{i}.{'jpg' if with_images else 'txt'}", jpeg(i)) for i in range(4)]
    two = [str(write_tar(tmp_path / "a.tar", [])), str(write_tar(tmp_path / "b.tar", members))]
    np.save(tmp_path / "e.npy", H[:4])
    features = adq.embed_shards(two, out=tmp_path / "f", embeddings=tmp_path / "e.npy", label=None)
    assert [file.has_texture for file in features] == [with_images]
