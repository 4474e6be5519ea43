"""Writes and checks a stream's state: a few fields within 400 bytes of JSON, compared one by one when loaded.

Version 2 has a checksum of all fields, since most values of `t`, `lanes` and `epoch` are plausible; version 3 has
`keep`; version 4, of streams with global batches, has `global_batch` in place of `batch_size`. All are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from adq_wds.errors import StateError, shorten
from adq_wds.files import sha256_text
from adq_wds.reading.listing import Listing

VERSION = 4
_MAX = 2**62
_REMEDY = {
    "version": "load it with the adq_wds that saved it, or start the epoch anew",
    "plan": "it belongs to another plan or other shards; use those it was saved with",
    "rank": "pipes that drop samples put each rank at a place of its own; load each rank's own state",
    "world": "pipes that drop samples put each rank at a place of its own; keep the number of ranks",
}


@dataclass(frozen=True)
class State:
    """A stream's position, the same on all ranks, for any number of ranks and workers; FORMAT.md defines the fields."""

    plan: str  # its hash; of the shards' index where there is no plan
    seed: int
    epoch: int
    shuffle: bool
    fresh: bool
    lanes: int
    batch_size: int | None
    t: int  # first position not handed on yet, of all ranks together
    rank: int | None = None  # with pipes that drop samples, whose place this is
    world: int | None = None
    keep: str | None = None  # the draws so far, where they are not the plan's
    global_batch: int | None = None  # then there is no batch_size

    @property
    def batch(self) -> tuple[str, int | None]:
        """The name of the option that says how large batches are, and its value."""
        name = "batch_size" if self.global_batch is None else "global_batch"
        return name, getattr(self, name)

    def plain(self) -> dict[str, Any]:
        """The fields of its version: numbers and text."""
        version = 3 if self.global_batch is None else 4
        values = {**asdict(self), "version": version}
        return {name: values[name] for name in _of_version(values, version)}

    def as_dict(self) -> dict[str, Any]:
        """These with their checksum, for any kind of file."""
        return sealed(self.plain())


_KINDS = {"version": ["int"], **{field.name: str(field.type).split(" | ") for field in fields(State)}}


def read_state(saved: object, now: State, listing: Listing) -> State:
    """The saved state; a `StateError` unless it is of the stream of `now`, which reads this listing."""
    values = unsealed(saved, tuple(_KINDS))
    for name, kinds in _KINDS.items():
        if str(type(values[name]).__name__).replace("NoneType", "None") not in kinds:
            raise _damaged(name, values[name], " or ".join(kinds))
    del values["version"]
    state = State(**values)
    for name in ("plan", "seed", "shuffle", "fresh", "batch", "rank", "world"):
        old, new = getattr(state, name), getattr(now, name)
        if name == "batch" and old != new:
            raise _differs(old[0], old[1], new[1], name_now=new[0])
        if old != new and not (name in ("rank", "world") and old is None):
            raise _differs(name, old, new)
    _check_range("epoch", state.epoch, 0, _MAX)
    if (state.keep is None) != (listing.draws is None):
        raise _differs("keep", state.keep, now.keep)
    if state.keep is not None and listing.draws is not None:
        listing.draws.check(state.keep, state.epoch, begun=state.t > 0)
    n_total = listing.n_total(state.epoch) if state.t else 0  # a schedule may end with the epoch before
    _check_range("t", state.t, 0, n_total)
    _check_range("lanes", state.lanes, 1, max(n_total, now.lanes))
    return state


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise _damaged(name, value, f"{least} to {most}")


def _damaged(name: str, value: object, expected: str) -> StateError:
    return StateError(
        f"damaged state: {name} is {shorten(value)}, expected {expected}; load another checkpoint"
    )


def _differs(name: str, old: object, new: object, *, name_now: str | None = None) -> StateError:
    remedy = _REMEDY.get(name, f"give the data set the {name} it was saved with, or start the epoch anew")
    return StateError(
        f"state has {name}={shorten(old)}, this stream {name_now or name}={shorten(new)}: {remedy}"
    )


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the checksum of all its fields; for values unknown to JSON only their presence counts."""
    return {**state, "checksum": _checksum(state)}


def unsealed(saved: object, names: Sequence[str]) -> dict[str, Any]:
    """The fields of a `sealed` state; a `StateError` unless they have these names and match their checksum."""
    if not isinstance(saved, dict):
        raise StateError(f"state {shorten(saved)} is not one of ours: expected what state_dict() gave")
    version = saved.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise _differs("version", version, VERSION)
    known = _of_version(names, version)
    expected = {*known, "checksum"} if version > 1 else {*known}
    if odd := sorted(map(str, expected ^ set(saved))):
        what = "lacks" if odd[0] in expected else "has an unknown"
        raise StateError(f"damaged state: it {what} field {shorten(odd[0])}; load another checkpoint")
    state = {name: saved[name] for name in known}
    if version > 1 and saved["checksum"] != _checksum(state):
        raise StateError(
            f"damaged state: its checksum is {shorten(saved['checksum'])}, that of its fields {_checksum(state)!r}: it "
            "was changed since it was saved; load another checkpoint"
        )
    return dict.fromkeys(names) | state


def _of_version(names: Iterable[str], version: int) -> list[str]:
    """Those of some fields that a state of this version has."""
    absent = {"global_batch" if version < 4 else "batch_size", "keep" if version < 3 else ""}
    return [name for name in names if name not in absent]


def _checksum(state: dict[str, Any]) -> str:
    """64 bits of SHA-256, in hexadecimal, of the state after a round trip through JSON."""
    plain = json.loads(json.dumps(state, default=lambda value: type(value).__name__, skipkeys=True))
    return sha256_text(json.dumps(plain, sort_keys=True))[:16]


def split_iterator_state(state: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split an iterator's state into the stream's and the worker's part. Raises `StateError`: not a state."""
    whole = unsealed(state, (*_KINDS, "iterator"))
    of_worker = whole.pop("iterator")
    if not (
        isinstance(of_worker, dict)
        and sorted(map(str, of_worker)) == ["ended", "layout", "next_batch", "start"]
        and isinstance(of_worker["ended"], bool)
        and isinstance(of_worker["layout"], list)
        and len(of_worker["layout"]) == 4
        and all(
            type(n) is int and 0 <= n <= _MAX
            for n in (*of_worker["layout"], of_worker["next_batch"], of_worker["start"])
        )
    ):
        raise StateError(f"state {shorten(state)} is not an iterator's: expected what its state_dict() gave")
    del whole["version"]
    return State(**whole).as_dict(), of_worker


def check_share(saved: Sequence[int], now: Sequence[int]) -> None:
    """Raise `StateError` unless a worker's share is the saved one: (rank, world, worker, number of workers)."""
    if list(saved) != list(now):
        raise StateError(
            f"state is of {_worker(saved)}, this is {_worker(now)}: an iterator's state fits the same place only; use "
            "adq.Loader, whose state fits any number of workers and ranks"
        )


def check_only_worker(saved: Sequence[int]) -> None:
    """Raise `StateError` unless it was a rank's only worker: another's place is not the rank's."""
    if saved[3] != 1:
        raise StateError(
            f"state is of {_worker(saved)}: one worker's place is not the stream's; use adq.Loader and its state"
        )


def _worker(share: Sequence[int]) -> str:
    return f"worker {share[2]} of {share[3]} on rank {share[0]} of {share[1]}"
