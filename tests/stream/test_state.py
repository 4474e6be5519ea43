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
from tests.stream.conftest import OnlyEven, TarSet, Trips, as_worker, ids, write_set

Options = dict[str, Any]


def made(tar_set: TarSet, **options: Any) -> adq.ShardDataset:
    return adq.ShardDataset(
        tar_set.urls, **{"plan": tar_set.plan, "shuffle": True, "seed": 4, "batch_size": 4, **options}
    )


def state_after(tar_set: TarSet, n_batches: int, **options: Any) -> dict[str, Any]:
    loader = adq.Loader(made(tar_set, **options))
    batches = iter(loader)
    for _ in range(n_batches):
        next(batches)
    return loader.state_dict()


def resealed(state: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A state that somebody has changed, checksum and all."""
    return sealed({name: value for name, value in {**state, **change}.items() if name != "checksum"})


def version_1(state: dict[str, Any]) -> dict[str, Any]:
    """As it was saved before there was a checksum."""
    return {name: value for name, value in {**state, "version": 1}.items() if name != "checksum"}


def test_a_state_is_small_plain_and_says_how_far_all_ranks_are(tar_set: TarSet) -> None:
    states = [state_after(tar_set, 2, rank=rank, world=3) for rank in range(3)]
    assert states[0] == states[1] == states[2]
    assert states[0] == {
        "version": 2, "plan": adq.load_plan(tar_set.plan).hash, "seed": 4, "epoch": 0, "shuffle": True,
        "fresh": False, "lanes": 64, "batch_size": 4, "t": 24, "rank": None, "world": None,
        "checksum": states[0]["checksum"],
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{16}", states[0]["checksum"])
    largest = {**states[0], "seed": -(2**63), "epoch": 2**40, "t": 2**40, "rank": 10_000, "world": 10_000}
    assert len(json.dumps(largest)) < 400
    assert json.loads(json.dumps(states[0])) == states[0]


OTHERS: list[tuple[Options, str]] = [
    ({"seed": 5}, r"state has seed=4, this stream seed=5: give the data set the seed it was saved with"),
    ({"shuffle": False}, "state has shuffle=True, this stream shuffle=False"),
    ({"batch_size": 8}, "state has batch_size=4, this stream batch_size=8"),
    ({"batch_size": None}, "state has batch_size=4, this stream batch_size=None"),
    ({"fresh": True}, "state has fresh=False, this stream fresh=True"),
    ({"plan": None}, r"state has plan='\w{64}', this stream plan='\w{64}': it belongs to another plan"),
]


@pytest.mark.parametrize(("options", "text"), OTHERS)
def test_a_state_of_another_stream_is_refused_with_old_and_new_value(
    tar_set: TarSet, options: Options, text: str
) -> None:
    """F22."""
    state = state_after(tar_set, 2)
    for load in (made(tar_set, **options).start_from, adq.Loader(made(tar_set, **options)).load_state_dict):
        with pytest.raises(adq.StateError, match=text):
            load(state)


def test_a_state_of_another_plan_of_the_same_shards_is_refused(tmp_path: Path) -> None:
    """F22."""
    first = write_set(tmp_path / "set", [20], keep=lambda i: i % 2 == 0)
    state = state_after(first, 2)
    second = write_set(tmp_path / "set", [20], keep=lambda i: i % 2 == 1)
    with pytest.raises(adq.StateError, match="it belongs to another plan or other shards"):
        made(second).start_from(state)


DAMAGED: list[tuple[Options, str]] = [
    ({"version": 3}, "state has version=3, this stream version=2: load it with the adq_wds that saved it"),
    ({"version": True}, "state has version=True, this stream version=2"),
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
]


@pytest.mark.parametrize(("change", "text"), DAMAGED)
def test_a_damaged_state_is_refused_with_its_value(tar_set: TarSet, change: Options, text: str) -> None:
    """F22."""
    dataset = made(tar_set, rank=1, world=2)
    before = ids(made(tar_set, rank=1, world=2))
    with pytest.raises(adq.StateError, match=text):
        dataset.start_from(resealed(state_after(tar_set, 1), **change))
    assert ids(dataset) == before, "a refused state changes nothing"


def check_every_character(state: Any, load: Any) -> None:
    """F43: each character of a state's JSON replaced by every digit and letter is no state any more."""
    load(json.loads(json.dumps(state)))
    text = json.dumps(state)
    n_read = 0
    for i in range(len(text)):
        for letter in string.digits + "abcdefxtE-. ":
            changed = text[:i] + letter + text[i + 1 :]
            try:
                other = json.loads(changed)
            except ValueError:
                continue  # not even JSON
            if other != state:
                n_read += 1
                with pytest.raises(adq.StateError, match=r"load|expected what state_dict\(\) gave"):
                    load(other)
    assert n_read > 1000


def test_a_state_with_any_character_changed_is_refused(tar_set: TarSet) -> None:
    state = state_after(tar_set, 2)
    dataset = made(tar_set)
    check_every_character(state, dataset.start_from)
    assert dataset.state_at(Start(0), 2) == state


def test_an_iterators_state_with_any_character_changed_is_refused(tar_set: TarSet) -> None:
    stream = iter(made(tar_set))
    next(stream)
    state = stream.state_dict()  # type: ignore[attr-defined]
    check_every_character(state, made(tar_set).start_from)
    check_every_character(state, iter(made(tar_set)).load_state_dict)  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", ["plan", "seed", "epoch", "shuffle", "fresh", "lanes", "batch_size", "t", "rank", "world"])  # fmt: skip
@pytest.mark.parametrize("value", [0, 1, 2, 60, 2**62, True, None, "0", 4.0])
def test_a_state_with_any_field_changed_is_refused(tar_set: TarSet, field: str, value: Any) -> None:
    state = state_after(tar_set, 2)
    if type(state[field]) is type(value) and state[field] == value:
        return
    with pytest.raises(
        adq.StateError, match=r"its checksum is .* changed since it was saved; load another checkpoint"
    ):
        adq.Loader(made(tar_set)).load_state_dict({**state, field: value})


def test_a_state_of_version_1_is_read_with_exactly_its_own_fields(tar_set: TarSet) -> None:
    state, expected = state_after(tar_set, 2), ids(made(tar_set))
    old = version_1(state)
    loader = adq.Loader(made(tar_set))
    loader.load_state_dict(old)
    assert loader.state_dict() == state
    assert ids(loader) == expected[8:]
    for wrong in ({**old, "checksum": state["checksum"]}, {**old, "version": 2}, {**old, "n": 0}):
        with pytest.raises(adq.StateError, match=r"damaged state: it (lacks|has an unknown) field"):
            loader.load_state_dict(wrong)
    stream = iter(made(tar_set))
    next(stream)
    dataset = made(tar_set)
    dataset.start_from(version_1(stream.state_dict()))  # type: ignore[attr-defined]
    assert ids(dataset) == expected[4:]


def test_what_is_no_state_is_refused(tar_set: TarSet) -> None:
    state = state_after(tar_set, 1)
    for name in state:
        lacking = {key: value for key, value in state.items() if key != name}
        text = "state has version=None" if name == "version" else f"damaged state: it lacks field '{name}'"
        with pytest.raises(adq.StateError, match=text):
            made(tar_set).start_from(lacking)
    for wrong in (None, 3, "state", [state], {}, {1: 2}, {**state, 3: 4}):
        with pytest.raises(adq.StateError, match="state"):
            made(tar_set).start_from(wrong)  # type: ignore[arg-type]


def test_an_iterators_state_fits_its_own_place_only(tar_set: TarSet) -> None:
    with as_worker(1, 2):
        stream = iter(made(tar_set))
        next(stream)
        state = stream.state_dict()  # type: ignore[attr-defined]
        iter(made(tar_set)).load_state_dict(state)  # type: ignore[attr-defined]
    assert len(json.dumps(state)) < 500
    text = "state is of worker 1 of 2 on rank 0 of 1, this is worker 0 of 1 on rank 0 of 1: .* use adq.Loader"
    with pytest.raises(adq.StateError, match=text):
        iter(made(tar_set)).load_state_dict(state)  # type: ignore[attr-defined]
    with pytest.raises(adq.StateError, match=r"one worker's place is not the stream's; use adq\.Loader"):
        made(tar_set).start_from(state)
    for own in (
        None,
        3,
        {},
        {**state["iterator"], "next_batch": -1},
        {**state["iterator"], "layout": [0, 1, 0]},
    ):
        with pytest.raises(adq.StateError, match="is not an iterator's: expected what its state_dict"):
            iter(made(tar_set)).load_state_dict(resealed(state, iterator=own))  # type: ignore[attr-defined]


def test_with_dropping_pipes_a_state_is_its_ranks_own(tar_set: TarSet) -> None:
    state = state_after(tar_set, 1, pipes=[OnlyEven()], rank=1, world=2)
    assert (state["rank"], state["world"]) == (1, 2)
    made(tar_set, pipes=[OnlyEven()], rank=1, world=2).start_from(state)
    with pytest.raises(adq.StateError, match="state has rank=1, this stream rank=0: pipes that drop samples"):
        made(tar_set, pipes=[OnlyEven()], rank=0, world=2).start_from(state)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_state_is_its_ranks_own_once_a_batch_was_left_out(tar_set: TarSet, n_workers: int) -> None:
    options: Options = {"batch_size": None, "shuffle": False, "rank": 0, "world": 2, "on_error": "skip"}
    loader = adq.Loader(made(tar_set, pipes=[Trips(("k00009",))], **options), num_workers=n_workers)
    ranks = []
    for _ in loader:
        ranks.append(loader.state_dict()["rank"])
    assert ranks[:3] == [None] * 3
    assert ranks[3:] == [0] * 10
    assert loader.state_dict()["rank"] is None, "a new epoch begins in step"


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_resumed_state_stays_its_ranks_own_to_the_epochs_end(tar_set: TarSet, n_workers: int) -> None:
    options: Options = {"batch_size": None, "shuffle": False, "rank": 0, "world": 2, "on_error": "skip"}
    first = adq.Loader(made(tar_set, pipes=[Trips(("k00009",))], **options))
    batches = iter(first)
    for _ in range(5):
        next(batches)
    own = first.state_dict()
    assert own["rank"] == 0
    loader = adq.Loader(made(tar_set, pipes=[Trips(("k00009",))], **options), num_workers=n_workers)
    loader.load_state_dict(own)
    assert loader.state_dict() == own
    batches = iter(loader)
    next(batches)
    assert loader.state_dict()["rank"] == 0
    list(batches)
    assert loader.state_dict()["rank"] is None
    plain = made(tar_set, pipes=[Trips(("k00009",))], **options)
    plain.start_from(own)
    stream = iter(plain)
    next(stream)
    assert stream.state_dict()["rank"] == 0


def test_the_lanes_of_a_state_are_kept_to_its_epochs_end(tar_set: TarSet) -> None:
    """A later version may shuffle over more lanes; what an earlier one began is finished as it began."""
    few = resealed(state_after(tar_set, 0), lanes=3)
    dataset = made(tar_set)
    dataset.start_from(few)
    loader = adq.Loader(dataset)
    batches = iter(loader)
    head = [next(batches) for _ in range(3)]
    state = loader.state_dict()
    assert state["lanes"] == 3
    other = made(tar_set)
    other.start_from(state)
    assert sorted(ids(head) + ids(other)) == sorted(tar_set.kept)
    assert ids(head) != ids(made(tar_set))[:12]
    loader.load_state_dict(state)
    list(loader)
    assert loader.state_dict()["lanes"] == 64
