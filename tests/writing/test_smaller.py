"""Do shards whose images are written anew hold what was asked for, and does the report say what every part takes? F36."""

import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.pipes.resize import centre_square
from adq_wds.saliency.plain import RandomImportance
from adq_wds.samples.patch_file import encode, encode_whole
from adq_wds.writing.smaller import MEASURED, totals
from adq_wds.writing.write_shards import WriteReport, write_kept
from tests.conftest import Caplog, Capsys, MakeShard, jpeg, picture, write_tar
from tests.folders import contents, samples_in

RANDOM: dict[str, Any] = {"patch_keep": 0.75, "importance": "random", "size": 64}


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard(f"in/{name}.tar", 40, first=40 * i, side=80) for i, name in enumerate("ab")]


def png(seed: int, *, noise: bool = False) -> bytes:
    """96 × 96; of noise a quarter of the patches is more than a tar's longer name takes."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    (Image.fromarray(pixels) if noise else picture(seed, 96)).save(out, "PNG")
    return out.getvalue()


def parts(report: WriteReport) -> dict[str, dict[str, int]]:
    assert report.parts is not None
    return report.parts


# ---- What is written


def test_patches_take_the_images_place_as_the_pipes_store_them(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", **RANDOM, quality=90, seed=3)
    drop = adq.DropPatches(adq.importance("random"), keep=0.75, size=64, seed=3)
    expected = adq.EncodePatches(quality=90).apply(drop.apply(list(adq.ShardDataset(shards))))
    found = samples_in(tmp_path / "out")
    assert found == [{name: value for name, value in s.items() if name != "__url__"} for s in expected]
    assert set(found[0]) == {"__key__", "cls", "patches.jpg"}


@pytest.mark.parametrize(
    ("options", "side", "quality"),
    [({"size": 48}, 48, 90), ({"quality": 40}, 80, 40), ({"size": 96, "quality": 75}, 96, 75)],
)
def test_size_and_quality_work_without_patches_too(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], side: int, quality: int
) -> None:
    write_kept(shards, None, tmp_path / "out" / "%06d.tar", **options)
    found = samples_in(tmp_path / "out")
    assert len(found) == 80
    for i, sample in enumerate(found):
        image = centre_square(Image.open(io.BytesIO(jpeg(i, 80))).convert("RGB"), side)
        assert sample["jpg"] == encode_whole(np.asarray(image), quality=quality)
        assert sample["cls"] == str(i % 2).encode()


def test_other_formats_become_jpegs_and_other_fields_stay(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", [("k.png", png(0)), ("k.json", b"{}"), ("k.seg.png", b"x")])
    write_kept(source, None, tmp_path / "out" / "%d.tar", quality=90)
    (sample,) = samples_in(tmp_path / "out")
    assert set(sample) == {"__key__", "json", "seg.png", "jpg"}
    assert sample["jpg"].startswith(b"\xff\xd8")


def test_224_pixels_and_quality_90_are_meant_unless_said(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [make_shard("in/large.tar", 5, side=300)]
    for name, said in (("a", {}), ("b", {"size": 224, "quality": 90})):
        write_kept(shards, None, tmp_path / name / "%d.tar", patch_keep=0.5, importance="random", **said)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (sample, *_) = adq.ShardDataset(tmp_path / "a" / "0.tar", pipes=[adq.Decode(to="patches")])
    assert (sample["patches"].shape, sample["grid"].tolist()) == ((98, 16, 16, 3), [14, 14])


def test_webdataset_and_our_data_set_read_the_shards(shards: list[Path], tmp_path: Path) -> None:
    write_kept(shards, None, tmp_path / "out" / "%d.tar", **RANDOM)
    stock = wds.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False).decode("pil")
    found = [(image.size, label) for image, label in stock.to_tuple("patches.jpg", "cls")]
    assert found == [((12 * 16, 16), i % 2) for i in range(80)]
    fields = ("patches", "positions", "label")
    options: Any = {"fields": fields, "batch_size": 16, "shuffle": True}
    dataset = adq.ShardDataset(tmp_path / "out", pipes=[adq.Decode(to="patches")], **options)
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


def cells(folder: Path, *fields: str) -> int:
    """Bytes of all members of a folder's tars, or of those fields: headers, content, padding, read as they lie."""
    found = 0
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            ends = [*(member.offset for member in members[1:]), tar.offset]
        for member, end in zip(members, ends, strict=True):
            name = member.name.rpartition("/")[2].partition(".")[2]
            found += end - member.offset if not fields or name in fields else 0
    return found


def test_the_report_is_what_lies_on_the_disk(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = write_kept(shards, None, out / "%06d.tar", **RANDOM, max_samples=30)
    found = parts(report)
    stored = samples_in(out)
    assert found["images"]["before"] == sum(len(jpeg(i, 80)) for i in range(80))
    assert found["images"]["after"] == sum(len(sample["patches.jpg"]) for sample in stored)
    whole = [centre_square(Image.open(io.BytesIO(jpeg(i, 80))).convert("RGB"), 64) for i in range(80)]
    assert found["images"]["whole"] == sum(len(encode_whole(np.asarray(image))) for image in whole)
    assert set(found["other fields"].values()) == {80}
    assert report.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    sums = totals(found)
    assert (sums["before"], sums["after"]) == (cells(tmp_path / "in"), cells(out))
    assert sums["of_whole"] == sums["after"] / sums["whole"]
    assert sums["of_before"] == sums["after"] / sums["before"]
    for path in out.glob("*.tar"):  # the blocks that end a tar fill its last record
        assert path.stat().st_size % 10_240 == 0
    assert 0 < report.bytes - sums["after"] <= 10_240 * report.shards


def test_before_is_of_the_samples_that_a_plan_keeps_alone(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [make_shard(f"in/{name}.tar", 20, first=20 * i, side=80 + 16 * i) for i, name in enumerate("ba")]
    plan = adq.Plan.from_keys([str(path) for path in paths], ["s00003", "s00030", "s00031"])
    found = parts(write_kept(paths, plan, tmp_path / "out" / "%d.tar", **RANDOM))
    assert [s["__key__"] for s in samples_in(tmp_path / "out")] == ["s00030", "s00031", "s00003"]
    write_kept(paths, plan, tmp_path / "same" / "%d.tar")
    assert totals(found)["before"] == cells(tmp_path / "same")
    assert found["images"]["before"] == sum(len(s["jpg"]) for s in samples_in(tmp_path / "same"))


@pytest.mark.parametrize("key", ["short", "a/" + "long" * 22 + "12345", "füße"])
def test_whole_is_what_the_same_command_without_patches_writes(tmp_path: Path, key: str) -> None:
    """Names of more than 100 bytes, or not of ASCII, have a header more: here `patches.jpg`, and not `jpg`."""
    fields = [(("png", png(i, noise=True)), ("cls", b"1"), ("a.json", b"{}")) for i in range(9)]
    members = [(f"{key}{i}.{name}", data) for i, pairs in enumerate(fields) for name, data in pairs]
    source, whole_out = write_tar(tmp_path / "a.tar", members), tmp_path / "whole"
    whole = parts(write_kept(source, None, whole_out / "%d.tar", size=96, quality=90, max_samples=4))
    for importance in ("random", "texture"):
        out = tmp_path / importance
        options = {**RANDOM, "importance": importance, "size": 96, "max_samples": 4}
        some = parts(write_kept(source, None, out / "%d.tar", **options))
        assert totals(some)["after"] == cells(out)
        assert [part["whole"] for part in some.values()] == [part["after"] for part in whole.values()]
        assert totals(some)["whole"] == cells(whole_out) == cells(whole_out, "jpg", "cls", "a.json")
        for name in ("before", "whole"):
            assert [part[name] for part in some.values()] == [part[name] for part in whole.values()]


def test_the_command_prints_parts_and_sums(shards: list[Path], tmp_path: Path, capsys: Capsys) -> None:
    flags = ["--patch-keep", "0.75", "--importance", "random", "--size", "64", "--quality", "90"]
    flags += ["--seed", "0"]
    command = ["write", *map(str, shards), *flags, "-o", str(tmp_path / "a" / "%06d.tar")]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    report = write_kept(shards, None, tmp_path / "b" / "%06d.tar", **RANDOM)
    assert said["parts"] == parts(report)
    assert said["totals"] == totals(parts(report))
    assert (said["read"], said["bad"]) == (80, 0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert main([*command, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert str(report) in printed
    rows = [line.split("  ")[0].strip() for line in printed.splitlines() if line.count("  ") > 2]
    assert rows == ["bytes", "images", "other fields", "container", "all"]
    sums = totals(parts(report))
    assert f"after: {sums['of_whole']:.3f} of whole, {sums['of_before']:.3f} of before\n" in printed
    assert printed.endswith(f"on disk, with them: {report.bytes:,}\n")


def test_an_encoder_is_named_by_its_usual_flags(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    with caplog.at_level(logging.INFO, "adq_wds"):
        write_kept(shards[:1], None, tmp_path / "a" / "%d.tar", patch_keep=0.75, size=64)
    assert "patches are kept by what 'builtin' looks at, a small classifier" in caplog.text
    flags = ["--patch-keep", "0.75", "--size", "64", "--importance", "gradcam", "--encoder", "resnet10t"]
    command = ["write", str(shards[0]), *flags, "--no-pretrained", "--image-size", "64"]
    assert main([*command, "-q", "-o", str(tmp_path / "b" / "%d.tar")]) == 0
    importance = adq.importance("gradcam", encoder="resnet10t", pretrained=False, image_size=64)
    write_kept(shards[:1], None, tmp_path / "c" / "%d.tar", patch_keep=0.75, size=64, importance=importance)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert contents(tmp_path / "b") != contents(tmp_path / "a")


# ---- What is refused


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"importance": "random"}, "importance='random' decides which patches are kept; give patch_keep too"),
    ({"importance": adq.importance("gradcam")}, "^importance=<CamImportance> decides .*give patch_keep too"),
    ({"quality": 90, "on_error": "ignore"}, "on_error must be 'raise', 'skip' or a function"),
    ({"quality": 90, "max_bad_fraction": float("nan")}, r"max_bad_fraction must lie in \[0, 1\], got nan"),
    ({"on_error": "skip"}, "on_error='skip' has no effect: .*give patch_keep=, size= or quality= too"),
    ({"max_bad_fraction": 0.5}, "max_bad_fraction=0.5 has no effect: no image is written anew"),
    ({"patch_keep": float("nan")}, r"patch_keep must be a number in \[0, 1\], got nan"),
    ({"patch_keep": 0.0}, "patch_keep=0.0 keeps none of the 196 patches of 16 x 16 .* size 224; give at"),
    ({"patch_keep": 0.004}, "patch_keep=0.004 keeps none of the 196 patches"),
    ({"patch_keep": 0.5, "size": 16}, "patch_keep=0.5 keeps none of the 1 .* at size 16; give at least 1"),
    ({"quality": 90.0}, "quality must be an integer from 1 to 100, got 90.0"),
    ({"patch_keep": 1.5}, "got 1.5"),
    ({"patch_keep": 0.5, "importance": "tecture"}, "unknown importance 'tecture'; did you mean texture"),
    ({"patch_keep": 0.5, "size": 100}, "size=100 does not fall into patches of 16 .*; give a multiple of 16"),
    ({"patch_keep": 0.001, "size": 30}, "size=30 does not fall into patches of 16 pixels; give a multiple"),
    ({"size": 0}, "size must be an integer >= 1"),
    ({"quality": 101}, "quality must be an integer from 1 to 100, got 101"),
    ({"quality": 90, "image": "pkl"}, "would run what a pickle says"),
    ({"patch_keep": 0.5, "importance": adq.importance("random", patch=8)}, "looks at patches of 8"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_wrong_arguments_are_met_before_anything_is_made(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        write_kept(shards, None, tmp_path / "out" / "%d.tar", **options)
    assert not (tmp_path / "out").exists()


def test_patches_that_would_save_nothing_are_refused(tmp_path: Path) -> None:
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(flat, "PNG")
    source = write_tar(tmp_path / "a.tar", [(f"k{i}.png", flat.getvalue()) for i in range(3)])
    text = r"would not make these images smaller: \d+ bytes an image against \d+ whole, .* \(mean of 3,"
    with pytest.raises(ValueError, match=text):
        write_kept(source, None, tmp_path / "out" / "%d.tar", **RANDOM)
    assert not (tmp_path / "out").exists()


def test_patches_that_grow_unasked_are_refused(shards: list[Path], tmp_path: Path, caplog: Caplog) -> None:
    options: dict[str, Any] = {"patch_keep": 0.95, "importance": "random", "quality": 95}
    drop = adq.DropPatches(adq.importance("random"), keep=0.95, size=224)
    first = list(adq.ShardDataset(shards))[:MEASURED]
    after = [len(s["patches.jpg"]) for s in adq.EncodePatches(quality=95).apply(drop.apply(first))]
    means = [sum(after) // MEASURED, sum(len(sample["jpg"]) for sample in first) // MEASURED]
    text = rf"larger than they were: {means[0]} bytes each against {means[1]} .*or size=224 if"
    with pytest.raises(ValueError, match=text):
        write_kept(shards, None, tmp_path / "out" / "%d.tar", **options)
    assert not (tmp_path / "out").exists()
    write_kept(shards, None, tmp_path / "out" / "%d.tar", size=224, **options)
    assert "images become larger than they were: " in caplog.text


@pytest.mark.parametrize(("options", "at"), [({}, "their own size"), ({"size": 224}, "size 224")])
def test_images_that_become_larger_than_they_were_are_warned_of(
    shards: list[Path], tmp_path: Path, caplog: Caplog, options: dict[str, int], at: str
) -> None:
    write_kept(shards, None, tmp_path / "out" / "%d.tar", quality=100, **options)
    assert "images become larger than they were: " in caplog.text
    assert f"(mean of the first {MEASURED}) at {at} and quality 100; a lower quality" in caplog.text


def test_a_bad_image_is_named_and_nothing_looks_complete(shards: list[Path], tmp_path: Path) -> None:
    images = [(f"z{i}.jpg", jpeg(i, 80) if i != 70 else b"no") for i in range(80)]
    bad = write_tar(tmp_path / "in" / "c.tar", images)
    with pytest.raises(adq.SampleError, match=r"^shard c.tar, key 'z70', field 'jpg': not an image"):
        write_kept([*shards, bad], None, tmp_path / "out" / "%06d.tar", **RANDOM, max_samples=50)
    assert sorted(contents(tmp_path / "out")) == ["000000.tar", "000001.tar"]
    none = write_tar(tmp_path / "d.tar", [("k.txt", b"x")])
    with pytest.raises(adq.SampleError, match=r"shard d.tar, key 'k': no image field"):
        write_kept(none, None, tmp_path / "out2" / "%06d.tar", quality=90)


@pytest.mark.parametrize("options", [RANDOM, {"quality": 90}])
def test_bad_images_are_skipped_logged_and_counted(
    shards: list[Path], tmp_path: Path, caplog: Caplog, options: dict[str, Any]
) -> None:
    """Whichever stage they fail in: a damaged image, none, two, one without some patches."""
    write_kept(shards[0], None, tmp_path / "p" / "%d.tar", **RANDOM)
    stored = samples_in(tmp_path / "p")[0]["patches.jpg"]
    taken = "patches.jpg" if options is RANDOM else "jpg"
    bad = [("k1.jpg", b"no"), ("k2.txt", b"x"), ("k3.png", png(0)), (f"k3.{taken}", b"")]
    bad.append(("k4.patches.jpg", stored))
    fine = [(f"n{i:02d}.jpg", jpeg(i, 80)) for i in range(20)]
    source = write_tar(tmp_path / "in" / "c.tar", [*fine[:3], *bad, *fine[3:]])
    skip: Any = {**options, "on_error": "skip", "max_samples": 50}
    report = write_kept([*shards, source], None, tmp_path / "out" / "%d.tar", **skip)
    assert (report.samples, report.bad, report.read) == (100, 4, 104)
    source = write_tar(tmp_path / "c.tar", fine)
    write_kept([*shards, source], None, tmp_path / "as" / "%d.tar", **options, max_samples=50)
    assert contents(tmp_path / "out") == contents(tmp_path / "as")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage().startswith("{")]
    assert [line["error"].partition(",")[2][:9] for line in lines] == [f" key 'k{i}'" for i in range(1, 5)]
    assert "write: read 104 = kept 100 + dropped 0 + bad 4" in caplog.text
    assert totals(parts(report))["after"] == cells(tmp_path / "out")
    write_kept([*shards, source], None, tmp_path / "same" / "%d.tar")
    assert totals(parts(report))["before"] == cells(tmp_path / "same")


def test_too_many_bad_images_leave_nothing_complete(make_shard: MakeShard, tmp_path: Path) -> None:
    some = [(f"k{i}.jpg", jpeg(i, 80) if i % 4 else b"no") for i in range(12)]
    source = write_tar(tmp_path / "a.tar", some)
    text = "3 of 12 samples are bad, more than max_bad_fraction=0.2; the last: shard a.tar, key 'k8'"
    with pytest.raises(adq.SampleError, match=text):
        write_kept(source, None, tmp_path / "out" / "%d.tar", **RANDOM, on_error="skip", max_bad_fraction=0.2)
    assert not (tmp_path / "out").exists()
    for on_error in ("skip", lambda error: "not an image" in str(error)):
        skip: Any = {**RANDOM, "on_error": on_error, "max_bad_fraction": 0.25, "overwrite": True}
        report = write_kept(source, None, tmp_path / "out" / "%d.tar", **skip)
        assert (report.samples, report.bad) == (9, 3)
    with pytest.raises(adq.SampleError, match="key 'k0', field 'jpg': not an image"):
        write_kept(source, None, tmp_path / "no" / "%d.tar", **RANDOM, on_error=lambda error: False)
    source = write_tar(tmp_path / "b.tar", [("k.jpg", b"no")])
    with pytest.raises(adq.SampleError, match="all 1 samples are bad; see the log"):
        write_kept(source, None, tmp_path / "no" / "%d.tar", size=64, on_error="skip")


def test_the_command_says_how_many_samples_were_bad(tmp_path: Path, capsys: Capsys) -> None:
    some = [(f"k{i}.jpg", jpeg(i, 80) if i % 4 else b"no") for i in range(12)]
    source = write_tar(tmp_path / "a.tar", some)
    command = ["write", str(source), "--quality", "50", "-o", str(tmp_path / "out" / "%d.tar"), "--overwrite"]
    assert main(command) == 1
    assert main([*command, "--on-error", "skip"]) == 1
    assert "bad, more than --max-bad-fraction 0.1; the last" in capsys.readouterr().err
    command += ["--on-error", "skip", "--max-bad-fraction", "0.3"]
    assert main(command) == 0
    said = "9 samples of 12 read, 3 bad ones left out (see the log), in 1 shards: "
    assert capsys.readouterr().out.startswith(said)
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["read"], said["samples"], said["bad"]) == (12, 9, 3)


def test_a_field_in_the_new_images_place_is_refused(tmp_path: Path) -> None:
    both = write_tar(tmp_path / "a.tar", [("k.png", jpeg(0)), ("k.jpg", jpeg(1))])
    with pytest.raises(adq.SampleError, match="key 'k', field 'jpg': is there already"):
        write_kept(both, None, tmp_path / "out" / "%d.tar", quality=90, image="png")


@pytest.mark.parametrize("options", [{"quality": 50}, {"size": 32}, RANDOM])
@pytest.mark.parametrize("image", [None, "patches.jpg"])
def test_images_without_some_patches_are_not_written_anew(
    shards: list[Path], tmp_path: Path, options: dict[str, Any], image: str | None
) -> None:
    write_kept(shards[0], None, tmp_path / "p" / "%d.tar", **RANDOM)
    source, named = tmp_path / "p" / "0.tar", {} if image is None else {"image": image}
    text = r"^shard 0.tar, key 's00000', field 'patches.jpg': some of its patches are dropped .*leave out patch_keep="
    with pytest.raises(adq.SampleError, match=text):
        write_kept(source, None, tmp_path / "out" / "%d.tar", **options, **named)
    assert not (tmp_path / "out").exists()
    write_kept(source, None, tmp_path / "out" / "%d.tar")  # copied as they are
    assert (tmp_path / "out" / "0.tar").read_bytes() == source.read_bytes()


# ---- F36


def write_until(arguments: list[str], n_steps: int, taken: Any) -> None:
    """The command, killed at its n-th step: an event that Python audits (of a file, mostly), or a batch of images."""
    score = RandomImportance.__call__

    def step(*_: Any) -> None:
        taken.value += 1
        if taken.value == n_steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: RandomImportance, *images: Any) -> Any:
        step()
        return score(self, *images)

    RandomImportance.__call__ = counted  # type: ignore[method-assign]
    sys.addaudithook(step)
    main(arguments)


@pytest.mark.parametrize("n_kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_writes_leave_complete_shards_only(
    make_shard: MakeShard, tmp_path: Path, n_kills: int
) -> None:
    """F36: killed at any step and started again, the shards end as those of a run that was left alone."""
    source = make_shard("in/a.tar", 200, side=32)
    command = ["write", str(source), "--patch-keep", "0.75", "--importance", "random", "--size", "32"]
    command += ["--max-samples", "30", "--overwrite", "-q"]
    fork = multiprocessing.get_context("fork")
    taken = fork.Value("q", 0, lock=False)

    def run(out: Path, n_steps: int) -> int | None:
        taken.value = 0
        job = fork.Process(target=write_until, args=([*command, "-o", str(out / "%06d.tar")], n_steps, taken))
        job.start()
        job.join()
        return job.exitcode

    assert run(tmp_path / "whole", -1) == 0
    whole, out, n_steps = contents(tmp_path / "whole"), tmp_path / "killed", taken.value
    for at in np.random.default_rng(n_kills).integers(1, n_steps, n_kills).tolist():
        assert run(out, at) == -signal.SIGKILL
        found = contents(out) if out.exists() else {}
        assert all(data == whole[name] for name, data in found.items() if name.endswith(".tar"))
        assert "_info.json" not in found or found == whole
    assert run(out, -1) == 0
    assert contents(out) == whole


def test_the_photographs_take_what_was_promised(photographs: Path, tmp_path: Path) -> None:
    """At 224, quality 90, a quarter dropped at random: at most 0.79 of the bytes in tars and 0.765 of the files."""
    options: Any = {"patch_keep": 0.75, "importance": "random", "size": 224, "quality": 90}
    report = write_kept(photographs, None, tmp_path / "%06d.tar", **options)
    images = parts(report)["images"]
    assert images["after"] <= 0.765 * images["whole"]
    assert report.bytes <= 0.79 * sum(part["whole"] for part in parts(report).values())
    kept = np.arange(147)
    (sample, *_) = adq.ShardDataset(photographs, pipes=[adq.Decode(to="pil")])
    pixels = np.asarray(centre_square(sample["image"], 224))
    assert len(encode(pixels, kept, 16)) < len(encode_whole(pixels))
