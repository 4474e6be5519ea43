"""The column `members`: the field and size of each member of a sample, and the crc32 of all its bytes.

A field never holds a slash, so a text holds the fields in tar order, their sizes, and the crc32 of the whole span, headers
and padding included: ``jpg/cls/2345/1/3735928559``. A reader that finds this crc32 cuts out the payloads and parses no
header. The text is empty where that is not known, or too long to be worth its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adq_wds.shards.samples_in_tar import Member
from adq_wds.shards.tar_headers import BLOCK

MEMBERS = pa.field("members", pa.string(), nullable=False)
_MAX_MEMBERS = 8
_MAX_BYTES = 120  # of a text: with longer ones a million rows would be more text than a table may hold


def members_text(members: Sequence[Member], crc32: int) -> str:
    """The column's value for one sample.

    >>> members_text([Member("jpg", 512, 2345), Member("cls", 3584, 1)], 3735928559)
    'jpg/cls/2345/1/3735928559'
    """
    text = "/".join([*(m.field for m in members), *(str(m.n_bytes) for m in members), str(crc32)])
    return text if len(members) <= _MAX_MEMBERS and len(text.encode()) <= _MAX_BYTES else ""


def payload_places(
    members: pa.Array, n_bytes: NDArray[np.int64]
) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.int64]]:
    """Where the payloads of n samples lie in their spans, and the crc32 of these.

    They are known for samples whose members, each behind one plain header, fill the span exactly. They are unknown
    for samples with long names, foreign members between their own, reserved fields, or an empty or invalid text.

    Args:
        members: n texts.
        n_bytes: (n,) of each span.

    Returns:
        (n,) a tuple of field names, None where not known; (2F, n) start and stop of each payload, F the most fields of
        any sample; and (n,) crc32.

    >>> texts = pa.array(["jpg/cls/2345/1/77", "cls/7/88"])
    >>> fields, cuts, crc32 = payload_places(texts, np.array([4096, 1024]))
    >>> fields.tolist(), cuts.T.tolist(), crc32.tolist()
    ([('jpg', 'cls'), ('cls',)], [[512, 2857, 3584, 3585], [512, 519, 0, 0]], [77, 88])
    """
    parts = pc.split_pattern(members, "/")
    counts, first, flat = pc.list_value_length(parts).to_numpy(), parts.offsets.to_numpy(), parts.flatten()
    first = first[:-1] - first[0]  # `flatten` begins at the first part
    widths = [n for n in range(1, _MAX_MEMBERS + 1) if (counts == 2 * n + 1).any()]
    fields = np.full(len(n_bytes), None, dtype=object)
    cuts = np.zeros((2 * max(widths, default=0), len(n_bytes)), np.int64)
    crc32 = np.zeros(len(n_bytes), np.int64)
    for width in widths:
        rows = np.flatnonzero(counts == 2 * width + 1)
        part = first[rows][:, None] + np.arange(2 * width + 1)  # (m, 2F + 1)
        try:
            numbers = flat.take(pa.array(part[:, width:].ravel())).cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:  # no numbers
            continue
        numbers = numbers.reshape(-1, width + 1).T  # (F + 1, m)
        size, crc32[rows] = numbers[:-1], numbers[-1]
        blocks = BLOCK + size + -size % BLOCK  # header, payload, padding
        stop = np.cumsum(blocks, axis=0) - blocks + BLOCK + size
        known = (size >= 0).all(axis=0) & (size <= n_bytes[rows]).all(axis=0)
        known &= blocks.sum(axis=0) == n_bytes[rows]
        fields[rows[known]] = _tuples(flat.take(pa.array(part[:, :width].ravel())), width)[known]
        cuts[0 : 2 * width : 2, rows], cuts[1 : 2 * width : 2, rows] = stop - size, stop
    return fields, cuts, crc32


def _tuples(names: pa.Array, width: int) -> NDArray[np.object_]:
    """(m,) tuples of `width` names each; None where the names cannot be those of a sample's members."""
    encoded = names.dictionary_encode()
    code = encoded.indices.to_numpy().reshape(-1, width)
    shapes, which = (code[:1], np.zeros(len(code), np.int64))
    if (code != code[0]).any():
        shapes, which = np.unique(code, axis=0, return_inverse=True)
    tuples = np.full(len(shapes), None, dtype=object)
    for i, shape in enumerate(shapes.tolist()):
        fields = tuple(encoded.dictionary[j].as_py() for j in shape)
        reserved = any(field.startswith("__") for field in fields)
        tuples[i] = None if reserved or len(set(fields)) < width else fields
    return tuples[which.reshape(-1)]
