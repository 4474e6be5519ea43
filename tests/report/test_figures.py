"""Figures for papers: equal inputs give equal files, in both formats and both schemes, whatever a class is called."""

import sys
from pathlib import Path

import pytest
from PIL import Image

import adq_wds as adq
from adq_wds.report.figures import draw_figures
from adq_wds.report.samples import Samples
from tests.conftest import MonkeyPatch
from tests.report.hostile import hostile_plan


def test_figures_are_files_that_open_and_do_not_change(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    samples = Samples.of_plan(hostile_plan(tmp_path)[0])
    paths = draw_figures(samples, tmp_path / "a")
    names = {
        f"{name}-{scheme}.{kind}"
        for name in ("reasons", "classes", "bins")
        for scheme in ("light", "dark")
        for kind in ("svg", "png")
    }
    assert {Path(path).name for path in paths} == names
    with Image.open(tmp_path / "a" / "classes-dark.png") as picture:
        assert picture.size == (1280, 720)
    again = draw_figures(samples, tmp_path / "b")
    assert [Path(path).read_bytes() for path in paths] == [Path(path).read_bytes() for path in again]
    assert "<script" not in (tmp_path / "a" / "classes-light.svg").read_text(encoding="utf-8")


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(adq.AdqError, match=r'matplotlib.*pip install "adq-wds\[report\]"'):
        draw_figures(Samples.of_plan(hostile_plan(tmp_path)[0]), tmp_path / "a")
