"""Is every odd name, type and size in a tar's headers read, counted or refused by whatever opens a shard? F6, F7, F8."""

import tarfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.jobs.index import index_shards
from tests.shards.test_samples_in_tar import pack
from tests.shards.test_tar_headers import base_256, header, long_name, octal, pax, quick_and_small, record
from tests.test_faults_shards import check_unmixed, two_shards

# ---- F6: keys

Found = dict[str, list[str]] | str
NAMES: dict[str, tuple[list[Any], Found, int]] = {  # names, what comes (fields by key) or is said, members ignored
    "duplicate adjacent": (["a.jpg", "a.cls", "a.jpg", "a.cls"], "key 'a', field 'jpg': field twice in a sample", 0),
    "duplicate apart": (["a.jpg", "b.jpg", "a.jpg"], "key 'a': key twice in a shard", 0),
    "interleaved": (["a.jpg", "b.jpg", "a.cls", "b.cls"], "key 'a': key twice in a shard", 0),
    "many bytes not UTF-8": (["ok.jpg", "\udcff\udcfe.jpg"], r"byte 1024: name b'\xff\xfe.jpg' is not UTF-8", 0),
    "dotted": (["img.v1.jpg", "img.v2.jpg"], {"img": ["v1.jpg", "v2.jpg"]}, 0),
    "./": (["./a.jpg", "a.jpg"], {"./a": ["jpg"], "a": ["jpg"]}, 0),
    "no extension": (["README", "a.jpg", "x/README", "a.cls", "a.b/c"], {"a": ["jpg", "cls"]}, 3),
    "leading dot": (["._a.jpg", ".hidden", "dir/._a.jpg", "a.jpg"], {"a": ["jpg"]}, 3),
    "__x__": (["__x__", "__x__/a.jpg", "__x.__", "__x__.jpg"], {"__x__": ["jpg"]}, 3),
    "case of a field": (["a.JPG", "a.jpg"], "key 'a', field 'jpg': field twice in a sample", 0),
    "case of a key": (["A.jpg", "a.JPG", "a.Cls"], {"A": ["jpg"], "a": ["jpg", "cls"]}, 0),
    "NFC/NFD": (
        [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")], {"\xe9": ["jpg"], "e\u0301": ["jpg"]}, 0,
    ),
    "not UTF-8": (["ok.jpg", "\udcff.jpg"], r"byte 1024: name b'\xff.jpg' is not UTF-8", 0),
    "newline": (["a\nb.jpg", "a\tb\x1b.jpg"], {"a\nb": ["jpg"], "a\tb\x1b": ["jpg"]}, 0),
    "empty": (["", "a.jpg", ("/", b""), "a."], {"a": ["jpg", ""]}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_every_kind_of_name_is_read_refused_or_counted(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """F6; `tar` says why. What a scan refuses, a plan and an index are never made of."""
    names, found, n_ignored = NAMES[case]
    path = tmp_path / "a.tar"
    path.write_bytes(pack(*names, form=tarfile.GNU_FORMAT))
    makers: list[Callable[[], Any]] = [
        lambda: adq.ShardDataset(str(path)),
        lambda: adq.ShardDataset(str(path), plan=adq.Plan.from_keys(str(path), None)),
        lambda: index_shards(path, tmp_path / "i.parquet"),
        lambda: adq.ShardDataset(str(path), index=tmp_path / "i.parquet"),
    ]
    if isinstance(found, str):
        for make in makers[:3]:
            with pytest.raises(adq.ShardError) as caught:
                make()
            assert str(caught.value).startswith("shard a.tar, ")
            assert found in str(caught.value)
        return
    for make in makers:
        caplog.clear()
        with caplog.at_level("INFO", logger="adq_wds"):
            made = make()
        lines = [r.message for r in caplog.records if "ignored: first" in r.message]
        told = [line.partition(": ")[2].split()[0] for line in lines]
        assert told == [str(n_ignored)] * (n_ignored > 0 and make is not makers[3])
        if isinstance(made, adq.ShardDataset):
            got = {s["__key__"]: [field for field in s if field[:2] != "__"] for s in made}
            assert got == found
            assert [s["__key__"] for s in made] == list(found)


def test_a_20_mb_name_is_refused_from_its_header(tmp_path: Path) -> None:
    """F6."""
    for head in (long_name(b"n" * 20_000_000), pax(record(b"path", b"n" * 20_000_000))):
        check_refused(tmp_path, head + header() + bytes(1024), r"declares 200000\d\d bytes, more than Limits")


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    """F6."""
    paths, known = two_shards(tmp_path)
    urls = [str(path) for path in paths]
    for options in ({}, *known.values()):
        assert check_unmixed(iter(adq.ShardDataset(urls, **options))) == 8
        for twice in ([urls[0], urls[0]], [urls[0], f"{tmp_path}/./a.tar"]):
            refused = (ValueError, adq.PlanError, adq.ShardError)
            with pytest.raises(refused, match=r"a.tar' .*(twice|2 times|both match)"):
                adq.ShardDataset([*twice, urls[1]], **options)


# ---- F7, F8: headers that no plain file has


def check_refused(tmp_path: Path, data: bytes, text: str) -> None:
    """By whatever walks a shard's headers, in less than a second and 64 MiB."""
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    makers: list[Callable[[], Any]] = [
        lambda: adq.ShardDataset(str(path)),
        lambda: adq.Plan.from_keys(str(path), None),
        lambda: index_shards(path, tmp_path / "i.parquet"),
        lambda: adq.embed_shards(str(path), "thumbnail", tmp_path / "features", progress=False),
    ]
    for make in makers:
        with quick_and_small(), pytest.raises(adq.ShardError, match=f"shard s.tar, byte .*{text}"):
            make()


SPECIAL = {
    "hard link": (header(b"x/a.jpg", kind=b"1"), "hard link 'x/a.jpg'"),
    "symbolic link": (header(b"x/a.jpg", kind=b"2"), "symbolic link 'x/a.jpg'"),
    "fifo": (header(b"x/a.jpg", kind=b"6"), "fifo 'x/a.jpg'"),
    "character device": (header(b"x/a.jpg", kind=b"3"), "character device 'x/a.jpg'"),
    "block device": (header(b"x/a.jpg", kind=b"4"), "block device 'x/a.jpg'"),
    "sparse": (header(b"x/a.jpg", octal(1 << 30), b"S"), "sparse file 'x/a.jpg'"),
    "sparse by PAX": (pax(record(b"GNU.sparse.major", b"1")) + header(), r"sparse file \(PAX GNU.sparse\)"),
    "unknown V": (header(b"x/a.jpg", octal(1 << 30), b"V"), "member of unknown type 'V' 'x/a.jpg': only plain files"),
    "unknown M": (header(b"x/a.jpg", octal(1 << 30), b"M"), "member of unknown type 'M' 'x/a.jpg': only plain files"),
    "PAX size": (pax(record(b"size", b"%d" % (1 << 40))) + header(), "declares 1099511627776 bytes"),
    "negative size": (header(size=b"\xff" * 12), "negative number"),
    "negative PAX size": (pax(record(b"size", b"-1")) + header(), "PAX size b'-1'"),
    "directory with a size": (header(b"d.x", octal(5), b"5"), "directory 'd.x/' declares 5 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """F7; a plain directory is ignored and counted."""
    head, text = SPECIAL[kind]
    check_refused(tmp_path, header(b"ok.jpg") + head + bytes(1024), text)


SIZES = [10**9, 1 << 33, 1 << 40, 1 << 62]
KINDS = {"read": (b"a.jpg", b"0"), "filtered": (b"README", b"0"), "meta": (b"PaxHeader", b"x")}


@pytest.mark.parametrize("n_bytes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_lies_is_refused_before_any_read_or_skip(kind: str, n_bytes: int, tmp_path: Path) -> None:
    """F8."""
    name, flag = KINDS[kind]
    head = header(name, base_256(n_bytes) if n_bytes >= 1 << 33 else octal(n_bytes), flag)
    text = rf"declares {n_bytes} bytes, (more than Limits\.|but 2048 are left: truncated)"
    check_refused(tmp_path, header(b"ok.jpg") + head + bytes(2048), text)


@pytest.mark.parametrize("n_bytes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_lies_since_the_plan_was_made_is_refused(kind: str, n_bytes: int, tmp_path: Path) -> None:
    """F8, where the plan says how many bytes are read; what it drops is not looked at."""
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join(header(b"%d.jpg" % i, octal(512)) + bytes(512) for i in range(3)) + bytes(1024))
    plan = adq.Plan.from_keys(str(path), ["0", "1"] if kind != "filtered" else ["0", "2"])
    assert len(list(adq.ShardDataset(str(path), plan=plan))) == 2
    name, flag = (b"1.jpg", b"0") if kind == "filtered" else (b"1.jpg", KINDS[kind][1])
    lying = header(name, base_256(n_bytes) if n_bytes >= 1 << 33 else octal(n_bytes), flag)
    path.write_bytes(path.read_bytes()[:1024] + lying + path.read_bytes()[1536:])
    start = time.process_time()
    stream = iter(adq.ShardDataset(str(path), plan=plan))
    assert next(stream)["__key__"] == "0"
    if kind == "filtered":
        assert next(stream)["__key__"] == "2"
    else:
        text = rf"s.tar, key '1': .* declares {n_bytes} bytes"
        with quick_and_small(), pytest.raises(adq.ShardError, match=text):
            next(stream)
    assert time.process_time() - start < 1
