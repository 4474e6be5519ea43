"""Where does a stream stand? A few fields that fit into 400 bytes of JSON, compared one by one when loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from adq_wds.errors import StateError, shorten

VERSION = 1
_MAX = 2**62
_REMEDY = {
    "version": "load it with the adq_wds that saved it, or start the epoch anew",
    "plan": "it belongs to another plan or other shards; use those it was saved with",
    "rank": "pipes that drop samples put each rank at a place of its own; load each rank's own state",
    "world": "pipes that drop samples put each rank at a place of its own; keep the number of ranks",
}


@dataclass(frozen=True)
class State:
    """A stream's place, the same on all ranks, for any number of ranks and workers.

    Attributes:
        plan: hash of the plan; of the shards' index where there is no plan.
        seed: of the shuffle.
        epoch: the epoch it stands in.
        shuffle: whether order is shuffled.
        fresh: whether each epoch keeps other samples.
        lanes: L, the shuffle's lanes.
        batch_size: samples in a batch; None without batches.
        t: first position not handed on yet, of all ranks together.
        rank: None; with pipes that drop samples, whose place this is.
        world: None; the number of ranks that `rank` is of.
        version: of this layout.
    """

    plan: str
    seed: int
    epoch: int
    shuffle: bool
    fresh: bool
    lanes: int
    batch_size: int | None
    t: int
    rank: int | None = None
    world: int | None = None
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """As plain numbers and text, for any kind of file."""
        return asdict(self)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("version", "seed", "epoch", "lanes", "t"), (int,)),
    **dict.fromkeys(("batch_size", "rank", "world"), (int, type(None))),
    **dict.fromkeys(("shuffle", "fresh"), (bool,)),
    "plan": (str,),
}


def read_state(saved: object, now: State, n_total: int) -> State:
    """The saved state, if it is one of the stream that `now` is a state of.

    Args:
        saved: what `state_dict` gave.
        now: of the stream as it is; `epoch`, `t` and `lanes` may differ.
        n_total: T, positions in an epoch.

    Raises:
        StateError: not a state, or of another stream; names the field, the saved and the present value.
    """
    if not isinstance(saved, dict):
        raise StateError(f"state {shorten(saved)} is not one of ours: expected what state_dict() gave")
    if saved.get("version") != VERSION or isinstance(saved.get("version"), bool):
        raise _differs("version", saved.get("version"), VERSION)
    names = [field.name for field in fields(State)]
    if odd := sorted(map(str, set(names) ^ set(saved))):
        what = "lacks" if odd[0] in names else "has an unknown"
        raise StateError(f"damaged state: it {what} field {shorten(odd[0])}; load another checkpoint")
    for name in names:
        value = saved[name]
        whole = type(value) in _TYPES[name] and (type(value) is not int or -_MAX <= 2 * value <= 2 * _MAX)
        if not whole:
            kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in _TYPES[name])
            raise StateError(f"damaged state: {name} is {shorten(value)}, expected {kinds}")
    state = State(**saved)
    for name in ("plan", "seed", "shuffle", "fresh", "batch_size"):
        if getattr(state, name) != getattr(now, name):
            raise _differs(name, getattr(state, name), getattr(now, name))
    for name in ("rank", "world"):
        if getattr(state, name) is not None and getattr(state, name) != getattr(now, name):
            raise _differs(name, getattr(state, name), getattr(now, name))
    for name, low, high in (("epoch", 0, _MAX), ("t", 0, n_total), ("lanes", 1, max(1, n_total, now.lanes))):
        if not low <= getattr(state, name) <= high:
            raise StateError(f"damaged state: {name} is {getattr(state, name)}, expected {low} to {high}")
    return state


def _differs(name: str, old: object, new: object) -> StateError:
    remedy = _REMEDY.get(name, f"give the data set the {name} it was saved with, or start the epoch anew")
    return StateError(f"state has {name}={shorten(old)}, this stream {name}={shorten(new)}: {remedy}")


def own_part(state: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """An iterator's state in two: the stream's, and what its worker's place adds.

    Raises:
        StateError: it is not an iterator's.
    """
    own = state.get("iterator") if isinstance(state, dict) else None
    if (
        not isinstance(state, dict)
        or not isinstance(own, dict)
        or sorted(map(str, own)) != ["ended", "layout", "next_batch", "start"]
        or not isinstance(own["ended"], bool)
        or not isinstance(own["layout"], list)
        or len(own["layout"]) != 4
        or not all(
            type(n) is int and 0 <= n <= _MAX for n in (*own["layout"], own["next_batch"], own["start"])
        )
    ):
        raise StateError(f"state {shorten(state)} is not an iterator's: expected what its state_dict() gave")
    return {name: value for name, value in state.items() if name != "iterator"}, own


def check_layout(saved: Sequence[int], now: Sequence[int]) -> None:
    """Raise `StateError` unless a worker's place is the saved one: (rank, world, worker, number of workers)."""
    if list(saved) != list(now):
        raise StateError(
            f"state is of {_place(saved)}, this is {_place(now)}: an iterator's state fits the same place only; use "
            "adq.Loader, whose state fits any number of workers and ranks"
        )


def check_single(saved: Sequence[int]) -> None:
    """Raise `StateError` unless it was a rank's only worker: another's place is not the rank's."""
    if saved[3] != 1:
        raise StateError(
            f"state is of {_place(saved)}: one worker's place is not the stream's; use adq.Loader and its state"
        )


def _place(layout: Sequence[int]) -> str:
    return f"worker {layout[2]} of {layout[3]} on rank {layout[0]} of {layout[1]}"
