"""Descriptions are read as their makers mean them, and name nothing but plain files in their own folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.shards.names import shown_url
from adq_wds.tables.info import read_info

TRAIN = {"name": "train", "num_samples": 12, "filenames": ["a.tar", "x/b.tar"], "shard_lengths": [5, 7]}
VAL = {"name": "val", "num_samples": 3, "filenames": ["v.tar"], "shard_lengths": [3]}
TIMM = {"splits": {"train": TRAIN, "val": VAL}, "classes": ["cat", "dog"]}
WIDS = {
    "wids_version": 1,
    "name": "all",
    "shardlist": [{"url": "a.tar", "nsamples": 5, "filesize": 10}],
    "datasets": [{"name": "more", "shardlist": [{"url": "./x/b.tar", "nsamples": 7}]}],
}


def put(folder: Path, value: Any) -> Path:
    path = folder / "_info.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def timm(*rows: tuple[Any, Any], **said: Any) -> dict[str, Any]:
    split = {"name": "train", "filenames": [name for name, _ in rows], "shard_lengths": [n for _, n in rows]}
    return {"splits": {"train": {**split, **said}}}


def wids(*rows: tuple[Any, Any], **said: Any) -> dict[str, Any]:
    return {"shardlist": [{"url": url, "nsamples": n} for url, n in rows], **said}


def test_splits_of_timm_are_read_in_order(tmp_path: Path) -> None:
    path = put(tmp_path, TIMM)
    train = [(str(tmp_path / "a.tar"), 5), (str(tmp_path / "x/b.tar"), 7)]
    assert read_info(path) == [*train, (str(tmp_path / "v.tar"), 3)]
    assert read_info(path, split="train") == train


def test_shard_lists_of_wids_are_read_in_order(tmp_path: Path) -> None:
    path = put(tmp_path, WIDS)
    assert read_info(path) == [(str(tmp_path / "a.tar"), 5), (str(tmp_path / "x/b.tar"), 7)]
    assert read_info(path, split="more") == [(str(tmp_path / "x/b.tar"), 7)]
    older = {name: value for name, value in WIDS.items() if name != "wids_version"}
    assert read_info(put(tmp_path, older)) == read_info(put(tmp_path, WIDS))


def test_a_bare_path_and_a_byte_order_mark_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, b"\xef\xbb\xbf" + json.dumps(timm(("a.tar", 1))).encode())
    monkeypatch.chdir(tmp_path)
    assert read_info("_info.json") == [("a.tar", 1)]


def test_an_unknown_split_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'tset' is not in .*_info.json: it has \['train', 'val'\]"):
        read_info(put(tmp_path, TIMM), split="tset")


# ---- S2: a description opens nothing else

HOSTILE = [
    "pipe:cat /etc/passwd", "PIPE:id", " pipe:id", "a.tar::pipe:id", "file:///etc/passwd", "-", "-rf", "..", "../a.tar",
    "x/../../a.tar", "/etc/passwd", "{a,b}.tar", "${HOME}/a.tar", "a\n.tar", "~/a.tar", "*.tar", "x//a.tar", "",
    "a.tar|id", "`id`", "c:\\a.tar", "././a.tar",
]  # fmt: skip


@pytest.mark.parametrize("make", [timm, wids])
@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_no_plain_files_are_refused_by_name(make: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(adq.ShardError, match=r"_info.json: shard (name )?.* is(\s| .* a name)") as error:
        read_info(put(tmp_path, make(("a0.tar", 1), (name, 1))))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:s3cret@host/a.tar?sig=s3cret#s3cret", "https://s3cret@host", "s3://s3cret:x@b/a.tar", "s3cret@h:a.tar",
        "pipe:curl -H 's3cret' https://h/a.tar", "https://host/a@s3cret:x",
    ],
)  # fmt: skip
def test_secrets_in_urls_are_never_said(url: str, tmp_path: Path) -> None:
    assert "s3cret" not in shown_url(url)
    with pytest.raises(adq.ShardError, match="is refused") as error:
        read_info(put(tmp_path, wids((url, 1))))
    assert "s3cret" not in str(error.value)


def test_only_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.tar").write_bytes(b"x")
    (home / "out.tar").symlink_to(tmp_path / "secret.tar")
    (home / "up").symlink_to(tmp_path)
    (home / "a.tar").write_bytes(b"x")
    (home / "in.tar").symlink_to("a.tar")
    for name in ("out.tar", "up/secret.tar"):
        with pytest.raises(adq.ShardError, match=rf"shard '{name}' is refused: a link .* out of the folder"):
            read_info(put(home, timm((name, 1))))
    (tmp_path / "link").symlink_to(home)
    put(home, timm(("in.tar", 1)))
    assert read_info(tmp_path / "link" / "_info.json") == [(str(tmp_path / "link" / "in.tar"), 1)]


# ---- Wrong types, sizes, forms

WRONG: list[tuple[Any, str]] = [
    (b"{", "not JSON that can be read"),
    (b"\xff\xff\xff", "not JSON that can be read"),
    (b"[" * 100_000, "not JSON that can be read"),
    (b"[" * 50 + b"]" * 50, "expected 'splits'"),
    (b'{"splits": ' * 2000 + b"1" + b"}" * 2000, r"not JSON that can be read|splits"),
    (b"1" * 10_000, "not JSON that can be read"),
    (b"[" + b"{}," * 2_000_000 + b"{}]", "header of values of about"),
    ([], "expected 'splits', as timm writes them, or 'shardlist', as wids does"),
    ("splits", "expected 'splits'"),
    ({"split": {}}, "expected 'splits'"),
    ({"splits": []}, r"splits is \[\], expected dict"),
    ({"splits": {"train": 3}}, "splits.train is 3, expected object"),
    ({"splits": {"train": {}}}, "splits.train has no 'filenames'"),
    ({"splits": {"train": {"filenames": ["a.tar"]}}}, "splits.train has no 'shard_lengths'"),
    ({"splits": {"train": {"filenames": "a.tar", "shard_lengths": [1]}}}, "filenames is 'a.tar', expected list"),
    ({"splits": {"t": {"filenames": ["a.tar"], "shard_lengths": []}}}, "has 1 filenames and 0 shard_lengths"),
    (timm((3, 1)), "shard name 3 is not a name"),
    (timm(("a.tar", -1)), r"shard_lengths\[0\] is -1, expected int"),
    (timm(("a.tar", True)), r"shard_lengths\[0\] is True, expected int"),
    (timm(("a.tar", 1.0)), r"shard_lengths\[0\] is 1.0, expected int"),
    (timm(("a.tar", "1")), r"shard_lengths\[0\] is '1', expected int"),
    (timm(("a.tar", 1), num_samples=2), "has num_samples 2, its shard_lengths sum to 1"),
    (timm(("a.tar", 1), num_samples=True), "num_samples is True, expected int"),
    (timm(("a.tar", 1), ("a.tar", 1)), "shard 'a.tar' is listed twice"),
    (wids((None, 1)), "shard name None is not a name"),
    (wids(("a.tar", None)), r"shardlist\[0\].nsamples is None"),
    (wids(("a.tar", 1), wids_version=2), "wids_version 2, expected 1"),
    (wids(("a.tar", 1), datasets={}), r"datasets is \{\}, expected list"),
    (wids(("a.tar", 1), datasets=[3]), r"datasets\[0\] is 3, expected dict"),
    (wids(("a.tar", 1), datasets=[{"source_url": "http://h/x.json"}]), "'source_url' is refused"),
    (wids(("a.tar", 1), base="/data"), "'base' is refused"),
    (wids(("a.tar", 1), name=3), "a data set.name is 3"),
    ({"shardlist": ["a.tar"]}, r"shardlist\[0\] is 'a.tar', expected object"),
    ({"shardlist": [{"url": "a.tar"}]}, r"shardlist\[0\] has no 'nsamples'"),
    ({"shardlist": [{"nsamples": 1}]}, r"shardlist\[0\] has no 'url'"),
    ({"datasets": [{"name": "x"}]}, "a data set has no 'shardlist'"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_what_is_no_description_is_a_shard_error(value: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(adq.ShardError, match=rf"_info.json: .*{text}") as error:
        read_info(put(tmp_path, value))
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = put(tmp_path, b"{}")
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(adq.ShardError, match="header of 67,108,865 bytes, at most 67,108,864"):
        read_info(path)


def test_a_missing_file_a_folder_and_a_fifo_are_shard_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    for name in ("none.json", "", "fifo.json"):
        with pytest.raises(adq.ShardError, match="no such file; expected a JSON description"):
            read_info(tmp_path / name)
