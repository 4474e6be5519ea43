"""Which rank of how many is this process? Said once, by the program or its launcher, and held to."""

from __future__ import annotations

import os

from adq_wds.errors import StateError


def find_rank() -> tuple[int, int] | None:
    """(rank, world) of this process, from torch.distributed where it runs, else from RANK and WORLD_SIZE.

    Raises:
        ValueError: one of the two variables is set without the other, or they make no sense.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if texts == (None, None):
        return None
    if None in texts or not all(text.isdecimal() for text in texts if text is not None):
        raise ValueError(
            f"RANK={texts[0]!r} and WORLD_SIZE={texts[1]!r} in the environment: expected two numbers; set both, "
            "or give rank= and world="
        )
    rank, world = (int(text) for text in texts if text is not None)
    check_rank(rank, world)
    return rank, world


def check_rank(rank: object, world: object) -> None:
    """Raise `ValueError` unless 0 <= rank < world, both integers."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (rank, world))
    if not whole or not 0 <= rank < world:  # type: ignore[operator]
        raise ValueError(f"rank={rank!r} of world={world!r}: expected integers, 0 <= rank < world")


class Ranks:
    """This process's rank, as first learnt; a worker gets it with its copy, where nothing else might say it.

    Args:
        rank: together with `world`; or both None, to ask torch.distributed and the environment.
        world: number of ranks.

    Raises:
        ValueError: one without the other, or out of range.
    """

    def __init__(self, rank: int | None, world: int | None) -> None:
        if (rank is None) != (world is None):
            raise ValueError(f"rank={rank!r} and world={world!r}: give both or neither")
        self._given = rank is not None
        self._found: tuple[int, int] | None = None
        if rank is not None and world is not None:
            check_rank(rank, world)
            self._found = rank, world
        self.look()

    def look(self) -> tuple[int, int]:
        """(rank, world), asked for again: the process group may have come after the data set.

        Raises:
            StateError: it is not what it was.
        """
        if not self._given:
            now = find_rank()
            if self._found is None:
                self._found = now
            elif now is not None and now != self._found:
                raise StateError(
                    f"this was rank {self._found[0]} of {self._found[1]} and is now rank {now[0]} of {now[1]}: make the "
                    "data set after torch.distributed.init_process_group, in each process, or give rank= and world="
                )
        return self._found or (0, 1)

    def __getstate__(self) -> dict[str, object]:
        self.look()  # a spawned worker could not: the process group stays behind
        return self.__dict__
