"""Tars are written whole, in pieces that hold what was asked, and from equal samples with equal bytes."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.writing.tars import ShardPattern, write_tars

Samples = list[dict[str, Any]]


def samples(n: int, size: int = 100) -> Samples:
    fields = [{"jpg": bytes([i]) * size, "cls": b"%d" % i} for i in range(n)]
    return [{"__key__": f"d/k{i:03d}", "__url__": "x.tar", **each} for i, each in enumerate(fields)]


def write(
    folder: Path, stream: Any, *, name: str = "s-%06d.tar", max_samples: int = 10, max_bytes: int = 10**9
) -> list[tuple[str, int, int]]:
    pattern = ShardPattern(str(folder / name))
    out = write_tars(stream, pattern, max_samples=max_samples, max_bytes=max_bytes)
    return [(shard.path.name, shard.n, shard.payload_bytes) for shard in out]


def keys(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [member.name[:-4] for member in tar if member.name.endswith(".jpg")]


def test_members_are_the_fields_in_their_order(tmp_path: Path) -> None:
    fields = {"seg.png": b"1", "jpg": b"22", "__local_path__": "y", "cls": b""}
    sample = {"__key__": "a/b", "__url__": "x", **fields}
    assert write(tmp_path, [sample]) == [("s-000000.tar", 1, 3)]
    with tarfile.open(tmp_path / "s-000000.tar") as tar:
        members = tar.getmembers()
        assert [(m.name, m.size) for m in members] == [("a/b.seg.png", 1), ("a/b.jpg", 2), ("a/b.cls", 0)]
        assert {(m.mtime, m.mode, m.uid, m.uname) for m in members} == {(0, 0o444, 0, "")}
        assert [tar.extractfile(m).read() for m in members] == [b"1", b"22", b""]  # type: ignore[union-attr]


def test_a_shard_ends_at_max_samples(tmp_path: Path) -> None:
    assert [n for _, n, _ in write(tmp_path, samples(25))] == [10, 10, 5]
    assert [n for _, n, _ in write(tmp_path, samples(20))] == [10, 10]
    found = [key for path in sorted(tmp_path.glob("*.tar"))[:2] for key in keys(path)]
    assert found == [sample["__key__"] for sample in samples(20)]


def test_a_shard_ends_before_max_bytes(tmp_path: Path) -> None:
    stream = [{"__key__": f"k{i}", "bin": bytes(n)} for i, n in enumerate([40, 60, 1, 500, 99, 1, 1])]
    sizes = [(2, 100), (1, 1), (1, 500), (2, 100), (1, 1)]
    found = write(tmp_path, stream, max_bytes=100)
    assert found == [(f"s-{i:06d}.tar", n, n_bytes) for i, (n, n_bytes) in enumerate(sizes)]


def test_long_and_foreign_keys_are_read_back(tmp_path: Path) -> None:
    long = ["é" * 80, "a" * 300, "x/" * 60 + "y", "new\nline"]
    write(tmp_path, [{"__key__": key, "jpg": b"1"} for key in long])
    assert keys(tmp_path / "s-000000.tar") == long


@pytest.mark.parametrize(
    ("n", "error", "shown", "text", "left"),
    [
        (15, RuntimeError("broke"), RuntimeError, "broke", ["s-000000.tar"]),
        (3, ConnectionResetError("by"), adq.SampleError, "stream to be written failed: ConnectionReset", []),
    ],  # an error of the source is not taken for one of the disk
)
def test_a_stream_that_breaks_leaves_no_short_shard(
    tmp_path: Path, n: int, error: Exception, shown: type[Exception], text: str, left: list[str]
) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from samples(n)
        raise error

    with pytest.raises(shown, match=text):
        write(tmp_path, broken())
    assert os.listdir(tmp_path) == left
    assert all(len(keys(tmp_path / name)) == 10 for name in left)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ({"__key__": "k", "cls": 3}, "shard x.tar, key 'k', field 'cls': holds int, only bytes can be"),
        ({"__key__": "k", "txt": "hello"}, "key 'k', field 'txt': holds str"),
        ({"__key__": "k", "jpg": bytearray(b"1")}, "key 'k', field 'jpg': holds bytearray"),
        ({"__key__": "k"}, "shard x.tar, key 'k': nothing to store"),
        ({"jpg": b""}, "shard x.tar: no key to store it under, __key__ is None"),
        ({"__key__": 7, "jpg": b""}, "shard x.tar, key 7: no key to store it under, __key__ is 7"),
        *[
            ({"__key__": key, field: b""}, rf"key '{key}', field '{field}': would not be read back")
            for key, field in (("a.b", "jpg"), ("a/", "jpg"), ("", "jpg"), ("a", "JPG"), ("__a__/b", "jpg"))
        ],
    ],
)
def test_a_sample_that_cannot_be_stored_is_named(tmp_path: Path, sample: dict[str, Any], text: str) -> None:
    with pytest.raises(adq.SampleError, match=text):
        write(tmp_path, [*samples(2), {"__url__": "x.tar", **sample}])
    assert os.listdir(tmp_path) == []


NO_NUMBER = "small.tar %06d/small.tar %d-%d.tar a/%06d/%06d.tar {000000..000009}.tar %s.tar %6d.tar %0999d.tar %%06d.tar"


@pytest.mark.parametrize("pattern", ["", "%06d", "%06d.tar.gz", *NO_NUMBER.split()])
def test_a_pattern_without_exactly_one_number_is_refused(pattern: str) -> None:
    text = "must end in .tar" if pattern.startswith("%06d") and "/" not in pattern else "must hold one number"
    with pytest.raises(ValueError, match=text):
        ShardPattern(pattern)


def test_a_pattern_finds_the_files_it_could_have_made(tmp_path: Path) -> None:
    others = ["s-x.tar", "t-000000.tar", "s-000000.tar.bak"]
    for name in ("s-000001.tar", "s-000000.tar", "s-1234567.tar", *others):
        (tmp_path / name).touch()
    pattern = ShardPattern(str(tmp_path / "s-%06d.tar"))
    assert [path.name for path in pattern.existing()] == ["s-000000.tar", "s-000001.tar", "s-1234567.tar"]
    assert pattern.path(1_234_567).name == "s-1234567.tar"
    assert ShardPattern("%d.tar").path(7) == Path("7.tar")
