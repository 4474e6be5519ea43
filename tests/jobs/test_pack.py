"""A folder of image files becomes shards that hold every image, and every other file is counted."""

import io
import json
import logging
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.errors import AdqError, SampleError
from adq_wds.jobs.pack import pack_folder
from adq_wds.tables.spans import scan_spans
from tests.programs import Program

Files = dict[str, bytes]


def picture(seed: int, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def lay(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def classes_of(n_classes: int, n: int, *, first: int = 0) -> Files:
    return {f"c{i % n_classes}/{i:04d}.jpg": picture(first + i) for i in range(n)}


def read(folder: Path) -> list[adq.Sample]:
    return list(adq.ShardDataset(str(folder), rank=0, world=1))


def images(samples: list[adq.Sample]) -> Counter[bytes]:
    return Counter(v for s in samples for k, v in s.items() if k != "cls" and not k.startswith("__"))


def info(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "_info.json").read_text()))


def listing(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".parquet"}


def test_every_image_is_read_back_with_its_bytes_and_label(tmp_path: Path) -> None:
    files = {**classes_of(3, 30), "c1/deep/er/x.png": picture(99, "PNG")}
    report = pack_folder(lay(tmp_path / "in", files), tmp_path / "out" / "%03d.tar", max_samples=8)
    samples = read(tmp_path / "out")
    assert images(samples) == Counter(files.values())
    labels = {s["__key__"]: int(s["cls"]) for s in samples}
    assert labels == {name.rsplit(".", 1)[0]: int(name[1]) for name in files}
    assert (report.samples, report.shards, report.classes) == (31, 4, ["c0", "c1", "c2"])
    assert info(tmp_path / "out")["classes"] == ["c0", "c1", "c2"]
    assert (tmp_path / "out" / "index.parquet").is_file()
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in theirs] == [s["__key__"] for s in samples]
    assert images(theirs) == Counter(files.values())


def test_files_and_seed_alone_decide_bytes_and_order(tmp_path: Path) -> None:
    files = classes_of(4, 40)
    lay(tmp_path / "a", files)
    lay(tmp_path / "b", dict(reversed(files.items())))
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        pack_folder(tmp_path / name, tmp_path / f"{name}{seed}" / "%d.tar", seed=seed)
    assert listing(tmp_path / "a0") == listing(tmp_path / "b0")
    orders = {name: [s["__key__"] for s in read(tmp_path / name)] for name in ("a0", "a1")}
    assert sorted(orders["a0"]) == sorted(orders["a1"])
    assert orders["a0"] != orders["a1"]
    labels = [int(s["cls"]) for s in read(tmp_path / "a0")]
    assert labels != sorted(labels), "classes one after another"


MIXED: Files = {
    **classes_of(2, 20), "c0/empty.jpg": b"", "c0/page.PNG": b"<html>404</html>", "c1/.DS_Store": b"x",
    "c1/._0001.jpg": b"x", ".git/a/b.jpg": b"x", ".git/c": b"x", "README": b"about", "c1/notes.txt": b"n",
    "c1/two.TXT": b"n", "top.jpg": picture(500),
}  # fmt: skip


def test_every_file_is_packed_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = lay(tmp_path / "in", MIXED)
    (root / "c0" / "gone.jpg").symlink_to(root / "nothing.jpg")
    os.mkfifo(root / "c0" / "fifo.jpg")
    (root / "c0" / "round").symlink_to(root)
    (root / "c0" / "linked.jpg").symlink_to(root / "c1" / "0001.jpg")
    with caplog.at_level(logging.WARNING, "adq_wds"):
        report = pack_folder(root, tmp_path / "out" / "%d.tar", on_error="skip", max_bad_fraction=0.5)
    assert (report.samples, report.bad, report.hidden) == (21, 6, 4)
    assert report.other == {".txt": 2, "no extension": 1}
    assert report.files == len(MIXED) + 4
    assert len(read(tmp_path / "out")) == 21
    for name, reason in {
        "empty.jpg": "0 bytes", "page.PNG": "<html>", "gone.jpg": "cannot be read", "fifo.jpg": "no plain file",
        "round": "a link back", "top.jpg": "no label",
    }.items():  # fmt: skip
        assert any(name in line and reason in line for line in caplog.messages), name
    assert "34 files = 21 packed + 6 bad + 4 hidden + 3 without" in str(report)
    assert str(report).count("\n") == 1, "no key was changed"


@pytest.mark.parametrize("bad", ["c0/empty.jpg", "c0/page.PNG", "top.jpg"])
def test_a_bad_image_is_an_error_that_names_the_file(bad: str, tmp_path: Path) -> None:
    root = lay(tmp_path / "in", {**classes_of(2, 20), bad: MIXED[bad]})
    with pytest.raises(SampleError, match=f"file '.*in/{bad}': "):
        pack_folder(root, tmp_path / "out" / "%d.tar")
    assert not (tmp_path / "out" / "_info.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    root = lay(tmp_path / "in", classes_of(2, 4))
    for place in (root / "c0" / "0000.jpg", root / "c1"):
        mode = place.stat().st_mode
        place.chmod(0)
        with pytest.raises(SampleError, match=f"{place.name}': cannot be read: Permission denied"):
            pack_folder(root, tmp_path / place.name / "%d.tar")
        place.chmod(mode)


def test_skipping_has_bounds(tmp_path: Path) -> None:
    root = lay(tmp_path / "in", {**classes_of(2, 20), **{f"c0/bad{i}.jpg": b"x" for i in range(5)}})
    with pytest.raises(SampleError, match=r"5 of 25 samples are bad, more than max_bad_fraction=0\.1"):
        pack_folder(root, tmp_path / "out" / "%d.tar", on_error="skip")
    with pytest.raises(SampleError, match="all 1 images are bad"):
        pack_folder(lay(tmp_path / "one", {"a/b.jpg": b"x"}), tmp_path / "o" / "%d.tar", on_error="skip")


HOSTILE = [
    b"c/a.jpg", b"c/a.png", b"c/a.JPG", b"c/A.jpg", b"c/a-2.jpg", b"c/a.v1.jpg", b"c/a.v2.jpg", b"c/a_v1.jpg",
    b"c/with space.jpg", b"c/new\nline.jpg", b"c/\x1b[31m.jpg", b"c/\xff\xfe.jpg", b"c/\xff\xfd.jpg",
    "c/é.jpg".encode(), "c/e\u0301.jpg".encode(), b"c/" + b"n" * 250 + b".jpg", b"__c__/x.jpg", b"__bad__/y.jpg",
    b"c.d/e.f/g.jpg", b"c/a..jpg", b"c/patches.jpg", b"c/x.patches.jpg", b"c/__key__.jpg", b"\xff/z.jpg", b"c/'\"\\.jpg",
]  # fmt: skip


def test_any_name_becomes_a_key_of_its_own_that_is_read_back(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path / "in")
    for i, name in enumerate(HOSTILE):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(picture(i))
    report = pack_folder(tmp_path / "in", tmp_path / "out" / "%d.tar")
    assert report.samples == report.files == len(HOSTILE)
    wanted = Counter(picture(i) for i in range(len(HOSTILE)))
    assert images(read(tmp_path / "out")) == wanted
    theirs = list(wds.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False))
    assert images(theirs) == wanted
    keys = [sample["__key__"] for sample in theirs]
    assert len(set(keys)) == len(keys)
    assert keys == scan_spans(tmp_path / "out" / "0.tar", shard="0.tar").keys
    assert all(key.isprintable() and not key.startswith("__") for key in keys)
    assert {"c/a", "c/A", "c/a-2", "c/with space", "c/a_v2"} <= set(keys)
    classes = info(tmp_path / "out")["classes"]
    assert classes == ["__bad__", "__c__", "c", "c.d", "_"]


def test_the_field_is_named_after_the_content(tmp_path: Path) -> None:
    forms = {"JPEG": "jpg", "TIFF": "tif"} | {f: f.lower() for f in ("PNG", "WEBP", "GIF", "BMP", "PPM")}
    root = lay(tmp_path / "in", {f"{form}.jpeg": picture(1, form) for form in forms})
    pack_folder(root, tmp_path / "out" / "%d.tar")
    fields = {s["__key__"]: [n for n in s if n[:2] != "__"] for s in read(tmp_path / "out")}
    assert fields == {form: [name] for form, name in forms.items()}
    for sample in adq.ShardDataset(str(tmp_path / "out"), pipes=[adq.Decode(label=None)], rank=0, world=1):
        assert sample["image"].size == (12, 12)


def test_what_has_no_class_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = lay(tmp_path / "in", {f"{i}.jpg": picture(i) for i in range(5)})
    assert pack_folder(root, tmp_path / "out" / "%d.tar").classes is None
    assert "packed without labels" in caplog.text
    assert all("cls" not in sample for sample in read(tmp_path / "out"))
    assert "classes" not in info(tmp_path / "out")
    root = lay(tmp_path / "in2", {**classes_of(2, 4), "annotations/a.xml": b"<a/>"})
    assert pack_folder(root, tmp_path / "out2" / "%d.tar").classes == ["c0", "c1"]
    assert "no classes: ['annotations']" in caplog.text


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    root = lay(tmp_path / "in", {"train/cat/a.jpg": picture(0), "val/cat/a.jpg": picture(1)})
    text = r"splits, not classes: \['train', 'val'\]; pack each by itself.*in/train'"
    with pytest.raises(ValueError, match=text):
        pack_folder(root, tmp_path / "out" / "%d.tar")
    assert pack_folder(root, tmp_path / "out" / "%d.tar", label=None).samples == 2


def test_what_cannot_be_packed_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out" / "%d.tar"
    with pytest.raises(ValueError, match="is no folder"):
        pack_folder(tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match=r"no image files in .*other files: .heic 1; hidden files: 1"):
        pack_folder(lay(tmp_path / "in", {"a.heic": b"x", ".b": b""}), out)
    root = lay(tmp_path / "good", classes_of(1, 2))
    with pytest.raises(ValueError, match="inside"):
        pack_folder(root, root / "shards" / "%d.tar")
    with pytest.raises(ValueError, match="label must be 'folder' or None"):
        pack_folder(root, out, label="cls")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    pack_folder(root, out)
    with pytest.raises(AdqError, match=r"holds _info\.json of an earlier run"):
        pack_folder(root, out)
    assert pack_folder(root, out, overwrite=True).samples == 2


KILLED = """
import sys, time, adq_wds.jobs.pack as pack
read, paths = pack._read_image, []

def read_twelve(path):
    paths.append(path)
    if len(paths) > 12:
        print("waiting", flush=True)
        time.sleep(600)
    return read(path)

pack._read_image = read_twelve
pack.pack_folder(sys.argv[1], sys.argv[2], max_samples=5)
"""


def test_killed_it_leaves_whole_shards_and_no_description(tmp_path: Path) -> None:
    root, out = lay(tmp_path / "in", classes_of(2, 60)), tmp_path / "out"
    job = Program(KILLED, str(root), str(out / "%03d.tar"))
    assert job.stdout.readline() == "waiting\n"
    job.kill()
    job.communicate()
    assert job.returncode == -signal.SIGKILL
    left = sorted(path for path in out.glob("*.tar") if not path.name.startswith("."))
    assert [len(scan_spans(path, shard=path.name)) for path in left] == [5, 5]
    assert not (out / "_info.json").exists()
    report = pack_folder(root, out / "%03d.tar", max_samples=5, overwrite=True)
    assert images(read(out)) == Counter(classes_of(2, 60).values())
    assert report.shards == 12


def test_the_command_packs_and_run_plans_the_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root, out = lay(tmp_path / "in", {**classes_of(2, 20), "c0/page.jpg": b"<html>"}), tmp_path / "out"
    arguments = ["pack", str(root), "-o", str(out / "%06d.tar"), "--seed", "3"]
    assert main(arguments) == 1
    assert "c0/page.jpg': not an image" in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["samples"], shown["bad"], shown["files"]) == (20, 1, 21)
    flags = f"--encoder thumbnail --bins 2 --keep 0.5 -o {tmp_path / 'run'}".split()
    assert main(["run", str(out), *flags]) == 0
    assert adq.load_plan(tmp_path / "run" / "plan.parquet").n_kept == 10


@pytest.mark.parametrize("command", ["run", "embed", "index"])
def test_a_folder_of_images_as_shards_is_pointed_to_pack(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = lay(tmp_path / "in", classes_of(1, 2))
    assert main([command, str(root), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "image files" in error
    assert f"adq pack {root} -o" in error
