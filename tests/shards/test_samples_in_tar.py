"""Does the tar reader find the samples that webdataset finds, and refuse what webdataset loses?"""

import bz2
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from adq_wds.errors import SampleError, ShardError
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import (
    Ignored,
    WrongSample,
    expected_span,
    iter_spans,
    payload_crc32,
    read_sample,
    span_at,
    split_name,
)
from adq_wds.shards.tar_headers import Limits

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(*members: str | tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, payload); a bare name gets its own bytes as payload."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member in members:
            name, payload = (member, member.encode("utf-8", "replace")) if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return file.getvalue()


def ours(data: bytes) -> list[dict[str, Any]]:
    return [read_sample(data, span, url="u") for span in iter_spans(data, shard="s.tar")]


def stock(data: bytes) -> list[dict[str, Any]]:
    """Webdataset's own reader."""
    files = [{**file, "__url__": "u"} for file in tar_file_iterator(io.BytesIO(data))]
    return list(group_by_keys(files))


def check_span_law(data: bytes) -> None:
    end = 0
    for span in iter_spans(data, shard="s.tar"):
        assert span.byte_offset >= end
        end = span.byte_offset + span.n_bytes
        alone = data[span.byte_offset : end]
        found = span_at(alone, shard="s.tar")
        assert read_sample(alone, found, url="u") == read_sample(data, span, url="u")
        assert payload_crc32(alone, found) == payload_crc32(data, span)
    assert end <= len(data)


LONG = "folder/" * 20 + "n" * 60


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_samples_equal_webdatasets_in_every_tarfile_format(form: int) -> None:
    names = ["./a.jpg", "./a.cls", "b.c/d.jpg", "b.c/d.v1.JPG", "e.", "README", "__m__/x.jpg", "é/ü.jpg", "é/ü.txt",
             LONG + ".jpg", LONG + ".cls", "empty.jpg"]  # fmt: skip
    members = [(name, os.urandom(37 * i)) for i, name in enumerate(names)] + [("empty.cls", b"")]
    data = pack(*members, form=form)
    assert ours(data) == stock(data)
    assert [sample["__key__"] for sample in ours(data)] == ["./a", "b.c/d", "e", "é/ü", LONG, "empty"]
    check_span_law(data)


@pytest.mark.parametrize("mode", [{}, {"compress": False, "mtime": 1.5}])
def test_samples_equal_webdatasets_in_what_its_tarwriter_writes(tmp_path: Path, mode: dict[str, Any]) -> None:
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path), **mode) as writer:
        for i in range(20):
            writer.write({"__key__": f"train/{i:05d}", "jpg": os.urandom(600), "cls": i, "json": {"i": i}})
    expected = list(wds.WebDataset(str(path), shardshuffle=False))
    with open_shard(path) as view:
        got = [read_sample(view, span, url=str(path)) for span in iter_spans(view, shard="a.tar")]
    for sample in expected:
        sample.pop("__local_path__", None)
    assert got == expected
    assert len(got) == 20
    check_span_law(path.read_bytes())


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs a tar program")
@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_samples_equal_webdatasets_in_what_gnu_tar_writes(tmp_path: Path, form: str) -> None:
    if "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("needs GNU tar")
    folder = tmp_path / "set"
    names = ["a.jpg", "a.cls", "sub/ü.jpg", "sub/ü.txt", "sub/README"]
    if form != "v7":
        names += [f"{'d' * 60}/{'e' * 60}.{field}" for field in ("jpg", "cls")]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(700))
    arguments = f"tar --format={form} --sort=name -cf {tmp_path}/x.tar -C {folder} ."
    subprocess.run(arguments.split(), check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert ours(data) == stock(data)
    assert len(ours(data)) == (2 if form == "v7" else 3)
    check_span_law(data)


PARTS = st.sampled_from(["a", "b", "A", ".", "/", "__", "é", "\n", "a.jpg", "b.cls", ".x.", "__m__/"])
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("".join)


def comparable(name: str) -> bool:
    """Names that webdataset and we read alike: the exceptions are a base name with a leading dot, a trailing '/'
    (a directory), and a newline in a folder that has a dot."""
    folder, _, base = name.rpartition("/")
    return base != "" and not base.startswith(".") and not ("\n" in folder and "." in folder)


@settings(max_examples=400)
@given(st.lists(NAMES.filter(comparable), max_size=6), st.sampled_from(sorted(FORMATS)))
def test_samples_equal_webdatasets_for_any_unrepeated_names(names: list[str], form: str) -> None:
    data = pack(*names, form=FORMATS[form])
    pairs = [pair for pair in map(split_name, names) if pair is not None]
    runs = [key for i, (key, _) in enumerate(pairs) if i == 0 or pairs[i - 1][0] != key]
    if len(set(pairs)) < len(pairs) or len(set(runs)) < len(runs):
        with pytest.raises(ShardError, match=r"twice in a (shard|sample)"):
            list(iter_spans(data, shard="s.tar"))
        return
    expected = stock(data)
    spans = list(iter_spans(data, shard="s.tar"))
    assert [span.key for span in spans] == [sample["__key__"] for sample in expected]
    for span, sample in zip(spans, expected, strict=True):
        reserved = any(name.startswith("__") for name in sample if name not in ("__key__", "__url__"))
        assert (span.problem is not None) == reserved
        if not reserved:
            assert read_sample(data, span, url="u") == sample


def test_ignored_members_are_told_in_one_line() -> None:
    counts = Ignored()
    assert str(counts) == "no members ignored"
    list(iter_spans(pack("READ\nME", "a.jpg"), shard="s.tar", ignored=counts))
    assert str(counts) == r"1 member ignored: first 'READ\nME'"


@pytest.mark.parametrize("field", ["__bad__", "__key__", "__url__", "__x"])
def test_a_reserved_field_spoils_its_own_sample_only(field: str) -> None:
    data = pack("a.jpg", "b.jpg", f"b.{field}", "c.jpg")
    spans = list(iter_spans(data, shard="s.tar"))
    assert [span.key for span in spans if span.problem is None] == ["a", "c"]
    with pytest.raises(SampleError, match=f"shard s.tar, key 'b', field '{field}': reserved"):
        read_sample(data, spans[1], url="u")
    alone = data[spans[1].byte_offset :][: spans[1].n_bytes]
    assert span_at(alone, shard="s.tar").problem == spans[1].problem


def test_forged_fields_are_dropped_but_counted_in_the_crc() -> None:
    data = pack("a.jpg", ("a.__adq_keep__", b"1"))
    (span,) = iter_spans(data, shard="s.tar")
    assert read_sample(data, span, url="u") == {"__key__": "a", "__url__": "u", "jpg": b"a.jpg"}
    (other,) = iter_spans(forged := pack("a.jpg", ("a.__adq_keep__", b"0")), shard="s.tar")
    assert payload_crc32(data, span) != payload_crc32(forged, other)


def test_a_sample_of_too_many_members_is_refused() -> None:
    data = pack(*[f"a.{i}" for i in range(4)])
    assert len(list(iter_spans(data, shard="s.tar", limits=Limits(sample_members=4)))) == 1
    with pytest.raises(ShardError, match=r"key 'a': more than 3 members .* \(Limits.sample_members\)"):
        list(iter_spans(data, shard="s.tar", limits=Limits(sample_members=3)))


def test_whole_samples_before_damage_are_given_for_any_batch() -> None:
    names = [f"{i}.{field}" for i in range(3000) for field in ("jpg", "cls")]  # more headers than one batch
    data = pack(*[(name, b"") for name in names])
    for broken in (1, 2000, 2999):
        damaged, spans = bytearray(data), []
        damaged[broken * 1024 + 600] ^= 1  # in the second header of sample `broken`
        text = f"s.tar, byte {broken * 1024 + 512}: bad header: checksum does not match; write or fetch"
        with pytest.raises(ShardError, match=text):  # noqa: PT012 - what came before counts
            for span in iter_spans(bytes(damaged), shard="s.tar"):
                spans.append(span)
        assert [span.key for span in spans] == [str(i) for i in range(broken)]


def test_a_span_must_hold_exactly_one_sample() -> None:
    data = pack("a.jpg", "a.cls", "b.jpg", "README")
    a, b = iter_spans(data, shard="s.tar")
    both = data[: b.byte_offset + b.n_bytes]
    for wrong, text in [
        (both, r"holds 2 samples \('a', 'b'\)"),
        (b"", r"holds 0 samples \(\)"),
        (data[b.byte_offset + b.n_bytes :][:1024], "holds 0 samples"),
        (
            data[b.byte_offset :][: b.n_bytes + 1024],
            r"holds 1 samples \('b'\), expected exactly one from end",
        ),
        (both + bytes(512), "end-of-archive marker inside a span"),
        (both[: a.n_bytes] + b"x", "truncated"),
        (both[: a.n_bytes - 1], "but 511 are left: truncated"),
        (data[512:2048], "byte 0: not a tar file"),
    ]:
        with pytest.raises(ShardError, match=text):
            span_at(wrong, shard="s.tar")


def test_a_span_that_ends_behind_its_buffer_is_refused() -> None:
    data = pack("a.jpg", "b.jpg")
    _, b = iter_spans(data, shard="s.tar")
    for use in (lambda: payload_crc32(data[:1024], b), lambda: read_sample(data[:1024], b, url="u")):
        with pytest.raises(ValueError, match="ends at byte 1541 of a buffer of 1024"):
            use()


def test_spans_pickle_and_compare() -> None:
    (span,) = iter_spans(pack("a.jpg"), shard="s.tar")
    assert pickle.loads(pickle.dumps(span)) == span  # noqa: S301
    assert Limits() == Limits(member_bytes=1 << 32)


def test_a_shard_file_reads_like_its_bytes_and_is_closed(tmp_path: Path) -> None:
    data = pack("a.jpg", "b.jpg")
    (tmp_path / "a#1.tar").write_bytes(data)
    with open_shard(tmp_path / "a#1.tar") as view:
        spans = list(iter_spans(view, shard="s.tar"))
        assert spans == list(iter_spans(data, shard="s.tar"))
        assert [payload_crc32(view, span) for span in spans] == [payload_crc32(data, span) for span in spans]
        assert len(view) == len(data)
        assert (view[512:517], view[-5:], view[len(data) :]) == (b"a.jpg", bytes(5), b"")
    n_open = len(os.listdir("/dev/fd"))
    for _ in range(20):
        with open_shard(tmp_path / "a#1.tar") as view:
            next(iter_spans(view, shard="s.tar"))
    assert len(os.listdir("/dev/fd")) == n_open


@pytest.mark.parametrize("sizes", [[0, 1, 511] * 200, [70_000, 3, 20_000, 300_000], [16_384, 16_383] * 30])
def test_headers_are_found_wherever_reading_ahead_ends(tmp_path: Path, sizes: list[int]) -> None:
    data = pack(*((f"k{i}.bin", bytes([i % 256]) * size) for i, size in enumerate(sizes)))
    (tmp_path / "a.tar").write_bytes(data)
    with open_shard(tmp_path / "a.tar") as view:
        spans = list(iter_spans(view, shard="s.tar"))
        samples = [read_sample(view, span, url="u") for span in spans]
    assert spans == list(iter_spans(data, shard="s.tar"))
    assert [len(sample["bin"]) for sample in samples] == sizes
    assert samples == [read_sample(data, span, url="u") for span in spans]


def test_what_is_no_tar_file_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "bz2").write_bytes(bz2.compress(pack("a.jpg")))
    texts = {"empty": "empty file", "folder": "a directory", "fifo": "a fifo, socket or device", "bz2": "bzip2: unpack it",
             "loop": "symbolic links", "missing": "No such file", "empty/x": "Not a directory"}  # fmt: skip
    for name, text in texts.items():
        refused = pytest.raises(ShardError, match=f"shard {tmp_path}/{name}: .*{text}")
        with refused, open_shard(tmp_path / name):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack("a.jpg"))
    (tmp_path / "a.tar").chmod(0)
    refused = pytest.raises(ShardError, match=r"a\.tar: cannot be opened: Permission denied")
    with refused, open_shard(tmp_path / "a.tar"):
        pass


def test_a_span_is_taken_only_with_the_key_and_payload_expected() -> None:
    (span,) = iter_spans(pack("a.jpg", "a.cls"), shard="s.tar")
    data, crc = pack("a.jpg", "a.cls")[: span.n_bytes], payload_crc32(pack("a.jpg", "a.cls"), span)
    assert expected_span(data, shard="s.tar", key="a", crc32=crc) == span
    assert expected_span(data, shard="s.tar", key="a", crc32=None) == span
    for key, wanted in (("b", crc), ("a", crc ^ 1)):
        text = f"found key 'a' with crc32 {crc:08x}, expected .*{wanted:08x}"
        with pytest.raises(WrongSample, match=text) as wrong:
            expected_span(data, shard="s.tar", key=key, crc32=wanted)
        assert (wrong.value.span, wrong.value.crc32) == (span, crc)
    with pytest.raises(WrongSample, match=r"^in its span, ") as wrong:
        expected_span(data[:512], shard="s.tar", key="a", crc32=crc)
    assert wrong.value.span is None
