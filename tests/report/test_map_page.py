"""The map in a browser: it draws, moves, finds and names points, and runs nothing of their names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adq_wds.report.escaped import shown
from adq_wds.report.map_section import map_section
from adq_wds.report.page import page
from adq_wds.report.section import Section
from benchmarks.browser import CHROMIUM, Visit, visit
from tests.report.hostile import NAMES
from tests.report.test_map_points import places, table_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

# Defines root, canvas, press(key) and others once the map is drawn; each gives a promise of the next frame.
TOOLS = """(async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  window.root = document.getElementById("adq-map");
  while (!root.dataset.drawn) await frame();
  window.canvas = root.querySelector("canvas");
  const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  window.pixels = () => {
    copy.canvas.width = canvas.width;
    copy.canvas.height = canvas.height;
    copy.drawImage(canvas, 0, 0);
    return [...new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer)];
  };
  window.lit = () => pixels().filter(Boolean).length;
  window.press = async (key) => { canvas.dispatchEvent(new KeyboardEvent("keydown", { key })); await frame(); };
  window.choose = async (name) => {
    const select = root.querySelector("select");
    select.value = name;
    select.dispatchEvent(new Event("change"));
    await frame();
  };
  window.find = async (key) => {
    root.querySelector("input").value = key;
    root.querySelector("form button").click();
    await frame();
    return root.querySelector(".map-point").innerText;
  };
  return [...root.querySelector("select").options].map(option => option.value);
})()"""


def opened(
    tmp_path: Path, table: pa.Table, xy: Any, *scripts: str, images: Any = (), **options: Any
) -> Visit:
    nearest = {row: 0 for row, _ in images}
    file = tmp_path / "map.html"
    sections = [Section("Overview", "<p>Before</p>"), map_section(table, xy, dict(images), nearest)]
    file.write_text(page("Map", sections), encoding="utf-8")
    seen = visit(file, TOOLS, *scripts, **options)
    assert (seen.dialogs, seen.logged) == ([], [])
    assert [url for url in seen.requests if not url.startswith("data:")] == [file.resolve().as_uri()]
    return seen


def test_it_draws_moves_and_zooms(tmp_path: Path) -> None:
    table = table_of([f"k{i}" for i in range(300)])
    seen = opened(
        tmp_path, table, places(300), "lit()", "press('+').then(() => press('ArrowLeft')).then(lit)",
        "window.first = pixels().join(), press('0').then(() => pixels().join() !== first)",
        "choose('class').then(() => new Set(pixels()).size)", "choose('bin').then(() => new Set(pixels()).size)",
        "root.querySelector('.map-legend button').click(), press('0').then(() => new Set(pixels()).size)",
    )  # fmt: skip
    choices, lit, nearer, back, classes, bins, one = seen.answers
    assert choices == ["kept", "reason", "bin", "class"]
    assert 300 < lit < 60_000
    assert nearer > 0
    assert back
    assert (classes, bins, one) == (4, 4, 4)  # the ground, and each value's colour


def test_a_point_is_reached_by_keys_by_pointer_and_by_name(tmp_path: Path) -> None:
    table = table_of([f"k{i}" for i in range(50)])
    xy = np.stack([np.arange(50), np.zeros(50)], axis=1)
    point = "root.querySelector('.map-point').innerText"
    pointer = """(() => {
        const box = canvas.getBoundingClientRect(), at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
        canvas.setPointerCapture = () => {};  // no real pointer is down
        for (const type of ["pointerdown", "pointerup"]) canvas.dispatchEvent(new PointerEvent(type, at));
        return root.querySelector('.map-point').innerText;
    })()"""
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    seen = opened(
        tmp_path, table, xy, f"press('Enter').then(() => {point})", f"press('n').then(() => {point})",
        f"press('p').then(() => {point})", "find('k7')", "root.querySelectorAll('.map-point img').length",
        f"[...root.querySelectorAll('.map-point button')].pop().click(), {point}", "find('nothing')",
        f"press('Escape').then(() => {point})", "find('k24')", f"press('Escape').then(() => {pointer})",
        images=[(7, pixel), (0, pixel)],
    )  # fmt: skip
    _, first, after, before, found, images, nearest, lost, none, by_name, by_pointer = seen.answers
    lines = dict(zip(*[iter(found.split("\n")[:14])] * 2, strict=True))
    row = table.slice(7, 1).to_pylist()[0]
    assert (lines["key"], lines["shard"], lines["class"]) == ("k7", "0.tar", row["class"])
    assert lines["reason"] == row["reason"]
    assert lines["kept"] == ("yes" if row["kept"] else "no")
    assert {first.split("\n")[1], after.split("\n")[1]} <= {"k24", "k25", "k23", "k26"}
    assert first == before != after
    assert images == 2
    assert nearest.split("\n")[1] == "k0"
    assert lost == "None of 50 keys is exactly this."
    assert none.startswith("Point at a sample")
    assert by_name.split("\n")[1] == by_pointer.split("\n")[1] == "k24"


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    """S3, in Chromium: as keys, classes and shards."""
    names = pa.array(NAMES).dictionary_encode()
    table = table_of(NAMES).set_column(3, "class", names).set_column(0, "shard", names)
    finds = [f"find({json.dumps(shown(name, 160))})" for name in NAMES]
    seen = opened(tmp_path, table, places(len(NAMES)), *finds, "choose('class').then(() => root.innerText)")
    _, *points, text = seen.answers
    for name, point in zip(NAMES, points, strict=True):
        assert " ".join(point.split()).count(" ".join(shown(name, 160).split())) == 3, name
    assert sum(" ".join(shown(name, 160).split()) in " ".join(text.split()) for name in NAMES) >= 12


@pytest.mark.parametrize("kind", ["one sample", "all equal", "unlabelled, no bins", "10,000 classes"])
def test_odd_sets_have_a_map(kind: str, tmp_path: Path) -> None:
    n = {"one sample": 1, "10,000 classes": 12_000}.get(kind, 40)
    table = table_of([f"k{i}" for i in range(n)], classes=10_000 if n > 1000 else 1)
    xy = places(n) if kind != "all equal" else np.ones((n, 2))
    if kind == "unlabelled, no bins":
        table = table.set_column(3, "class", pa.array([""] * n).dictionary_encode())
        table = table.set_column(4, "bin", pa.array([-1] * n, type=pa.int16()))
    seen = opened(
        tmp_path, table, xy, "lit()", "press('Enter').then(() => root.querySelector('dd').innerText)"
    )
    choices, lit, key = seen.answers
    assert lit > 0
    assert key.startswith("k")
    assert ("bin" in choices, "class" in choices) == (
        kind in ("all equal", "10,000 classes"), kind == "10,000 classes",
    )  # fmt: skip


def test_without_scripts_there_is_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    section = map_section(table_of(["a", "b"]), places(2), {}, {})
    file.write_text(page("Map", [Section("Overview", ""), section]), encoding="utf-8")
    size = "[document.images.length, document.images[0].naturalWidth, document.documentElement.scrollWidth]"
    seen = visit(file, size, width=390, javascript=False)
    assert (seen.logged, seen.answers) == ([], [[1, 720, 390]])
