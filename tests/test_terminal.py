"""Does a character that steers a terminal ever reach it, whatever name, key or header of a stranger it stands in? F44."""

import io
import json
import logging
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.cli.main import main
from adq_wds.errors import AdqError, located, printable, shorten
from tests.conftest import jpeg, write_tar
from tests.tables.test_plan import rewritten

STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
HOSTILE = {  # by what it does to a terminal
    "title": "\x1b]0;title\x07",
    "colour": "\x1b[31m",
    "c1": "\x9b31m",
    "overwrite": "a\rb\x08",
    "delete": "\x7f",
    "reverse": "\u202egpj\u2066",
    "marks": "\u200e\u200f\u061c",
    "lines": "\u2028\u2029",
}
ORDINARY = "café 中文 👩\u200d💻 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"


def say(*arguments: object) -> str:
    """All that a command writes."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), suppress(SystemExit):
        main([str(word) for word in arguments])
    return said.getvalue()


def write_shard(path: Path, text: str, n: int = 24) -> None:
    """A shard whose keys and class names hold a text; one of its images is none."""
    members = []
    for i in range(n):
        image = b"<html>" + text.encode() if i == 5 else jpeg(i, 32)
        members += [(f"k{text}{i:02d}.jpg", image), (f"k{text}{i:02d}.txt", f"cat{text}{i % 2}".encode())]
    path.parent.mkdir(exist_ok=True)
    write_tar(path, members)


def outputs(home: Path, text: str) -> dict[str, str]:
    """What commands say of files that hold a text wherever a stranger may have written one, by command."""
    write_shard(home / "in" / "a.tar", text)
    write_shard(home / "other" / "a.tar", f"{text}!")
    run, labels = ["--encoder", "thumbnail", "--label", "txt"], ["--bins", 2, "--keep", 0.5]
    plan, shards = home / "run/plan.parquet", home / "in"
    said = {
        "embed": say("embed", shards, *run, "-o", home / "features"),
        "run": say(
            "run", shards, *run, *labels, "--on-error", "skip", "--max-bad-fraction", 0.5, "-o", home / "run"
        ),
        "again": say(
            "run", shards, *run, *labels, "--on-error", "skip", "--max-bad-fraction", 0.5, "-o", home / "run"
        ),
        "show": say("show", plan),
        "show --json": say("show", plan, "--json"),
        "show --keys": say("show", plan, "--keys"),
        "show --keys --json": say("show", plan, "--keys", "--json"),
        "plan --json": say("plan", home / "run/features", *labels, "-o", home / "p.parquet", "--json"),
        "codebook": say(
            "codebook", home / "run/features", "--bins", 2, "--min-pilot", 5, "-o", home / "c.safetensors"
        ),
        "show codebook": say("show", home / "c.safetensors"),
        "patches": say("patches", shards, "-o", home / "s.png", "--importance", "random", "--size", 32),
        "write": say("write", shards, "--plan", plan, "-o", home / "small/%06d.tar"),
        "write --size": say("write", shards, "--size", 16, "-o", home / "smaller/%06d.tar"),
        "index": say("index", shards, "-o", home / "i.parquet"),
        "verify": say("verify", plan, home / "other"),
        "verify --json": say("verify", plan, home / "other", "--json"),
        "verify --decode": say("verify", home / "i.parquet", shards, "--decode"),
        "write other": say("write", home / "other", "--plan", plan, "-o", home / "o/%06d.tar"),
    }
    (home / "keys.txt").write_text(f"nobody{text}\n", encoding="utf-8")
    said["must-include"] = say("plan", home / "run/features", *labels, "--must-include", home / "keys.txt")
    # names of files
    named = home / f"x{text}.tar"
    named.write_bytes((shards / "a.tar").read_bytes())
    for command in ("run", "embed", "index", "write", "verify"):
        first = [plan] if command == "verify" else []
        said[f"{command} NAME"] = say(
            command, *first, named, *(["-o", home / "n" / "%d.tar"] if not first else [])
        )
    said["run DRY"] = say("run", named, *run, "--dry-run", "-o", home / "n")
    (home / "photos" / f"cat{text}").mkdir(parents=True)
    (home / "photos" / f"cat{text}" / f"x{text}.jpg").write_bytes(b"<html>")
    said["pack"] = say("pack", home / "photos", "-o", home / "packs/%06d.tar")
    said["photos"] = say("run", home / "photos", *run, "-o", home / "n")
    (home / "bad").mkdir()
    (home / "bad" / f"x{text}.parquet").write_bytes(b"PAR1zz")
    (home / "packed").mkdir()
    (home / "packed" / f"x{text}.tar.zst").touch()
    said["features"] = say("plan", home / "bad")
    said["folder"] = say("index", home / "packed")
    (home / "packed" / "a.tar").write_bytes((shards / "a.tar").read_bytes())
    said["left out"] = say("index", home / "packed", "-o", home / "i2.parquet")
    # headers
    arguments = {
        "encoder": {"spec": "thumbnail"},
        "embed": {"label": f"a{text}"},
        "plan": {"bins": 3},
        "write": False,
    }
    one = {
        "format": "adq_wds.run",
        "version": 1,
        "arguments": arguments,
        "shards": [{"path": str(shards / "a.tar")}],
    }
    changed: dict[str, dict[str, Any]] = {
        "label": {},
        "encoder": {"arguments": {**arguments, "encoder": {"spec": text}}},
        "unknown": {"arguments": {**arguments, "embed": {text: 1}}},
        "format": {"format": text},
        "path": {"shards": [{"path": f"{home}/gone{text}.tar"}]},
    }
    for what, change in changed.items():
        (home / "run.json").write_text(json.dumps({**one, **change}))
        said[f"--from {what}"] = say("run", "--from", home / "run.json", "-o", home / "from")
    for what in ("format", "name", "names"):

        def change_header(header: dict[str, Any], _: object, what: str = what) -> None:
            if what == "name":
                header["shards"][0]["name"] = f"b{text}.tar"
            else:
                header[what] = f"plan{text}" if what == "format" else [f"b{text}", f"c{text}"]

        stranger = rewritten(plan, change_header)
        said[f"header {what}"] = say("show", stranger) + say("verify", stranger, shards)
    splits = {f"s{text}": {"filenames": [f"a{text}.tar"], "shard_lengths": [1]}}
    (home / "_info.json").write_text(json.dumps({"splits": splits}))
    said["description"] = say("index", home / "_info.json") + say(
        "index", home / "_info.json", "--split", "x"
    )
    # words of the command line, which a shell may have taken from a folder
    for words in (
        ["plan", text, text],
        [text],
        ["plan", "p", "--seed", text],
        ["embed", "x", "--encoder", text],
    ):
        said[f"words {len(said)}"] = say(*words)
    return said


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_command_writes_a_character_that_steers_a_terminal(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F44: keys, class names, names of shards and files, run.json, headers, words; every output, character by character."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # so that the command's own is the one
    text = HOSTILE[kind]
    said = outputs(tmp_path, text)
    steering = {command: STEERING.findall(all_of_it) for command, all_of_it in said.items()}
    assert {command: found for command, found in steering.items() if found} == {}
    escaped = (repr(text)[1:-1], repr(repr(text))[1:-1][1:-1], json.dumps(text)[1:-1])
    quiet = {command for command, all_of_it in said.items() if not any(form in all_of_it for form in escaped)}
    assert quiet <= {
        "write",
        "index",
        "photos",
        "must-include",
    }  # which name no key, or read keys line by line


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_errors_of_the_library_are_safe_in_anybodys_log(text: str) -> None:
    error = AdqError(f"{text}: damaged")
    place = located(error, shard=f"a{text}.tar", key=text, field=text)
    for said in (str(error), str(place), shorten(text), printable(text), f"{AdqError(text)}"):
        assert not STEERING.search(said)
    assert printable(printable(text)) == printable(text)


def test_text_in_any_language_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"{ORDINARY}\n\tnext"
    assert printable(text) == text
    assert ORDINARY in str(AdqError(ORDINARY))
    assert f"plan {ORDINARY}" in say("show", f"plan {ORDINARY}")


@given(st.text())
def test_only_characters_that_steer_are_changed(text: str) -> None:
    said = printable(text)
    assert not STEERING.search(said)
    if not STEERING.search(text):
        assert said == text
