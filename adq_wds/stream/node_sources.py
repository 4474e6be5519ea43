"""Reads the source of a node and tracks its state: a data set, another node, a loader, or any iterable."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import get_worker_info
from torchdata.nodes import BaseNode
from torchdata.nodes.types import Stateful

from adq_wds.errors import StateError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.samples.fields import EPOCH_FIELD
from adq_wds.shards.names import base_name
from adq_wds.stream.dataset import ShardDataset
from adq_wds.stream.progress import Progress


class Source(Iterator[Any]):
    """The source of a node: samples, and their state."""

    @abstractmethod
    def reset(self, state: Any, *, ended: bool) -> None:
        """Read from the beginning, or from a state on; nothing follows the state of an `ended` pass."""

    @abstractmethod
    def mark(self) -> Any:
        """Mark the current position: its state, unless it has a `state_after`."""

    def state_after(self, mark: Any, n: int, *, lossy: bool) -> tuple[Any, int]:
        """The state n samples after the last mark, and 0; or, where that is unknown, the mark's state and n.

        With `lossy`, another rank may be elsewhere after as many samples.
        """
        return mark, n

    def advance(self) -> None:
        """Note that the first sample has been given out."""

    def finish(self) -> None:
        """Note that all has been given out."""


def source_of(source: Any, pipes: Sequence[Pipe]) -> Source:
    """The source of a node; with `pipes`, a data set's samples get the epoch's number."""
    if isinstance(source, ShardDataset):
        return _Shards(source, with_epoch=bool(pipes))
    if isinstance(source, BaseNode):
        return _Nested(source)
    if isinstance(source, str | bytes | dict) or not isinstance(source, Iterable):
        raise TypeError(f"as_node reads a ShardDataset, a node or other samples, got {shorten(source)}")
    if isinstance(source, Iterator):
        raise TypeError(
            f"as_node got a {type(source).__name__}, which can be read only once: give what makes it, such as a data set"
        )
    return _Loaded(source) if isinstance(source, Stateful) else _Replayed(source, pipes)


class _Shards(Source):
    """A `ShardDataset`: its small state, at any sample."""

    def __init__(self, dataset: ShardDataset, *, with_epoch: bool) -> None:
        self._dataset, self._with_epoch = dataset, with_epoch

    def reset(self, state: Any, *, ended: bool) -> None:
        if get_worker_info() is not None:
            raise RuntimeError(
                "as_node: a ShardDataset's node runs in the main process (other nodes give it threads); in a DataLoader "
                "put the pipes into the data set"
            )
        if state is not None:
            self._dataset.start_from(state)
        self._restart(ended)

    def _restart(self, ended: bool) -> None:
        self._progress = Progress(self._dataset, None if ended else self._dataset.__iter__)
        self._since_mark = list[int]()  # batches read, after each

    def __next__(self) -> Any:
        sample = next(self._progress)
        self._since_mark.append(self._progress.n_batches)
        if self._with_epoch and isinstance(sample, dict):
            sample[EPOCH_FIELD] = self._progress.start.epoch
        return sample

    def mark(self) -> int:
        self._since_mark.clear()
        return self._progress.n_batches

    def state_after(self, mark: int, n: int, *, lossy: bool) -> tuple[dict[str, Any], int]:
        return self._progress.state_at(self._since_mark[n - 1] if n else mark, dropped=lossy), 0

    def advance(self) -> None:
        self._progress.advance()

    def finish(self) -> None:
        self._restart(ended=True)


class _Nested(Source):
    """Another node."""

    def __init__(self, node: BaseNode[Any]) -> None:
        self._node = node

    def reset(self, state: Any, *, ended: bool) -> None:
        self._node.reset(state)

    def __next__(self) -> Any:
        return next(self._node)

    def mark(self) -> Any:
        return self._node.state_dict()


class _Loaded(Source):
    """An iterable with `state_dict` and `load_state_dict`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def reset(self, state: Any, *, ended: bool) -> None:
        if state is not None:
            self._loader.load_state_dict(state)
        self._samples: Iterator[Any] = iter(() if ended else self._loader)

    def __next__(self) -> Any:
        return next(self._samples)

    def mark(self) -> Any:
        return self._loader.state_dict()


class _Replayed(Source):
    """An iterable that can only be read from its beginning; its state counts and checksums the samples read.

    Each pass reads all of it, a resumed one too, so that pipes can check the whole set.
    """

    def __init__(self, samples: Iterable[Any], pipes: Sequence[Pipe]) -> None:
        self._iterable, self._pipes = samples, pipes

    def reset(self, state: Any, *, ended: bool) -> None:
        kind = type(self._iterable).__name__
        if state is not None and not (
            isinstance(state, dict)
            and sorted(map(str, state)) == ["crc32", "n_read"]
            and all(type(number) is int and number >= 0 for number in state.values())
        ):
            raise StateError(f"state {shorten(state)} is not of a source that is read anew, as a {kind} is")
        self._n_read = self._crc32 = 0
        samples: Iterable[Any] = () if ended else self._iterable
        for pipe in () if ended else self._pipes:
            samples = pipe.counted(samples)
        self._samples = iter(samples)
        if ended or state is None:
            return
        for _ in islice(self, state["n_read"]):
            pass
        if self.mark() != state:
            raise StateError(
                f"the first {state['n_read']} samples of a {kind} are not what they were when the state was saved, so "
                "it cannot go on after them: give a source of fixed order, or a ShardDataset"
            )

    def __next__(self) -> Any:
        sample = next(self._samples)
        self._n_read += 1
        if isinstance(sample, dict):
            name = f"{base_name(str(sample.get('__url__')))} {sample.get('__key__')}"
            self._crc32 = zlib.crc32(name.encode("utf-8", "surrogatepass"), self._crc32)
        return sample

    def mark(self) -> dict[str, int]:
        return {"n_read": self._n_read, "crc32": self._crc32}
