"""Labels may change, and digests come, without embedding again: the folder is then that of a fresh job."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.score import Score
from adq_wds.tables.features_file import FeaturesFile, ShardFeatures
from tests.conftest import Caplog, jpeg, write_tar
from tests.embedded import Watching, files, shard_of

N = 12


def with_head(images: Sequence[Image.Image]) -> tuple[Any, Any]:
    """Thumbnails, and logits of three classes."""
    h, _ = Thumbnail()(images)
    return h, h[:, :3]


class Red(Score):
    """How red an image is."""

    name = "red"

    def per_sample(self, image: Image.Image, h: Any) -> float:
        return float(np.asarray(image)[..., 0].mean())


def members(first: int, n: int = N) -> list[tuple[str, bytes]]:
    out = []
    for i in range(first, first + n):
        document = json.dumps({"y": i % 3, "word": f"w{i % 2}"}).encode()
        fields = {"jpg": jpeg(i), "cls": str(i % 2).encode(), "json": document}
        out += [(f"s{i:03d}.{name}", data) for name, data in fields.items()]
    return out


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write_tar(tmp_path / f"{name}.tar", members(20 * i)) for i, name in enumerate("abc")]


def test_another_label_gives_a_fresh_jobs_bytes(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    encoder = Watching(with_head)
    adq.embed_shards(shards, encoder, tmp_path / "f", scores=[Red()])
    n = encoder.n
    for label in ("json:y", "json:word", None, "none", lambda sample: sample["__key__"], "cls"):
        caplog.clear()
        adq.embed_shards(shards, encoder, tmp_path / "f", label=label, scores=[Red()])
        assert encoder.n == n
        out = tmp_path / f"fresh{len(list(tmp_path.iterdir()))}"
        adq.embed_shards(shards, Watching(with_head), out, label=label, scores=[Red()])
        assert files(tmp_path / "f") == files(out)
        if label not in (None, "none"):
            assert "shard a.tar: labels are read again, by" in caplog.text


def test_scores_that_are_not_asked_for_now_stay(shards: list[Path], tmp_path: Path) -> None:
    adq.embed_shards(shards, Watching(with_head), tmp_path / "f", scores=[Red()])
    before = adq.Features(tmp_path / "f").score("red")
    features = adq.embed_shards(shards, Watching(with_head), tmp_path / "f", label="json:y")
    assert features.score("red").tobytes() == before.tobytes()


def test_only_bad_samples_are_tried_again(tmp_path: Path, caplog: Caplog) -> None:
    """One has no cls, one no json, one no whole image."""
    caplog.set_level(logging.INFO, "adq_wds")
    every = members(0)
    damaged = [(name, data[:50] if name == "s005.jpg" else data) for name, data in every]
    left = [member for member in damaged if member[0] not in ("s003.cls", "s007.json")]
    shard = write_tar(tmp_path / "a.tar", left)
    encoder = Watching(with_head)
    options: dict[str, Any] = {"on_error": "skip", "max_bad_fraction": 0.5}
    (file,) = adq.embed_shards(shard, encoder, tmp_path / "f", **options)
    assert [row[1] for row in file.bad] == ["s003", "s005"]
    n = encoder.n
    (file,) = adq.embed_shards(shard, encoder, tmp_path / "f", label="json:y", **options)
    assert [row[1] for row in file.bad] == ["s005", "s007"]
    assert encoder.n == n + 1
    adq.embed_shards(shard, Watching(with_head), tmp_path / "fresh", label="json:y", **options)
    assert files(tmp_path / "f") == files(tmp_path / "fresh")
    with pytest.raises(adq.SampleError, match=r"shard a\.tar, key 's003': no label field: looked for cls"):
        adq.embed_shards(shard, encoder, tmp_path / "f")
    assert files(tmp_path / "f") == files(tmp_path / "fresh")


def test_a_stopped_job_leaves_each_shard_old_or_new(shards: list[Path], tmp_path: Path) -> None:
    encoder, stop = Watching(with_head), True

    def label(sample: dict[str, Any]) -> int:
        if stop and sample["__url__"].endswith("b.tar"):
            raise KeyboardInterrupt
        return int(json.loads(sample["json"])["y"])

    adq.embed_shards(shards, encoder, tmp_path / "f")
    n, old = encoder.n, files(tmp_path / "f")
    with pytest.raises(KeyboardInterrupt):
        adq.embed_shards(shards, encoder, tmp_path / "f", label=label, workers=1)
    stop = False
    adq.embed_shards(shards, encoder, tmp_path / "fresh", label=label)
    new, now = files(tmp_path / "fresh"), files(tmp_path / "f")
    assert [now[name] == new[name] for name in new] == [True, False, False]
    assert [now[name] == old[name] for name in new] == [False, True, True]
    with pytest.raises(adq.FeaturesError, match=r"label .*embed all shards again with .* one label"):
        adq.Features(tmp_path / "f")
    adq.embed_shards(shards, encoder, tmp_path / "f", label=label)
    assert files(tmp_path / "f") == new
    assert encoder.n == 2 * n


def test_logit_gradients_depend_on_the_labels(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    encoder = Watching(with_head)
    adq.embed_shards(shards, encoder, tmp_path / "f", logit_grad=True)
    adq.embed_shards(shards, encoder, tmp_path / "f", logit_grad=True, label="json:y")
    assert encoder.n == 2 * 3 * N
    assert "has no logit_grad by label 'json:y'; embedding the shard again" in caplog.text
    adq.embed_shards(shards, encoder, tmp_path / "fresh", logit_grad=True, label="json:y")
    assert files(tmp_path / "f") == files(tmp_path / "fresh")
    n = encoder.n
    adq.embed_shards(shards, encoder, tmp_path / "f")  # none are asked for: those of the old labels go
    assert encoder.n == n
    assert FeaturesFile(tmp_path / "f" / "a.parquet").n_classes is None


def older(folder: Path) -> None:
    """The files as they were before there were digests and members."""
    for path in folder.glob("*.parquet"):
        file = FeaturesFile(path)
        ours = ("format", "version", "n_classes", "width", "columns", "label_names", "shards", "bad")
        ShardFeatures(
            file.shard, replace(file.spans(), members=None), file.read_columns(["label"])["label"].to_numpy(), file.embedding(), file.norm(),
            file.texture(), {name: value for name, value in file.header.items() if name not in ours}, file.names,
            file.bad_spans(), [row[5] for row in file.bad], None if file.n_classes is None else file.logit_grad(),
            {name: file.score(name) for name in file.scores},
        ).save(path)  # fmt: skip


def test_older_features_get_digests_unencoded(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    caplog.set_level(logging.INFO, "adq_wds")
    shards.append(write_tar(tmp_path / "d.tar", [*members(90), ("z.jpg", jpeg(0)[:60]), ("z.cls", b"0")]))
    encoder = Watching(with_head)
    options: dict[str, Any] = {"logit_grad": True, "scores": [Red()], "on_error": "skip"}
    adq.embed_shards(shards, encoder, tmp_path / "f", **options)
    n, whole = encoder.n, files(tmp_path / "f")
    older(tmp_path / "f")
    assert {FeaturesFile(path).header["version"] for path in (tmp_path / "f").glob("*")} == {2}
    adq.embed_shards(shards, encoder, tmp_path / "f", **options)
    assert (encoder.n, files(tmp_path / "f")) == (n, whole)
    assert "shard a.tar: digests are added to older features, without embedding" in caplog.text
    caplog.clear()
    adq.embed_shards(shards, encoder, tmp_path / "f", **options)
    assert "digests" not in caplog.text


def test_a_shard_that_changed_is_embedded_again_not_read(shards: list[Path], tmp_path: Path) -> None:
    encoder = Watching(with_head)
    adq.embed_shards(shards, encoder, tmp_path / "f")
    older(tmp_path / "f")
    data, stamp = bytearray(shards[0].read_bytes()), shards[0].stat()
    at = data.index(b"\xff\xd8")
    data[at + 300] ^= 1
    shards[0].write_bytes(data)
    os.utime(shards[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as if nothing had happened
    adq.embed_shards(shards, encoder, tmp_path / "f")
    assert encoder.n == 3 * N + N
    adq.embed_shards(shards, encoder, tmp_path / "fresh")
    assert files(tmp_path / "f") == files(tmp_path / "fresh")


def test_a_limit_reads_again_what_was_embedded(shards: list[Path], tmp_path: Path) -> None:
    encoder = Watching(with_head)
    adq.embed_shards(shards, encoder, tmp_path / "f", limit=N + 5)
    n = encoder.n
    part = adq.embed_shards(shards, encoder, tmp_path / "f", limit=N + 5, label="json:word")
    assert encoder.n == n
    assert [(file.n, file.names) for file in part] == [(N, ["w0", "w1"]), (5, ["w0", "w1"])]


def test_a_run_with_another_label_plans_anew_and_embeds_nothing(shards: list[Path], tmp_path: Path) -> None:
    from adq_wds.jobs.run import run_job

    def run(label: str) -> dict[str, Any]:
        return run_job(
            shards, tmp_path / "run", encoder={"spec": "thumbnail"}, embed={"label": label}, plan={"bins": 2, "keep": 0.5}
        )  # fmt: skip

    run("cls")
    path = tmp_path / "run" / "features" / "a.parquet"
    embedding = FeaturesFile(path).read_columns(["embedding"])
    run("json:word")
    assert FeaturesFile(path).read_columns(["embedding"]).equals(embedding)
    plan = adq.load_plan(tmp_path / "run" / "plan.parquet")
    assert [entry["name"] for entry in plan.header["classes"]] == ["w0", "w1"]


def labelled(path: Path, labels: list[bytes]) -> Path:
    return shard_of(path, len(labels), {i: {"cls": label} for i, label in enumerate(labels)})


@pytest.mark.parametrize(
    ("labels", "text", "kept"),
    [
        ([b"1", b"0", b"cat", b"1"], r"key 'k2': label 'cat', but the shard's first is 1: classes are all", [0, 1, 3]),
        ([b"a", b"0", b"cat", b"b"], r"key 'k1': label 0, but the shard's first is 'a': .*a function of your own", [0, 2, 3]),
        ([b"?", b"a", b"0", b"b"], r"key 'k0', field 'cls': '\?' is neither", [1, 3]),
    ],
)  # fmt: skip
def test_the_first_label_sets_the_kind(tmp_path: Path, labels: Any, text: str, kept: list[int]) -> None:
    shard = labelled(tmp_path / "a.tar", labels)
    with pytest.raises(adq.SampleError, match=r"shard a\.tar, " + text):
        adq.embed_shards(shard, "thumbnail", tmp_path / "f")
    for i, (batch_size, workers) in enumerate([(64, 1), (1, 3)]):
        options: Any = {"max_bad_fraction": 1, "batch_size": batch_size, "workers": workers}
        (file,) = adq.embed_shards(shard, "thumbnail", tmp_path / f"f{i}", on_error="skip", **options)
        assert file.spans().index.tolist() == kept


@pytest.mark.parametrize("words_first", [True, False])
def test_shards_of_numbers_and_of_words_are_refused(tmp_path: Path, words_first: bool) -> None:
    words, numbers = [b"cat", b"dog"], [b"0", b"1"]
    first, second = (words, numbers) if words_first else (numbers, words)
    shards = [labelled(tmp_path / "a.tar", first), labelled(tmp_path / "b.tar", second)]
    text = r"shard b\.tar: its labels are (words, such as 'cat'|numbers), those of shard a\.tar are (words|numbers)"
    for _ in range(2):  # found again by the next job, which reads the first from its file
        with pytest.raises(adq.FeaturesError, match=text):
            adq.embed_shards(shards, "thumbnail", tmp_path / "f")
    assert list(files(tmp_path / "f")) == ["a.parquet", "b.parquet"]  # each is right by itself
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "g", label=lambda s: s["cls"].decode() + "!")
    expected = [sorted(f"{y.decode()}!" for y in part) for part in (first, second)]
    assert [file.names for file in features] == expected
