"""Is a state small, the same for all, and refused where it does not belong?"""

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.stream.clock import Start
from adq_wds.stream.state import sealed
from tests.stream.conftest import OnlyEven, Options, TarSet, Trips, as_worker, ids, made, write_set

State = dict[str, Any]


def state_after(tar_set: TarSet, n_batches: int, **options: Any) -> State:
    return made(tar_set, **options).state_at(Start(0), n_batches)


def resealed(state: State, **change: Any) -> State:
    """A state that somebody has changed, checksum and all."""
    return sealed({name: value for name, value in {**state, **change}.items() if name != "checksum"})


def version_2(state: State) -> State:
    """As it was saved before there was `keep`."""
    return sealed(
        {name: value for name, value in {**state, "version": 2}.items() if name not in ("keep", "checksum")}
    )


def version_1(state: State) -> State:
    """As it was saved before there was a checksum."""
    return {name: value for name, value in {**version_2(state), "version": 1}.items() if name != "checksum"}


def after_one(tar_set: TarSet) -> Any:
    """An iterator that has given one batch."""
    stream = iter(made(tar_set))
    next(stream)
    return stream


def test_a_state_is_small_plain_and_the_same_for_all_ranks(tar_set: TarSet) -> None:
    states = [state_after(tar_set, 2, rank=rank, world=3) for rank in range(3)]
    assert states[0] == states[1] == states[2]
    assert states[0] == {
        "version": 3, "plan": adq.load_plan(tar_set.plan).hash, "seed": 3, "epoch": 0, "shuffle": True,
        "fresh": False, "lanes": 64, "batch_size": 4, "t": 24, "rank": None, "world": None,
        "keep": None, "checksum": states[0]["checksum"],
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{16}", states[0]["checksum"])
    largest = {**states[0], "seed": -(2**63), "epoch": 2**40, "t": 2**40, "rank": 10_000, "world": 10_000}
    assert len(json.dumps(largest)) < 400
    assert json.loads(json.dumps(states[0])) == states[0]


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_a_state_of_any_seed_is_read(tar_set: TarSet, seed: int) -> None:
    made(tar_set, seed=seed).start_from(state_after(tar_set, 1, seed=seed))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 5}, "state has seed=3, this stream seed=5: give the data set the seed it was saved with"),
        ({"shuffle": False}, "state has shuffle=True, this stream shuffle=False"),
        ({"batch_size": 8}, "state has batch_size=4, this stream batch_size=8"),
        ({"batch_size": None}, "state has batch_size=4, this stream batch_size=None"),
        ({"fresh": True}, "state has fresh=False, this stream fresh=True"),
        ({"plan": None}, r"state has plan='\w{64}', this stream plan='\w{64}': it belongs to another plan"),
    ],
)
def test_another_streams_state_is_refused_with_both_values(
    tar_set: TarSet, options: Options, text: str
) -> None:
    """F22."""
    dataset = made(tar_set, **options)
    for load in (dataset.start_from, adq.Loader(dataset).load_state_dict):
        with pytest.raises(adq.StateError, match=text):
            load(state_after(tar_set, 2))


def test_a_state_of_another_plan_of_the_same_shards_is_refused(tmp_path: Path) -> None:
    """F22."""
    state = state_after(write_set(tmp_path / "set", [20], keep=lambda i: i % 2 == 0), 2)
    second = write_set(tmp_path / "set", [20], keep=lambda i: i % 2 == 1)
    with pytest.raises(adq.StateError, match="it belongs to another plan or other shards"):
        made(second).start_from(state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"version": 5},
            "state has version=5, this stream version=4: load it with the adq_wds that saved it",
        ),
        ({"version": True}, "state has version=True, this stream version=4"),
        ({"t": 29}, "damaged state: t is 29, expected 0 to 28"),
        ({"t": -1}, "damaged state: t is -1"),
        ({"t": 4.0}, "damaged state: t is 4.0, expected int"),
        ({"t": True}, "damaged state: t is True, expected int"),
        ({"t": 2**70}, "damaged state: t is 1180591620717411303424, expected 0 to 28"),
        ({"epoch": -1}, "damaged state: epoch is -1, expected 0 to"),
        ({"epoch": "1"}, "damaged state: epoch is '1', expected int"),
        ({"lanes": 0}, "damaged state: lanes is 0, expected 1 to 64"),
        ({"plan": 3}, "damaged state: plan is 3, expected str"),
        ({"shuffle": 1}, "damaged state: shuffle is 1, expected bool"),
        ({"batch_size": [4]}, r"damaged state: batch_size is \[4\], expected int or None"),
        ({"rank": 0}, "state has rank=0, this stream rank=1: .* load each rank's own state"),
        ({"world": 3}, "state has world=3, this stream world=2: .* keep the number of ranks"),
        ({"extra": 1}, "damaged state: it has an unknown field 'extra'"),
    ],
)
def test_a_damaged_state_is_refused_with_its_value(tar_set: TarSet, change: Options, text: str) -> None:
    """F22; and changes nothing."""
    dataset = made(tar_set, rank=1, world=2)
    with pytest.raises(adq.StateError, match=text):
        dataset.start_from(resealed(state_after(tar_set, 1), **change))
    assert ids(dataset) == ids(made(tar_set, rank=1, world=2))


@pytest.mark.parametrize("kind", ["stream", "iterator"])
def test_a_state_with_any_character_changed_is_refused(tar_set: TarSet, kind: str) -> None:
    """F43: each character of its JSON replaced by every digit and letter."""
    dataset, stream = made(tar_set), after_one(tar_set)
    state = state_after(tar_set, 2) if kind == "stream" else stream.state_dict()
    loads = [dataset.start_from] if kind == "stream" else [dataset.start_from, stream.load_state_dict]
    text = json.dumps(state)
    n_read = 0
    for i in range(len(text)):
        for letter in string.digits + "abcdefxtE-. ":
            try:
                other = json.loads(text[:i] + letter + text[i + 1 :])
            except ValueError:
                continue  # not even JSON
            if other != state:
                n_read += 1
                for load in loads:
                    with pytest.raises(adq.StateError, match=r"load|expected what state_dict\(\) gave"):
                        load(other)
    assert n_read > 1000
    for load in loads:
        load(state)


@pytest.mark.parametrize("value", [0, 1, 2, 60, 2**62, True, None, "0", 4.0])
def test_a_state_with_any_field_changed_is_refused(tar_set: TarSet, value: Any) -> None:
    state = state_after(tar_set, 2)
    for field in set(state) - {"version", "checksum"}:
        if type(state[field]) is not type(value) or state[field] != value:
            with pytest.raises(adq.StateError, match=r"its checksum is .*; load another checkpoint"):
                made(tar_set).start_from({**state, field: value})


def test_a_state_of_version_2_is_read_with_its_own_fields(tar_set: TarSet) -> None:
    state, expected = state_after(tar_set, 2), ids(made(tar_set))
    loader = adq.Loader(made(tar_set))
    loader.load_state_dict(version_2(state))
    assert loader.state_dict() == state
    assert ids(loader) == expected[8:]
    with pytest.raises(adq.StateError, match="damaged state: it has an unknown field 'keep'"):
        loader.load_state_dict(resealed(state, version=2))
    dataset = made(tar_set)
    dataset.start_from(version_2(after_one(tar_set).state_dict()))
    assert ids(dataset) == expected[4:]


def test_a_state_of_version_1_is_read_with_its_own_fields(tar_set: TarSet) -> None:
    state, expected = state_after(tar_set, 2), ids(made(tar_set))
    old = version_1(state)
    loader = adq.Loader(made(tar_set))
    loader.load_state_dict(old)
    assert loader.state_dict() == state
    assert ids(loader) == expected[8:]
    for wrong in ({**old, "checksum": state["checksum"]}, {**old, "version": 2}, {**old, "n": 0}):
        with pytest.raises(adq.StateError, match=r"damaged state: it (lacks|has an unknown) field"):
            loader.load_state_dict(wrong)
    dataset = made(tar_set)
    dataset.start_from(version_1(after_one(tar_set).state_dict()))
    assert ids(dataset) == expected[4:]


def test_what_is_no_state_is_refused(tar_set: TarSet) -> None:
    state = state_after(tar_set, 1)
    for name in state:
        lacking = {key: value for key, value in state.items() if key != name}
        text = "state has version=None" if name == "version" else f"damaged state: it lacks field '{name}'"
        with pytest.raises(adq.StateError, match=text):
            made(tar_set).start_from(lacking)
    wrong: Any
    for wrong in (None, 3, "state", [state], {}, {1: 2}, {**state, 3: 4}):
        with pytest.raises(adq.StateError, match="state"):
            made(tar_set).start_from(wrong)


def test_an_iterators_state_fits_its_own_place_only(tar_set: TarSet) -> None:
    with as_worker(1, 2):
        stream = after_one(tar_set)
        state = stream.state_dict()
        stream.load_state_dict(state)
    assert len(json.dumps(state)) < 500
    alone = after_one(tar_set)
    text = "state is of worker 1 of 2 on rank 0 of 1, this is worker 0 of 1 on rank 0 of 1: .* use adq.Loader"
    with pytest.raises(adq.StateError, match=text):
        alone.load_state_dict(state)
    with pytest.raises(adq.StateError, match=r"one worker's place is not the stream's; use adq\.Loader"):
        made(tar_set).start_from(state)
    damaged: list[Options] = [{"next_batch": -1}, {"layout": [0, 1, 0]}, {"ended": 1}]
    for own in (None, 3, {}, *({**state["iterator"], **change} for change in damaged)):
        with pytest.raises(adq.StateError, match="is not an iterator's: expected what its state_dict"):
            alone.load_state_dict(resealed(state, iterator=own))


def test_with_dropping_pipes_a_state_is_its_ranks_own(tar_set: TarSet) -> None:
    state = state_after(tar_set, 1, pipes=[OnlyEven()], rank=1, world=2)
    assert (state["rank"], state["world"]) == (1, 2)
    made(tar_set, pipes=[OnlyEven()], rank=1, world=2).start_from(state)
    with pytest.raises(adq.StateError, match="state has rank=1, this stream rank=0: pipes that drop samples"):
        made(tar_set, pipes=[OnlyEven()], rank=0, world=2).start_from(state)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_state_is_its_ranks_own_once_a_batch_is_left_out(tar_set: TarSet, n_workers: int) -> None:
    """To the epoch's end, resumed or not."""

    def make(n_workers: int) -> adq.Loader:
        options: Options = {"batch_size": None, "shuffle": False, "rank": 0, "world": 2, "on_error": "skip"}
        return adq.Loader(made(tar_set, pipes=[Trips(("k00009",))], **options), num_workers=n_workers)

    loader = make(n_workers)
    states = [loader.state_dict() for _ in loader]
    assert [state["rank"] for state in states] == [None] * 3 + [0] * 10
    assert loader.state_dict()["rank"] is None, "a new epoch begins in step"
    loader.load_state_dict(states[4])
    assert loader.state_dict() == states[4]
    assert [loader.state_dict() for _ in loader][:-1] == states[5:-1]
    assert loader.state_dict()["rank"] is None
    plain = make(0).dataset
    plain.start_from(states[4])
    stream = iter(plain)
    next(stream)
    assert stream.state_dict()["rank"] == 0


def test_the_lanes_of_a_state_are_kept_to_its_epochs_end(tar_set: TarSet) -> None:
    """A later version may shuffle over more lanes; what an earlier one began is finished as it began."""
    loader, other = adq.Loader(made(tar_set)), made(tar_set)
    loader.load_state_dict(resealed(state_after(tar_set, 0), lanes=3))
    batches = iter(loader)
    head = [next(batches) for _ in range(3)]
    state = loader.state_dict()
    assert state["lanes"] == 3
    other.start_from(state)
    assert sorted(ids(head) + ids(other)) == sorted(tar_set.kept)
    assert ids(head) != ids(made(tar_set))[:12]
    list(batches)
    assert loader.state_dict()["lanes"] == 64
