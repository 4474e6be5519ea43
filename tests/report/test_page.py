"""The report in a browser: hostile names do nothing, nothing is asked of the network, narrow screens fit."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adq_wds.jobs.write_report import write_report
from adq_wds.report.escaped import shown
from benchmarks.browser import CHROMIUM, visit
from tests.report.hostile import NAMES, hostile_plan


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    plan, features = hostile_plan(folder)
    write_report(plan, None, folder / "report.html", features=features)
    return folder / "report.html"


class Tags(HTMLParser):
    """The tags of a page, its attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: Path) -> Tags:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    return tags


def test_names_are_text_and_nothing_else(page: Path) -> None:
    """S3: no tag, no attribute and no address comes of them."""
    tags = parsed(page)
    assert not {"iframe", "base", "link", "form", "animate"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name == "style"]
    addresses = [value for name, value in tags.attributes if name in ("href", "src", "action")]
    assert [each for each in addresses if not re.match(r"#s\d+$|data:image/(png|webp);base64,", each)] == []
    for name in NAMES:
        assert shown(name, 40) in tags.text, name


def test_control_characters_are_shown_as_escapes(page: Path) -> None:
    """F44."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]", text
    )
    assert r"\x1b]0;title\x07" in text
    assert r"\u202egnp.exe" in text
    assert r"two\nlines\tand a tab" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_runs_nothing_of_the_names_and_loads_nothing(page: Path) -> None:
    """S3, in Chromium: no alert, no error in the console, no request but the page itself."""
    seen = visit(page, "document.body.innerText", "document.querySelectorAll('thead button').length")
    assert (seen.dialogs, seen.logged) == ([], [])
    assert [url for url in seen.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    text, n_buttons = seen.answers
    assert all(" ".join(shown(name, 40).split()) in " ".join(text.split()) for name in NAMES)
    assert n_buttons > 0, "the page's own script did not run"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_narrow_screen_without_scripts_shows_all_of_it(page: Path) -> None:
    seen = visit(
        page,
        "document.documentElement.scrollWidth",
        "document.body.innerText",
        width=390,
        dark=True,
        javascript=False,
    )
    assert seen.logged == []
    width, text = seen.answers
    assert width == 390
    for words in ("Samples kept", "What became of all 60 samples", "Classes", "Bins", "Doubted labels"):
        assert words in text
