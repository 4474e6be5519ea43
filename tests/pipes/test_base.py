"""A stream loses exactly its bad samples, by name, and not without end."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.pipes.base import MAX_BAD_IN_A_ROW, Tally, check_on_error
from adq_wds.samples.label import read_label

Samples = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Half(adq.Pipe):
    """Keeps even numbers; raises what `bad` says for others."""

    bad: Any = None

    def apply(self, samples: Samples) -> Samples:
        for sample in samples:
            if self.bad is not None and (error := self.bad(sample["n"])) is not None:
                raise error
        return [dict(sample) for sample in samples if sample["n"] % 2 == 0]


def stream(n: int) -> Samples:
    return [{"__key__": f"k{i}", "__url__": "data/a.tar", "n": i} for i in range(n)]


def no(n: int) -> Exception:
    return adq.SampleError(f"shard a.tar, key 'k{n}': no")


def at(*bad: int, error: Callable[[int], Exception] = no) -> Any:
    return lambda n: error(n) if n in bad else None


def numbers(samples: Any) -> list[int]:
    return [sample["n"] for sample in samples]


def test_a_bad_sample_raises_after_the_good_ones_before_it() -> None:
    out: Samples = []
    with pytest.raises(adq.SampleError, match=r"^shard a.tar, key 'k37': no$"):
        out.extend(Half(bad=at(37))(stream(100)))
    assert numbers(out) == list(range(0, 37, 2))


def test_a_skip_drops_exactly_the_bad_samples(caplog: pytest.LogCaptureFixture) -> None:
    out = numbers(Half(bad=at(3, 16, 31, 32), on_error="skip")(stream(100)))
    assert out == [i for i in range(0, 100, 2) if i not in (16, 32)]
    lines = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    assert lines == [{"skipped_by": "Half", "error": f"shard a.tar, key 'k{n}': no"} for n in (3, 16, 31, 32)]
    assert caplog.records[-1].message == "Half: read 100 = kept 48 + dropped 48 + bad 4"
    caplog.clear()
    assert len(list(Half(on_error="skip")(stream(100)))) == 50
    assert caplog.text == ""


def test_a_function_gets_each_error_and_decides() -> None:
    seen: list[str] = []

    def decide(error: adq.AdqError) -> bool:
        seen.append(str(error))
        return "k3'" in str(error)

    with pytest.raises(adq.SampleError, match="k16'"):
        list(Half(bad=at(3, 16), on_error=decide)(stream(100)))
    assert seen == ["shard a.tar, key 'k3': no", "shard a.tar, key 'k16': no"]


KINDS = (adq.PlanError, adq.ShardError, adq.StateError, adq.FeaturesError, adq.CodebookError, adq.AdqError)


@pytest.mark.parametrize("kind", KINDS)
def test_only_errors_of_samples_are_skipped(kind: type[adq.AdqError]) -> None:
    for on_error in ("skip", lambda error: True):
        with pytest.raises(kind, match="plan is wrong"):
            list(Half(bad=at(5, error=lambda n: kind("plan is wrong")), on_error=on_error)(stream(20)))


def test_any_error_gets_shard_and_key_on_one_line() -> None:
    text = "first\nsecond\r\x1b[31m\u2028" + "x" * 10_000
    pipe = Half(bad=at(5, error=lambda n: ZeroDivisionError(text)))
    expected = r"^shard a.tar, key 'k5': Half: ZeroDivisionError: 'first\\nsecond"
    with pytest.raises(adq.SampleError, match=expected) as caught:
        list(pipe(stream(20)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ((b"jpg", 3), "a tuple"),
        ([b"jpg", 3], "a list"),
        (None, "a NoneType"),
        ({"jpg": b""}, r"a dict with \['jpg'\]"),
        ({"__key__": ["k0", "k1"], "__url__": ["a.tar", "a.tar"]}, r"a dict with \['__key__', '__url__'\]"),
        ({"__key__": "k0", "__url__": None}, r"a dict with \['__key__', '__url__'\]"),
    ],
)
def test_what_is_no_sample_ends_the_stream_under_every_policy(item: Any, found: str) -> None:
    text = rf"^Half got {found}, expected a sample: .*; put this stage before to_tuple/batched$"
    for on_error in ("raise", "skip", lambda error: True):
        out: Samples = []
        with pytest.raises(TypeError, match=text):
            out.extend(Half(on_error=on_error)([*stream(3), item]))
        assert numbers(out) == [0, 2]


def test_one_sample_is_no_stream_and_a_tuple_of_samples_is() -> None:
    with pytest.raises(TypeError, match=r"got one sample \(a tuple\): use \.compose\(Half\(...\)\)"):
        Half()((b"jpg", 3))  # type: ignore[arg-type]
    assert numbers(Half()(tuple(stream(5)))) == [0, 2, 4]


def test_a_malformed_field_spec_is_no_samples_fault() -> None:
    pipe = Half(bad=lambda n: read_label({"cls": b"1"}, "pkl"), on_error="skip")
    with pytest.raises(ValueError, match="'pkl' would run what a pickle says"):
        list(pipe(stream(3)))


def test_an_error_of_the_source_is_not_ours_to_skip() -> None:
    def source() -> Any:
        yield from stream(20)
        raise adq.SampleError("the source broke")

    with pytest.raises(adq.SampleError, match="the source broke"):
        list(Half(on_error="skip")(source()))


LIMITS: list[tuple[int, Sequence[int], str | None]] = [  # samples, bad ones among them, the error that ends the stream
    (2000, range(1000, 1200), "100 bad samples in a row; the last: shard a.tar, key 'k1099': no"),
    (6000, [n for n in range(5000, 5180) if n % 90], None),  # not in a row
    (1000, range(0, 1000, 9), "12 of 100 samples are bad, more than max_bad_fraction=0.1; .* key 'k99': no"),
    (1000, range(9, 1000, 10), None),
    (200, range(60, 99), "39 of 200 samples are bad, .*"),  # at the end: none follows the first hundred
    *((n, range(bad), f"{bad} of {n} samples are bad, .*'k{bad - 1}': no") for n, bad in ((2, 2), (5, 2), (20, 3), (99, 10))),
    *((n, range(bad), None) for n, bad in ((1, 1), (5, 1), (20, 2), (99, 9))),
]  # fmt: skip


@pytest.mark.parametrize(("n", "bad", "error"), LIMITS)
def test_as_many_bad_samples_are_borne(n: int, bad: Sequence[int], error: str | None) -> None:
    pipe, out = Half(bad=at(*bad), on_error="skip"), []
    with nullcontext() if error is None else pytest.raises(adq.SampleError, match=f"^{error}$"):
        out.extend(pipe(stream(n)))
    good = [i for i in range(0, n, 2) if i not in bad]
    assert numbers(out) == good[: len(out)]
    assert len(out) == len(good) or n >= 1000


def test_a_tally_counts_before_it_raises(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally("x", "skip", max_bad_fraction=0.5)
    for name in "abc":
        tally.failed(adq.SampleError(f"no {name}"))
    tally.good(2, 1)
    with pytest.raises(adq.SampleError, match=r"^3 of 5 samples .* max_bad_fraction=0.5; the last: no c$"):
        tally.close()
    assert caplog.records[-1].message == "x: read 5 = kept 1 + dropped 1 + bad 3"
    tally = Tally("x", "skip", max_bad_fraction=1.0)
    tally.good(10, 4)
    for _ in range(MAX_BAD_IN_A_ROW - 1):
        tally.failed(adq.SampleError("no"))
    tally.good(1, 1)
    tally.failed(adq.SampleError("no"))
    assert (tally.read, tally.kept, tally.dropped, tally.bad) == (111, 5, 6, 100)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise', 'skip' or a function, got None"):
        check_on_error(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_bad_fraction must lie in \[0, 1\], got nan"):
        check_on_error("skip", float("nan"))


def test_two_passes_over_one_pipe_count_apart(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Half(bad=at(3), on_error="skip")
    for _ in range(2):
        list(pipe(stream(20)))
    told = [record.message for record in caplog.records if "read" in record.message]
    assert told == ["Half: read 20 = kept 10 + dropped 9 + bad 1"] * 2
