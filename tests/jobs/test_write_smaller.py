"""Do shards whose images are written anew hold what was asked for, and does the report say what every part takes? F36."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import adq_wds as adq
from adq_wds.cli import main
from adq_wds.jobs.write import WriteReport, write_kept
from adq_wds.jobs.write_smaller import MEASURED, parts_text
from adq_wds.models.plain_importance import RandomImportance
from adq_wds.patch_jpeg import encode, encode_whole
from adq_wds.pipes.resize import centre_square
from adq_wds.tar import iter_spans, open_shard, read_sample
from tests.conftest import jpeg, picture, write_tar

MakeShard = Callable[..., Path]
RANDOM: dict[str, Any] = {"patch_keep": 0.75, "importance": "random", "size": 64}


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard(f"in/{name}.tar", 40, first=40 * i, side=80) for i, name in enumerate("ab")]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with open_shard(path) as buffer:
            found += [
                read_sample(buffer, span, url=path.name) for span in iter_spans(buffer, shard=path.name)
            ]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".adq.lock"}


def parts(report: WriteReport) -> dict[str, dict[str, int]]:
    assert report.parts is not None
    return report.parts


# ---- What is written


def test_patches_take_the_images_place_as_the_pipes_store_them(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", **RANDOM, quality=90, seed=3)
    drop = adq.DropPatches(adq.importance("random"), keep=0.75, size=64, seed=3)
    expected = adq.EncodePatches(quality=90).apply(drop.apply(list(adq.ShardDataset(shards))))
    found = samples_of(tmp_path / "out")
    assert [{**s, "__url__": ""} for s in found] == [{**s, "__url__": ""} for s in expected]
    assert set(found[0]) == {"__key__", "__url__", "cls", "patches.jpg"}


@pytest.mark.parametrize(
    ("options", "side", "quality"),
    [({"size": 48}, 48, 90), ({"quality": 40}, 80, 40), ({"size": 96, "quality": 75}, 96, 75)],
)
def test_size_and_quality_work_without_patches_too(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], side: int, quality: int
) -> None:
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", **options)
    found = samples_of(tmp_path / "out")
    assert len(found) == 80
    for i, sample in enumerate(found):
        image = centre_square(Image.open(io.BytesIO(jpeg(i, 80))).convert("RGB"), side)
        assert sample["jpg"] == encode_whole(np.asarray(image), quality=quality)
        assert sample["cls"] == str(i % 2).encode()


def test_other_formats_become_jpegs_and_other_fields_stay(tmp_path: Path) -> None:
    data = io.BytesIO()
    picture(0, 64).save(data, "PNG")
    source = write_tar(
        tmp_path / "a.tar", [("k.png", data.getvalue()), ("k.json", b"{}"), ("k.seg.png", b"x")]
    )
    write_kept(source, None, tmp_path / "out" / "%d.tar", quality=90)
    (sample,) = samples_of(tmp_path / "out")
    assert set(sample) == {"__key__", "__url__", "json", "seg.png", "jpg"}
    assert sample["jpg"].startswith(b"\xff\xd8")


def test_224_pixels_and_quality_90_are_meant_unless_said(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards, None, tmp_path / "a" / "%d.tar", patch_keep=0.5, importance="random")
    write_kept(
        shards, None, tmp_path / "b" / "%d.tar", patch_keep=0.5, importance="random", size=224, quality=90
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    (sample, *_) = adq.ShardDataset(tmp_path / "a" / "0.tar", pipes=[adq.Decode(to="patches")])
    assert (sample["patches"].shape, sample["grid"].tolist()) == ((98, 16, 16, 3), [14, 14])


def test_without_any_of_the_three_bytes_stay_untouched(shards: list[Path], tmp_path: Path) -> None:
    report = write_kept(shards, None, tmp_path / "out" / "%06d.tar")
    assert report.parts is None
    assert [sample["jpg"] for sample in samples_of(tmp_path / "out")] == [jpeg(i, 80) for i in range(80)]


def test_a_plan_chooses_the_samples(shards: list[Path], tmp_path: Path) -> None:
    plan = adq.Plan.from_keys([str(path) for path in shards], ["s00003", "s00050"])
    write_kept(shards, plan, tmp_path / "out" / "%d.tar", **RANDOM)
    assert [sample["__key__"] for sample in samples_of(tmp_path / "out")] == ["s00003", "s00050"]


def test_a_stock_webdataset_opens_the_shards_and_ours_trains_from_them(
    shards: list[Path], tmp_path: Path
) -> None:
    write_kept(shards, None, tmp_path / "out" / "%d.tar", **RANDOM)
    stock = (
        wds.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False)
        .decode("pil")
        .to_tuple("patches.jpg", "cls")
    )
    assert [(image.size, label) for image, label in stock] == [((12 * 16, 16), i % 2) for i in range(80)]
    dataset = adq.ShardDataset(
        tmp_path / "out",
        pipes=[adq.Decode(to="patches")],
        fields=("patches", "positions", "label"),
        batch_size=16,
        shuffle=True,
    )
    assert [tuple(batch[0].shape) for batch in dataset] == [(16, 12, 16, 16, 3)] * 5
    pictures = adq.ShardDataset(tmp_path / "out", pipes=[adq.Decode(to="torch")])
    assert {tuple(sample["image"].shape) for sample in pictures} == {(3, 64, 64)}


def test_an_importance_of_ones_own_is_asked_for_patches_of_16(shards: list[Path], tmp_path: Path) -> None:
    def last(images: Any, labels: Any, seeds: Any) -> Any:
        return np.tile(np.arange(16, dtype=np.float32), (len(images), 1))

    write_kept(shards, None, tmp_path / "out" / "%d.tar", patch_keep=0.25, importance=last, size=64)
    (sample, *_) = adq.ShardDataset(tmp_path / "out", pipes=[adq.Decode(to="patches")])
    assert sample["positions"].tolist() == [12, 13, 14, 15]


# ---- The report


def test_the_report_is_what_lies_on_the_disk(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = write_kept(shards, None, out / "%06d.tar", **RANDOM, max_samples=30)
    found = parts(report)
    stored = samples_of(out)
    assert found["images"]["before"] == sum(len(jpeg(i, 80)) for i in range(80))
    assert found["images"]["after"] == sum(len(sample["patches.jpg"]) for sample in stored)
    whole = [centre_square(Image.open(io.BytesIO(jpeg(i, 80))).convert("RGB"), 64) for i in range(80)]
    assert found["images"]["whole"] == sum(len(encode_whole(np.asarray(image))) for image in whole)
    assert set(found["other fields"].values()) == {80}
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    assert len(sizes) == 3
    assert sum(part["after"] for part in found.values()) == report.bytes == sum(sizes.values())
    cells = 0
    for path in shards:  # all but what ends a tar
        with tarfile.open(path) as tar:
            cells += sum(512 + member.size + -member.size % 512 for member in tar)
    assert sum(part["before"] for part in found.values()) == cells


def test_whole_is_what_the_same_command_without_patches_writes(shards: list[Path], tmp_path: Path) -> None:
    some = write_kept(shards, None, tmp_path / "some" / "%06d.tar", **RANDOM)
    whole = write_kept(shards, None, tmp_path / "whole" / "%06d.tar", size=64)
    assert (
        parts(some)["images"]["whole"] == parts(whole)["images"]["after"] == parts(whole)["images"]["whole"]
    )
    expected = sum(part["whole"] for part in parts(some).values())
    assert abs(whole.bytes - expected) < 10_240  # a tar's last record


def test_the_command_prints_the_parts_and_their_sums(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--patch-keep",
        "0.75",
        "--importance",
        "random",
        "--size",
        "64",
        "--quality",
        "90",
        "--seed",
        "0",
    ]
    command = ["write", *map(str, shards), *flags, "-o", str(tmp_path / "a" / "%06d.tar")]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    report = write_kept(shards, None, tmp_path / "b" / "%06d.tar", **RANDOM)
    assert said["parts"] == parts(report)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert main([*command, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert parts_text(parts(report)) in printed
    lines = [line.split("  ") for line in printed.splitlines()]
    assert [line[0] for line in lines if len(line) > 3] == [
        "bytes",
        "images",
        "other fields",
        "container",
        "all",
    ]
    share = report.bytes / sum(part["whole"] for part in parts(report).values())
    assert f"after: {share:.3f} of whole, which is the same images at the same size and quality" in printed


def test_an_encoder_is_named_by_the_flags_it_always_has(
    shards: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "adq_wds"):
        write_kept(shards[:1], None, tmp_path / "a" / "%d.tar", patch_keep=0.75, size=64)
    assert (
        "patches are kept by what 'builtin' looks at, a small classifier of CIFAR-10's classes" in caplog.text
    )
    flags = ["--patch-keep", "0.75", "--size", "64", "--importance", "gradcam", "--encoder", "resnet10t"]
    command = ["write", str(shards[0]), *flags, "--no-pretrained", "--image-size", "64"]
    assert main([*command, "-q", "-o", str(tmp_path / "b" / "%d.tar")]) == 0
    importance = adq.importance("gradcam", encoder="resnet10t", pretrained=False, image_size=64)
    write_kept(shards[:1], None, tmp_path / "c" / "%d.tar", patch_keep=0.75, size=64, importance=importance)
    assert files(tmp_path / "b") == files(tmp_path / "c")
    assert files(tmp_path / "b") != files(tmp_path / "a")


# ---- What is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"importance": "random"}, "importance='random' decides which patches are kept; give patch_keep too"),
        ({"patch_keep": float("nan")}, r"keep must be a number in \[0, 1\], got nan"),
        (
            {"patch_keep": 0.0},
            "patch_keep=0.0 keeps none of the 196 patches of 16 x 16 pixels at size 224; give at least",
        ),
        ({"patch_keep": 0.004}, "patch_keep=0.004 keeps none of the 196 patches"),
        (
            {"patch_keep": 0.5, "size": 16},
            "patch_keep=0.5 keeps none of the 1 patches .* at size 16; give at least 1",
        ),
        ({"quality": 90.0}, "quality must be an integer from 1 to 100, got 90.0"),
        ({"patch_keep": 1.5}, "got 1.5"),
        ({"patch_keep": 0.5, "importance": "tecture"}, "unknown importance 'tecture'; did you mean texture"),
        ({"patch_keep": 0.5, "size": 100, "importance": "random"}, "100 x 100 pixels .* patches of 16 x 16"),
        ({"size": 0}, "size must be an integer >= 1"),
        ({"quality": 101}, "quality must be an integer from 1 to 100, got 101"),
        ({"quality": 90, "image": "pkl"}, "would run what a pickle says"),
        (
            {"patch_keep": 0.5, "importance": adq.importance("random", patch=8)},
            "the importance looks at patches of 8",
        ),
    ],
)
def test_wrong_arguments_are_met_before_anything_is_made(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        write_kept(shards, None, tmp_path / "out" / "%d.tar", **options)
    assert not (tmp_path / "out").exists()


def test_what_would_become_larger_without_patches_is_refused_with_numbers(tmp_path: Path) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(flat, "PNG")
    source = write_tar(tmp_path / "a.tar", [(f"k{i}.png", flat.getvalue()) for i in range(3)])
    text = r"storing patches would not make these images smaller: \d+ bytes an image against \d+ whole, .*mean of 3,"
    with pytest.raises(ValueError, match=text):
        write_kept(source, None, tmp_path / "out" / "%d.tar", **RANDOM)
    assert not (tmp_path / "out").exists()


def test_images_that_become_larger_than_they_were_are_warned_of(
    shards: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_kept(shards, None, tmp_path / "out" / "%d.tar", quality=100)
    assert "images become larger than they were: " in caplog.text
    assert f"(mean of the first {MEASURED}); a lower quality or a smaller size would help" in caplog.text


def test_a_bad_image_is_named_and_nothing_looks_complete(shards: list[Path], tmp_path: Path) -> None:
    bad = write_tar(
        tmp_path / "in" / "c.tar", [(f"z{i}.jpg", jpeg(i, 80) if i != 70 else b"no") for i in range(80)]
    )
    with pytest.raises(adq.SampleError, match=r"^shard c.tar, key 'z70', field 'jpg': not an image"):
        write_kept([*shards, bad], None, tmp_path / "out" / "%06d.tar", **RANDOM, max_samples=50)
    assert sorted(files(tmp_path / "out")) == ["000000.tar", "000001.tar"]
    none = write_tar(tmp_path / "d.tar", [("k.txt", b"x")])
    with pytest.raises(adq.SampleError, match=r"shard d.tar, key 'k': no image field"):
        write_kept(none, None, tmp_path / "out2" / "%06d.tar", quality=90)


def test_a_field_that_the_new_image_would_take_the_place_of_is_refused(tmp_path: Path) -> None:
    both = write_tar(tmp_path / "a.tar", [("k.png", jpeg(0)), ("k.jpg", jpeg(1))])
    with pytest.raises(
        adq.SampleError, match="key 'k', field 'jpg': is there already, and the new image would take"
    ):
        write_kept(both, None, tmp_path / "out" / "%d.tar", quality=90, image="png")


@pytest.mark.parametrize("options", [{"quality": 50}, {"size": 32}, RANDOM])
@pytest.mark.parametrize("image", [None, "patches.jpg"])
def test_images_without_some_patches_are_not_written_anew(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], image: str | None
) -> None:
    write_kept(shards[0], None, tmp_path / "p" / "%d.tar", **RANDOM)
    source, named = tmp_path / "p" / "0.tar", {} if image is None else {"image": image}
    text = (
        r"^shard 0.tar, key 's00000', field 'patches.jpg': some of its patches are dropped already, .*"
        r"leave out patch_keep, size and quality"
    )
    with pytest.raises(adq.SampleError, match=text):
        write_kept(source, None, tmp_path / "out" / "%d.tar", **options, **named)
    assert not (tmp_path / "out").exists()


def test_images_without_some_patches_are_copied_as_they_are(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards[0], None, tmp_path / "p" / "%d.tar", **RANDOM)
    write_kept(tmp_path / "p" / "0.tar", None, tmp_path / "out" / "%d.tar")
    assert (tmp_path / "out" / "0.tar").read_bytes() == (tmp_path / "p" / "0.tar").read_bytes()


# ---- F36


def test_equal_input_gives_equal_bytes_in_every_file(shards: list[Path], tmp_path: Path) -> None:
    for name, order in (("x", shards), ("y", shards[::-1])):
        write_kept(order, None, tmp_path / name / "%06d.tar", **RANDOM, max_samples=30)
    assert files(tmp_path / "x") == files(tmp_path / "y")


def slow_write(arguments: list[str]) -> None:
    """The command as it is, with an importance that takes 2 ms an image."""
    fast = RandomImportance.__call__

    def slow(self: RandomImportance, images: Any, labels: Any, seeds: Any) -> Any:
        time.sleep(0.002 * len(images))
        return fast(self, images, labels, seeds)

    RandomImportance.__call__ = slow  # type: ignore[method-assign]
    main(arguments)


@pytest.mark.parametrize("n_kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_while_writing_only_complete_shards_have_final_names(
    make_shard: MakeShard, tmp_path: Path, n_kills: int
) -> None:
    """F36: killed at any moment and started again, the shards end as those of a run that was left alone."""
    source = make_shard("in/a.tar", 200, side=32)
    command = ["write", str(source), "--patch-keep", "0.75", "--importance", "random", "--size", "32"]
    command += ["--max-samples", "30", "--overwrite", "-q"]
    begin = time.monotonic()
    assert main([*command, "-o", str(tmp_path / "whole" / "%06d.tar")]) == 0
    longest = time.monotonic() - begin + 0.4
    whole, out = files(tmp_path / "whole"), tmp_path / "killed"
    again = [*command, "-o", str(out / "%06d.tar")]
    rng = np.random.default_rng(n_kills)
    landed = 0
    for _ in range(n_kills):
        job = multiprocessing.get_context("fork").Process(target=slow_write, args=(again,))
        job.start()
        job.join(timeout=rng.uniform(0.05, longest))
        landed += job.is_alive()
        job.kill()
        job.join()
        found = files(out) if out.exists() else {}
        assert all(data == whole[name] for name, data in found.items() if name.endswith(".tar"))
        assert "_info.json" not in found or found == whole
    assert landed >= n_kills // 2
    assert main(again) == 0
    assert files(out) == whole


def test_the_photographs_take_what_was_promised(photographs: Path, tmp_path: Path) -> None:
    """At 224, quality 90, a quarter dropped at random: at most 0.79 of the bytes in tars and 0.765 of the files."""
    report = write_kept(
        photographs, None, tmp_path / "%06d.tar", patch_keep=0.75, importance="random", size=224, quality=90
    )
    images = parts(report)["images"]
    assert images["after"] <= 0.765 * images["whole"]
    assert report.bytes <= 0.79 * sum(part["whole"] for part in parts(report).values())
    kept = np.arange(147)
    (sample, *_) = adq.ShardDataset(photographs, pipes=[adq.Decode(to="pil")])
    pixels = np.asarray(centre_square(sample["image"], 224))
    assert len(encode(pixels, kept, 16)) < len(encode_whole(pixels))
