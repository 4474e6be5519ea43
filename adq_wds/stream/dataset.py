"""Defines `ShardDataset`: reads the kept samples of tar shards by offset, in one order for any ranks and workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from torch.utils.data import IterableDataset, default_collate, get_worker_info

from adq_wds.checks import integer, positive
from adq_wds.core.order import UNEVEN, Uneven
from adq_wds.core.rng import check_seed
from adq_wds.errors import ShardError, shorten
from adq_wds.pipes.base import OnError, Pipe, check_on_error
from adq_wds.reading.listing import Listing, everything, planned
from adq_wds.remote.backend import TIMEOUT, Access
from adq_wds.remote.cache import Cache, as_cache
from adq_wds.remote.fetch import Fetch
from adq_wds.shards.names import expand_urls, is_url
from adq_wds.stream.as_map import MapView
from adq_wds.stream.class_rates import ClassRates, Keep, draws_of
from adq_wds.stream.clock import Clock, Start
from adq_wds.stream.epoch_order import Recipe, Share
from adq_wds.stream.iterator import Stream, TaggedStream
from adq_wds.stream.ranks import Ranks
from adq_wds.stream.state import check_only_worker, split_iterator_state
from adq_wds.tables.plan import Plan, as_plan

_MAX_EPOCH = 2**62 - 1


class ShardDataset(IterableDataset[Any]):
    """The samples that a plan keeps, read by offset from tar shards; without a plan, all samples.

    Only kept bytes are read, of local files and of any server that serves ranges (``https://``, ``s3://``, ``gs://``,
    ``az://``, and what fsspec reads). Packed shards (``.tar.gz``), commands and servers without ranges are fetched whole.
    Without pipes it gives WebDataset-like dicts: `__key__`, `__url__`, and fields as bytes.
    Every kept sample comes exactly once in an epoch (but see `uneven`), in an order that depends on plan, seed and
    epoch alone: not on the number of workers, and ranks share it out among them. See `adq_wds.core.order`.

    Every iteration reads the next epoch, as soon as the one before has handed on a batch (with workers of another loader
    than `adq.Loader`: as soon as these have read one ahead); `set_epoch` chooses another.

    Iterate it, or hand it to `adq.Loader` (workers; one small state for any number of ranks and workers), to
    ``torch.utils.data.DataLoader(ds, batch_size=None)`` or to torchdata's StatefulDataLoader (which resumes on the
    same number of workers only).

    Args:
        urls: tar files: paths, URLs, a pattern with braces (and stars, for local files), a folder, or a list of these.
        plan: a plan or its path; it must be of just these shards.
        pipes: stages inside the data set, `Decode`, `Map` or any `Pipe`, in order. With these it resumes exactly,
            unlike with stages outside. A saved state records the plans and codebooks that they use.
        batch_size: samples in a batch. Batches are cut before the pipes and never filled up again: a sample that is
            skipped makes its batch smaller, so that ranks stay in step, and a batch that loses all is left out. None
            gives single samples.
        global_batch: in place of `batch_size`, samples in the batches of all ranks together. A global step has the same
            samples for any number of ranks up to that; batches differ by one sample where it does not divide.
        shuffle: draw the order anew in every epoch. Else shards go by name, samples as they lie.
        seed: of the shuffle.
        fields: yield tuples of these fields instead of dicts.
        collate: makes a batch of a list of samples. By default torch's `default_collate` of the tuples, with
            `fields`; the list itself without.
        rank: this process's rank, with `world`; by default from torch.distributed or RANK and WORLD_SIZE, when the
            data set is made or, if they are not set then, when it is first used or sent to a worker.
        world: number of ranks.
        uneven: where ranks would be unequal, "pad" reads some samples twice (fewer than `world`), "drop" leaves the
            last ones out, "ragged" gives some ranks one more, "error" refuses. With `global_batch` it says what becomes
            of a last step that is not full; "pad" fills it, "ragged" gives ranks that it does not reach a batch less.
        fresh: keep other samples in every epoch; see `Plan.kept_in`.
        keep: with `fresh`, another ratio than the plan's: a function of the epoch that gives one in (0, 1], always the
            same for an epoch (and defined in a module, for spawned workers), or one for all epochs; see `Schedule`. Or
            `ClassRates`, which follow the losses of classes.
        on_error: "raise", "skip", or a function of the error that says whether to skip, for bad samples here and in
            all `pipes`. Each skip is one JSON line in the log, and too many are an error; see `Pipe`. Damaged shards
            and plans that do not fit are always errors.
        cache: a folder, or a `Cache` with a bound, for fetched bytes: each byte is fetched once for all workers,
            ranks and epochs of a machine, while the bound holds. Shuffled reading works in 64 places at a time: 128
            MiB, or 64 whole shards where these must be fetched whole. Without it each sample is one request.
        root: the folder that the plan's shard names are relative to, where a path fits several of them.
        index: without a plan, the shards' index file (of ``adq index`` or ``adq write``); else samples are found when
            the data set is made, by another library's index beside a shard, or by walking its headers.
        verify: compare samples with the crc32 in the plan or index; other libraries' indexes have none. Without it
            bytes from the cache are trusted.
        allow_pipe: run the commands of ``pipe:`` URLs, in a shell. Only for URLs that the program itself wrote; ``::``
            ends a command.
        timeout: seconds without an answer from a server, or without output of a command, that are an error.
        storage_options: for the library that reads a URL: obstore's configuration of the store, or fsspec's options.
            Without it credentials come from where these look: environment, configuration files, the machine's role.

    Raises:
        ValueError: an argument is wrong or contradicts another.
        PlanError: the plan is damaged, not of just these shards, or of one ratio only.
        ShardError: a shard is missing; without a plan, damaged or not in the index.

    Raises (while streaming):
        ShardError: a shard is damaged or changed; names shard and key.
        SampleError: a sample is bad, or too many are.
        LoaderClosed: `next` after an error.
        StateError: rank or world changed.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        pipes: Sequence[Pipe] = (),
        batch_size: int | None = None,
        global_batch: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        fields: Sequence[str] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        rank: int | None = None,
        world: int | None = None,
        uneven: Uneven = "pad",
        fresh: bool = False,
        keep: Keep | None = None,
        on_error: OnError = "raise",
        cache: Cache | str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
        verify: bool = True,
        allow_pipe: bool = False,
        timeout: float = TIMEOUT,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        _check(pipes, batch_size, global_batch, fields, collate, uneven)
        check_on_error(on_error)
        if keep is not None and not fresh:
            raise ValueError("keep= changes what fresh draws take: give fresh=True, or plan at that ratio")
        if plan is None and fresh:
            raise ValueError("fresh=True draws anew from a plan's bins, and there is no plan: give plan=")
        if plan is not None and index is not None:
            raise ValueError("plan and index both say where samples lie: give one, the plan")
        self._ranks = Ranks(rank, world)
        access = Access(timeout, {} if storage_options is None else storage_options)
        fetch = Fetch(as_cache(cache), bool(allow_pipe), access)
        listing = _listing(urls, plan, root, index, fresh, keep, fetch)
        self._recipe = Recipe(
            listing=listing,
            pipes=tuple(pipes),
            batch_size=None if batch_size is None else int(batch_size),
            global_batch=None if global_batch is None else int(global_batch),
            shuffle=bool(shuffle),
            seed=check_seed(seed),
            fields=None if fields is None else tuple(fields),
            collate=collate or (list if fields is None else _stacked),
            uneven=uneven,
            fresh=bool(fresh),
            on_error=on_error,
            verify=verify and listing.checked,
            fetch=fetch,
        )
        self._clock = Clock()
        self._tagged = False
        self._rank_epoch: int | None = None  # resumed at a position of this rank alone
        self._recipe.n_samples(*self._ranks.current(), 0)  # raises where ranks cannot share it out
        if isinstance(keep, ClassRates):
            keep.join(self._clock, self._ranks)

    def __repr__(self) -> str:
        listing = self._recipe.listing
        try:
            samples = f"{listing.n_total(self.epoch):,} samples"
        except ValueError:  # a schedule may have ended
            samples = "an unknown number of samples"
        return f"<ShardDataset {samples} in {len(listing.names)} shards, epoch {self.epoch}>"

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The fields that a sample's tuple is made of; None where samples are dicts."""
        return self._recipe.fields

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads: one more than the one whose first batch was handed on last."""
        return self._clock.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration read this epoch, in running workers too; not needed for consecutive epochs.

        Raises:
            ValueError: not an integer >= 0.
        """
        self._clock.epoch = integer("epoch", epoch, least=0, most=_MAX_EPOCH)

    def start_from(self, state: dict[str, Any]) -> None:
        """Make the next iteration resume at a saved state; later epochs start at their beginning.

        The number of ranks and workers may differ from the saved one's. Only where pipes dropped samples must each rank
        load its own state, on the same number of ranks.

        Args:
            state: from `state_dict` of `adq.Loader`, or of an iterator of a stream without workers.

        Raises:
            StateError: damaged, or of another stream; names the field, the saved and the present value.
        """
        ended = False
        if isinstance(state, dict) and "iterator" in state:
            state, of_worker = split_iterator_state(state)
            check_only_worker(of_worker["layout"])
            ended = of_worker["ended"]
        saved = self._recipe.resumed(state, *self._ranks.current(), ended=ended)
        self._clock.resume_at(Start(saved.epoch, saved.t, saved.lanes))
        self._clock.epoch = saved.epoch + ended
        self._rank_epoch = None if saved.rank is None else saved.epoch

    @property
    def next_start(self) -> Start:
        """Where the next iteration starts."""
        return self._clock.start_of(self._clock.epoch)

    def state_at(self, start: Start, n_batches: int, *, dropped: bool = False) -> dict[str, Any]:
        """The state of an iteration after some batches, for `adq.Loader`.

        Args:
            start: where all ranks started.
            n_batches: batches done on this rank, dropped ones included.
            dropped: whether a batch was left out.
        """
        recipe, (rank, world) = self._recipe, self._ranks.current()
        t = start.position + n_batches * recipe.step(world)
        t = min(t, recipe.listing.n_total(start.epoch)) if t else 0  # a schedule may end before
        state = recipe.state(start.epoch, t, start.lanes)
        if recipe.drops or dropped or start.epoch == self._rank_epoch:
            state = replace(state, rank=rank, world=world)
        return state.as_dict()

    def n_batches_from(self, start: Start) -> int | None:
        """Batches after which all ranks are through with an epoch; None where pipes may drop some, so that only the end
        itself says it."""
        recipe, (_, world) = self._recipe, self._ranks.current()
        return None if recipe.drops else recipe.n_batches(0, world, *start[:2])

    def advance_past(self, epoch: int) -> None:
        """Make the next iteration read the epoch after `epoch`, of which a batch was handed on, unless another was
        set."""
        self._clock.advance_past(epoch)

    @contextmanager
    def tagging(self) -> Iterator[None]:
        """In this block, iterators, also in workers, yield `Item`s and do not advance the epoch.

        The caller advances it by `advance_past`. Workers read the epoch that is next now.
        """
        self._clock.announce(self._clock.epoch)
        self._begin(self._clock.epoch)
        self._tagged = True
        try:
            yield
        finally:
            self._tagged = False

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        share = Share(*self._ranks.current(), *((worker.id, worker.num_workers) if worker else ()))
        start = self._clock.next_start(announced=self._tagged)
        self._begin(start.epoch)
        dropped = start.epoch == self._rank_epoch
        stream = Stream(
            self._recipe, self._clock, start, share, advance=not self._tagged, dropped_before=dropped
        )
        return TaggedStream(stream) if self._tagged else stream

    def _begin(self, epoch: int) -> None:
        draws = self._recipe.listing.draws
        if draws is not None:
            draws.begin(epoch)

    def __len__(self) -> int:
        """Batches of this rank in the next epoch, read from its beginning; samples, without batches.

        Raises:
            TypeError: a pipe may drop samples.
        """
        names = [type(pipe).__name__ for pipe in self._recipe.pipes if not pipe.one_to_one]
        if names:
            text = f"{', '.join(names)} may drop samples, and how many shows only in reading"
            raise TypeError(f"no length: {text}")
        return self._recipe.n_batches(*self._ranks.current(), self.epoch)

    def __getitem__(self, index: Any) -> NoReturn:
        """Raise: a stream has no access by number; use `as_map`."""
        raise TypeError(f"a ShardDataset is a stream and takes no [{index!r}]; write .as_map()[{index!r}]")

    def as_map(self) -> MapView:
        """All kept samples by number, for samplers that choose the order, such as torch's DistributedSampler.

        Raises:
            TypeError: a pipe may drop samples, or bad ones are skipped: every number must give one.
            ValueError: with `fresh`, a number would mean another sample in every epoch.
        """
        return MapView(self._recipe, self._clock)


def _listing(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    plan: Plan | str | os.PathLike[str] | None,
    root: str | os.PathLike[str] | None,
    index: str | os.PathLike[str] | None,
    fresh: bool,
    keep: Keep | None,
    fetch: Fetch,
) -> Listing:
    """The samples to read in the shards at `urls`."""
    paths = expand_urls(urls, commands=fetch.allow_pipe)
    for path in paths:
        if not is_url(path) and not os.path.exists(path):
            raise ShardError(f"shard {path}: no such file")
    base = None if root is None else os.fspath(root)
    if plan is None:
        return everything(paths, index, root=base, fetch=fetch)
    plan = as_plan(plan)
    return planned(paths, plan, root=base, fresh=fresh, fetch=fetch, draws=draws_of(plan, keep))


def _check(
    pipes: object, batch_size: object, global_batch: object, fields: object, collate: object, uneven: object
) -> None:
    if not isinstance(pipes, Sequence) or not all(isinstance(pipe, Pipe) for pipe in pipes):
        raise ValueError(f"pipes must be a list of pipes, got {shorten(pipes)}; wrap a function in adq.Map")
    sizes = {"batch_size": batch_size, "global_batch": global_batch}
    given = [positive(name, size) for name, size in sizes.items() if size is not None]
    if len(given) == 2:
        raise ValueError("batch_size is of each rank, global_batch of all ranks together: give one of them")
    names = fields if isinstance(fields, Sequence) and not isinstance(fields, str) else ()
    if fields is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"fields must be a tuple of names, like ('image', 'label'), got {shorten(fields)}")
    if collate is not None and not (given and callable(collate)):
        raise ValueError(f"collate must be a function, with a batch_size; got {shorten(collate)}")
    if uneven not in UNEVEN:
        raise ValueError(f"uneven must be one of {', '.join(UNEVEN)}, got {shorten(uneven)}")


def _stacked(samples: list[Any]) -> Any:
    """Torch's default collate, with a remedy in its error."""
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise ValueError(
            f"the samples of a batch differ in shape ({error}); give collate=list for lists of samples, or a pipe that makes "
            "them alike"
        ) from error
