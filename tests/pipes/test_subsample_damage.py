"""F39: a pipeline of WebDataset with `Subsample` in it loses no kept sample in silence, and refuses nothing sound.

WebDataset's tar reader ends without an error at a bad header. The oracle is that reader alone, its samples held
against those of the sound shards one by one.
"""

import random
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import webdataset as wds

import adq_wds as adq
from tests.conftest import Caplog, write_tar

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # WebDataset leaves the files of damaged shards open

BLOCK = 512
Samples = dict[str, dict[str, bytes]]


class Set(NamedTuple):
    """Two shards, of which the first is to be damaged, and a plan that keeps every other sample of both."""

    urls: list[str]
    plan: adq.Plan
    data: bytes  # of the first
    kept: Samples  # of both

    def damage(self, data: bytes) -> None:
        Path(self.urls[0]).write_bytes(data)


def members(rng: random.Random, prefix: str, n: int) -> list[tuple[str, bytes]]:
    names = [f"{prefix}{i}.{field}" for i in range(n) for field in ("jpg", "txt")]
    return [(name, rng.randbytes(rng.randrange(1, 900))) for name in names]


@pytest.fixture
def two(tmp_path: Path) -> Set:
    rng = random.Random(0)
    paths = [write_tar(tmp_path / f"{name}.tar", members(rng, name, n)) for name, n in (("a", 6), ("b", 2))]
    urls = [str(path) for path in paths]
    keys = ["a1", "a3", "a5", "b1"]
    plan = adq.Plan.from_keys(urls, keys)
    found, error = by_webdataset(urls)
    assert error is None
    return Set(urls, plan, Path(urls[0]).read_bytes(), {key: found[key] for key in keys})


def fields(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in sample.items() if name[:2] != "__"}


def raw(urls: list[str], **options: Any) -> wds.WebDataset:
    return wds.WebDataset(urls, shardshuffle=False, empty_check=False, **options)


def by_webdataset(urls: list[str], **options: Any) -> tuple[Samples, Exception | None]:
    """What the reader alone gives of each key, and the error that it ends with."""
    found: Samples = {}
    try:
        for sample in raw(urls, **options):
            found[sample["__key__"]] = fields(sample)
    except Exception as error:
        return found, error
    return found, None


def plain(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    return raw(urls).compose(adq.Subsample(plan))


def shuffled(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    return wds.WebDataset(urls, shardshuffle=2, empty_check=False).shuffle(6).compose(adq.Subsample(plan))


def decoded_before(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    return raw(urls).decode(only=["cls"]).compose(adq.Subsample(plan))


def going_on(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    return raw(urls, handler=wds.ignore_and_continue).compose(adq.Subsample(plan, on_error="skip"))


def node(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    made = adq.as_node(raw(urls), adq.Subsample(plan))
    made.reset()
    return made


def same(sample: Any) -> Any:
    return sample


def workers(urls: list[str], plan: adq.Plan) -> Iterable[Any]:
    stream = raw(urls).compose(adq.Subsample(plan))
    batches = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, collate_fn=same))
    try:
        yield from batches
    finally:  # now, not when the error's traceback is freed, which may be in a later test's worker
        batches._shutdown_workers()  # type: ignore[attr-defined]


LINES: dict[str, Callable[[list[str], adq.Plan], Iterable[Any]]] = {
    "plain": plain, "shuffled": shuffled, "decode": decoded_before, "handler": going_on, "node": node, "workers": workers,
}  # fmt: skip


def read(line: str, two: Set) -> tuple[Samples, str | None]:
    """What a reading line gives, and its error's text."""
    got: Samples = {}
    try:
        for sample in LINES[line](two.urls, two.plan):
            assert sample["__key__"] not in got
            got[sample["__key__"]] = fields(sample)
    except (adq.ShardError, adq.PlanError) as error:
        return got, str(error)
    return got, None


def check(two: Set, line: str, caplog: Caplog) -> bool:
    """Exactly what was lost or changed is noticed; True if something was."""
    handler = {"handler": wds.ignore_and_continue} if line == "handler" else {}
    given, failed = by_webdataset(two.urls, **handler)
    harmed = failed is not None or any(given.get(key) != kept for key, kept in two.kept.items())
    caplog.clear()
    got, error = read(line, two)
    silent = not any(key.startswith("a") for key in given)  # a shard that gives nothing is only warned of
    warned = "gave no sample, the first 'a.tar'" in caplog.text
    assert (error is not None or (silent and warned)) == harmed, (error, failed, caplog.text)
    assert error is None or "shard a.tar" in error or "shard b.tar" in error
    assert all(two.kept[key] == sample for key, sample in got.items()), "nothing false is handed on"
    assert harmed or got == two.kept
    return harmed


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zero(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(data), BLOCK)
    return data[:at] + bytes(BLOCK) + data[at + BLOCK :]


def delete(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(data), BLOCK)
    return data[:at] + data[at + BLOCK * rng.randrange(1, 6) :]


def swap(data: bytes, rng: random.Random) -> bytes:
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    i, j = rng.sample(range(len(blocks)), 2)
    blocks[i], blocks[j] = blocks[j], blocks[i]
    return b"".join(blocks)


DAMAGES = {cut: 600, flip: 1500, zero: 200, delete: 200, swap: 200}
OTHERS = [line for line in LINES if line not in ("plain", "workers")]


SLOW = [pytest.param(line, 1500, marks=pytest.mark.slow) for line in OTHERS]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("line", "most"), [("plain", 1500), *((line, 30) for line in OTHERS), ("workers", 2), *SLOW]
)
def test_no_damage_passes_in_silence_and_none_is_invented(
    two: Set, line: str, most: int, damage: Callable[[bytes, random.Random], bytes], caplog: Caplog
) -> None:
    """F2 and F3 at their figures, and as many deleted and swapped blocks."""
    rng, n, n_harmed = random.Random(1), min(DAMAGES[damage], most), 0
    for _ in range(n):
        data = damage(two.data, rng)
        if line == "workers" and data[:BLOCK] == bytes(BLOCK):
            continue  # such a shard gives nothing, which no worker can tell from another's share
        two.damage(data)
        n_harmed += check(two, line, caplog)
    assert n_harmed > n / 10 or n < 200


# ---- What is no loss


def cut_between(two: Set) -> None:
    """Cut the first shard behind its third sample, where WebDataset sees its end."""
    spans = two.plan.shard("a.tar").spans
    two.damage(two.data[: int(spans.byte_offset[3])])


def test_who_stops_early_is_told_nothing(two: Set, caplog: Caplog) -> None:
    cut_between(two)
    for n in range(2):
        assert len(list(islice(plain(two.urls, two.plan), n))) == n
    assert len(list(raw(two.urls).compose(adq.Subsample(two.plan)).with_epoch(2))) == 2
    assert caplog.text == ""
    text = r"^shard a\.tar, key 'a3': never came, nor did 1 more of its 3 kept"
    with pytest.raises(adq.ShardError, match=text):
        list(plain(two.urls, two.plan))


def test_with_warn_it_is_one_line_in_the_log(two: Set, caplog: Caplog) -> None:
    cut_between(two)
    stage = adq.Subsample(two.plan, missing="warn")
    assert [sample["__key__"] for sample in raw(two.urls).compose(stage)] == ["a1", "b1"]
    (line,) = caplog.messages
    assert line.startswith("Subsample: shard a.tar, key 'a3': never came, nor did 1 more")
    assert "adq verify" in line
    filtered = raw(two.urls).select(lambda sample: sample["__key__"] != "b1")
    text = r"shard a\.tar, key 'a3'.*nor 1 kept samples of other shards \('b\.tar'\)"
    with pytest.raises(adq.ShardError, match=text):
        list(filtered.compose(adq.Subsample(two.plan)))
    for wrong in ("skip", None, True):
        with pytest.raises(ValueError, match="missing must be 'raise' or 'warn'"):
            adq.Subsample(two.plan, missing=wrong)  # type: ignore[arg-type]


def test_a_shard_that_gives_nothing_is_warned_of_once(two: Set, caplog: Caplog) -> None:
    two.damage(bytes(BLOCK) + two.data[BLOCK:])
    stream = raw(two.urls).compose(adq.Subsample(two.plan))
    for _ in range(2):
        assert [sample["__key__"] for sample in stream] == ["b1"]
    (line,) = caplog.messages
    assert "1 of the plan's 2 shards gave no sample, the first 'a.tar'" in line


def test_whole_samples_before_an_error_are_handed_on_first(two: Set) -> None:
    spans = two.plan.shard("a.tar").spans
    two.damage(two.data[: int(spans.byte_offset[5]) + 600])
    stream = iter(plain(two.urls, two.plan))
    got = [next(stream)["__key__"], next(stream)["__key__"]]
    text = r"^shard a\.tar: cannot be read after key 'a4' \(ReadError: .*adq verify"
    with pytest.raises(adq.ShardError, match=text):
        next(stream)
    assert got == ["a1", "a3"]


# ---- Shards that come twice in a pass


def error_of(stream: Iterable[Any]) -> str:
    """Read it all; the text of the `ShardError` that ends it."""
    try:
        list(stream)
    except adq.ShardError as error:
        return str(error)
    return ""


def slow_missing(passes: list[str], kept: set[str]) -> set[str]:
    """Kept keys that came less often than the one that came most often, or never."""
    due = max(1, *(passes.count(key) for key in kept))
    return {key for key in kept if passes.count(key) < due}


def test_a_second_visit_hides_nothing_of_the_first_in_any_order(two: Set) -> None:
    rng = random.Random(3)
    whole = list(raw(two.urls[:1]))
    kept = {"a1", "a3", "a5"}
    alarms = 0
    for _ in range(400):
        stream = [s for _ in range(rng.randrange(1, 4)) for s in whole if rng.random() < 0.97]
        if rng.random() < 0.5:
            rng.shuffle(stream)
        missing = slow_missing([s["__key__"] for s in stream], kept) if stream else set()
        alarms += bool(missing)
        said = error_of(adq.Subsample(two.plan)(stream))
        if missing:
            assert said.startswith(f"shard a.tar, key '{min(missing)}': never came")
        else:
            assert said == ""
    assert 50 < alarms < 350


def test_sound_shards_raise_no_alarm_however_often_they_come(two: Set) -> None:
    whole = list(raw(two.urls))
    rng = random.Random(4)
    for times in (1, 2, 3, 300):
        stream = whole * times
        assert len(list(adq.Subsample(two.plan)(stream))) == 4 * times
        rng.shuffle(stream)
        assert len(list(adq.Subsample(two.plan)(stream))) == 4 * times
    doubled = [sample for sample in whole for _ in range(1 + (sample["__key__"] == "a0"))]
    assert len(list(adq.Subsample(two.plan)(doubled * 2))) == 8, "one that is not kept may come oftener"
    repeated = raw(two.urls).compose(adq.Subsample(two.plan)).repeat(2)
    assert len(list(repeated)) == 8


def test_endless_pipelines_are_read_as_long_as_one_likes(two: Set) -> None:
    endless = wds.WebDataset(two.urls, resampled=True, shardshuffle=False).shuffle(5)
    assert len(list(endless.compose(adq.Subsample(two.plan)).with_epoch(100))) == 100


def test_what_an_epoch_keeps_is_what_must_come(tmp_path: Path, two: Set) -> None:
    """Fresh draws: the samples of the epoch, not those of the plan."""
    urls = [str(write_tar(tmp_path / "c.tar", [(f"c{i:02d}.ppm", b"P6 8 8 255 " + bytes([9 * i] * 192)) for i in range(24)]))]  # fmt: skip
    features = adq.embed_shards(urls, "thumbnail", tmp_path / "features", label=None)
    plan = adq.build_plan(features, bins=2, keep=0.25)
    whole = list(raw(urls))
    for epoch in range(3):
        spans = plan.shard("c.tar").spans
        keys = {key for key, kept in zip(spans.keys, plan.kept_in("c.tar", epoch), strict=True) if kept}
        for options in ({"epoch": epoch}, {"epoch": lambda epoch=epoch: epoch}):
            for left_out in whole:
                stream = [sample for sample in whole if sample is not left_out]
                said = error_of(adq.Subsample(plan, **options)(stream))
                key = left_out["__key__"]
                assert (f"key '{key}': never came:" in said) == (key in keys) == (said != "")


# ---- Errors of the reader, and of others


def test_the_readers_errors_name_the_shard(two: Set, tmp_path: Path) -> None:
    Path(two.urls[1]).rename(tmp_path / "moved.tar")
    text = r"^shard b\.tar: cannot be read \(FileNotFoundError: No such file"
    with pytest.raises(adq.ShardError, match=text):
        list(plain(two.urls, two.plan))
    command = f"pipe:head -c 700 {two.urls[0]}; echo s3cret >/dev/null; exit 3"
    text = r"^shard a\.tar: cannot be read \((OSError: exit 3|ReadError: .*)\)"  # whichever is noticed first
    with pytest.raises(adq.ShardError, match=text) as caught:
        list(plain([command], two.plan))
    assert "s3cret" not in str(caught.value)
    write_tar(Path(two.urls[0]), [("a0.jpg", b"1"), ("a0.JPG", b"2")])
    (tmp_path / "moved.tar").rename(two.urls[1])
    text = r"^shard b\.tar: cannot be read after key 'b1', here or in the next shard \(ValueError: .*duplicate file name"
    with pytest.raises(adq.ShardError, match=text):
        list(plain(two.urls[::-1], two.plan))


def test_the_errors_of_other_stages_stay_what_they_are(two: Set) -> None:
    class TheirOwnError(Exception):
        pass

    def fail(error: Exception) -> Callable[[Any], Any]:
        def stage(sample: Any) -> Any:
            raise error

        return stage

    gone = FileNotFoundError(2, "No such file", "labels.csv")
    for error in (TheirOwnError("a", 1), ValueError("no"), gone, EOFError()):
        with pytest.raises(type(error)) as caught:
            list(raw(two.urls).map(fail(error)).compose(adq.Subsample(two.plan)))
        assert caught.value is error
    nothing = wds.WebDataset(two.urls, shardshuffle=False, select_files=lambda name: False)
    with pytest.raises(ValueError, match="No samples found"):
        list(nothing.compose(adq.Subsample(two.plan)))


# ---- Files that belong to no sample

HIDDEN = [
    "train/.DS_Store", "train/._0.jpg", "train/..x", "__MACOSX/._0.jpg", "__MACOSX/train/._0.txt", ".DS_Store",
    "._0.jpg", "README", "train/README", "__meta__", "__x__/a.jpg", "a.b/.hidden", "./.hidden",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_plan_ignores_by_rule_a_pipeline_leaves_out(tmp_path: Path, name: str) -> None:
    samples = [(f"train/{i}.{field}", b"%d" % i) for i in range(4) for field in ("jpg", "txt")]
    for at in (0, 2, 8):
        url = str(write_tar(tmp_path / "h.tar", [*samples[:at], (name, b"hidden"), *samples[at:]]))
        plan = adq.Plan.from_keys(url, None)
        assert plan.keys() == [f"train/{i}" for i in range(4)]
        for line in ("plain", *OTHERS):
            out = [(s["__key__"], s["jpg"], s["txt"]) for s in LINES[line]([url], plan)]
            assert sorted(out) == [(f"train/{i}", b"%d" % i, b"%d" % i) for i in range(4)]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_file_inside_a_sample_is_harmless_or_an_error(tmp_path: Path, name: str) -> None:
    """WebDataset gives such a sample in two parts where the hidden file makes a group of its own."""
    samples = [(f"train/{i}.{field}", b"%d" % i) for i in range(4) for field in ("jpg", "txt")]
    url = str(write_tar(tmp_path / "h.tar", [*samples[:3], (name, b"hidden"), *samples[3:]]))
    parts = [sample["__key__"] for sample in raw([url])].count("train/1")
    keeping, leaving = adq.Plan.from_keys(url, None), adq.Plan.from_keys(url, ["train/0", "train/2"])
    assert len(list(plain([url], leaving))) == 2
    if parts == 1:
        assert len(list(plain([url], keeping))) == 4
    else:
        text = r"^shard h\.tar, key 'train/1': bytes differ.*a hidden file lies between the members of this sample: write"
        with pytest.raises(adq.ShardError, match=text):
            list(plain([url], keeping))
    assert len(list(adq.ShardDataset(url, plan=keeping))) == 4
