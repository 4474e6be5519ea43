"""Does the stream itself, with a plan, an index or neither, ever pass damage on, mix shards or lose samples quietly?"""

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import webdataset as wds

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.index import index_shards
from adq_wds.shards.samples_in_tar import Span, iter_spans
from tests.conftest import Capsys, MakeShard, write_tar

HOW = ("plan", "index", "scan")
Samples = list[dict[str, Any]]


class Shard(NamedTuple):
    """A good shard, and what was made of it before it is damaged."""

    path: Path
    data: bytes
    spans: list[Span]
    samples: Samples
    plan: adq.Plan
    index: Path

    def stream(self, how: str, **options: Any) -> adq.ShardDataset:
        known: dict[str, Any] = {"plan": {"plan": self.plan}, "index": {"index": self.index}, "scan": {}}
        return adq.ShardDataset(str(self.path), **known[how], **options)

    def read(self, how: str) -> tuple[Samples, str | None]:
        """What a strict stream of the shard as it is now gives, and the text of its error."""
        got: Samples = []
        try:
            for sample in self.stream(how):
                got.append(sample)  # one by one: what came before an error is kept
        except adq.ShardError as error:
            return got, str(error)
        return got, None

    @property
    def ends(self) -> list[int]:
        """Where each sample ends, padding included."""
        return [span.byte_offset + span.n_bytes for span in self.spans]


@pytest.fixture
def shard(make_shard: MakeShard, tmp_path: Path) -> Shard:
    path = make_shard("a.tar", 3, side=8)
    index_shards(path, tmp_path / "index.parquet")
    return Shard(
        path,
        path.read_bytes(),
        list(iter_spans(path.read_bytes(), shard="a.tar")),
        list(adq.ShardDataset(str(path))),
        adq.Plan.from_keys(str(path), None),
        tmp_path / "index.parquet",
    )


# ---- F2, F4: cut


def check_cut(shard: Shard, cut: int, how: str) -> None:
    """Whole samples, then an error; or all samples, where nothing but the end mark is gone."""
    shard.path.write_bytes(shard.data[:cut])
    got, error = shard.read(how)
    assert got == shard.samples[: len(got)]
    harmless = {"plan": cut >= shard.ends[-1], "index": False, "scan": cut >= shard.ends[-1] + 512}[how]
    if harmless:
        assert (len(got), error) == (len(shard.samples), None)
        return
    assert error is not None, (cut, how)
    assert error.startswith(("shard a.tar", f"shard {shard.path}: empty file"))
    if how == "plan":
        n_whole = sum(end <= cut for end in shard.ends)
        assert len(got) == n_whole
        assert cut == 0 or f"a.tar, key '{shard.spans[n_whole].key}': ends at byte {cut}" in error
    else:
        assert got == []
        assert how == "index" or "truncated" in error or "empty file" in error
        assert how == "scan" or "when it was indexed: it changed since; index it again" in error


@pytest.mark.parametrize(("how", "n"), [("plan", 600), ("index", 100), ("scan", 400)])
def test_no_truncation_passes_in_silence(shard: Shard, how: str, n: int) -> None:
    """F2; an index notices by the file's size."""
    rng = random.Random(0)
    for cut in [rng.randrange(len(shard.data)) for _ in range(n)] + [0, shard.ends[-1] - 1, shard.ends[-1]]:
        check_cut(shard, cut, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_no_cut_at_any_byte_passes_in_silence(shard: Shard, how: str) -> None:
    """F4."""
    for cut in range(len(shard.data)):
        check_cut(shard, cut, how)


@pytest.mark.parametrize("how", ["plan", "scan"])
def test_a_shard_cut_later_gives_no_short_payload(shard: Shard, how: str) -> None:
    """F2, where no crc32 would tell: the plan's is not asked for, or the cut came after the scan."""
    for cut in range(shard.spans[1].byte_offset, shard.ends[-1], 97):
        shard.path.write_bytes(shard.data)
        stream = shard.stream(how, verify=False)
        shard.path.write_bytes(shard.data[:cut])
        got: Samples = []
        with suppress(adq.ShardError):
            for sample in stream:
                got.append(sample)
        assert got == shard.samples[: len(got)], cut
        assert len(got) <= sum(end <= cut for end in shard.ends)


# ---- F3: flipped and zeroed


def regions(shard: Shard) -> list[str]:
    """What each byte of the shard is: "header", "payload", "padding" or "end"."""
    found = ["end"] * len(shard.data)
    for span in shard.spans:
        found[span.byte_offset : span.byte_offset + span.n_bytes] = ["header"] * span.n_bytes
        for member in span.members:
            stop = member.offset + member.n_bytes
            found[member.offset : stop] = ["payload"] * member.n_bytes
            found[stop : stop + -stop % 512] = ["padding"] * (-stop % 512)
            found[member.offset - 512 + 155] = "padding"  # behind the NUL that ends the checksum
    return found


SEEN = {  # which changes each way of reading must notice; payloads have no checksum in a tar
    "plan": {"header", "payload"},
    "index": {"header", "payload", "end"},
    "scan": {"header", "end"},
}


def check_damage(shard: Shard, region: list[str], at: int, new: bytes, how: str) -> None:
    damaged = shard.data[:at] + new + shard.data[at + len(new) :]
    nul = {member.offset - 512 + 154 for span in shard.spans for member in span.members}
    changed = {
        region[i]
        for i in range(at, at + len(new))
        if damaged[i] != shard.data[i] and not (i in nul and damaged[i] == ord(" "))
    }
    shard.path.write_bytes(damaged)
    got, error = shard.read(how)
    assert (error is not None) == bool(changed & SEEN[how]), (at, changed, error)
    assert error is None or error.startswith("shard a.tar, "), error
    if how != "scan":
        assert got == shard.samples[: len(got)]
    if how == "plan" and error is not None:
        first = next(s for s in shard.spans if s.byte_offset <= at < s.byte_offset + s.n_bytes)
        assert f"a.tar, key '{first.key}': " in error
        assert len(got) == shard.spans.index(first)
    if error is None:
        assert len(got) == len(shard.samples)


@pytest.mark.parametrize(
    ("how", "n_flips", "n_blocks"), [("plan", 1500, 200), ("index", 300, 40), ("scan", 600, 100)]
)
def test_no_flip_or_zeroed_block_passes_or_adds(shard: Shard, how: str, n_flips: int, n_blocks: int) -> None:
    """F3: undetected 0, false alarms 0."""
    rng, region = random.Random(0), regions(shard)
    for _ in range(n_flips):
        at = rng.randrange(len(shard.data))
        check_damage(shard, region, at, bytes([shard.data[at] ^ 1 << rng.randrange(8)]), how)
    for _ in range(n_blocks):
        check_damage(shard, region, rng.randrange(0, len(shard.data), 512), bytes(512), how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damage_is_the_same_error_in_workers_and_for_any_policy(shard: Shard, how: str, damage: str) -> None:
    at = shard.spans[1].byte_offset + 3  # in its first header
    shard.path.write_bytes(shard.data[:at] + (b"" if damage == "cut" else b"\xff" + shard.data[at + 1 :]))
    texts = []
    for workers in (0, 2):
        for on_error in ("raise", "skip", lambda error: True):
            with pytest.raises(adq.ShardError) as caught:
                list(adq.Loader(shard.stream(how, on_error=on_error), num_workers=workers))
            texts.append(str(caught.value))
    assert len(set(texts)) == 1


def test_verify_tells_damage_by_exit_code_and_name(shard: Shard, tmp_path: Path, capsys: Capsys) -> None:
    plan = str(tmp_path / "plan.parquet")
    shard.plan.save(plan)
    rng, region = random.Random(0), regions(shard)
    for against in (plan, str(shard.index)):
        assert main(["verify", against, str(shard.path)]) == 0
        for _ in range(20):
            at = rng.randrange(shard.ends[-1])
            flipped = bytes([shard.data[at] ^ 1])
            for damaged in (shard.data[:at], shard.data[:at] + flipped + shard.data[at + 1 :]):
                shard.path.write_bytes(damaged)
                harmless = len(damaged) > at and region[at] == "padding"
                assert main(["verify", against, str(shard.path)]) == (0 if harmless else 1)
                said = capsys.readouterr()
                assert harmless or ("a.tar" in said.out and "the shards are not those of the" in said.err)
        shard.path.write_bytes(shard.data)


# ---- F5: cut, then a shard that repeats its keys


def two_shards(tmp_path: Path) -> tuple[list[Path], dict[str, Any]]:
    """Two shards of the same keys; each field says whose it is."""
    paths = []
    for name in "ab":
        places = [(i, field) for i in range(4) for field in ("cls", "jpg", "txt")]
        members = [(f"k{i}.{f}", f"{name}{i}".encode() * (30 + 100 * (f == "jpg"))) for i, f in places]
        paths.append(write_tar(tmp_path / f"{name}.tar", members))
    urls = [str(path) for path in paths]
    index_shards(urls, tmp_path / "index.parquet")
    plan, index = adq.Plan.from_keys(urls, None), tmp_path / "index.parquet"
    return paths, {"plan": {"plan": plan}, "index": {"index": index}}


def check_unmixed(samples: Iterator[dict[str, Any]]) -> int:
    """Take samples until the end or an error; all fields of each must be one shard's."""
    n = 0
    with suppress(adq.ShardError):
        for sample in samples:
            own = Path(sample["__url__"]).stem + sample["__key__"][1:]
            assert {sample[field][:2].decode() for field in ("cls", "jpg", "txt")} == {own}
            n += 1
    return n


@pytest.mark.parametrize("how", HOW)
def test_a_cut_shard_lends_nothing_to_the_next(tmp_path: Path, how: str) -> None:
    """F5: no sample of two shards, in any order of reading, skipping or not."""
    (first, second), known = two_shards(tmp_path)
    data, rng, n = first.read_bytes(), random.Random(1), 0
    for turn in range(200):
        first.write_bytes(data[: rng.randrange(len(data))])
        with suppress(adq.ShardError):  # an index, or a scan, refuses at once
            dataset = adq.ShardDataset(
                [str(first), str(second)], **known.get(how, {}), shuffle=turn % 2 == 1, on_error="skip"
            )
            n += check_unmixed(iter(dataset))
    assert n > 100 or how != "plan"


def test_what_webdataset_mixes_a_plan_refuses(tmp_path: Path) -> None:
    """F5, in a WebDataset pipeline that goes on after errors; without the plan it mixes, with it that is an error."""
    (first, second), known = two_shards(tmp_path)
    data, rng = first.read_bytes(), random.Random(1)
    n = mixed = 0
    for _ in range(200):
        first.write_bytes(data[: rng.randrange(len(data))])
        options: dict[str, Any] = {"handler": wds.ignore_and_continue, "empty_check": False}
        stock = wds.WebDataset([str(first), str(second)], shardshuffle=False, **options)
        fields = [{bytes(v)[:2] for k, v in s.items() if k[:2] != "__"} for s in stock]
        is_mixed = any(len(each) > 1 for each in fields)
        mixed += is_mixed
        planned = stock.compose(adq.Subsample(known["plan"]["plan"], on_error="skip"))
        n += check_unmixed(iter(planned))
        if is_mixed:
            with pytest.raises(adq.ShardError, match=r"shard a.tar, key 'k\d': bytes differ from the plan's"):
                list(planned)
    assert mixed > 5
    assert n > 100
