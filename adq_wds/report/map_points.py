"""Packs the points of the report's map into few bytes, which `map.js` unpacks."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core.rng import generator
from adq_wds.report.escaped import shown
from adq_wds.tables.plan_rows import NEVER

MAX_POINTS = 1_000_000
KEY_BYTES = 4 << 20
"""Of all keys, compressed. Keys that do not compress, such as digests, are packed for some samples only."""
_STEPS = 2**16 - 1
_LONGEST = 160  # characters of a name

Codes = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedPoints:
    """What the map shows.

    Attributes:
        text: all of it, as base64 of a deflate stream.
        places: (n, 2) uint16, as `quantise` gives them.
        kept: (n,) bool.
        n_named: points whose keys are packed.
        n_placed: rows of the table that have a place, drawn or not.
    """

    text: str
    places: NDArray[np.uint16]
    kept: NDArray[np.bool_]
    n_named: int
    n_placed: int

    @property
    def n(self) -> int:
        """Points."""
        return len(self.places)


def quantise(xy: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint16], NDArray[np.float64], float]:
    """Places as whole numbers of one step on both axes.

    Args:
        xy: (n, 2), finite.

    Returns:
        (n, 2) uint16 q, (2,) origin, and step: origin + q · step is nowhere further than half a step from `xy` on an axis. The
        places fill the square of the longer side, and lie in its middle on the other.

    >>> q, origin, step = quantise(np.array([[0.0, 0.0], [2.0, 1.0]]))
    >>> q.tolist(), step * 65535
    ([[0, 16384], [65535, 49151]], 2.0)
    """
    wide = xy.astype(np.float64).reshape(-1, 2)
    if not len(wide):
        return np.empty((0, 2), dtype=np.uint16), np.zeros(2), 1.0
    low, high = wide.min(axis=0), wide.max(axis=0)
    side = float((high - low).max()) or 1.0
    origin, step = (low + high) / 2 - side / 2, side / _STEPS
    q = np.clip(np.rint((wide - origin) / step), 0, _STEPS).astype(np.uint16)
    return q, origin, step


def choose_points(placed: NDArray[np.bool_], wanted: Sequence[int]) -> NDArray[np.int64]:
    """The rows that become points: all that have a place, or a seeded choice of `MAX_POINTS`, the wanted first; ascending."""
    rows = np.flatnonzero(placed)
    if len(rows) <= MAX_POINTS:
        return rows
    return np.sort(_draw(rows, np.isin(rows, wanted), MAX_POINTS, purpose="report points"))


def _draw(rows: NDArray[np.int64], first: NDArray[Any], n: int, *, purpose: str) -> NDArray[np.int64]:
    """`n` of the rows at random, those of the larger `first` before all others."""
    order = generator(0, 0, "", "", purpose=purpose).permutation(len(rows))
    return rows[order[np.argsort(-first[order].astype(np.int64), kind="stable")][:n]]


def pack_points(
    table: pa.Table,
    xy: NDArray[np.floating[Any]],
    pictures: Mapping[int, str],
    nearest: Mapping[int, int],
) -> PackedPoints:
    """All that the map shows, for `map.js`.

    The deflate stream is a uint32 with the length of a header, the header as JSON, the arrays that it lists, one after
    the other, and the keys in UTF-8; numbers are little-endian. Names are as a page may show them.

    Args:
        table: n rows, from `report_table`.
        xy: (n, 2), a place for each row; rows with NaN are left out.
        pictures: ``data:`` URIs by row.
        nearest: by row, the row of the nearest kept sample of its class.
    """
    placed = np.isfinite(xy).all(axis=1)
    wanted = sorted({*pictures, *(nearest[row] for row in pictures if row in nearest)})
    rows = choose_points(placed, wanted)
    kept = table["kept"].to_numpy(zero_copy_only=False)
    rows = rows[np.argsort(kept[rows], kind="stable")]  # kept points are drawn last
    is_wanted = np.isin(rows, wanted)
    point = {int(rows[i]): i for i in np.flatnonzero(is_wanted).tolist()}
    drawn = table.take(pa.array(rows))
    names, arrays = _categories(drawn)
    named, lengths, text = _pack_keys(drawn, is_wanted)
    places, _, _ = quantise(xy[rows])
    rank = drawn["rank"].to_numpy().astype(np.int64) + 2  # 1: always kept
    rank[rank == NEVER + 2] = 0
    arrays = {"x": places[:, 0], "y": places[:, 1], **arrays, "rank": rank, "named": named, "length": lengths}
    small = {name: np.ascontiguousarray(_narrow(values)) for name, values in arrays.items()}
    header = {
        "arrays": [[name, len(values), values.itemsize] for name, values in small.items()],
        "names": names,
        "counts": {name: np.bincount(arrays[name], minlength=len(names[name])).tolist() for name in names},
        "images": [
            [point[row], uri, point.get(nearest.get(row, -1), -1)]
            for row, uri in sorted(pictures.items())
            if row in point
        ],
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    parts = [len(head).to_bytes(4, "little"), head, *(values.tobytes() for values in small.values()), text]
    packed = base64.b64encode(_deflate(b"".join(parts))).decode("ascii")
    return PackedPoints(packed, places, kept[rows], len(named), int(placed.sum()))


def _categories(drawn: pa.Table) -> tuple[dict[str, list[str]], dict[str, Codes]]:
    """Names and codes of what points can be coloured by, and of the shards."""
    bin, kept = drawn["bin"].to_numpy().astype(np.int64), drawn["kept"].to_numpy(zero_copy_only=False)
    n_bins = int(bin.max()) + 1 if len(bin) else 0
    names = {"kept": ["dropped", "kept"], "bin": ["in no bin", *(f"bin {i}" for i in range(n_bins))]}
    codes: dict[str, Codes] = {"kept": kept.astype(np.uint8), "bin": bin + 1}
    for name in ("reason", "class", "shard"):
        if name in drawn.column_names:
            column = drawn[name].combine_chunks()
            dictionary = column.dictionary.to_pylist()
            codes[name] = column.indices.to_numpy()
            names[name] = [shown(word, _LONGEST) for word in dictionary]
    return names, codes


def _pack_keys(drawn: pa.Table, first: NDArray[np.bool_]) -> tuple[Codes, Codes, bytes]:
    """The points whose keys are packed, ascending; the length of each in UTF-8; and all bytes.

    All points where their keys fit, else those `first`, kept ones, and others, each in a seeded order.
    """
    keys = [shown(key, _LONGEST).encode() for key in drawn["key"].to_pylist()]
    points = np.arange(len(keys))
    text = b"".join(keys)
    order = None
    while (n_bytes := len(_deflate(text))) > KEY_BYTES:
        if order is None:
            rank = 2 * first + drawn["kept"].to_numpy(zero_copy_only=False)
            order = _draw(points, rank, len(points), purpose="report keys")
        points = np.sort(order[: int(len(points) * min(0.95, KEY_BYTES / n_bytes))])
        text = b"".join(keys[i] for i in points.tolist())
    return points, np.array([len(keys[i]) for i in points.tolist()], dtype=np.int64), text


def _narrow(values: Codes) -> Codes:
    """The same numbers, >= 0, in the least of one, two or four bytes each."""
    most = int(values.max()) if len(values) else 0
    return values.astype("u1" if most < 2**8 else "<u2" if most < 2**16 else "<u4")


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()
