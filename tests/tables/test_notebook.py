"""What a notebook shows of plans and features is small, inert and says what is kept."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

import adq_wds as adq
from tests.conftest import MakeFeatures, MakeShard
from tests.tampering import explained, small_plan

HOSTILE = [
    "<script>alert(1)</script>",
    "' onload='x",
    '"><img src=//e.x>',
    "a\nb",
    "\x1b[31m",
    "x\u202ey",
    "مفتاح",
    "👩‍🚀",
    "n" * 500,
]


class Parsed(HTMLParser):
    """The tags of a piece of HTML, checked to be closed, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.names.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def check(html: str) -> str:
    """The text of a piece of HTML that holds nothing but plain boxes and tables."""
    parsed = Parsed(html)
    assert parsed.names <= {"div", "span", "table", "tr", "th", "td", "bdi"}
    assert parsed.attributes <= {"style", "title"}
    assert "url(" not in html
    assert len(html) < 10_000
    assert parsed.text.isprintable() or not set(parsed.text) & set("\n\x1b\u202e")
    return parsed.text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_classes_and_encoders_are_inert(
    name: str, make_features: MakeFeatures, tmp_path: Path
) -> None:
    make_features("a.tar", [0, 1] * 20, names=sorted([name, "z"]), encoder=name)
    features = adq.Features(tmp_path / "features")
    plan = adq.build_plan(features, bins=2, keep=0.25)
    assert "keeps 10 of 40 samples" in check(plan._repr_html_())
    assert "40 samples in 1 shards" in check(features._repr_html_())
    if name.isalpha() and len(name) < 60:
        assert name in check(plan._repr_html_())


def test_a_plan_shows_its_reasons_and_classes(tmp_path: Path, make_features: MakeFeatures) -> None:
    make_features("a.tar", [c for c in range(12) for _ in range(4)], bad=[0])
    plan = adq.build_plan(tmp_path / "features", bins=1, keep=0.5)
    text = " ".join(check(plan._repr_html_()).split())
    assert "kept 24 49.0 % quota 24 49.0 % bad 1 2.0 %" in text
    assert "the 10 of 12 classes that keep most" in text
    assert plan.hash[:16] in text


def test_plans_of_every_kind_are_shown(make_shard: MakeShard, tmp_path: Path) -> None:
    assert "kept 8 33.3 % not kept 16" in " ".join(check(small_plan()._repr_html_()).split())
    check(adq.load_plan(explained(tmp_path / "plan.parquet"))._repr_html_())
    shard = make_shard("a.tar", 4)
    assert "keeps 0 of 4 samples" in check(adq.Plan.from_keys(shard, [])._repr_html_())
    assert "keeps 4 of 4 samples" in check(adq.Plan.from_keys(shard, None)._repr_html_())
    for version in ("v1", "v2", "v3", "v4"):
        folder = Path(__file__).parents[1] / "golden" / version
        check(adq.load_plan(folder / "plan.parquet")._repr_html_())
        check(adq.Features(folder / "features")._repr_html_())
