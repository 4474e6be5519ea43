"""Patterns, names, and the way back from a URL."""

import os
from pathlib import Path

import pytest

from adq_wds.errors import PlanError
from adq_wds.shards import ShardNames, base_name, check_shard_name, expand_urls, path_of, shard_names


def test_braces_and_double_colons_are_read_as_webdataset_reads_them() -> None:
    from webdataset.shardlists import expand_urls as theirs

    for pattern in ("a-{000..011}.tar", "{x,y}-{0..2}.tar::z.tar", "one.tar", "http://h/{a,b}.tar"):
        assert expand_urls(pattern) == theirs(pattern)


def test_stars_and_folders_match_local_files_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expand_urls(str(tmp_path / "*.tar")) == both
    assert expand_urls(tmp_path) == both
    assert expand_urls([tmp_path / "b.tar", str(tmp_path / "a*")]) == both[::-1]


def test_a_file_with_braces_in_its_own_name_is_one_shard(tmp_path: Path) -> None:
    path = tmp_path / "x{a,b}.tar"
    path.touch()
    assert expand_urls(path) == [str(path)]


@pytest.mark.parametrize(
    ("urls", "text"),
    [
        ("nothing-*.tar", "no shards match 'nothing-"),
        ([], "no shards given"),
        ("", "no shards given"),
        (["a.tar", "a.tar"], "shard 'a.tar' is listed 2 times"),
        ("a.tar::b.tar::a.tar", "is listed 2 times"),
    ],
)
def test_impossible_lists_are_refused(urls: str | list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        expand_urls(urls)


@pytest.mark.parametrize(
    "pattern", ["{0..999999999999}.tar", "{0..9999}-{0..9999}.tar", "{999999999..0..1}.tar"]
)
def test_a_pattern_for_too_many_shards_is_refused_before_it_is_written_out(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"shards, at most 1,000,000"):
        expand_urls(pattern)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards match"):
        expand_urls(tmp_path)


def test_names_take_as_much_folder_as_they_need() -> None:
    urls = ["/d/a/x/t.tar", "/d/b/x/t.tar", "/d/b/y/t.tar", "/d/u.tar"]
    assert shard_names(urls) == ["a/x/t.tar", "b/x/t.tar", "y/t.tar", "u.tar"]


@pytest.mark.parametrize("other", ["d/./a.tar", os.path.abspath("d/a.tar"), "d/e/../a.tar"])
def test_the_same_file_under_two_spellings_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match="is listed twice"):
        shard_names(["d/a.tar", other])


def test_a_shard_below_another_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shard_names(["t.tar", "sub/t.tar"]) == [f"{tmp_path.name}/t.tar", "sub/t.tar"]


def test_moving_the_data_changes_no_name_and_no_base_name() -> None:
    assert shard_names(["/old/a.tar", "/old/b.tar"]) == shard_names(["s3://bucket/new/a.tar?x=1", "/b.tar"])
    assert base_name("s3://bucket/x/a.tar?token=1") == base_name("x/a.tar") == "a.tar"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("a/b.tar", "a/b.tar"),
        ("http://u:p@h/b.tar#x", "h/b.tar"),
        ("pipe:curl https://h/a.tar -H 'Authorization: Bearer SECRET'", "a.tar"),
        ("pipe:cat /x/b.tar.gz || true", "b.tar.gz"),
        (" PIPE:whoami", "pipe"),
    ],
)
def test_the_path_of_a_url_holds_no_command_and_no_user(url: str, path: str) -> None:
    assert path_of(url) == path


def test_a_url_finds_the_name_with_the_longest_common_suffix() -> None:
    names = ShardNames(["x/t.tar", "y/t.tar", "u.tar"])
    assert names.find("/new/place/x/t.tar") == "x/t.tar"
    assert names.find("http://h/y/t.tar?a=b") == "y/t.tar"
    assert names.find("anywhere/u.tar") == "u.tar"


def test_an_ambiguous_url_is_an_error_that_root_settles() -> None:
    names = ["x/t.tar", "y/t.tar"]
    with pytest.raises(PlanError, match=r"may be 'x/t.tar' or 'y/t.tar'; say which with root="):
        ShardNames(names).find("/data/z/t.tar")
    assert ShardNames(names, root="/data").find("/data/x/t.tar") == "x/t.tar"
    with pytest.raises(PlanError, match=r"shard 'z/t.tar' below root '/data' is not in the plan"):
        ShardNames(names, root="/data").find("/data/z/t.tar")


def test_an_unknown_shard_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"shard 'v.tar' is not in the plan"):
        ShardNames(["u.tar"]).find("d/v.tar")


HOSTILE = [
    "pipe:cat a.tar", "PIPE:x", " a.tar", "a.tar ", "a.tar::pipe:x", "file:///etc/passwd", "-", "-rf.tar", "..",
    "../a.tar", "a/../../b.tar", "/etc/passwd", "{a,b}.tar", "${HOME}/a.tar", "a\nb.tar", "~/a.tar", "a*.tar",
    "http://h/a.tar", "", "a//b.tar", "./a.tar", "a|b.tar", "`x`.tar", "a;b.tar", "a\x00.tar", "C:\\a.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_could_open_something_else_is_refused(name: str) -> None:
    """S2: a plan never names anything but a plain relative file."""
    with pytest.raises(PlanError, match="shard name"):
        check_shard_name(name)


@pytest.mark.parametrize(
    "name", ["a.tar", "a#1.tar", "train set/a 1.tar", "é.tar", "x/y/z-000.tar", "a+b=c,d@e.tar"]
)
def test_a_plain_name_passes(name: str) -> None:
    assert check_shard_name(name) == name
