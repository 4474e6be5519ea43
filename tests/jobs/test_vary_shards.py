"""Variants are written as sets of shards with their scores, and a plan chooses among them."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.arguments import make_parser
from adq_wds.cli.main import main
from adq_wds.jobs.vary import vary_shards
from tests.conftest import MakeShard, jpeg, write_tar
from tests.models.test_diffusion import tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(images: Any, labels: Any, noise: Any) -> Any:
    return np.clip(images + noise * 0.3, -1, 1)


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard("train-000000.tar", 12), make_shard("train-000001.tar", 8, first=12)]


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    ds = adq.ShardDataset([str(folder / "*.tar")])
    return {sample["__key__"]: json.loads(sample["json"]) for sample in ds}


def test_each_variant_is_a_set_with_scores(shards: list[Path], tmp_path: Path) -> None:
    encoder = adq.encoder("builtin")
    reports = vary_shards(shards, noisy, encoder, tmp_path / "v", variants=2, seed=3, max_samples=15)
    assert [(report.shards, report.samples) for report in reports] == [(2, 20), (2, 20)]
    stages = adq.Embed(encoder), adq.Vary(noisy, "cls", 3, 1), adq.CosineScore(encoder, label="cls")
    expected = iter(adq.ShardDataset(shards))
    for stage in stages:
        expected = stage(expected)
    for sample, varied in zip(
        adq.ShardDataset(str(tmp_path / "v" / "variant-1" / "*.tar")), expected, strict=True
    ):
        assert list(sample) == ["__key__", "__url__", "cls", "png", "json"]
        assert json.loads(sample["json"]) == {"cos": round(varied["cos"], 6), "agree": varied["agree"]}
        pixels = adq.Decode(to="numpy").apply([sample])[0]["image"]
        assert (pixels == np.asarray(varied["jpg"])).all()
    first, second = (scores(tmp_path / "v" / f"variant-{i}") for i in (0, 1))
    assert first.keys() == second.keys()
    assert first != second


def test_equal_arguments_give_equal_bytes_and_parents_are_named(shards: list[Path], tmp_path: Path) -> None:
    plan = adq.Plan.from_keys(shards, ["s00003", "s00015"])
    for out, size in (("a", 64), ("b", 3)):
        vary_shards(shards, noisy, adq.encoder("thumbnail"), tmp_path / out, plan=plan, batch_size=size)
    names = ["000000.tar", "_info.json"]
    a, b = ([(tmp_path / out / "variant-0" / name).read_bytes() for name in names] for out in "ab")
    assert a == b
    assert list(scores(tmp_path / "a" / "variant-0")) == ["s00003", "s00015"]


def test_half_of_each_class_is_chosen_by_the_stored_cosine(shards: list[Path], tmp_path: Path) -> None:
    vary_shards(shards, noisy, adq.encoder("thumbnail"), tmp_path, variants=2)
    sets = [str(tmp_path / f"variant-{i}" / "*.tar") for i in (0, 1)]
    plan = adq.select_samples(sets, by="json:cos", keep=0.5)
    pipes = [adq.Decode()]
    ds = adq.ShardDataset(sets, plan=plan, pipes=pipes, batch_size=5, fields=("image", "label"), collate=list)
    assert Counter(label for batch in ds for _, label in batch) == {0: 10, 1: 10}


def test_entries_of_the_parents_json_stay(tmp_path: Path) -> None:
    members = [("x.jpg", jpeg(0)), ("x.json", b'{"label": 1, "of": "me"}')]
    shard = write_tar(tmp_path / "a.tar", members)
    vary_shards([shard], noisy, adq.encoder("thumbnail"), tmp_path / "v", label="json:label")
    (entries,) = scores(tmp_path / "v" / "variant-0").values()
    assert (entries["label"], entries["of"]) == (1, "me")
    assert set(entries) == {"label", "of", "cos"}
    wrong = {
        b"[1]": "no JSON object",
        b'{"a": NaN}': "no JSON object",
        b"{": "not JSON",
        b"[" * 99_999: "not JSON",
    }
    for content, message in wrong.items():
        bad = write_tar(tmp_path / "bad.tar", [("x.jpg", jpeg(0)), ("x.json", content)])
        with pytest.raises(adq.SampleError, match=rf"shard bad.tar, key 'x', field 'json': {message}"):
            vary_shards([bad], noisy, adq.encoder("thumbnail"), tmp_path / "w", label="none")


@pytest.mark.parametrize("field", ["png", "cos", "agree", "emb.npy", "json:cos", "json:agree"])
def test_no_field_or_entry_of_the_parent_is_lost(field: str, tmp_path: Path) -> None:
    name, _, entry = field.partition(":")
    content = b'{"%s": 1}' % entry.encode() if entry else jpeg(1)
    shard = write_tar(tmp_path / "a.tar", [("x.jpg", jpeg(0)), (f"x.{name}", content)])
    options: Any = {"image": "jpg", "label": "none"}
    with pytest.raises(
        adq.SampleError, match=rf"shard a.tar, key 'x', field '{field}': is there already; rename"
    ):
        vary_shards([shard], noisy, adq.encoder("thumbnail"), tmp_path / "v", **options)
    png = write_tar(tmp_path / "b.tar", [("x.png", jpeg(0))])
    vary_shards([png], noisy, adq.encoder("thumbnail"), tmp_path / "w", label="none")
    assert list(scores(tmp_path / "w" / "variant-0")) == ["x"]


def test_the_commands_encoder_knows_no_classes() -> None:
    arguments = make_parser().parse_args(["vary", "a.tar", "--unet", "unet", "-o", "v"])
    assert arguments.encoder == "builtin-free"


def test_labels_beyond_the_encoders_classes_have_no_agreement(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", [("x.jpg", jpeg(0)), ("x.cls", b"3"), ("y.jpg", jpeg(1)), ("y.cls", b"10")]
    )
    vary_shards([shard], noisy, adq.encoder("builtin"), tmp_path / "v")
    assert [set(entries) for entries in scores(tmp_path / "v" / "variant-0").values()] == [
        {"cos", "agree"},
        {"cos"},
    ]


def test_shards_of_an_earlier_run_and_of_the_parents_stay(shards: list[Path], tmp_path: Path) -> None:
    encoder = adq.encoder("thumbnail")
    vary_shards(shards, noisy, encoder, tmp_path / "v")
    with pytest.raises(adq.AdqError, match=r"variant-0.* holds _info.json of an earlier run"):
        vary_shards(shards, noisy, encoder, tmp_path / "v")
    own = str(tmp_path / "v" / "variant-0" / "*.tar")
    with pytest.raises(ValueError, match="would be written over"):
        vary_shards(own, noisy, encoder, tmp_path / "v", overwrite=True)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_the_command_varies_by_a_saved_network(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet")
    paths, out = list(map(str, shards)), str(tmp_path / "v")
    words = [
        "vary",
        *paths,
        "--unet",
        str(tmp_path / "unet"),
        "--strength",
        "0.5",
        "--steps",
        "4",
        "--variants",
        "2",
    ]
    assert main([*words, "--encoder", "thumbnail", "-o", out, "--json"]) == 0
    assert [report["samples"] for report in json.loads(capsys.readouterr().out)] == [20, 20]
    plan = ["--by", "json:cos", "--keep", "50%", "-o", str(tmp_path / "plan.parquet"), "-q"]
    assert main(["select", f"{out}/variant-0/*.tar", *plan]) == 0
    assert len(adq.load_plan(tmp_path / "plan.parquet")) == 10
    assert main([*words, "--strength", "1.5", "-o", out]) == 2
    assert "strength must be a number in [0, 1], got 1.5" in capsys.readouterr().err
    assert main(["vary", *paths, "--unet", str(tmp_path / "nothing"), "-o", out]) == 1
    assert "no UNet here" in capsys.readouterr().err
