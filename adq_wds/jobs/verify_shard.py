"""Does one shard hold exactly what a table lists? Key, place, size, order, checksum of every sample; contents if asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from adq_wds.engines.threads import pool_of_threads
from adq_wds.errors import SampleError, ShardError, shorten
from adq_wds.jobs.verify_listed import Expected
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

MISSING = "missing"
_DECODED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        shard: the shard's name.
        key: the sample's key; None for a shard.
        kind: of a sample "missing", "moved", "changed" (another payload), "damaged" (no sample there), "unusable", "label"
            or "extra"; of a shard "damaged", "unreadable", "missing shard", "renamed shard", "extra shard", "second file"
            or "unmatched shard".
        text: what was found, and what was listed.
        n: samples of the table that are not as listed because of this alone: 0 or 1, or all of a missing shard.
    """

    shard: str
    key: str | None
    kind: str
    text: str
    n: int

    def __str__(self) -> str:
        place = f"shard {self.shard}" + ("" if self.key is None else f", key {shorten(self.key)}")
        return f"{place}: {self.kind}: {self.text}"


@dataclass(frozen=True)
class Contents:
    """What is looked at inside the samples that training reads.

    Attributes:
        image: the field whose image is decoded; None to decode nothing.
        label: the field whose label is compared; None to compare nothing.
        workers: threads.
    """

    image: FieldSpec | None
    label: FieldSpec | None
    workers: int


@dataclass
class ShardCheck:
    """Counts of one shard's samples: listed = ok + differs + missing; `extra` are not listed.

    Attributes:
        used_ok: samples that training reads and that are as listed.
        n_contents: samples whose contents were looked at.
    """

    ok: int = 0
    differs: int = 0
    missing: int = 0
    extra: int = 0
    used_ok: int = 0
    n_contents: int = 0
    differences: list[Difference] = field(default_factory=list)


def check_shard(
    path: str | os.PathLike[str], expected: Expected, contents: Contents | None = None
) -> ShardCheck:
    """Hold a shard against what is listed, to its end: a fault in the middle hides nothing behind it."""
    try:
        with open_shard(path) as buffer:
            return _compare(buffer, expected, contents)
    except ShardError as error:  # of opening: `_compare` takes down what it meets
        url = os.fspath(path)
        place = f"shard {base_name(url) if is_url(url) else url}"
        return gone(expected, "unreadable", _without(place, str(error)))


def gone(expected: Expected, kind: str, text: str) -> ShardCheck:
    """The check of a shard of which no file can be read."""
    n = len(expected.spans)
    return ShardCheck(missing=n, differences=[Difference(expected.name, None, kind, text, n)])


def _compare(buffer: Buffer, expected: Expected, contents: Contents | None) -> ShardCheck:
    name, differences = expected.name, []
    walked = _Walked(buffer, name)
    if walked.fault is not None:
        differences.append(Difference(name, None, "damaged", walked.fault, 0))
    good: dict[int, _Sample] = {}
    faults: dict[int, _Fault] = {}
    for i, row in enumerate(expected.spans.rows()):
        sample = _check_row(walked, row)
        if isinstance(sample, _Sample) and expected.used[i] and sample.span.problem is not None:
            sample = _Fault("unusable", _without(f"shard {name}, key {shorten(row[1])}", sample.span.problem))
        if isinstance(sample, _Sample):
            good[i] = sample
        else:
            faults[i] = sample
    used = [i for i in good if expected.used[i]]
    if contents is not None:
        faults |= _check_contents({i: good[i] for i in used}, expected, contents)
    for i in sorted(faults):
        differences.append(Difference(name, expected.spans.keys[i], faults[i].kind, faults[i].text, 1))
    extra = _extra(walked, expected)
    missing = sum(fault.kind == MISSING for fault in faults.values())
    return ShardCheck(
        ok=len(expected.spans) - len(faults),
        differs=len(faults) - missing,
        missing=missing,
        extra=len(extra),
        used_ok=sum(i not in faults for i in used),
        n_contents=len(used) if contents is not None else 0,
        differences=differences + extra,
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample that is as listed: `span` counts from the start of `data`."""

    data: Buffer
    span: Span


@dataclass(frozen=True, slots=True)
class _Fault:
    kind: str
    text: str


class _Walked:
    """The samples that a shard holds, up to its first fault.

    Attributes:
        spans: in the shard's order.
        by_key: position and span of each.
        at: key by first byte.
        fault: why the shard cannot be read on from there; None when it ends well.
    """

    def __init__(self, buffer: Buffer, name: str) -> None:
        self.buffer, self.name = buffer, name
        self.spans: list[Span] = []
        self.fault: str | None = None
        try:
            for span in iter_spans(buffer, shard=name):
                self.spans.append(span)  # one by one: what stands before a fault is kept
        except ShardError as error:
            self.fault = _without(f"shard {name}", str(error))
        self.by_key = {span.key: (i, span) for i, span in enumerate(self.spans)}
        self.at = {span.byte_offset: span.key for span in self.spans}


_Row = tuple[int, str, int, int, int]


def _check_row(walked: _Walked, row: _Row) -> _Sample | _Fault:
    """A sample, if it is as listed."""
    index, key, byte_offset, n_bytes, crc32 = row
    if key not in walked.by_key:
        return _check_hidden(walked, row)
    position, span = walked.by_key[key]
    crc = payload_crc32(walked.buffer, span)
    if (position, span.byte_offset, span.n_bytes) != (index, byte_offset, n_bytes):
        text = (
            f"sample {position} at byte {span.byte_offset} ({span.n_bytes} bytes), listed as {index} at byte "
            f"{byte_offset} ({n_bytes} bytes); its payload is {'the same' if crc == crc32 else 'another'}"
        )
        return _Fault("moved" if crc == crc32 else "changed", text)
    if crc != crc32:
        return _Fault("changed", f"payload of crc32 {crc:08x}, listed {crc32:08x}")
    return _Sample(walked.buffer, span)


def _check_hidden(walked: _Walked, row: _Row) -> _Sample | _Fault:
    """A sample that the walk did not meet: it may stand whole behind a fault, where training reads it by offset."""
    _, key, byte_offset, n_bytes, crc32 = row
    end, size = byte_offset + n_bytes, len(walked.buffer)
    if not 0 <= byte_offset < end <= size:
        return _Fault(MISSING, f"listed at bytes {byte_offset} to {end}, the file ends at {size}")
    other = walked.at.get(byte_offset)
    if other is None and walked.fault is None:
        return _Fault(MISSING, "not in the shard")
    if other is None:
        data = walked.buffer[byte_offset:end]
        try:
            return _Sample(data, expected_span(data, shard=walked.name, key=key, crc32=crc32))
        except WrongSample as error:
            if error.span is None:
                return _Fault("damaged", str(error))
            if error.span.key == key:
                return _Fault("changed", f"payload of crc32 {error.crc32:08x}, listed {crc32:08x}")
            other = error.span.key
    return _Fault(MISSING, f"not in the shard; key {shorten(other)} is in its place")


def _extra(walked: _Walked, expected: Expected) -> list[Difference]:
    listed, n = set(expected.spans.keys), len(expected.spans)
    return [
        Difference(
            expected.name, span.key, "extra", f"sample {i} at byte {span.byte_offset} is not listed", 0
        )
        for i, span in enumerate(walked.spans)
        if span.key not in listed and (expected.complete or i < n)
    ]


def _check_contents(samples: dict[int, _Sample], expected: Expected, contents: Contents) -> dict[int, _Fault]:
    """Decode and compare, some samples at a time in each thread."""
    rows = list(samples)
    parts = [rows[i : i + _DECODED_AT_ONCE] for i in range(0, len(rows), _DECODED_AT_ONCE)]

    def check(part: list[int]) -> dict[int, _Fault]:
        faults = {i: _content_fault(samples[i], expected, i, contents) for i in part}
        return {i: fault for i, fault in faults.items() if fault is not None}

    all_faults: dict[int, _Fault] = {}
    with pool_of_threads(contents.workers, "adq-verify") as pool:
        for faults in pool.map(check, parts):
            all_faults |= faults
    return all_faults


def _content_fault(sample: _Sample, expected: Expected, i: int, contents: Contents) -> _Fault | None:
    try:
        fields = read_sample(sample.data, sample.span, url=expected.name)
        if contents.image is not None:
            whole_image(fields, contents.image)
        if contents.label is not None and expected.labels is not None:
            label = read_label(fields, contents.label)
            if label != expected.labels[i]:
                return _Fault("label", f"{shorten(label)}, listed {shorten(expected.labels[i])}")
    except SampleError as error:
        place = f"shard {base_name(expected.name)}, key {shorten(sample.span.key)}"
        return _Fault("unusable", _without(place, str(error)))
    return None


def _without(place: str, text: str) -> str:
    """An error's text without the place in front of it, which a difference names itself."""
    return text.removeprefix(place).lstrip(":, ")
