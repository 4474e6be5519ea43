"""Compares one shard with a table: key, offset, size, order, checksum of each sample; on request its contents."""

from __future__ import annotations

import os
from dataclasses import dataclass

from adq_wds.engines.threads import pool_of_threads
from adq_wds.errors import SampleError, ShardError, shorten
from adq_wds.jobs.verify_listed import Expected
from adq_wds.pipes.base import before_error
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import FieldSpec
from adq_wds.samples.label import read_label
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.names import base_name, is_url
from adq_wds.shards.samples_in_tar import (
    Buffer,
    Span,
    WrongSample,
    expected_span,
    iter_spans,
    payload_crc32,
    read_sample,
)

MISSING, EXTRA = "missing", "extra"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        shard: the shard's name.
        key: the sample's key; None for a shard.
        kind: of a sample "missing", "moved", "changed" (another payload), "damaged" (no sample there), "unusable", "label"
            or "extra"; of a shard "damaged", "unreadable", "missing shard", "extra shard", "second file" or "unmatched
            shard".
        text: the sample in the shard, and the one listed.
        n: listed samples that fail because of this difference alone: 0 or 1, or all of a missing shard.
    """

    shard: str
    key: str | None
    kind: str
    text: str
    n: int

    def __str__(self) -> str:
        place = f"shard {self.shard}" + ("" if self.key is None else f", key {shorten(self.key)}")
        return f"{place}: {self.kind}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """Counts of listed samples, each one of three: read = ok + differs + missing.

    Attributes:
        read: samples listed.
        kept: those of `read` that training reads: kept by a plan, or usable.
        kept_ok: those of `kept` that are as listed.
        n_contents: samples that were decoded, or whose labels were compared.
        differences: everything that differs.
    """

    read: int
    kept: int
    kept_ok: int = 0
    n_contents: int = 0
    differences: tuple[Difference, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def ok(self) -> int:
        """As listed: key, position, offset, size, checksum; and contents, where they were asked for."""
        return self.read - self.differs - self.missing

    @property
    def differs(self) -> int:
        """Samples present, but not as listed."""
        return sum(difference.n for difference in self.differences) - self.missing

    @property
    def missing(self) -> int:
        """Listed samples that are absent."""
        return sum(each.n for each in self.differences if each.key is None or each.kind == MISSING)

    @property
    def extra(self) -> int:
        """Unlisted samples in listed shards."""
        return sum(difference.kind == EXTRA for difference in self.differences)


def check_shard(
    path: str | os.PathLike[str],
    expected: Expected,
    *,
    image: FieldSpec | None = None,
    label: FieldSpec | None = None,
    workers: int = 1,
) -> Check:
    """Compare a shard with its list to the end: a fault in the middle hides nothing behind it.

    Args:
        path: the shard.
        expected: the entries of a table for it.
        image: field whose image is decoded, of the samples that training reads; None decodes nothing.
        label: field whose label is compared, of the same; None compares nothing.
        workers: threads that decode.
    """
    try:
        with open_shard(path) as buffer:
            return _compare(_Walk(buffer, expected.name), expected, image, label, workers)
    except ShardError as error:  # of opening: `_Walk` notes its own
        url = os.fspath(path)
        place = f"shard {base_name(url) if is_url(url) else url}"
        return lost_shard(expected, "unreadable", _without(place, str(error)))


def lost_shard(expected: Expected, kind: str, text: str) -> Check:
    """The check of a shard without a readable file."""
    n = len(expected.spans)
    difference = Difference(expected.name, None, kind, text, n)
    return Check(read=n, kept=int(expected.used.sum()), differences=(difference,))


_Sample = tuple[Buffer, Span]
"""A sample that is as listed: its span counts from the start of the bytes."""


class _Walk:
    """The samples of a shard up to its first fault.

    Attributes:
        spans: in the shard's order.
        fault: why reading stops there; None when the shard ends well.
        by_key: position and span of each.
        key_at: key by first byte.
    """

    def __init__(self, buffer: Buffer, name: str) -> None:
        self.buffer, self.name = buffer, name
        self.spans, error = before_error(iter_spans(buffer, shard=name))
        if error is not None and not isinstance(error, ShardError):
            raise error
        self.fault = None if error is None else _without(f"shard {name}", str(error))
        self.by_key = {span.key: (i, span) for i, span in enumerate(self.spans)}
        self.key_at = {span.byte_offset: span.key for span in self.spans}

    def find(self, index: int, key: str, byte_offset: int, n_bytes: int, crc32: int) -> _Sample | Difference:
        """A sample, if it is as listed."""

        def differs(kind: str, text: str) -> Difference:
            return Difference(self.name, key, kind, text, 1)

        if key in self.by_key:
            position, span = self.by_key[key]
            crc = payload_crc32(self.buffer, span)
            if (position, span.byte_offset, span.n_bytes) != (index, byte_offset, n_bytes):
                text = (
                    f"sample {position} at byte {span.byte_offset} ({span.n_bytes} bytes), listed as {index} at byte "
                    f"{byte_offset} ({n_bytes} bytes); its payload is {'the same' if crc == crc32 else 'another'}"
                )
                return differs("moved" if crc == crc32 else "changed", text)
            if crc != crc32:
                return differs("changed", f"payload of crc32 {crc:08x}, listed {crc32:08x}")
            return self.buffer, span
        # It may stand whole behind a fault, where training reads it by its offset.
        end, size = byte_offset + n_bytes, len(self.buffer)
        if not 0 <= byte_offset < end <= size:
            return differs(MISSING, f"listed at bytes {byte_offset} to {end}, the file ends at {size}")
        other = self.key_at.get(byte_offset)
        if other is None and self.fault is None:
            return differs(MISSING, "not in the shard")
        if other is None:
            data = self.buffer[byte_offset:end]
            try:
                return data, expected_span(data, shard=self.name, key=key, crc32=crc32)
            except WrongSample as error:
                if error.span is None:
                    return differs("damaged", str(error))
                if error.span.key == key:
                    return differs("changed", f"payload of crc32 {error.crc32:08x}, listed {crc32:08x}")
                other = error.span.key
        return differs(MISSING, f"not in the shard; key {shorten(other)} is in its place")


def _compare(
    walk: _Walk, expected: Expected, image: FieldSpec | None, label: FieldSpec | None, workers: int
) -> Check:
    name, keys = expected.name, set(expected.spans.keys)
    damaged = [] if walk.fault is None else [Difference(name, None, "damaged", walk.fault, 0)]
    faults: dict[int, Difference] = {}
    used: dict[int, _Sample] = {}
    for i, row in enumerate(expected.spans.rows()):
        sample = walk.find(*row)
        if isinstance(sample, Difference):
            faults[i] = sample
        elif expected.used[i] and sample[1].problem is not None:
            faults[i] = _unusable(name, row[1], sample[1].problem)
        elif expected.used[i]:
            used[i] = sample
    if image is not None or label is not None:
        faults |= _compare_contents(used, expected, image, label, workers)
    extra = [
        Difference(name, span.key, EXTRA, f"sample {i} at byte {span.byte_offset} is not listed", 0)
        for i, span in enumerate(walk.spans)
        if span.key not in keys and (expected.complete or i < len(expected.spans))
    ]
    return Check(
        read=len(expected.spans),
        kept=int(expected.used.sum()),
        kept_ok=sum(i not in faults for i in used),
        n_contents=0 if image is None and label is None else len(used),
        differences=(*damaged, *(faults[i] for i in sorted(faults)), *extra),
    )


def _compare_contents(
    samples: dict[int, _Sample],
    expected: Expected,
    image: FieldSpec | None,
    label: FieldSpec | None,
    workers: int,
) -> dict[int, Difference]:
    """Decode and compare, some samples at a time in each thread."""
    rows = list(samples)

    def compare(part: list[int]) -> dict[int, Difference]:
        faults = {i: _compare_content(samples[i], expected, i, image, label) for i in part}
        return {i: fault for i, fault in faults.items() if fault is not None}

    faults: dict[int, Difference] = {}
    with pool_of_threads(workers, "adq-verify") as pool:
        for more in pool.map(compare, (rows[i : i + 64] for i in range(0, len(rows), 64))):
            faults |= more
    return faults


def _compare_content(
    sample: _Sample, expected: Expected, i: int, image: FieldSpec | None, label: FieldSpec | None
) -> Difference | None:
    data, span = sample
    try:
        fields = read_sample(data, span, url=expected.name)
        if image is not None:
            whole_image(fields, image)
        if label is not None and expected.labels is not None:
            value, listed = read_label(fields, label), expected.labels[i]
            if value != listed:
                text = f"{shorten(value)}, listed {shorten(listed)}"
                return Difference(expected.name, span.key, "label", text, 1)
    except SampleError as error:
        return _unusable(expected.name, span.key, str(error))
    return None


def _unusable(shard: str, key: str, text: str) -> Difference:
    for name in (shard, base_name(shard)):
        text = _without(f"shard {name}, key {shorten(key)}", text)
    return Difference(shard, key, "unusable", text, 1)


def _without(place: str, text: str) -> str:
    """An error's text without its leading place; the difference has its own."""
    return text.removeprefix(place).lstrip(":, ")
