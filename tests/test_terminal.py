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
from tests.tampering import rewritten

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


# By name: a command, words apart; {N} is a file whose name holds the text.
COMMANDS = """
embed: embed in --encoder thumbnail -o features
run: run in --encoder thumbnail --label txt --on-error skip --max-bad-fraction 0.5 -o run
again: run in --encoder thumbnail --label txt --on-error skip --max-bad-fraction 0.5 -o run
show: show run/plan.parquet
show --json: show run/plan.parquet --json
show --keys: show run/plan.parquet --keys
show --keys --json: show run/plan.parquet --keys --json
plan --json: plan run/features --bins 2 --keep 0.5 -o p.parquet --json
codebook: codebook run/features --bins 2 --min-pilot 5 -o c.safetensors
show codebook: show c.safetensors
patches: patches in -o s.png --importance random --size 32
write: write in --plan run/plan.parquet -o small/%06d.tar
write --size: write in --size 16 -o smaller/%06d.tar
index: index in -o i.parquet
verify: verify run/plan.parquet other
verify --json: verify run/plan.parquet other --json
verify --decode: verify i.parquet in --decode
write other: write other --plan run/plan.parquet -o o/%06d.tar
must-include: plan run/features --bins 2 --keep 0.5 --must-include keys.txt
run NAME: run {N} -o n
embed NAME: embed {N} -o n
index NAME: index {N} -o n/%d.tar
write NAME: write {N} -o n/%d.tar
verify NAME: verify run/plan.parquet {N}
run DRY: run {N} --encoder thumbnail --dry-run -o n
pack: pack photos -o packs/%06d.tar
photos: run photos --encoder thumbnail -o n
features: plan bad
folder: index packed
left out: index packed+ -o i2.parquet
description: index _info.json
split: index _info.json --split x
"""


def outputs(home: Path, text: str) -> dict[str, str]:
    """What commands say, in `home`, of files that hold a text wherever a stranger may have written one, by command."""
    write_shard(home / "in" / "a.tar", text)
    write_shard(home / "other" / "a.tar", f"{text}!")
    shard = (home / "in" / "a.tar").read_bytes()
    named = f"x{text}.tar"
    for name, data in {
        "keys.txt": f"nobody{text}\n".encode(),
        named: shard,
        f"photos/cat{text}/x{text}.jpg": b"<html>",
        f"bad/x{text}.parquet": b"PAR1zz",
        f"packed/x{text}.tar.zst": b"",
        f"packed+/x{text}.tar.zst": b"",
        "packed+/a.tar": shard,
        "_info.json": json.dumps(
            {"splits": {f"s{text}": {"filenames": [f"a{text}.tar"], "shard_lengths": [1]}}}
        ).encode(),
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    said = {}
    for line in COMMANDS.strip().splitlines():
        name, words = line.split(": ")
        said[name] = say(*(named if word == "{N}" else word for word in words.split()))
    # headers
    arguments = {"encoder": {"spec": "thumbnail"}, "embed": {"label": f"a{text}"}, "plan": {"bins": 3}}
    arguments["write"] = False  # type: ignore[assignment]
    one = {"format": "adq_wds.run", "version": 1, "arguments": arguments, "shards": [{"path": "in/a.tar"}]}
    changed: dict[str, dict[str, Any]] = {
        "label": {},
        "encoder": {"arguments": {**arguments, "encoder": {"spec": text}}},
        "unknown": {"arguments": {**arguments, "embed": {text: 1}}},
        "format": {"format": text},
        "path": {"shards": [{"path": f"{home}/gone{text}.tar"}]},
    }
    for what, change in changed.items():
        (home / "run.json").write_text(json.dumps({**one, **change}))
        said[f"--from {what}"] = say("run", "--from", "run.json", "-o", "from")
    for what in ("format", "name", "names"):

        def change_header(header: dict[str, Any], _: object, what: str = what) -> None:
            if what == "name":
                header["shards"][0]["name"] = f"b{text}.tar"
            else:
                header[what] = f"plan{text}" if what == "format" else [f"b{text}", f"c{text}"]

        stranger = rewritten(home / "run/plan.parquet", change_header, home / "run/changed.parquet")
        said[f"header {what}"] = say("show", stranger) + say("verify", stranger, "in")
    # words of the command line, which a shell may have taken from a folder
    seed, encoder = ["plan", "p", "--seed", text], ["embed", "x", "--encoder", text]
    for words in (["plan", text, text], [text], seed, encoder):
        said[f"words {len(said)}"] = say(*words)
    return said


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_command_steers_a_terminal(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F44: keys, class names, names of shards and files, run.json, headers, words; every output, character by character."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # so that the command's own is the one
    text = HOSTILE[kind]
    said = outputs(tmp_path, text)
    steering = {command: STEERING.findall(all_of_it) for command, all_of_it in said.items()}
    assert {command: found for command, found in steering.items() if found} == {}
    escaped = (repr(text)[1:-1], repr(repr(text))[1:-1][1:-1], json.dumps(text)[1:-1])
    quiet = {command for command, all_of_it in said.items() if not any(form in all_of_it for form in escaped)}
    # which name no key, or read keys line by line
    assert quiet <= {"write", "index", "photos", "must-include"}


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
