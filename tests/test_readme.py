"""The README as a reader types it: its shell lines set the scene, its Python blocks run in order, its flags exist."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from adq_wds.cli.arguments import Parser, make_parser
from adq_wds.cli.main import main
from tests.programs import FILE, run

MakeShard = Callable[..., Path]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, dedent(text)) for _, language, text in FENCED.findall(README)]


def command_lines() -> list[list[str]]:
    """Every line of the shell blocks that calls `adq`, as words; what stands behind && is a line of its own."""
    lines = []
    for language, text in BLOCKS:
        for line in text.replace("\\\n", " ").splitlines() if not language else ():
            words = shlex.split(line, comments=True) if "adq " in line else []
            while "&&" in words:
                lines.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            lines.append(words)
    return [words for words in lines if words[:1] == ["adq"]]


def inline_commands() -> list[list[str]]:
    """Every `adq ...` between backticks in the text."""
    text = FENCED.sub("", README)
    return [code.split() for code in re.findall(r"`(adq [a-z][^`]*)`", text)]


def test_there_is_something_to_test() -> None:
    assert len([language for language, _ in BLOCKS if language == "python"]) >= 7
    assert len(command_lines()) >= 8
    assert len(inline_commands()) >= 15


def test_every_file_that_the_readme_names_is_there() -> None:
    named = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(named) > 10
    assert [link for link in named if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("words", [*command_lines(), *inline_commands()], ids=" ".join)
def test_every_command_and_flag_of_the_readme_exists(words: list[str]) -> None:
    parser: Parser = make_parser().commands[words[1]]
    flags = [word.rstrip(",.:;") for word in words[2:] if word.startswith("-")]
    assert set(flags) <= set(parser._option_string_actions)


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_whole_line_parses(words: list[str]) -> None:
    given = [word for word in words[1:] if word != "..."]  # which stand for the output
    make_parser().parse_args(given if given == words[1:] else [*given, "-o", "run/"])


def test_the_python_blocks_run_one_after_the_other(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads a first sample or batch of every data set that a block makes of files."""
    for name, first in (("train", 0), ("new", 300)):
        for i in range(10):
            make_shard(f"{name}-{i:06d}.tar", 16, first=first + 16 * i, side=32)
    monkeypatch.chdir(tmp_path)
    scene = [words for words in command_lines() if words[1] in ("run", "embed", "codebook")]
    for words in scene:
        if "SHARDS" not in words:
            assert main([*words[1:], "-q"]) == 0, words
    script = ""
    for language, text in BLOCKS:
        if language == "python":
            script += f"{text}\n"
            if "\nds = " in f"\n{text}" and "s3://" not in text:
                script += "assert next(iter(ds)) is not None\n"
    (tmp_path / "readme.py").write_text(script, encoding="utf-8")
    done = run(FILE, "readme.py")
    assert done.returncode == 0, done.stderr[-3000:]
