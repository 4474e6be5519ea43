"""Determines this process's rank and world size, and raises where these change."""

from __future__ import annotations

import os
from typing import TypeVar

from adq_wds.errors import StateError

T = TypeVar("T")


class Ranks:
    """This process's rank, determined once; a worker gets it with its copy, since it may have no other source.

    Without `rank` and `world`, they are read from torch.distributed or the environment.
    """

    def __init__(self, rank: int | None, world: int | None) -> None:
        if (rank is None) != (world is None):
            raise ValueError(f"rank={rank!r} and world={world!r}: give both or neither")
        self._given = rank is not None
        self._known = _checked(rank, world) if self._given else None
        self.current()

    def current(self) -> tuple[int, int]:
        """(rank, world), read again, since the process group may have been made after the data set."""
        if not self._given:
            now = _rank_of_process()
            self._known = self._known or now
            if now is not None and self._known is not None and now != self._known:
                (rank, world), (new, new_world) = self._known, now
                raise StateError(
                    f"this was rank {rank} of {world} and is now rank {new} of {new_world}: make the "
                    "data set after torch.distributed.init_process_group, in each process, or give rank= and world="
                )
        return self._known or (0, 1)

    def all_values(self, value: T) -> list[T]:
        """The values of all ranks, by torch.distributed; this one alone where it does not run, or the rank was given."""
        import torch.distributed as dist

        if self._given or not (dist.is_available() and dist.is_initialized()):
            return [value]
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def __getstate__(self) -> dict[str, object]:
        self.current()  # a spawned worker has no process group to read it from
        return self.__dict__


def _rank_of_process() -> tuple[int, int] | None:
    """(rank, world), from torch.distributed where it runs, else from RANK and WORLD_SIZE; None where neither is set."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world = texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if texts == (None, None):
        return None
    if not (rank and world and rank.isdecimal() and world.isdecimal()):
        raise ValueError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment: expected two numbers; set both, "
            "or give rank= and world="
        )
    return _checked(int(rank), int(world))


def _checked(rank: object, world: object) -> tuple[int, int]:
    """Both, if they are integers and 0 <= rank < world."""
    if type(rank) is int and type(world) is int and 0 <= rank < world:
        return rank, world
    raise ValueError(f"rank={rank!r} of world={world!r}: expected integers, 0 <= rank < world")
