"""Makes a node of `torchdata.nodes` from a stream and pipes, which resumes at any sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torchdata.nodes import BaseNode

from adq_wds.errors import LoaderClosed, StateError, shorten
from adq_wds.pipes.base import Pipe, Tally, before_error
from adq_wds.samples.fields import EPOCH_FIELD
from adq_wds.stream.dataset import ShardDataset
from adq_wds.stream.iterator import Closed
from adq_wds.stream.node_sources import Source, source_of
from adq_wds.stream.state import sealed, unsealed

_VERSION = 3  # of a node's state; that of its source has its own


def as_node(source: ShardDataset | Iterable[Any], *pipes: Pipe) -> Node:
    """A torchdata node that reads `source` through `pipes`.

    It may be read by itself, by `torchdata.nodes.Loader`, or under any other node. Its state counts its outputs,
    whatever the chunks that the pipes work in. How exactly it resumes depends on the source:

    - `ShardDataset`: exactly. What is left of the epoch follows, and nothing that came before is read again. Where no
    sample is dropped, the state is the same on all ranks and fits any number of them. Pipes may be here or in the
    data set, with equal results; here they take single samples, so leave batches and `fields` out of it.
    - a node, or an iterable that has `state_dict` and `load_state_dict`, such as `adq.Loader`: as exactly as these do.
    - any other iterable that can be read again, such as a WebDataset pipeline: it is read from its beginning, and
    samples already given out are skipped. A checksum verifies that their shards and keys are unchanged: a pipeline
    with a new shuffle each time is refused.

    An epoch starts with its first sample, as in torchdata's samplers: the next `reset` without a state makes a
    `ShardDataset` read the next one. (Samples that a `Prefetcher` has read ahead count as given out.) Pipes directly
    on a data set know its epoch, as its own pipes do, and draw anew in each; with another node between they do not. A
    `Subsample` directly on an iterable that is read again counts the samples of each shard, in a resumed pass too.

    Args:
        source: what to read.
        pipes: stages, in order, with their own `on_error`.

    Raises:
        TypeError: `source` cannot be read, or not more than once.
        ValueError: a pipe is none.

    Raises (while streaming):
        SampleError: a sample is bad, or too many are; the good ones before it come first.
        LoaderClosed: `next` after an error, until `reset`. A `Prefetcher` or `ParallelMapper` above just ends then.
        StateError: in `reset`: the state is of another node, or the source has changed.
        RuntimeError: a `ShardDataset` is read in a DataLoader's worker, whose share a node does not know.

    >>> from adq_wds import Map
    >>> samples = [{"__key__": key, "__url__": "a.tar", "n": n} for n, key in enumerate("abcd")]
    >>> node = as_node(samples, Map(lambda sample: {**sample, "n": 10 * sample["n"]}))
    >>> next(node)["n"], next(node)["n"]
    (0, 10)
    >>> state = node.state_dict()
    >>> node.reset(state)
    >>> [sample["n"] for sample in node]
    [20, 30]
    """
    for pipe in pipes:
        if not isinstance(pipe, Pipe):
            raise ValueError(f"as_node: {shorten(pipe)} is no pipe; wrap a function in adq.Map")
    return Node(source_of(source, pipes), pipes)


class Node(BaseNode[Any]):  # type: ignore[misc]
    """Made by `as_node`."""

    def __init__(self, source: Source, pipes: tuple[Pipe, ...]) -> None:
        super().__init__()
        self._source, self._pipes = source, pipes
        self._pass: _Pass | None = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start the source's epoch, or resume at `initial_state`."""
        super().reset(initial_state)
        self._pass = None
        self._pass = _Pass(self._source, self._pipes, initial_state)

    def next(self) -> Any:
        """The next sample."""
        return next(self._current())

    def get_state(self) -> dict[str, Any]:
        """The state: small, of plain numbers and text if the source's is."""
        return self._current().state()

    def _current(self) -> _Pass:
        if self._pass is None:
            raise LoaderClosed("the node's last reset failed, so it stands nowhere: reset it")
        return self._pass


class _Pass(Iterator[Any]):
    """One pass; a new one for each reset, as a thread may still be waiting in an old one.

    Its position: `_n_given` outputs of the open chunk, which starts at the source's mark `_mark`, are given out.
    """

    def __init__(self, source: Source, pipes: tuple[Pipe, ...], saved: object) -> None:
        state, self._n_given, self._ended = (None, 0, False) if saved is None else _parts(saved)
        self._source, self._pipes, self._whole = source, pipes, saved is None
        source.reset(state, ended=self._ended)
        self._mark = source.mark()
        self._one_each = False  # whether the open chunk's n-th output came of its n-th sample
        self._lossy = not all(pipe.one_to_one and pipe.on_error == "raise" for pipe in pipes)
        self._tallies = [Tally(type(pipe).__name__, pipe.on_error) for pipe in pipes]
        self._outputs: Iterator[Any] = iter(()) if self._ended else self._outputs_left()

    def __next__(self) -> Any:
        try:
            output = next(self._outputs)
        except StopIteration:
            raise
        except BaseException as error:
            if not isinstance(self._outputs, Closed):
                self._outputs = Closed(error)
            raise
        self._source.advance()
        return output

    def state(self) -> dict[str, Any]:
        n = self._n_given if self._one_each else 0
        source, n_left = self._source.state_after(self._mark, n, lossy=self._lossy)
        n_given = self._n_given - n + n_left
        return sealed({"version": _VERSION, "source": source, "n_given": n_given, "ended": self._ended})

    def _outputs_left(self) -> Iterator[Any]:
        """The outputs that are not given out yet, each counted just before it is."""
        size = max((pipe.chunk for pipe in self._pipes), default=1)
        more = True
        while more:
            chunk, error = before_error(islice(self._source, size))
            more = len(chunk) == size
            outputs, failed = self._applied(chunk)
            error = failed or error
            self._one_each = len(outputs) == len(chunk) or (failed is not None and not self._lossy)
            for output in outputs[self._n_given :]:
                self._n_given += 1
                yield output
            if error is not None:
                raise error
            self._n_given = max(0, self._n_given - len(outputs))  # left of a state saved with larger chunks
            self._mark, self._one_each = self._source.mark(), False
        if self._n_given:
            raise StateError(
                f"{self._n_given} samples more had been given out when the state was saved than there are now: the pipes "
                "or what they read are not what they were"
            )
        self._source.advance()  # past an epoch without a sample
        self._source.finish()
        self._mark, self._ended = self._source.mark(), True
        for tally in self._tallies:
            tally.close(whole=self._whole)

    def _applied(self, chunk: list[Any]) -> tuple[list[Any], Exception | None]:
        """The outputs of the pipes up to the first sample that may not be skipped, and its error."""
        error: Exception | None = None
        for pipe, tally in zip(self._pipes, self._tallies, strict=True):
            chunk, failed = before_error(pipe.run(chunk, tally))
            error = failed or error  # a later pipe's is of an earlier sample
        for sample in chunk if self._pipes else ():
            sample.pop(EPOCH_FIELD, None)
        return chunk, error


def _parts(saved: object) -> tuple[Any, int, bool]:
    state = unsealed(saved, ("version", "source", "n_given", "ended"))
    n_given, ended = state["n_given"], state["ended"]
    if type(n_given) is not int or n_given < 0 or not isinstance(ended, bool):
        raise StateError(f"state {shorten(saved)} is not a node's of ours: expected what state_dict() gave")
    return state["source"], n_given, ended
