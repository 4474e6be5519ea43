"""Does the source give exactly the kept samples, as they are?"""

import pickle
import shutil
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
from tests.stream.conftest import (
    OnlyEven,
    Options,
    TarSet,
    change_a_byte,
    epochs_of,
    ids,
    made,
    noisy,
    number,
    write_set,
)


def plain(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    """Without shuffle and batches."""
    return made(tar_set, **{"shuffle": False, "batch_size": None, **options})


def index_of(tar_set: TarSet, path: Path, n: int | None = None) -> Path:
    save_index(path, [(Path(url).name, scan_spans(url, shard=Path(url).name)) for url in tar_set.urls[:n]])
    return path


def test_it_gives_the_kept_samples_in_order_bytes_untouched(tar_set: TarSet) -> None:
    samples = list(plain(tar_set))
    assert ids(samples) == tar_set.kept
    for sample, name in zip(samples, tar_set.kept, strict=True):
        assert list(sample) == ["__key__", "__url__", "txt", "cls"]
        assert {f: sample[f] for f in ("txt", "cls")} == tar_set.bytes[name]
        assert sample["__url__"] in tar_set.urls


def test_without_a_plan_all_samples_come(tar_set: TarSet, tmp_path: Path) -> None:
    """From a scan or an index."""
    index = index_of(tar_set, tmp_path / "index.parquet")
    sources: list[Options] = [{"plan": None}, {"plan": None, "index": index}]
    for options in sources:
        assert ids(plain(tar_set, **options)) == list(tar_set.bytes)
        assert len(plain(tar_set, **options)) == 42
    first, second = (ids(made(tar_set, **options)) for options in sources)
    assert first == second != list(tar_set.bytes)
    index_of(tar_set, index, 6)
    with pytest.raises(adq.ShardError, match=r"^index .*shard 't-006.tar' is not in it; "):
        plain(tar_set, plan=None, index=index)


def test_an_index_vouches_for_the_bytes_and_a_scan_cannot(tmp_path: Path) -> None:
    tar_set = write_set(tmp_path / "set", [9])
    options: Options = {"plan": None, "index": index_of(tar_set, tmp_path / "i.parquet")}
    change_a_byte(tar_set.urls[0])
    with pytest.raises(adq.ShardError, match="key 'k00000': bytes differ"):
        list(plain(tar_set, **options))
    assert len(list(plain(tar_set, plan=None))) == 9
    write_set(tmp_path / "set", [8])
    with pytest.raises(adq.ShardError, match=r"shard t-000.tar: .*'k00008' .* index it again"):
        plain(tar_set, **options)


def test_what_is_dropped_is_never_decoded(tar_set: TarSet) -> None:
    """F18."""
    decoded: list[str] = []
    dataset = plain(tar_set, pipes=[adq.Map(lambda s: decoded.append(s["__key__"]) or s)])
    assert len(list(dataset)) == len(decoded) == len(tar_set.kept)


def test_fields_make_tuples_and_batches_are_collated(tar_set: TarSet) -> None:
    options: Options = {"pipes": [adq.Map(number)], "fields": ("key", "label")}
    singles = list(plain(tar_set, **options))
    assert singles == [(key, int(tar_set.bytes[shard, key]["cls"])) for shard, key in tar_set.kept]
    batches = list(plain(tar_set, batch_size=5, **options))
    assert [len(keys) for keys, _ in batches] == [5] * 5 + [3]
    assert all(isinstance(labels, torch.Tensor) for _, labels in batches)
    assert [pair for keys, labels in batches for pair in zip(keys, labels.tolist(), strict=True)] == singles
    assert list(plain(tar_set, batch_size=5, collate=len, **options)) == [5] * 5 + [3]


def test_pipes_run_as_they_do_alone(tar_set: TarSet) -> None:
    pipes = [adq.Map(number), adq.Map(noisy, seed=3)]
    single, batched, raw = (
        plain(tar_set, pipes=pipes),
        plain(tar_set, pipes=pipes, batch_size=5),
        plain(tar_set),
    )
    for epoch in range(2):
        stream: Any = ({**sample, "__adq_epoch__": epoch} for sample in raw)
        for pipe in pipes:
            stream = pipe(stream)
        expected = [{k: v for k, v in sample.items() if k != "__adq_epoch__"} for sample in stream]
        assert list(single) == [sample for batch in batched for sample in batch] == expected


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 5}, {"rank": 1, "world": 3}, {"rank": 2, "world": 3, "uneven": "ragged"}]
)
def test_the_length_is_exact(tar_set: TarSet, options: Options) -> None:
    assert len(plain(tar_set, **options)) == len(list(plain(tar_set, **options)))


def test_a_length_that_pipes_hide_is_refused(tar_set: TarSet) -> None:
    with pytest.raises(TypeError, match="no length: OnlyEven may drop samples"):
        len(plain(tar_set, pipes=[adq.Map(number), OnlyEven()]))


def test_only_kept_bytes_are_read(tar_set: TarSet, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Place] = []
    original = Readers.read_samples
    monkeypatch.setattr(
        Readers, "read_samples", lambda self, places: reads.extend(places) or original(self, places)
    )
    list(made(tar_set))
    kept_bytes = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in adq.load_plan(tar_set.plan))
    assert sum(place.n_bytes for place in reads) == kept_bytes


@pytest.mark.parametrize(("nth", "sparse"), [(3, True), (2, False), (1, False)])
def test_the_kernel_is_told_when_a_small_part_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, sparse: bool
) -> None:
    tar_set = write_set(tmp_path / "set", [12], keep=lambda i: i % nth == 0)
    given = []
    original = LocalShard.__init__

    def init(self: LocalShard, *arguments: Any, sparse: bool, **options: Any) -> None:
        given.append(sparse)
        original(self, *arguments, sparse=sparse, **options)

    monkeypatch.setattr(LocalShard, "__init__", init)
    assert ids(plain(tar_set)) == tar_set.kept
    assert given == [sparse]


def test_fresh_draws_keep_other_samples_in_every_epoch(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shards = [str(make_shard(f"f-{i}.tar", 30, first=30 * i)) for i in range(3)]
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    plan = adq.build_plan(features, bins=3, keep=0.3, out=tmp_path / "fresh.parquet")

    def expected(epoch: int) -> Counter[tuple[str, str]]:
        return Counter(
            (name, key)
            for name in plan.shards
            for key, kept in zip(plan.shard(name).spans.keys, plan.kept_in(name, epoch), strict=True)
            if kept
        )

    dataset = adq.ShardDataset(shards, plan=plan, fresh=True, shuffle=True)
    drawn = [Counter(epoch) for epoch in epochs_of(dataset, 5)]
    assert drawn == [expected(epoch) for epoch in range(5)]
    assert {each.total() for each in drawn} == {len(dataset)} == {plan.n_kept}
    assert len(set().union(*drawn)) == 90
    fixed = adq.ShardDataset(shards, plan=plan, shuffle=True)
    fixed.set_epoch(3)
    assert Counter(ids(fixed)) == expected(0)


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
        ({"cache": 3}, "cache must be a folder or a Cache, got a int"),
        ({"timeout": 0}, r"timeout must be a number of seconds > 0, got 0"),
        ({"storage_options": "x"}, "storage_options must be a dict, got a str"),
    ],
)
def test_wrong_arguments_are_refused(tar_set: TarSet, options: Options, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plain(tar_set, **options)


def test_wrong_shards_are_refused(tar_set: TarSet, tmp_path: Path) -> None:
    (tmp_path / "u.tar").write_bytes(b"x")
    urls, more = tar_set.urls, str(tmp_path / "u.tar")
    command = "pipe:curl https://host/a.tar?token=secret"
    for given, plan, kind, text in (
        (urls[:6], tar_set.plan, adq.PlanError, "'t-006.tar' of the plan is not among the 6 shards given"),
        ([*urls, more], tar_set.plan, adq.PlanError, "shard 'u.tar' is not in the plan"),
        ([*urls, f"{tmp_path}/none.tar"], tar_set.plan, adq.ShardError, "shard .*none.tar: no such file"),
        (more, None, adq.ShardError, "shard u.tar, byte 1: truncated"),
        (command, None, ValueError, "shard 'pipe:' … 'a.tar' is a command, and running it is ref"),
    ):
        with pytest.raises(kind, match=text) as error:
            adq.ShardDataset(given, plan=plan)
        assert "secret" not in str(error.value)


def test_the_data_may_move(tar_set: TarSet, tmp_path: Path) -> None:
    moved = [shutil.copy(url, tmp_path) for url in tar_set.urls]
    assert ids(adq.ShardDataset(moved[::-1], plan=tar_set.plan, shuffle=True, seed=3)) == ids(made(tar_set))


def test_a_pickled_copy_counts_its_own_epochs(tar_set: TarSet) -> None:
    dataset = made(tar_set)
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    assert list(copy) == list(dataset)
    assert copy.epoch == dataset.epoch == 4
    copy.set_epoch(9)
    assert dataset.epoch == 4


def test_it_is_not_stateful_so_torchdata_keeps_its_iterators(tar_set: TarSet) -> None:
    dataset = plain(tar_set)
    assert not hasattr(dataset, "state_dict")
    assert not hasattr(dataset, "load_state_dict")
    assert repr(dataset) == "<ShardDataset 28 samples in 7 shards, epoch 0>"
