"""README and docs/ as a reader types them: shell lines set the scene, Python blocks run, flags and files exist."""

import json
import re
import runpy
import shlex
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

import adq_wds
from adq_wds.cli.arguments import Parser, make_parser
from adq_wds.cli.main import main
from tests.conftest import jpeg, write_tar

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language; shell blocks have none."""
    return [dedent(text) for _, of, text in FENCED.findall(PAGES[page]) if of == language]


def command_lines(page: str) -> list[list[str]]:
    """Every line of the shell blocks that calls `adq`, as words; what stands behind && is a line of its own."""
    lines = []
    for text in blocks(page, ""):
        for line in text.replace("\\\n", " ").splitlines():
            words = (
                shlex.split(line, comments=True)
                if re.search(r"\badq [a-z]", line) and "'" not in line
                else []
            )
            while "&&" in words:
                lines.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            lines.append(words)
    return [words for words in lines if words[:1] == ["adq"]]


def inline_commands(page: str) -> list[list[str]]:
    """Every `adq ...` between backticks in the text."""
    return [code.split() for code in re.findall(r"`(adq [a-z][^`]*)`", FENCED.sub("", PAGES[page]))]


WHOLE_LINES = [pytest.param(words, id=" ".join(words)) for page in PAGES for words in command_lines(page)]
COMMANDS = {" ".join(words): words for page in PAGES for words in command_lines(page) + inline_commands(page)}


def test_there_is_something_to_test() -> None:
    assert len([page for page in PAGES if blocks(page, "python")]) >= 8
    assert len(WHOLE_LINES) >= 10
    assert len(COMMANDS) >= 25


def test_readme_fits_160_lines() -> None:
    assert len(PAGES["README"].splitlines()) <= 160


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    """Paths between backticks, from the repository's root or the package's."""
    code = re.findall(r"`([\w./-]+/(?:[\w.-]+\.(?:py|json|md|toml))?)`", FENCED.sub("", PAGES[page]))
    ours = [
        name
        for name in code
        if (ROOT / name.split("/")[0]).exists() or (ROOT / "adq_wds" / name.split("/")[0]).exists()
    ]
    assert [name for name in ours if not any((top / name).exists() for top in (ROOT, ROOT / "adq_wds"))] == []


def test_architecture_names_every_room() -> None:
    rooms = [path.parent.name for path in (ROOT / "adq_wds").glob("*/__init__.py")]
    assert [room for room in rooms if room != "core" and f"`{room}/`" not in PAGES["architecture"]] == []


def test_api_page_lists_every_public_name() -> None:
    listed = re.findall(r"^::: adq_wds\.(\w+)$", PAGES["api"], re.MULTILINE)
    assert sorted(listed) == sorted(set(adq_wds.__all__) - {"__version__"})


def test_errors_page_explains_every_error() -> None:
    errors = [name for name in adq_wds.__all__ if issubclass(type(getattr(adq_wds, name)), type)]
    ours = [name for name in errors if issubclass(getattr(adq_wds, name), adq_wds.AdqError)]
    assert [name for name in ours if f"| `{name}`" not in PAGES["errors"]] == []


def test_benchmarks_page_lists_every_benchmark() -> None:
    files = (ROOT / "benchmarks").glob("*.py")
    commands = [path.stem for path in files if "__main__" in path.read_text(encoding="utf-8")]
    assert [name for name in sorted(commands) if f"\n| `{name}` |" not in PAGES["benchmarks"]] == []


def test_demo_page_shows_the_recorded_numbers() -> None:
    """After a new `adq demo` its printed table replaces the page's block."""
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    for row in demo["table"]:
        (line,) = re.findall(rf"^{row['arm']}  .*", PAGES["demo"], re.MULTILINE)
        assert f" {100 * row['mean']:.2f} ± " in line
    assert " ".join(demo["conclusion"].split()) in " ".join(PAGES["demo"].split())


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_and_flag_exists(words: list[str]) -> None:
    parser: Parser = make_parser().commands[words[1]]
    flags = [word.rstrip(",.:;") for word in words[2:] if word.startswith("-")]
    assert set(flags) <= set(parser._option_string_actions)


@pytest.mark.parametrize("words", WHOLE_LINES)
def test_every_whole_line_parses(words: list[str]) -> None:
    given = [word for word in words[1:] if word != "..."]  # which stand for the output
    make_parser().parse_args(given if given == words[1:] else [*given, "-o", "run/"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards, the run and the codebook that the pages talk of."""
    folder = tmp_path_factory.mktemp("scene")
    for name, first in (("train", 0), ("new", 300)):
        for i in range(10):
            members = []
            for k in range(
                first + 16 * i, first + 16 * i + (16 if i < 2 else 6)
            ):  # two are enough for a codebook
                members += [(f"s{k:05d}.jpg", jpeg(k, 32)), (f"s{k:05d}.cls", b"%d" % (k % 2))]
            write_tar(folder / f"{name}-{i:06d}.tar", members)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("logits.npy", np.random.default_rng(0).normal(size=(80, 2)))  # of the train shards
        for words in [line for page in ("README", "codebook", "soft") for line in command_lines(page)]:
            if words[1] in ("run", "embed", "codebook", "soften"):
                assert main([*words[1:], "-q"]) == 0, words
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: str, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as one program; reads a first sample or batch of every local data set they make."""
    monkeypatch.chdir(scene)
    script = ""
    for text in blocks(page, "python"):
        script += f"{text}\n"
        if "\nds = " in f"\n{text}" and "s3://" not in text:
            script += "assert next(iter(ds)) is not None\n"
    path = scene / f"{page}.py"
    path.write_text(script, encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")
