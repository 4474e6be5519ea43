"""Patterns, names, and the way back from a URL."""

import logging
import os
from itertools import islice
from pathlib import Path

import braceexpand
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.errors import PlanError
from adq_wds.shards.braces import count_braces
from adq_wds.shards.names import ShardNames, base_name, check_shard_name, expand_urls, path_of, shard_names
from adq_wds.tables.features import file_name


def test_braces_and_double_colons_are_read_as_by_webdataset() -> None:
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
def test_a_pattern_for_too_many_shards_is_refused_unexpanded(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"shards, at most 1,000,000"):
        expand_urls(pattern)


RANGES = st.builds(
    lambda ends, step: "{" + "..".join([*ends, *step]) + "}",
    st.one_of(
        st.tuples(*[st.sampled_from(["0", "7", "-3", "007", "12", "00", "-00"])] * 2),
        st.tuples(*[st.sampled_from("AbZaz")] * 2),
    ),
    st.sampled_from([[], ["0"], ["2"], ["-3"], ["100"]]),
)
BRACES = st.recursive(
    RANGES | st.sampled_from(["", "a", ",", "..", r"\\{", r"\\,", r"\\", "{a}", "{}", "x{", "}"]),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}")
    ),
    max_leaves=5,
)


MANY = 10_000


@given(BRACES | st.text("{},.\\\\-019aZ", max_size=12))
def test_braces_are_counted_as_braceexpand_expands_them(pattern: str) -> None:
    """Nested alternatives, steps, padding, letters, escapes, and halves of braces."""
    try:
        expected = sum(1 for _ in islice(braceexpand.braceexpand(pattern), MANY))
    except braceexpand.UnbalancedBracesError:
        with pytest.raises(ValueError, match="braces that do not match"):
            count_braces(pattern)
        return
    assert min(count_braces(pattern), MANY) == expected


def test_ranges_in_alternatives_add_up() -> None:
    pattern = "/data/{yfcc/{00000..01481},cc12m/{00000..02175}}.tar"
    assert len(expand_urls(pattern)) == 1_482 + 2_176


@pytest.mark.parametrize("pattern", ["{a,b", "a}", "{" * 5_000 + "}" * 5_000, "{1.." + "9" * 5_000 + "}"])
def test_unreadable_braces_are_named_and_the_url_is_not(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"a\.tar.*: .*braces") as error:
        expand_urls(f"https://s3cret@host/{pattern}a.tar?s3cret")
    assert "s3cret" not in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards match"):
        expand_urls(tmp_path)


def test_a_folder_gives_packed_shards_and_names_what_it_omits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["a-000.tar", "a-001.tar.gz", "a-002.tgz", "b.tar"]
    for name in [*kept, "c.tar.zst", "d.ZIP", "e.TAR", "f.tar.part", "g.jpg"]:
        (tmp_path / name).touch()
    quiet = ["_info.json", "index.parquet", "README.md", ".b.tar.0123-4567.partial", "a.tar.md5", "a.idx"]
    for name in quiet:
        (tmp_path / name).touch()
    for folder in ("val", "notes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "val" / "0.tar.gz").touch()
    with caplog.at_level(logging.WARNING, "adq_wds"):
        assert expand_urls(tmp_path) == [str(tmp_path / name) for name in kept]
    (line,) = (record.getMessage() for record in caplog.records)
    assert (
        "left out: 4 archives of another kind ('c.tar.zst', 'd.ZIP', 'e.TAR', …), 1 images ('g.jpg'), 1 folders"
        in line
    )
    assert not [name for name in (*quiet, "notes") if name in line]


def test_a_folder_of_shards_alone_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.tar", "b.tgz", "index.parquet", "_info.json", "plan.parquet"):
        (tmp_path / name).touch()
    assert len(expand_urls(tmp_path)) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (["cat/0.jpg", "dog/1.png"], r"no shards match .*/\*\.tar'.*adq pack .* -o"),
        (["0.webp"], r"1 images \('0.webp'\); to make shards of image files: adq pack "),
        (["train/0.tar", "val/0.tar"], r"there are 2 folders with shards \('train', 'val'\)$"),
        (["a.tar.zst"], r"1 archives of another kind \('a.tar.zst'\)$"),
        (["notes.txt"], r"\*\.tgz$"),
    ],
)
def test_a_folder_without_shards_says_what_it_holds(files: list[str], text: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=text):
        expand_urls(tmp_path)


def test_packed_and_plain_shards_of_one_name_stay_apart() -> None:
    names = shard_names(["d/a.tar", "d/a.tar.gz", "d/a.tgz"])
    assert names == ["a.tar", "a.tar.gz", "a.tgz"]
    assert len(set(map(file_name, names))) == 3


@pytest.mark.parametrize(
    "url",
    [
        "http://h/t-*.tar", "s3://bucket/x/t-*.tar", "gs://b/t-00?.tar", "http://h/t-0?0?.tar.gz", "http://h/t[0-9].tar",
        "https://h/folder/", "http://h", "http://u:p@h:8000/", "s3://bucket", "s3://bucket/folder/", "HTTP://h/*/a.tar",
    ],
)  # fmt: skip
def test_patterns_and_folders_in_urls_are_named_at_once(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"in URLs braces are expanded only.*train-\{000000\.\.000009\}\.tar"
    ) as error:
        expand_urls(url)
    assert "u:p" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/a.tar?X-Amz-Signature=0*[ab]&x=/", "https://h/a.tar?token", "https://h/get?a.tar", "https://h/?f=a.tar",
        "https://h/a.tar?versionId=1#x", "s3://b/train[1].tar", "http://[fe80:1]/a.tar", "memory://a.tar",
        "https://h/a.tar?",
    ],
)  # fmt: skip
def test_urls_with_queries_and_brackets_are_left_alone(url: str) -> None:
    assert expand_urls(url) == [url]


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
    "http://h/a.tar", "", "a//b.tar", "./a.tar", "a|b.tar", "`x`.tar", "a\x00.tar", "C:\\a.tar", "file:/etc/passwd",
    "file:a.tar", "http:a.tar", "$HOME/a.tar", "a\x1b[31m.tar", "a\u202e.tar", "a\tb.tar", '"a".tar',
]  # fmt: skip


@pytest.mark.parametrize("name", [*HOSTILE, "a\udc80.tar"])  # half a character, which no table can hold
def test_a_name_that_could_open_something_else_is_refused(name: str) -> None:
    """S2: a plan never names anything but a plain relative file."""
    with pytest.raises(PlanError, match="shard name"):
        check_shard_name(name)


PLAIN = [
    "a.tar", "a#1.tar", "train set/a 1.tar", "é.tar", "中文.tar", "👩\u200d💻.tar", "x/y/z-000.tar", "a+b=c,d@e.tar",
    "birds & bees-000.tar", "train's.tar", "train[1].tar", "2024:05-000.tar", "R&D/0.tar", "wow!.tar", "a;b.tar",
    "100%.tar", "a(1).tar", "a^b.tar", "d/log-10:00.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_passes(name: str) -> None:
    assert check_shard_name(name) == name
    assert shard_names([f"/data/{name}"]) == [name.rsplit("/", 1)[-1] if "log" not in name else name]


@pytest.mark.parametrize("name", ["log-2024-05-01T10:00.tar", "-1.tar", "~a.tar", "c:1.tar", "me@h:1.tar"])
def test_a_name_that_reads_as_more_takes_its_folder_with_it(name: str) -> None:
    (found,) = shard_names([f"/data/d/{name}"])
    assert check_shard_name(found) == f"d/{name}"
    assert ShardNames([found]).find(f"/moved/{name}") == found
    assert base_name(found) == name
