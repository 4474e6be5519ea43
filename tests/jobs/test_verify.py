"""Everything by which shards differ from their plan is found and named, and nothing else."""

import bz2
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.engines.shared import Shared
from adq_wds.jobs.index import index_shards
from adq_wds.jobs.verify import Report, verify_shards
from adq_wds.jobs.verify_listed import Expected
from adq_wds.jobs.verify_shard import Check, check_shard
from adq_wds.samples.patch_file import encode, encode_whole
from tests.conftest import NOBODY, Capsys, MakeShard, jpeg, picture, write_tar
from tests.folders import flip, members, spans_of

Said = list[tuple[str, str | None, str]]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    """Three shards, two of them with the same keys."""
    return [make_shard("in/b.tar", 8), make_shard("in/a.tar", 9, first=8), make_shard("in/c.tar", 8, side=12)]


@pytest.fixture
def plan(shards: list[Path], tmp_path: Path) -> adq.Plan:
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    return adq.build_plan(features, bins=2, keep=0.4, out=tmp_path / "plan.parquet")


def verified(plan: Any, urls: Any, **options: Any) -> Report:
    report = verify_shards(plan, urls, **options)
    assert min(report.ok, report.differs, report.missing) >= 0
    assert 0 <= report.kept_ok <= report.kept <= report.read
    assert all(str(difference).isprintable() for difference in report.differences)
    return report


def said(report: Report) -> Said:
    return [(difference.shard, difference.key, difference.kind) for difference in report.differences]


def of_b(*named: str) -> Said:
    """Differences of b.tar: "2 moved" is of its sample 2, "damaged" of itself."""
    pairs = [words.split() for words in named]
    return [("b.tar", f"s{int(words[0]):05d}" if len(words) > 1 else None, words[-1]) for words in pairs]


# ---- What is as it was


def test_a_fresh_plan_or_features_verify_clean(shards: list[Path], plan: adq.Plan, tmp_path: Path) -> None:
    index_shards(shards, tmp_path / "i.parquet")
    features = tmp_path / "features"
    for source, kind, kept in (
        (plan, "plan", plan.n_kept),
        (tmp_path / "plan.parquet", "plan", plan.n_kept),
        (tmp_path / "i.parquet", "index", 25),
        (str(features), "features", 25),
        (adq.Features(features), "features", 25),
    ):
        for urls in (shards, shards[::-1], str(tmp_path / "in"), str(tmp_path / "in" / "{a,b,c}.tar")):
            report = Report(against=kind, shards=3, read=25, kept=kept, kept_ok=kept)
            assert (verified(source, urls), report.ok) == (report, 25)
    (tmp_path / "in").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (1, 1))
    for source in (plan, tmp_path / "i.parquet", features):
        assert verified(source, tmp_path / "moved").equal


def test_shards_of_one_name_are_told_apart_by_folder_or_root(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [make_shard(f"in/{name}/t.tar", 3, first=i) for i, name in enumerate("xy")]
    plan = adq.Plan.from_keys([str(path) for path in paths], None)
    assert verified(plan, paths).equal
    assert verified(plan, paths, root=str(tmp_path / "in")).equal
    shutil.copy(paths[0], tmp_path / "t.tar")
    (difference,) = verified(plan, [*paths, tmp_path / "t.tar"]).differences
    assert (difference.shard, difference.kind) == ("t.tar", "unmatched shard")
    assert "may be 'x/t.tar' or 'y/t.tar'; say which with root=" in difference.text
    report = verified(plan, paths, root=str(tmp_path))
    assert [d.kind for d in report.differences] == ["missing shard"] * 2 + ["unmatched shard"] * 2
    assert "shard 'in/x/t.tar' below root" in str(report.differences[2])


def test_features_and_plans_of_some_samples_and_of_bad_ones(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard("a.tar", 6)
    found = members(shard)
    found[4] = (found[4][0], b"no image")  # of sample 2
    write_tar(shard, found)
    features = adq.embed_shards(shard, "thumbnail", tmp_path / "f", on_error="skip", max_bad_fraction=1.0)
    report = verified(features, shard, decode=True, label="cls")  # the bad one is listed as bad
    assert (report.read, report.ok, report.kept, report.n_contents) == (6, 6, 5, 5)
    assert verified(adq.build_plan(features, bins=2, keep=1.0), shard, decode=True).n_contents == 5
    other = make_shard("b.tar", 6)
    features = adq.embed_shards(other, "thumbnail", tmp_path / "g", limit=4)
    first = adq.Features(tmp_path / "f", limit=4)
    for source, path in ((features, other), (tmp_path / "g", other), (first, shard)):
        report = verified(source, path)
        assert (report.read, report.equal) == (4, True)  # the others were never looked at
    plan = adq.build_plan(features, bins=2, keep=0.5)  # a stream would stop there
    assert said(verified(plan, other)) == [("b.tar", f"s0000{i}", "extra") for i in (4, 5)]
    write_tar(other, [(name.replace("s00001", "s00901"), data) for name, data in members(other)])
    assert said(verified(features, other)) == of_b("1 missing", "901 extra")


# ---- F29: each change is found and named


def test_an_added_or_lost_shard_is_named(shards: list[Path], plan: adq.Plan, make_shard: MakeShard) -> None:
    report = verified(plan, [*shards, make_shard("in/d.tar", 2)])
    assert said(report) == [("d.tar", None, "extra shard")]
    assert (report.ok, report.missing) == (25, 0)
    assert "not in the plan; leave it out, or make the plan again with it" in str(report.differences[0])
    report = verified(plan, shards[1:])
    assert said(report) == [("b.tar", None, "missing shard")]
    kept_ok = plan.n_kept - int(plan.shard("b.tar").kept.sum())
    assert (report.ok, report.missing, report.kept_ok) == (17, 8, kept_ok)
    shards[0] = shards[0].rename(shards[0].with_name("z.tar"))
    report = verified(plan, shards)
    assert said(report) == [("b.tar", None, "missing shard"), ("z.tar", None, "extra shard")]
    assert report.missing == 8


def test_two_files_of_a_name_are_named(shards: list[Path], plan: adq.Plan, make_shard: MakeShard) -> None:
    report = verified(plan, [*shards, make_shard("other/b.tar", 8)])
    assert said(report) == [("b.tar", None, "second file")]
    assert re.search(r"'.*other/b\.tar' and '.*in/b\.tar' both match 'b\.tar'", report.text())
    assert report.ok == 25


def test_a_regrown_shard_is_named_by_sample(
    shards: list[Path], plan: adq.Plan, make_shard: MakeShard
) -> None:
    make_shard("in/b.tar", 10)  # two more at its end
    assert said(verified(plan, shards)) == of_b("8 extra", "9 extra")
    make_shard("in/b.tar", 6)
    assert said(verified(plan, shards)) == of_b("6 missing", "7 missing")
    make_shard("in/b.tar", 8, first=100)  # as many, and all others
    report = verified(plan, shards)
    assert Counter(kind for _, _, kind in said(report)) == {"missing": 8, "extra": 8}
    assert "key 's00100' is in its place" in str(report.differences[0])
    make_shard("in/b.tar", 8, side=20)  # the same keys and other images
    report = verified(plan, shards)
    assert {kind for _, _, kind in said(report)} == {"changed"}
    assert (report.differs, report.ok) == (8, 17)


def test_reordered_samples_are_named(shards: list[Path], plan: adq.Plan) -> None:
    found = members(shards[0])
    write_tar(shards[0], found[:4] + found[6:8] + found[4:6] + found[8:])
    report = verified(plan, shards)
    assert said(report) == of_b("2 moved", "3 moved")
    text = r"sample 3 at byte .* listed as 2 at byte .* its payload is the same$"
    assert re.search(text, str(report.differences[0]))
    write_tar(shards[0], [found[1], found[0], *found[2:]])  # members of one sample
    assert said(verified(plan, shards)) == of_b("0 changed")


def test_one_label_one_byte_one_key_one_field_is_named(shards: list[Path], plan: adq.Plan) -> None:
    found = members(shards[0])
    for at, (name, payload) in enumerate(found):
        other = bytes([payload[0] ^ 1]) + payload[1:]
        write_tar(shards[0], [*found[:at], (name, other), *found[at + 1 :]])
        assert said(verified(plan, shards)) == [("b.tar", name.partition(".")[0], "changed")]
    write_tar(shards[0], [(name.replace("s00002", "s00902"), payload) for name, payload in found])
    assert said(verified(plan, shards)) == of_b("2 missing", "902 extra")
    write_tar(shards[0], [pair for pair in found if pair[0] != "s00007.cls"])
    report = verified(plan, shards)
    assert said(report) == of_b("7 changed")
    assert str(report.differences[0]).endswith("its payload is another")


def test_all_differences_are_listed_and_not_the_first_only(
    shards: list[Path], plan: adq.Plan, make_shard: MakeShard
) -> None:
    flip(shards[0], spans_of(shards[0])[5].members[0].offset)
    flip(shards[1], spans_of(shards[1])[2].byte_offset)  # a header
    shards[2].unlink()
    report = verified(plan, [*shards, make_shard("in/d.tar", 2)])
    assert said(report) == [
        ("a.tar", None, "damaged"), ("a.tar", "s00010", "damaged"), ("b.tar", "s00005", "changed"),
        ("c.tar", None, "unreadable"), ("d.tar", None, "extra shard"),
    ]  # fmt: skip
    assert (report.ok, report.differs, report.missing) == (15, 2, 8)


# ---- Damage


def test_what_stands_behind_a_damaged_header_is_still_compared(shards: list[Path], plan: adq.Plan) -> None:
    write_tar(shards[0], [(name.replace("s00005", "s00905"), data) for name, data in members(shards[0])])
    spans = spans_of(shards[0])
    flip(shards[0], spans[1].byte_offset)
    flip(shards[0], spans[6].members[0].offset)
    report = verified(plan, shards, decode=True)
    assert said(report) == of_b("damaged", "1 damaged", "5 missing", "6 changed")
    assert f"byte {spans[1].byte_offset}: bad header: checksum does not match" in str(report.differences[0])
    assert "key 's00905' is in its place" in str(report.differences[2])
    assert report.ok == 22


def test_a_key_twice_is_named_and_the_others_are_compared(shards: list[Path], plan: adq.Plan) -> None:
    found = members(shards[0])
    write_tar(shards[0], [*found, *found[4:6]])
    report = verified(plan, shards)
    assert said(report) == of_b("damaged")
    assert "key 's00002': key twice in a shard" in str(report.differences[0])
    assert report.ok == 25
    write_tar(shards[0], [*found[:4], *found[:2], *found[4:]])  # apart, and in front of the others
    report = verified(plan, shards)
    assert said(report)[0] == ("b.tar", None, "damaged")
    assert [key for _, key, _ in said(report)[1:]] == [f"s{i:05d}" for i in range(2, 8)]  # none in its place
    assert report.differs + report.missing == 6


def test_unreadable_shards_are_named_all_missing(shards: list[Path], plan: adq.Plan, tmp_path: Path) -> None:
    path, data = shards[0], shards[0].read_bytes()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: None, "unreadable: cannot be opened: No such file"),
        (path.touch, "unreadable: empty file"),
        (lambda: path.write_bytes(bz2.compress(data)), "unreadable: bzip2: unpack it"),
        (lambda: os.mkfifo(path), "unreadable: a fifo, socket or device"),
        (lambda: path.symlink_to(tmp_path / "nowhere"), "unreadable: cannot be opened: No such file"),
        (lambda: path.symlink_to(path), "unreadable: cannot be opened: Too many levels"),
    ]
    for make, text in cases:
        path.unlink(missing_ok=True)
        make()
        report = verified(plan, shards)
        assert str(report.differences[0]).startswith(f"shard b.tar: {text}")
        assert (len(report.differences), report.missing, report.ok) == (1, 8, 17)
    path.unlink(missing_ok=True)
    path.write_bytes(b"<html>404</html>" * 100)
    report = verified(plan, shards)
    assert "not a tar file (starts with" in str(report.differences[0])
    assert (report.ok, report.differs + report.missing) == (17, 8)
    path.write_bytes(bytes(len(data)))  # a file that was never filled is an empty tar
    assert verified(plan, shards).missing == 8


def test_a_link_in_a_shard_is_named(shards: list[Path], plan: adq.Plan) -> None:
    write_tar(shards[0], members(shards[0])[:2])
    with tarfile.open(shards[0], "a") as tar:
        link = tarfile.TarInfo("s00001.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    report = verified(plan, shards)
    assert "symbolic link 's00001.jpg': only plain files are read" in str(report.differences[0])
    assert report.ok == 18


# ---- Contents


def test_every_kept_image_is_decoded_when_asked(make_shard: MakeShard) -> None:
    shard = make_shard("a.tar", 200)
    found = members(shard)
    bad = {3: b"no image", 77: found[2 * 77][1][:200], 150: b"<html>"}
    for i, payload in bad.items():
        found[2 * i] = (found[2 * i][0], payload)
    write_tar(shard, found)
    plan = adq.Plan.from_keys(str(shard), None)
    assert verified(plan, shard).equal  # these bytes are those that were planned
    for workers in (1, 3):
        report = verified(plan, shard, decode=True, workers=workers)
        assert said(report) == [("a.tar", f"s{i:05d}", "unusable") for i in bad]
        assert (report.ok, report.differs, report.kept_ok, report.n_contents) == (197, 3, 197, 200)
    text = "shard a.tar, key 's00003': unusable: field 'jpg': not an image"
    assert str(report.differences[0]).startswith(text)
    kept = adq.Plan.from_keys(str(shard), ["s00003", "s00004"])
    report = verified(kept, shard, decode=True)
    assert (report.n_contents, report.kept, report.kept_ok, report.ok) == (2, 2, 1, 199)
    assert [kind for _, _, kind in said(verified(kept, shard, decode=True, image="png"))] == ["unusable"] * 2
    flip(shard, spans_of(shard)[100].members[0].offset)
    kinds = {3: "unusable", 77: "unusable", 100: "changed", 150: "unusable"}
    report = verified(plan, shard, decode=True)
    assert said(report) == [("a.tar", f"s{i:05d}", kind) for i, kind in kinds.items()]


@pytest.mark.parametrize("image", [{}, {"image": "patches.jpg;patches.webp"}])
def test_of_patch_images_mask_geometry_and_pixels_are_checked(tmp_path: Path, image: dict[str, str]) -> None:
    good = encode(np.asarray(picture(0, 64)), np.array([0, 3, 7]), 16)
    start = good.index(b"ADQP\0") - 4
    segment = good[start : start + 2 + int.from_bytes(good[start + 2 : start + 4], "big")]
    smaller = encode_whole(np.asarray(picture(0, 32)))
    other_crc = good.replace(segment, segment[:-5] + b"\xff" + segment[-4:])
    found = {
        "a.patches.jpg": (good, None),
        "b.patches.jpg": (good.replace(segment, b""), "no patch mask: this JPEG has no APP9 segment"),
        "c.patches.jpg": (other_crc, "damaged patch mask: crc32"),
        "d.patches.jpg": (good[:20] + segment + smaller[20:], "the stored image has 32 x 32 .*, its patch"),
        "e.patches.jpg": (good[:-40], "cannot decode this JPEG"),
        "f.patches.webp": (b"RIFF\x04\0\0\0WEBP", "no patch-dropped image: .* write it again from the"),
    }
    shard = write_tar(tmp_path / "p.tar", [(name, data) for name, (data, _) in found.items()])
    report = verified(adq.Plan.from_keys(str(shard), None), shard, decode=True, **image)
    assert report.n_contents == len(found)
    bad = [(name, text) for name, (_, text) in found.items() if text is not None]
    assert said(report) == [("p.tar", name[0], "unusable") for name, _ in bad]
    for difference, (name, text) in zip(report.differences, bad, strict=True):
        place = re.escape(f"shard p.tar, key '{name[0]}': unusable: field '{name[2:]}': ")
        assert re.match(place + text, str(difference)), str(difference)


def test_two_images_in_a_sample_are_told_whichever_they_are(tmp_path: Path) -> None:
    patches = encode(np.asarray(picture(0)), np.array([0]), 16)
    shard = write_tar(tmp_path / "p.tar", [("a.jpg", jpeg(0)), ("a.patches.jpg", patches)])
    plan = adq.Plan.from_keys(str(shard), None)
    (difference,) = verified(plan, shard, decode=True).differences
    assert "key 'a': unusable: fields 'jpg' and 'patches.jpg' are both there; name one" in str(difference)
    for image in ("jpg", "patches.jpg"):
        assert verified(plan, shard, decode=True, image=image).equal


@pytest.mark.parametrize(
    ("field", "other", "shown"), [("cls", "cls2", "1, listed 2"), ("txt", "cap.txt", "'1', listed '2'")]
)
def test_labels_are_compared_when_asked(
    make_shard: MakeShard, tmp_path: Path, field: str, other: str, shown: str
) -> None:
    shard = make_shard("a.tar", 9, label=field, classes=3)
    found = members(shard)
    for at, (name, payload) in [(9, found[9]), (13, found[13])]:
        found[at] = (name, b" " + payload)  # the same label in other bytes
    wrong = [(name.replace(f".{field}", f".{other}"), data) for name, data in found if name.endswith(field)]
    wrong[5:7] = [(wrong[5][0], b"1"), (wrong[6][0], b"")]
    write_tar(shard, sorted([*found, *wrong], key=lambda pair: pair[0].partition(".")[0]))
    features = adq.embed_shards(shard, "thumbnail", tmp_path / "f", label=field)
    for source in (features, adq.build_plan(features, bins=1, keep=1.0)):
        assert verified(source, shard, label=field).equal
        assert verified(source, shard, label="none").n_contents == 0
        report = verified(source, shard, label=other, workers=2)
        assert said(report) == [("a.tar", "s00005", "label"), ("a.tar", "s00006", "unusable")]
        assert str(report.differences[0]) == f"shard a.tar, key 's00005': label: {shown}"
        assert report.n_contents == 9


def test_labels_of_all_shards_are_those_of_the_whole_set(make_shard: MakeShard, tmp_path: Path) -> None:
    paths = [make_shard("a.tar", 4, label="txt", classes=2), make_shard("b.tar", 9, label="txt", classes=5)]
    features = adq.embed_shards(paths, "thumbnail", tmp_path / "f", label="txt")
    for source in (features, adq.build_plan(features, bins=1, keep=1.0, dedup=None)):
        assert verified(source, paths, label="txt").n_contents == 13


def test_a_reserved_field_is_named_where_it_would_be_read(make_shard: MakeShard) -> None:
    shard = make_shard("a.tar", 3)
    found = members(shard)
    write_tar(shard, [*found[:4], ("s00001.__bad__", b"x"), *found[4:]])
    report = verified(adq.Plan.from_keys(str(shard), None), shard)
    assert said(report) == [("a.tar", "s00001", "unusable")]
    assert "field '__bad__': reserved" in str(report.differences[0])
    assert verified(adq.Plan.from_keys(str(shard), ["s00000"]), shard).equal  # a stream drops it unread


# ---- What cannot be verified


def test_a_label_where_none_is_listed_is_a_value_error(shards: list[Path], tmp_path: Path) -> None:
    index_shards(shards, tmp_path / "i.parquet")
    unlabelled = adq.embed_shards(shards, "thumbnail", tmp_path / "f", label=None)
    plan = adq.build_plan(unlabelled, bins=2, keep=0.5)
    for source, kind in ((tmp_path / "i.parquet", "index"), (unlabelled, "features"), (plan, "plan")):
        with pytest.raises(ValueError, match=rf"label='cls': the {kind} lists no labels to compare with"):
            verify_shards(source, shards, label="cls")


def test_wrong_arguments_are_value_errors(shards: list[Path], plan: adq.Plan) -> None:
    for options, text in (
        ({"workers": 0}, "workers must be an integer >= 1, got 0"),
        ({"urls": []}, "no shards given"),
        ({"urls": [shards[0], shards[0]]}, "is listed 2 times"),
    ):
        with pytest.raises(ValueError, match=text):
            verify_shards(plan, **{"urls": shards, **options})  # type: ignore[arg-type]
    for option in ("image", "label"):  # before anything is opened
        with pytest.raises(ValueError, match="'pkl' would run what a pickle says"):
            verify_shards("none.parquet", "none.tar", **{option: "pkl"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a plan, an index or features, got a int"):
        verify_shards(3, shards)  # type: ignore[arg-type]


def test_secrets_in_urls_are_never_said(plan: adq.Plan) -> None:
    report = verify_shards(plan, [f"http://u:s3cret@{NOBODY}/b.tar?t=s3cret"])
    assert "shard b.tar: unreadable: no connection" in report.text()
    assert "s3cret" not in report.text()


def test_a_damaged_or_lost_table_is_its_error(shards: list[Path], plan: adq.Plan, tmp_path: Path) -> None:
    index_shards(shards, tmp_path / "i.parquet")
    shutil.copy(tmp_path / "features" / "b.parquet", tmp_path / "f.parquet")
    (tmp_path / "empty").mkdir()
    for name, kind, text in (
        ("none.parquet", adq.PlanError, "none.parquet: no such file"),
        ("in/a.tar", adq.PlanError, "not a readable Parquet file"),
        ("f.parquet", adq.PlanError, "holds 'adq_wds.features', expected adq_wds.plan"),
        ("empty", adq.FeaturesError, "no features here"),
    ):
        with pytest.raises(kind, match=text):
            verify_shards(tmp_path / name, shards)
    damaged = {"plan": adq.PlanError, "i": adq.ShardError, "features/b": adq.FeaturesError}
    for name, kind in ((f"{name}.parquet", kind) for name, kind in damaged.items()):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:8] + bytes([data[8] ^ 255]) * 40 + data[48:])
        with pytest.raises(kind, match=r"\.parquet.*damaged"):
            verify_shards(tmp_path / name.replace("/b.parquet", ""), shards)


def test_hostile_names_stay_on_one_line(shards: list[Path], plan: adq.Plan, tmp_path: Path) -> None:
    hostile = ["a\nadq: all is well", "\x1b[2J", "k" * 300, "‮txt"]
    write_tar(shards[0], [*members(shards[0]), *[(f"{key}.jpg", b"x") for key in hostile]])
    extra = tmp_path / "in" / "x\n\x1b[31m.tar"
    shutil.copy(shards[1], extra)
    report = verified(plan, [*shards, extra])
    assert [d.kind for d in report.differences] == ["extra"] * 4 + ["extra shard"]
    lines = report.text().splitlines()
    assert len(lines) == 2 + 5
    assert all(line.isprintable() and len(line) < 250 for line in lines)


# ---- What is printed


def test_lines_are_bounded_and_json_lists_all(
    shards: list[Path], plan: adq.Plan, make_shard: MakeShard, tmp_path: Path, capsys: Capsys
) -> None:
    make_shard("in/b.tar", 8, first=100)
    make_shard("in/a.tar", 9, first=8, side=20)
    report = verified(plan, shards)
    assert len(report.differences) == 8 + 8 + 9
    lines = report.text(lines=10).splitlines()
    assert lines[:2] == [
        "25 samples of 3 shards in the plan: 8 ok, 9 differ, 8 missing; 8 more are not listed",
        f"{report.kept} kept: {report.kept_ok} ok",
    ]
    assert lines[2:12] == [str(difference) for difference in report.differences[:10]]
    assert lines[12:] == ["… and 15 more differences: 8 extra, 7 missing (--json lists them all)"]
    file = str(tmp_path / "plan.parquet")
    assert main(["verify", file, *map(str, shards), "--lines", "3"]) == 1
    out, err = capsys.readouterr()
    assert out == report.text(lines=3) + "\n"
    assert err == f"adq: ShardError: the shards are not those of the plan {file}: see above\n"
    assert main(["verify", file, *map(str, shards), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert (value["equal"], value["read"], len(value["differences"])) == (False, 25, 25)
    first = {"shard": "a.tar", "key": "s00008", "kind": "changed", "text": report.differences[0].text, "n": 1}
    assert value["differences"][0] == first


def test_exit_codes_say_equal_different_and_wrong_usage(
    shards: list[Path], plan: adq.Plan, tmp_path: Path, capsys: Capsys
) -> None:
    index, folder = str(tmp_path / "i.parquet"), str(tmp_path / "in")
    index_shards(shards, index)
    flags = f"--decode --label cls --image jpg --workers 1 --root {folder}".split()
    for source in ("plan.parquet", "features"):
        assert main(["verify", str(tmp_path / source), folder, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "25 samples of 3 shards in the features: 25 ok, 0 differ, 0 missing; 0 more are not listed",
        "25 usable: 25 ok",
        "25 opened",
    ]
    for code, words in (
        (0, [index, folder]),
        (1, [index, *map(str, shards[1:])]),
        (1, [str(tmp_path / "none.parquet"), folder]),
        (2, [index, folder, "--label", "cls"]),
        (2, [index, "pipe:cat x.tar"]),
    ):
        assert main(["verify", *words]) == code, words


def test_real_shards_verify_clean(cifar10: Path, photographs: Path, tmp_path: Path) -> None:
    for folder in (cifar10, photographs):
        report = index_shards(folder / "_info.json", tmp_path / f"{folder.name}.parquet")
        found = verified(tmp_path / f"{folder.name}.parquet", folder)
        assert (found.equal, found.ok) == (True, report.samples)


# ---- Checks that are kept


def test_checks_in_a_folder_are_not_made_again_until_a_shard_or_the_plan_changes(
    shards: list[Path], plan: adq.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def check(path: str, expected: Expected, **options: Any) -> Check:
        made.append(expected.name)
        return check_shard(path, expected, **options)

    monkeypatch.setattr("adq_wds.jobs.verify.check_shard", check)
    flip(shards[0], spans_of(shards[0])[2].byte_offset + 600)
    expected = verify_shards(plan, shards)
    assert not expected.equal

    def again(names: str, of: Any = plan, **options: Any) -> None:
        made.clear()
        report = verify_shards(of, shards, out=tmp_path / "checks", **options)
        assert report == verify_shards(of, shards, **{**options, "engine": "threads"})
        assert made[: len(names.split())] == names.split()
        assert len(made) == len(names.split()) + 3

    again("a.tar b.tar c.tar")
    assert sorted(os.listdir(tmp_path / "checks")) == ["a.json", "b.json", "c.json"]
    again("", of=tmp_path / "plan.parquet", engine="shared")
    again("a.tar b.tar c.tar", decode=True)
    os.utime(shards[0])
    again("b.tar", decode=True)
    (tmp_path / "checks" / "c.json").write_text('{"format":"adq_wds.check"')
    again("c.tar", decode=True)
    file = tmp_path / "checks" / "b.json"
    for old, new in (('"n":1', '"n":1,"more":2'), ('"n":1', '"n":-1'), ('"kept":', '"kept":1e9,"":')):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        again("b.tar", decode=True)
    index_shards(shards, tmp_path / "index.parquet")
    again("a.tar b.tar c.tar", of=tmp_path / "index.parquet")
    shards.pop().unlink()
    assert said(verify_shards(plan, shards, out=tmp_path / "checks"))[-1] == ("c.tar", None, "missing shard")


def test_commands_that_share_check_each_shard_once(
    shards: list[Path], plan: adq.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, both = list[str](), Barrier(2, timeout=60)

    def check(path: str, expected: Expected, **options: Any) -> Check:
        if made:
            raise KeyboardInterrupt
        made.append(expected.name)
        return check_shard(path, expected, **options)

    def check_at_once(path: str, expected: Expected, **options: Any) -> Check:
        both.wait()
        made.append(expected.name)
        return check_shard(path, expected, **options)

    def shared() -> Report:
        return verify_shards(plan, shards, out=tmp_path / "out", engine=Shared(tmp_path / "out", beat=0.1))

    expected = verify_shards(plan, shards)
    monkeypatch.setattr("adq_wds.jobs.verify.check_shard", check)
    with pytest.raises(KeyboardInterrupt):
        shared()
    monkeypatch.setattr("adq_wds.jobs.verify.check_shard", check_at_once)
    with ThreadPoolExecutor(2) as pool:
        reports = [each.result() for each in [pool.submit(shared) for _ in range(2)]]
    assert reports == [expected, expected]
    assert sorted(made) == ["a.tar", "b.tar", "c.tar"]


def test_commands_that_share_need_a_folder(shards: list[Path], plan: adq.Plan) -> None:
    with pytest.raises(ValueError, match="engine='shared' needs out=, a folder that all commands see"):
        verify_shards(plan, shards, engine="shared")
