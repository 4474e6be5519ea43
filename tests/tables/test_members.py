"""The column `members` says where payloads lie, or nothing."""

import numpy as np
import pyarrow as pa
import pytest

from adq_wds.shards.samples_in_tar import Member
from adq_wds.tables.members import members_text, payload_places
from adq_wds.tables.spans import Spans


def test_places_are_those_of_plain_headers_one_after_another() -> None:
    texts = pa.array(["jpg/cls/2345/1/5", "cls/7/6", "", "jpg/cls/0/512/7", "cls/jpg/1/2345/4294967295"])
    n_bytes = np.array([512 + 2560 + 1024, 1024, 4096, 1536, 4096])
    fields, cuts, crc32 = payload_places(texts.slice(0), n_bytes)
    assert crc32.tolist() == [5, 6, 0, 7, 2**32 - 1]
    assert fields.tolist() == [("jpg", "cls"), ("cls",), None, ("jpg", "cls"), ("cls", "jpg")]
    assert cuts[:, 0].tolist() == [512, 2857, 3584, 3585]
    assert cuts[:2, 1].tolist() == [512, 519]
    assert cuts[:, 3].tolist() == [512, 512, 1024, 1536]
    assert cuts[:, 4].tolist() == [512, 513, 1536, 3881]
    part, where, _ = payload_places(texts.slice(3), n_bytes[3:])
    assert part.tolist() == fields[3:].tolist()
    assert where.tolist() == cuts[:, 3:].tolist()


@pytest.mark.parametrize(
    "text",
    ["", "jpg", "jpg/", "jpg/1", "jpg/x/1", "jpg/1/x", "jpg/-1/1", "jpg/513/1", "jpg/1/2/3/4", "__key__/1/1",
     "jpg/99999999999999999999/1", "__adq_keep__/1/1", "/".join(["x"] * 9 + ["1"] * 10), "jpg/jpg/0/0/1",
     "1" * 4000, "jpg/9223372036854775807/1"],
)  # fmt: skip
def test_a_text_that_contradicts_its_span_yields_to_the_headers(text: str) -> None:
    fields, *_ = payload_places(pa.array([text]), np.array([1024]))
    assert fields.tolist() == [None]


def test_a_text_out_of_proportion_is_not_kept() -> None:
    eight = [Member(f"f{i}", 0, i) for i in range(8)]
    assert members_text(eight, 9) == "f0/f1/f2/f3/f4/f5/f6/f7/0/1/2/3/4/5/6/7/9"
    assert members_text([*eight, Member("f8", 0, 8)], 9) == ""
    assert members_text([Member("é" * 60, 0, 1)], 9) == ""


def test_spans_joined_with_memberless_ones_have_empty_texts() -> None:
    rows = [(0, "a", 0, 1024, 1), (1, "b", 1024, 1024, 2)]
    known, unknown = Spans.from_rows(rows[:1], ["jpg/1"]), Spans.from_rows(rows[1:])
    joined = Spans.joined([known, unknown])
    assert joined.members.to_pylist() == ["jpg/1", ""]
    assert joined.take(np.array([1])).members.to_pylist() == [""]
    assert joined.rows() == rows
    assert "members" not in unknown.columns("a.tar")
    assert unknown.columns("a.tar", members=True)["members"].to_pylist() == [""]
    assert Spans.joined([unknown, unknown]).members is None
