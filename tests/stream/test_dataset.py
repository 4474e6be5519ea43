"""Does the source give exactly the kept samples, as they are?"""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adq_wds as adq
from adq_wds.reading.local import LocalShard
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place
from adq_wds.tables.index import save_index
from adq_wds.tables.spans import scan_spans
from tests.stream.conftest import OnlyEven, TarSet, ids, noisy, number, write_set

Options = dict[str, Any]


def test_it_gives_the_kept_samples_in_the_plans_order_bytes_untouched(tar_set: TarSet) -> None:
    samples = list(adq.ShardDataset(tar_set.urls, plan=tar_set.plan))
    assert ids(samples) == tar_set.kept
    for sample, name in zip(samples, tar_set.kept, strict=True):
        assert list(sample) == ["__key__", "__url__", "txt", "cls"]
        assert {f: sample[f] for f in ("txt", "cls")} == tar_set.bytes[name]
        assert sample["__url__"] in tar_set.urls


def test_without_a_plan_all_samples_come_from_a_scan_or_an_index(tar_set: TarSet, tmp_path: Path) -> None:
    index = tmp_path / "index.parquet"
    rows = [(Path(url).name, scan_spans(url, shard=Path(url).name)) for url in tar_set.urls]
    save_index(index, rows)
    scanned, indexed = adq.ShardDataset(tar_set.urls), adq.ShardDataset(tar_set.urls, index=index)
    assert ids(scanned) == ids(indexed) == list(tar_set.bytes)
    assert len(scanned) == len(indexed) == 42
    shuffled = [list(adq.ShardDataset(tar_set.urls, shuffle=True, **o)) for o in ({}, {"index": index})]
    assert shuffled[0] == shuffled[1]
    assert ids(shuffled[0]) != ids(scanned)
    save_index(index, rows[:6])
    with pytest.raises(adq.ShardError, match=r"^index .*shard 't-006.tar' is not in it; "):
        adq.ShardDataset(tar_set.urls, index=index)


def test_an_index_vouches_for_the_bytes_and_a_scan_cannot(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [9])
    save_index(tmp_path / "i.parquet", [("t-000.tar", scan_spans(tar_set.urls[0], shard="t-000.tar"))])
    data = bytearray(Path(tar_set.urls[0]).read_bytes())
    data[512] ^= 1
    Path(tar_set.urls[0]).write_bytes(data)
    with pytest.raises(adq.ShardError, match="key 'k00000': bytes differ"):
        list(adq.ShardDataset(tar_set.urls, index=tmp_path / "i.parquet"))
    write_set(tmp_path / "set", [8])
    with pytest.raises(
        adq.ShardError, match=r"shard t-000.tar: sample 8 is nothing, 'k00008' .* index it again"
    ):
        adq.ShardDataset(tar_set.urls, index=tmp_path / "i.parquet")
    write_set(tmp_path / "set", [9])
    assert len(list(adq.ShardDataset(tar_set.urls))) == 9


def test_what_is_dropped_is_never_decoded(tar_set: TarSet) -> None:
    """F18."""
    calls = []
    dataset = adq.ShardDataset(
        tar_set.urls, plan=tar_set.plan, pipes=[adq.Map(lambda s: calls.append(s["__key__"]) or s)]
    )
    assert len(list(dataset)) == len(calls) == len(tar_set.kept)


def test_fields_make_tuples_and_batches_are_collated(tar_set: TarSet) -> None:
    options: Options = {"plan": tar_set.plan, "pipes": [adq.Map(number)], "fields": ("key", "label")}
    singles = list(adq.ShardDataset(tar_set.urls, **options))
    assert singles == [(key, int(tar_set.bytes[shard, key]["cls"])) for shard, key in tar_set.kept]
    batches = list(adq.ShardDataset(tar_set.urls, batch_size=5, **options))
    assert [len(keys) for keys, _ in batches] == [5] * 5 + [3]
    assert all(isinstance(labels, torch.Tensor) for _, labels in batches)
    assert [pair for keys, labels in batches for pair in zip(keys, labels.tolist(), strict=True)] == singles
    own = adq.ShardDataset(tar_set.urls, batch_size=5, collate=len, **options)
    assert list(own) == [5] * 5 + [3]


def test_without_batches_pipes_run_as_they_do_alone(tar_set: TarSet) -> None:
    pipes = [adq.Map(number), adq.Map(noisy, seed=3)]
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=pipes)
    raw = adq.ShardDataset(tar_set.urls, plan=tar_set.plan)
    for epoch in range(2):
        stream: Any = ({**sample, "__adq_epoch__": epoch} for sample in raw)
        for pipe in pipes:
            stream = pipe(stream)
        expected = [{k: v for k, v in sample.items() if k != "__adq_epoch__"} for sample in stream]
        assert list(dataset) == expected
    batched = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=pipes, batch_size=5)
    batched.set_epoch(1)
    assert [sample for batch in batched for sample in batch] == expected


def test_the_length_is_exact_or_refused_with_the_reason(tar_set: TarSet) -> None:
    for options in (
        {},
        {"batch_size": 5},
        {"rank": 1, "world": 3},
        {"rank": 2, "world": 3, "uneven": "ragged"},
    ):
        dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, **options)
        assert len(dataset) == len(list(dataset))
    dropping = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, pipes=[adq.Map(number), OnlyEven()])
    with pytest.raises(TypeError, match="no length: OnlyEven may drop samples"):
        len(dropping)


def test_only_kept_bytes_are_read(tar_set: TarSet, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Place] = []
    original = Readers.read
    monkeypatch.setattr(Readers, "read", lambda self, places: reads.extend(places) or original(self, places))
    list(adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True, batch_size=4))
    plan = adq.load_plan(tar_set.plan)
    kept_bytes = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in plan)
    assert sum(place.n_bytes for place in reads) == kept_bytes


@pytest.mark.parametrize(("nth", "sparse"), [(3, True), (2, False), (1, False)])
def test_the_kernel_is_told_when_a_small_part_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, sparse: bool
) -> None:
    tar_set = write_set(tmp_path / "set", [12], keep=lambda i: i % nth == 0)
    told = []
    original = LocalShard.__init__

    def init(self: LocalShard, *arguments: Any, sparse: bool, **options: Any) -> None:
        told.append(sparse)
        original(self, *arguments, sparse=sparse, **options)

    monkeypatch.setattr(LocalShard, "__init__", init)
    assert ids(adq.ShardDataset(tar_set.urls, plan=tar_set.plan)) == tar_set.kept
    assert told == [sparse]


def test_fresh_draws_keep_other_samples_in_every_epoch(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shards = [str(make_shard(f"f-{i}.tar", 30, first=30 * i)) for i in range(3)]
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    plan = adq.build_plan(features, bins=3, keep=0.3, out=tmp_path / "fresh.parquet")
    dataset = adq.ShardDataset(shards, plan=plan, fresh=True, shuffle=True)
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(5):
        drawn = Counter(ids(dataset))
        expected = Counter(
            (name, key)
            for name in plan.shards
            for key, kept in zip(plan.shard(name).spans.keys, plan.kept_in(name, epoch), strict=True)
            if kept
        )
        assert drawn == expected
        assert drawn.total() == len(dataset) == plan.n_kept
        seen += drawn
    assert len(seen) == 90
    fixed = adq.ShardDataset(shards, plan=plan, shuffle=True)
    fixed.set_epoch(3)
    assert Counter(ids(fixed)) == Counter(
        (s.name, k) for s in plan for k, kept in zip(s.spans.keys, s.kept, strict=True) if kept
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"pipes": [len]}, "pipes must be a list of pipes, got .* wrap a function in adq.Map"),
        ({"pipes": adq.Decode()}, "pipes must be a list of pipes"),
        ({"fields": "image"}, "fields must be a tuple of names, like .*, got 'image'"),
        ({"fields": ()}, r"fields must be a tuple of names, .*, got \(\)"),
        ({"collate": len}, "collate must be a function, with a batch_size"),
        ({"collate": 3, "batch_size": 2}, "collate must be a function, with a batch_size; got 3"),
        ({"uneven": "even"}, "uneven must be one of pad, drop, ragged, error, got 'even'"),
        ({"on_error": "warn"}, "on_error must be 'raise', 'skip' or a function, got 'warn'"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"rank": 0}, "rank=0 and world=None: give both or neither"),
        ({"rank": 2, "world": 2}, r"rank=2 of world=2: expected integers, 0 <= rank < world"),
        ({"plan": None, "fresh": True}, "fresh=True draws anew from a plan's bins, and there is no plan"),
        ({"index": "index.parquet"}, "plan and index both say where samples lie"),
    ],
)
def test_wrong_arguments_are_refused(tar_set: TarSet, options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        adq.ShardDataset(tar_set.urls, **{"plan": tar_set.plan, **options})


def test_wrong_shards_are_refused(tar_set: TarSet, tmp_path: Path) -> None:
    with pytest.raises(adq.PlanError, match=r"shard 't-006.tar' of the plan is not among the 6 shards given"):
        adq.ShardDataset(tar_set.urls[:6], plan=tar_set.plan)
    (tmp_path / "u.tar").write_bytes(b"x")
    with pytest.raises(adq.PlanError, match=r"shard 'u.tar' is not in the plan"):
        adq.ShardDataset([*tar_set.urls, str(tmp_path / "u.tar")], plan=tar_set.plan)
    with pytest.raises(adq.ShardError, match=r"shard .*none.tar: no such file"):
        adq.ShardDataset([*tar_set.urls, str(tmp_path / "none.tar")], plan=tar_set.plan)
    with pytest.raises(
        ValueError, match=r"shard 'pipe:' … 'a.tar' is a command, and running it is ref"
    ) as error:
        adq.ShardDataset("pipe:curl https://host/a.tar?token=secret")
    assert "secret" not in str(error.value)
    with pytest.raises(adq.ShardError, match=r"shard u.tar, byte 1: truncated"):
        adq.ShardDataset(str(tmp_path / "u.tar"))


def test_the_data_may_move(tar_set: TarSet, tmp_path: Path) -> None:
    moved = []
    for url in tar_set.urls:
        moved.append(str(tmp_path / Path(url).name))
        Path(moved[-1]).write_bytes(Path(url).read_bytes())
    options: Options = {"plan": tar_set.plan, "shuffle": True}
    assert ids(adq.ShardDataset(moved[::-1], **options)) == ids(adq.ShardDataset(tar_set.urls, **options))


def test_a_pickled_copy_reads_the_same_and_counts_its_own_epochs(tar_set: TarSet) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan, shuffle=True, batch_size=4)
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    assert list(copy) == list(dataset)
    assert copy.epoch == dataset.epoch == 4
    copy.set_epoch(9)
    assert dataset.epoch == 4


def test_it_is_not_stateful_itself_so_that_torchdata_keeps_its_iterators_state(tar_set: TarSet) -> None:
    dataset = adq.ShardDataset(tar_set.urls, plan=tar_set.plan)
    assert not hasattr(dataset, "state_dict")
    assert not hasattr(dataset, "load_state_dict")
    assert repr(dataset) == "<ShardDataset 28 samples in 7 shards, epoch 0>"
