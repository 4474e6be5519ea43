"""The map's points: their bytes unpack to the table's rows, and are few, equal for equal inputs, and harmless."""

import base64
import json
import re
import zlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adq_wds.errors import printable
from adq_wds.report import map_points
from adq_wds.report.map_picture import map_picture
from adq_wds.report.map_points import pack_points, quantise
from adq_wds.report.map_section import map_section
from adq_wds.tables.plan_rows import NEVER
from tests.conftest import MonkeyPatch
from tests.report.hostile import NAMES


class Unpacked(NamedTuple):
    """What `map.js` reads."""

    names: dict[str, list[str]]
    counts: dict[str, list[int]]
    images: list[Any]
    arrays: dict[str, Any]
    keys: dict[int, str]

    def words(self, name: str) -> list[str]:
        return [self.names[name][code] for code in self.arrays[name].tolist()]


def unpacked(text: str) -> Unpacked:
    """By the documented format, and by none of our code."""
    raw = zlib.decompress(base64.b64decode(text), -15)
    at = 4 + int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4:at])
    values = {}
    for name, count, size in header["arrays"]:
        values[name] = np.frombuffer(raw, dtype=f"<u{size}", count=count, offset=at)
        at += count * size
    keys = {}
    for point, length in zip(values["named"].tolist(), values["length"].tolist(), strict=True):
        keys[point] = raw[at : at + length].decode()
        at += length
    assert at == len(raw)
    return Unpacked(header["names"], header["counts"], header["images"], values, keys)


def table_of(keys: list[str], *, classes: int = 3, bins: int = 2, seed: int = 0) -> pa.Table:
    """A table as of `report_table`, of random decisions."""
    rng, n = np.random.default_rng(seed), len(keys)
    kept = rng.random(n) < 0.3
    label = rng.integers(0, classes, n).astype(np.int32)
    return pa.table(
        {
            "shard": pa.array([f"{i // 50}.tar" for i in range(n)]).dictionary_encode(),
            "key": pa.array(keys, type=pa.string()),
            "label": label,
            "class": pa.array([f"class {i}" for i in label.tolist()], type=pa.string()).dictionary_encode(),
            "bin": rng.integers(-1, bins, n).astype(np.int16),
            "rank": np.where(rng.random(n) < 0.1, NEVER, rng.integers(-1, 300, n)).astype(np.int32),
            "kept": kept,
            "reason": pa.array(np.where(kept, "kept", "quota")).dictionary_encode(),
        }
    )


def places(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 30), st.just(2)), elements=st.floats(-1e6, 1e6, width=32)),
)
def test_places_decode_within_a_step(xy: Any) -> None:
    q, origin, step = quantise(xy)
    error = np.abs(origin + q.astype(np.float64) * step - xy)
    assert error.max() <= step / 2 * (1 + 1e-6) + 1e-9
    assert q.dtype == np.uint16


def test_equal_places_lie_in_the_middle() -> None:
    assert quantise(np.ones((3, 2)))[0].tolist() == [[32768, 32768]] * 3


def test_points_are_the_rows_with_kept_ones_last() -> None:
    table, xy = table_of([f"k{i}" for i in range(200)]), places(200)
    xy[7] = np.nan
    packed = pack_points(table, xy, {3: "data:,a", 9: "data:,b"}, {3: 9, 9: 150, 4: 5})
    got = unpacked(packed.text)
    kept = np.array(table["kept"])
    rows = [i for want in (False, True) for i in range(200) if i != 7 and kept[i] == want]
    assert (packed.n, packed.n_named, packed.n_placed) == (199, 199, 199)
    assert list(got.keys.values()) == [f"k{i}" for i in rows]
    for name in ("class", "shard", "reason"):
        assert got.words(name) == [table[name][i].as_py() for i in rows]
    assert got.words("kept") == ["kept" if kept[i] else "dropped" for i in rows]
    bins = ["in no bin", "bin 0", "bin 1"]
    assert got.words("bin") == [bins[table["bin"][i].as_py() + 1] for i in rows]
    ranks = [table["rank"][i].as_py() for i in rows]
    assert got.arrays["rank"].tolist() == [0 if rank == NEVER else rank + 2 for rank in ranks]
    q = quantise(xy[rows])[0]
    assert np.array_equal(np.stack([got.arrays["x"], got.arrays["y"]], axis=1), q)
    for name, counts in got.counts.items():
        assert counts == [got.words(name).count(word) for word in got.names[name]]
    assert got.images == [
        [rows.index(3), "data:,a", rows.index(9)],
        [rows.index(9), "data:,b", rows.index(150)],
    ]


def test_equal_inputs_give_equal_bytes() -> None:
    sections = [map_section(table_of(["a", "b", "c"]), places(3), {0: "data:,"}, {}) for _ in range(2)]
    assert sections[0] == sections[1]


def test_keys_that_do_not_fit_are_those_of_dropped_samples(monkeypatch: MonkeyPatch) -> None:
    """Digests do not compress: the samples with pictures keep their keys, then kept ones."""
    keys = [np.random.default_rng(i).bytes(8).hex() for i in range(1000)]
    table = table_of(keys)
    monkeypatch.setattr(map_points, "KEY_BYTES", 5000)
    packed = pack_points(table, places(1000), dict.fromkeys(range(20), "data:,"), {})
    got = unpacked(packed.text)
    kept = {key for key, k in zip(keys, np.array(table["kept"]).tolist(), strict=True) if k}
    named = set(got.keys.values())
    assert 450 < packed.n_named == len(named) < 625
    assert named >= set(keys[:20]) | kept
    note = map_section(table, places(1000), {}, {}).html
    assert re.search(r"\d+ points name their keys, kept ones first", note)


def test_of_too_many_points_some_are_drawn(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(map_points, "MAX_POINTS", 100)
    table = table_of([f"k{i}" for i in range(500)])
    packed = pack_points(table, places(500), {499: "data:,a"}, {499: 7})
    keys = list(unpacked(packed.text).keys.values())
    assert (packed.n, packed.n_placed) == (100, 500)
    assert {"k499", "k7"} <= set(keys)
    assert len(set(keys)) == 100
    assert "100 of 500 samples are drawn" in map_section(table, places(500), {}, {}).html


def test_names_are_nowhere_in_the_page_as_they_are() -> None:
    """S3, F44: they are packed, and escaped as on a terminal."""
    table = table_of(NAMES)
    table = table.set_column(3, "class", pa.array(NAMES).dictionary_encode())
    section = map_section(table, places(len(NAMES)), {}, {})
    assert re.fullmatch(r"[\x20-\x7e\n]*", section.html)
    assert sorted(re.findall(r"<(\w+)", section.html)) == ["div", "img", "p", "p", "p", "script"]
    text = re.search(r'id="adq-map-data">([A-Za-z0-9+/=]*)</script>', section.html)
    assert text is not None
    got = unpacked(text[1])
    for name in (*got.keys.values(), *got.names["class"]):
        assert name == printable(name)
        assert "\n" not in name
    assert "<script>alert(1)</script>" in got.keys.values()


def test_long_names_are_cut_in_the_middle() -> None:
    (key,) = unpacked(pack_points(table_of(["a" * 500 + "z"]), places(1), {}, {}).text).keys.values()
    assert len(key) == 160
    assert "…" in key
    assert key.endswith("z")


@pytest.mark.parametrize("n", [1, 2])
def test_few_or_no_points(n: int) -> None:
    table = table_of(["a"] * n, classes=1, bins=1)
    assert "All" in map_section(table, places(n), {}, {}).html
    nothing = map_section(table, np.full((n, 2), np.nan), {}, {})
    assert (nothing.html, nothing.script) == ("<p>No sample has an embedding, so there is no map.</p>", "")


def test_a_plan_without_reasons_has_a_map() -> None:
    table = table_of(["a", "b"]).drop_columns(["reason"])
    assert "reason" not in unpacked(pack_points(table, places(2), {}, {}).text).names


def test_many_classes_take_two_bytes_a_point() -> None:
    table = table_of([str(i) for i in range(12_000)], classes=10_000)
    assert unpacked(pack_points(table, places(12_000), {}, {}).text).arrays["class"].dtype == np.uint16


def test_the_picture_shows_kept_points_over_dropped_ones() -> None:
    import io

    from PIL import Image

    uri = map_picture(
        np.array([[0, 0], [0, 0], [65535, 65535]], dtype=np.uint16), np.array([False, True, False])
    )
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA")
    colours = [colour for _, colour in sorted(image.getcolors() or [], reverse=True)]
    assert colours[0][3] == 0
    left, right = image.crop((0, 240, 360, 480)), image.crop((360, 0, 720, 240))
    assert {colour[:3] for _, colour in left.getcolors() or [] if colour[3]} == {(0, 114, 178)}
    assert {colour[:3] for _, colour in right.getcolors() or [] if colour[3]} == {(138, 146, 153)}
