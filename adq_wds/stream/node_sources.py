"""What can a node read, and where does that stand? A data set, other nodes, loaders, and what is only iterable."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import get_worker_info
from torchdata.nodes import BaseNode
from torchdata.nodes.types import Stateful

from adq_wds.errors import StateError, shorten
from adq_wds.pipes.base import Pipe
from adq_wds.samples.fields import EPOCH_FIELD
from adq_wds.shards.names import base_name
from adq_wds.stream.dataset import ShardDataset


class Source(Iterator[Any], Protocol):
    """What a node reads: samples, and where they stand."""

    def begin(self, state: Any, *, ended: bool) -> None:
        """Read from the beginning, or from a state on; one of an `ended` pass is followed by nothing."""

    def mark(self) -> Any:
        """Where it stands now; with `state` the state that it stands for."""

    def after(self, mark: Any, n: int) -> tuple[Any, int]:
        """The mark n samples after the last mark, and 0; or, where it cannot be said, that mark and n."""

    def state(self, mark: Any, *, lossy: bool) -> Any:
        """The state at a mark; `lossy` if another rank may have given out as many samples and stand elsewhere."""

    def begun(self) -> None:
        """The first sample has been given out."""

    def finish(self) -> None:
        """All has been given out."""


def source_of(source: Any, pipes: Sequence[Pipe]) -> Source:
    """The source that `as_node` was given, for pipes: these make a data set's samples bear the epoch's number."""
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


class _Shards(Iterator[Any]):
    """A `ShardDataset`: its own small state, at any sample."""

    def __init__(self, dataset: ShardDataset, *, with_epoch: bool) -> None:
        self._dataset, self._with_epoch = dataset, with_epoch

    def begin(self, state: Any, *, ended: bool) -> None:
        if get_worker_info() is not None:
            raise RuntimeError(
                "as_node: a ShardDataset's node runs in the main process (other nodes give it threads); in a DataLoader "
                "put the pipes into the data set"
            )
        if state is not None:
            self._dataset.start_from(state)
        self._begin = self._dataset.begin
        self._n, self._since = 0, list[int]()  # batches read; after each since the last mark
        self._dropped = state is not None and state["rank"] is not None
        self._items: Iterator[Any] = iter(())
        if not ended:
            with self._dataset.tagging():
                self._items = iter(self._dataset)

    def __next__(self) -> Any:
        item = next(self._items)
        while item.empty:
            self._dropped = True
            item = next(self._items)
        self._n = item.number + 1
        self._since.append(self._n)
        if self._with_epoch and isinstance(item.batch, dict):
            item.batch[EPOCH_FIELD] = self._begin.epoch
        return item.batch

    def mark(self) -> int:
        self._since.clear()
        return self._n

    def after(self, mark: int, n: int) -> tuple[int, int]:
        return (self._since[n - 1] if n else mark), 0

    def state(self, mark: int, *, lossy: bool) -> dict[str, Any]:
        begin = self._begin
        return self._dataset.state_at(
            begin.epoch, mark, start=begin.start, lanes=begin.lanes, dropped=lossy or self._dropped
        )

    def begun(self) -> None:
        self._dataset.begun(self._begin.epoch)

    def finish(self) -> None:
        self._begin, self._n, self._dropped = self._dataset.begin, 0, False


class _Marked(Iterator[Any]):
    """A source whose marks are states."""

    def after(self, mark: Any, n: int) -> tuple[Any, int]:
        return mark, n

    def state(self, mark: Any, *, lossy: bool) -> Any:
        return mark

    def begun(self) -> None:
        pass

    def finish(self) -> None:
        pass


class _Nested(_Marked):
    """Another node."""

    def __init__(self, node: BaseNode[Any]) -> None:
        self._node = node

    def begin(self, state: Any, *, ended: bool) -> None:
        self._node.reset(state)

    def __next__(self) -> Any:
        return next(self._node)

    def mark(self) -> Any:
        return self._node.state_dict()


class _Loaded(_Marked):
    """An iterable that can say where it stands."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def begin(self, state: Any, *, ended: bool) -> None:
        if state is not None:
            self._loader.load_state_dict(state)
        self._samples: Iterator[Any] = iter(()) if ended else iter(self._loader)

    def __next__(self) -> Any:
        return next(self._samples)

    def mark(self) -> Any:
        return self._loader.state_dict()


class _Replayed(_Marked):
    """An iterable that can be read from its beginning only; its state is what had been read.

    Each pass reads all of it, a resumed one too, so that pipes which know their set hold it against that.
    """

    def __init__(self, samples: Iterable[Any], pipes: Sequence[Pipe]) -> None:
        self._iterable, self._pipes = samples, pipes

    def begin(self, state: Any, *, ended: bool) -> None:
        if state is not None and not (
            isinstance(state, dict)
            and sorted(map(str, state)) == ["crc32", "n_read"]
            and all(type(number) is int and number >= 0 for number in state.values())
        ):
            raise StateError(
                f"state {shorten(state)} is not of a source that is read anew, as a {type(self._iterable).__name__} is"
            )
        self._n_read = self._crc32 = 0
        self._samples: Iterator[Any] = iter(())
        if ended:
            return
        counted = self._iterable
        for pipe in self._pipes:
            counted = pipe.counted(counted)
        self._samples = iter(counted)
        if state is None:
            return
        for _ in islice(self, state["n_read"]):
            pass
        if (self._n_read, self._crc32) != (state["n_read"], state["crc32"]):
            raise StateError(
                f"the first {state['n_read']} samples of a {type(self._iterable).__name__} are not what they were when "
                "the state was saved, so it cannot go on after them: give a source of fixed order, or a ShardDataset"
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
