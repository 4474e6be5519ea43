"""Any samples are planned by embeddings of their own: without images, nothing asks for pixels."""

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.embedding.estimate import estimate
from adq_wds.models.thumbnail import Thumbnail
from tests.conftest import jpeg, write_tar

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


def npy(row: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, row)
    return out.getvalue()


H = np.random.default_rng(0).normal(size=(2 * N, 8)).astype(np.float32)


def texts(first: int) -> list[tuple[str, bytes]]:
    members = []
    for i in range(first, first + N):
        members += [
            (f"t{i:03d}.json", json.dumps({"text": f"do {i}"}).encode()),
            (f"t{i:03d}.emb.npy", npy(H[i])),
        ]
    return members


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write_tar(tmp_path / f"{name}.tar", texts(N * i)) for i, name in enumerate("ab")]


@pytest.fixture(params=["parquet", "npy", "folder", "field"])
def embeddings(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same numbers in each form."""
    if request.param == "parquet":
        pq.write_table(
            pa.table({"key": [f"t{i:03d}" for i in range(2 * N)], "embedding": list(H)}),
            tmp_path / "e.parquet",
        )
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
    shards: list[Path], embeddings: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    features = adq.embed_shards(
        shards, out=tmp_path / "f", label=None, embeddings=embeddings, scores=[Length()]
    )
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
    kept = [
        sample["__key__"] for sample in adq.ShardDataset([str(s) for s in shards], plan=plan, shuffle=False)
    ]
    rows = plan.table().to_pylist()
    assert sorted(kept) == sorted(row["key"] for row in rows if row["kept"])


def test_texture_asked_for_by_name_says_what_to_do(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, out=tmp_path / "f", label=None, embeddings="field:emb.npy")
    for scores in (["texture"], ["texture", "diversity"]):
        with pytest.raises(adq.FeaturesError, match=r"no texture here.*scores=\['diversity'\]"):
            adq.build_plan(features, scores=scores)
        with pytest.raises(adq.FeaturesError, match="no texture here"):
            adq.fit_codebook(features, bins=2, scores=scores)


def test_a_codebook_of_text_goes_by_diversity(shards: list[Path], tmp_path: Path) -> None:
    features = adq.embed_shards(shards, out=tmp_path / "f", label=None, embeddings="field:emb.npy")
    codebook = adq.fit_codebook(features, bins=2, out=tmp_path / "c.safetensors")
    assert codebook.header["settings"]["scores"] == ["diversity"]
    assert adq.load_codebook(tmp_path / "c.safetensors").hash == codebook.hash


@pytest.mark.parametrize("image", [None, "none"])
def test_no_image_may_be_said_and_then_none_is_decoded(tmp_path: Path, image: Any) -> None:
    """The second image is damaged, which nobody notices."""
    members = [
        ("a.jpg", jpeg(0)),
        ("a.emb.npy", npy(H[0])),
        ("b.jpg", jpeg(1)[:40]),
        ("b.emb.npy", npy(H[1])),
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    features = adq.embed_shards(
        shard, out=tmp_path / "f", image=image, label=None, embeddings="field:emb.npy"
    )
    (file,) = features
    assert (file.n, file.has_texture) == (2, False)
    digest = file.digest()
    assert digest is not None
    assert digest[0].tobytes() == hashlib.blake2b(jpeg(0), digest_size=16).digest()
    with pytest.raises(adq.SampleError, match=r"key 'b'.*embeddings are given, so image=None .* none\)"):
        adq.embed_shards(shard, out=tmp_path / "g", label=None, embeddings="field:emb.npy")
    with pytest.raises(adq.FeaturesError, match=r"made with image 'none', now 'jpg'"):
        adq.embed_shards(shard, out=tmp_path / "f", image="jpg", label=None, embeddings="field:emb.npy")


def test_digests_of_text_are_of_every_field_and_no_key(tmp_path: Path) -> None:
    bodies = [b"x", b"x", b"y", b"x"]
    fields = [("json", "emb.npy")] * 3 + [("jsn", "emb.npy")]
    members = [
        (f"k{i}.{name}", data)
        for i, (body, names) in enumerate(zip(bodies, fields, strict=True))
        for name, data in zip(names, (body, npy(H[0])), strict=True)
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    (file,) = adq.embed_shards(shard, out=tmp_path / "f", label=None, embeddings="field:emb.npy")
    digest = file.digest()
    assert digest is not None
    a, b, c, d = (row.tobytes() for row in digest)
    assert a == b
    assert len({a, c, d}) == 3


def test_what_needs_images_refuses_to_go_without(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image=None \(--image none\) needs embeddings made elsewhere"):
        adq.embed_shards(shards, "thumbnail", tmp_path / "f", image=None)
    with pytest.raises(ValueError, match="score 'bright' looks at images, and image=None leaves them out"):
        adq.embed_shards(
            shards, out=tmp_path / "f", image="none", embeddings="field:emb.npy", scores=[Bright()]
        )
    with pytest.raises(adq.SampleError, match="key 't000': no image field: looked for"):
        adq.embed_shards(
            shards, out=tmp_path / "f", label=None, embeddings="field:emb.npy", scores=[Bright()]
        )
    with pytest.raises(ValueError, match="views need an encoder"):
        adq.embed_shards(shards, out=tmp_path / "f", label=None, embeddings="field:emb.npy", views=3)


def test_the_command_plans_text_and_its_dry_run_tells_so(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = [
        "run",
        "a.tar",
        "b.tar",
        "--label",
        "none",
        "--embeddings",
        "field:emb.npy",
        "--keep",
        "0.2",
        "-o",
        "r",
    ]
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
    assert (
        estimate(["a.tar"], Thumbnail(), image="none", label=None, embeddings="field:emb.npy")["samples"] == N
    )


@pytest.mark.parametrize("with_images", [True, False])
def test_an_empty_first_shard_says_nothing_of_the_others(tmp_path: Path, with_images: bool) -> None:
    members = [(f"t{i}.{'jpg' if with_images else 'txt'}", jpeg(i)) for i in range(4)]
    shards = [str(write_tar(tmp_path / "a.tar", [])), str(write_tar(tmp_path / "b.tar", members))]
    np.save(tmp_path / "e.npy", H[:4])
    features = adq.embed_shards(
        shards, embeddings=tmp_path / "e.npy", label=None, out=tmp_path / "f", progress=False
    )
    assert [file.has_texture for file in features] == [with_images]
