"""Filters a stream: passes the samples that a plan keeps, or that are drawn by a codebook's rates."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from adq_wds.core.rng import check_seed
from adq_wds.errors import PlanError, ShardError, located, shorten
from adq_wds.pipes.arrivals import FULL, Arrivals, Lost, lost_text
from adq_wds.pipes.base import Pipe, Tally
from adq_wds.pipes.by_codebook import ByCodebook
from adq_wds.pipes.epochs import Epoch, checked_epoch, epoch_of, runs
from adq_wds.pipes.reader_errors import has_place, named_reader_error
from adq_wds.remote.url_path import as_path
from adq_wds.samples.fields import Sample, clean_fields
from adq_wds.shards.names import ShardNames
from adq_wds.shards.samples_in_tar import split_name
from adq_wds.tables.codebook import SUFFIX, Codebook, load_codebook
from adq_wds.tables.plan import CACHED_SHARDS, Plan, as_plan

KEEP = 0.3  # as `build_plan` has it

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True, eq=False)
class Subsample(Pipe):
    """Pass the samples that a plan keeps, or that are drawn by a codebook's rates; bytes untouched.

    With a plan, put it before decoding, so that dropped samples are never decoded:
    ``wds.WebDataset(urls).compose(adq.Subsample(plan)).decode("pil")``. It works after decoding too. Workers may
    be forked or spawned. The stream is still read whole; to read less in every epoch, write the kept samples to
    shards of their own with ``adq write``.

    With a codebook, put it after `Embed` and `AssignBins`: a sample is kept when its draw, keyed by seed, epoch, shard
    and key, lies below the rate of its class and bin. `keep` is the ratio kept on average, also of new shards; a
    smaller `keep` keeps a subset of a larger one. Copies and doubted labels, where the codebook recognises them, are
    dropped at any `keep`, and counted in the log at level INFO. The fields of those two pipes are removed again.
    ``__adq_*`` fields from a tar are dropped in any case.

    Args:
        plan: a plan or a codebook, or the path of one; a codebook's ends in .safetensors.
        root: the folder that the plan's shard names are relative to; needed only where a `__url__` fits
            several of them.
        verify: compare the kept samples' bytes with the plan's checksum, while they are still bytes. Turn it
            off when a stage before this one changes or selects fields.
        keep: with a codebook, ratio of samples kept, in [0, 1]; 0.3 by default.
        seed: with a codebook, of the draws.
        epoch: None keeps the same samples in every epoch. Else fresh draws: with a plan each epoch takes the next
            samples of every class and bin (epoch 0 is the plan), with a codebook each draws anew. The number of the
            epoch; a function that gives it, called for every chunk, such as one that reads a shared
            ``multiprocessing.Value``; or "sample", for the number that a source of ours has put into the sample.
        keep_fields: with a codebook, leave ``emb.npy`` and the fields of `AssignBins` in the kept samples.
        missing: with a plan, what to do at the end of a pass that began a shard and did not bring all its kept
            samples: "raise" or "warn", for pipelines that leave samples out before this stage.

    A tar reader such as WebDataset's ends without an error at a damaged header. So each pass counts the samples of
    every shard, in any order, and compares the counts with the plan when it is read to its end; a pass that is left
    early is not compared. A shard without any sample may be one that the pipeline does not read; where one process
    reads everything, one warning names such shards.

    Raises:
        TypeError: `plan` is no plan, no codebook and no path, as when the class itself is made a stage.
        ValueError: an option is out of range, or is given with the other of plan and codebook.
        PlanError, CodebookError: the file is missing or damaged.

    Raises (while streaming):
        PlanError: a shard or key is not in the plan, or a `__url__` fits several shards.
        ShardError: a kept sample's bytes are not the planned ones; kept samples of a shard are missing; or the reader
            failed. Names the shard.
        CodebookError: a sample's bin is missing, or is by another codebook.
        ValueError: the epoch is not an integer >= 0.
    """

    plan: Plan | Codebook | str | os.PathLike[str]
    root: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    verify: bool = field(default=True, kw_only=True)
    keep: float | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    epoch: Epoch = field(default=None, kw_only=True)
    keep_fields: bool = field(default=False, kw_only=True)
    missing: Literal["raise", "warn"] = field(default="raise", kw_only=True)
    _choose: _ByPlan | ByCodebook = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        opened: Any = self.plan
        if isinstance(opened, str | os.PathLike):
            opened = load_codebook(opened) if as_path(opened).suffix == SUFFIX else as_plan(opened)
        if not isinstance(opened, Plan | Codebook):
            kind = type(self.plan).__name__
            raise TypeError(f"Subsample needs a plan: .compose(adq.Subsample(plan)); got a {kind}")
        if not (self.epoch is None or self.epoch == "sample" or callable(self.epoch)):
            checked_epoch(self.epoch)
        if self.missing not in ("raise", "warn"):
            raise ValueError(f"missing must be 'raise' or 'warn', got {shorten(self.missing)}")
        object.__setattr__(self, "plan", opened)
        object.__setattr__(
            self, "_choose", self._by_plan() if isinstance(opened, Plan) else self._by_codebook()
        )

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The kept samples, as new dicts."""
        return self._choose(samples, self._epoch_now())

    def run(self, chunk: list[Sample], tally: Tally) -> Iterator[Sample]:
        """As in `Pipe`; samples that a codebook leaves out are also counted by their reasons."""
        if isinstance(self._choose, ByCodebook):
            return self._run_with_reasons(self._choose, chunk, tally)
        return super().run(chunk, tally)

    def _run_with_reasons(self, choose: ByCodebook, chunk: list[Sample], tally: Tally) -> Iterator[Sample]:
        yield from super().run(chunk, tally)
        tally.reasons.update(choose.reasons(chunk))

    def counted(self, stream: Iterable[Sample]) -> Iterable[Sample]:
        """The stream; at its end, its counts are compared with the plan."""
        if isinstance(self._choose, _ByPlan):
            return self._choose.counted(stream, self._epoch_now, self.missing)
        return stream

    def _epoch_now(self) -> int | str | None:
        return checked_epoch(self.epoch()) if callable(self.epoch) else self.epoch

    def _by_plan(self) -> _ByPlan:
        self._refuse(
            keep=None, seed=0, keep_fields=False, of="a codebook; a plan has decided that when it was built"
        )
        assert isinstance(self.plan, Plan)
        root = None if self.root is None else os.fspath(self.root)
        return _ByPlan(self.plan, self.plan.names(root=root), self.verify)

    def _by_codebook(self) -> ByCodebook:
        self._refuse(root=None, missing="raise", of="a plan; a codebook knows of no shards")
        assert isinstance(self.plan, Codebook)
        keep = KEEP if self.keep is None else self.keep
        return ByCodebook.of(self.plan, keep, check_seed(self.seed), self.keep_fields)

    def _refuse(self, *, of: str, **defaults: Any) -> None:
        """Raise `ValueError` for an option that belongs to the other of plan and codebook and is not at its default."""
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(f"{name}={value!r} goes with {of}")


class _ByPlan:
    """Passes the samples that a plan keeps: its own choice, or that of an epoch."""

    def __init__(self, plan: Plan, names: ShardNames, verify: bool) -> None:
        self._plan, self._names, self._verify = plan, names, verify
        self._shards: dict[str, str] = {}  # name in the plan, by URL
        self._fresh: dict[tuple[str, int], bytes] = {}  # a byte a row, 1 where kept, by shard and epoch
        self._warned = False

    def __call__(self, samples: list[Sample], epoch: int | str | None) -> list[Sample]:
        out = []
        for url, number, run in runs(samples, epoch):
            shard = self._shard_of(url)
            rows = self._plan.shard(shard).by_key
            fresh = None if number is None else self._kept_in(shard, number)
            for sample in run:
                key = sample["__key__"]
                row = rows.get(key)
                if row is None:
                    if split_name(f"{key}.x") is None:
                        continue  # a folder's hidden files, which WebDataset groups as "folder/"
                    trouble = "not in the plan; the shard changed since it was planned, so plan again"
                    raise located(PlanError(trouble), shard=shard, key=key)
                kept, crc32, i = row
                if kept if fresh is None else fresh[i]:
                    if self._verify:
                        _check_bytes(sample, crc32, shard=shard)
                    out.append(clean_fields(sample))
        return out

    def _shard_of(self, url: str) -> str:
        shard = self._shards.get(url)
        if shard is None:
            shard = self._shards[url] = self._names.find(url)
        return shard

    def _kept_in(self, shard: str, epoch: int) -> bytes:
        kept = self._fresh.get((shard, epoch))
        if kept is None:
            kept = self._fresh[shard, epoch] = self._plan.kept_in(shard, epoch).tobytes()
            while len(self._fresh) > CACHED_SHARDS:
                del self._fresh[next(iter(self._fresh))]
        return kept

    def counted(
        self, stream: Iterable[Sample], epoch_now: Callable[[], int | str | None], missing: str
    ) -> Iterator[Sample]:
        """The samples of one pass over whole shards; at its end, a `ShardError` or a warning if kept ones are
        missing."""
        arrivals: dict[str, Arrivals] = {}
        url = sample = None
        try:
            for sample in stream:
                if has_place(sample):
                    if sample["__url__"] != url:
                        url = sample["__url__"]
                        shard = self._shard_of(url)
                        rows = self._plan.shard(shard).by_key
                        if shard not in arrivals:
                            arrivals[shard] = Arrivals(len(rows))
                        counts, epoch = arrivals[shard].counts, epoch_now()
                        arrivals[shard].epochs.add(epoch_of(sample) if isinstance(epoch, str) else epoch)
                    row = rows.get(sample["__key__"])
                    if row is not None and counts[row[2]] < FULL:
                        counts[row[2]] += 1
                yield sample
        except Exception as error:
            raise named_reader_error(error, sample, self._shard_of)  # noqa: B904 - mostly the same error
        self._report_lost(arrivals, missing)
        self._warn_of_silent(arrivals)

    def _report_lost(self, arrivals: dict[str, Arrivals], missing: str) -> None:
        lost = []
        for name, came in arrivals.items():
            if came.equally_often():
                continue
            shard = self._plan.shard(name)
            masks = [shard.kept if e is None else self._plan.kept_in(name, e) for e in came.epochs]
            kept = np.logical_or.reduce(masks)
            rows = came.missing(kept).tolist()
            if rows:
                lost.append(Lost(name, [shard.spans.keys[row] for row in rows], int(kept.sum())))
        if lost:
            error = located(ShardError(lost_text(lost)), shard=lost[0].shard, key=lost[0].keys[0])
            if missing == "raise":
                raise error
            logger.warning("Subsample: %s", error)

    def _warn_of_silent(self, begun: Iterable[str]) -> None:
        """Warn, once, of shards with kept samples of which none arrived, unless another process may have read them."""
        names, kept = self._plan.shards, self._plan.shard_kept.tolist()
        silent = [name for name, n in zip(names, kept, strict=True) if n and name not in begun]
        if silent and not self._warned and _reads_alone():
            self._warned = True
            logger.warning(
                "Subsample: %d of the plan's %d shards gave no sample, the first %s: as it should be where the pipeline "
                "reads a part of the plan's shards; else `adq verify` tells what is wrong with them",
                len(silent),
                len(names),
                shorten(silent[0]),
            )


def _reads_alone() -> bool:
    """Whether this process reads alone: no worker, and the only rank."""
    import torch.distributed as dist
    from torch.utils.data import get_worker_info

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return get_worker_info() is None and not several


def _check_bytes(sample: Sample, crc32: int, *, shard: str) -> None:
    """Compare a raw sample's payloads, in tar order, with the plan's checksum; a decoded one passes.

    Forged `__adq_*` fields count: they are members of the tar, so the plan's checksum includes them.
    """
    crc = 0
    for name, value in sample.items():
        if name[:2] == "__" and not (name.startswith("__adq_") and isinstance(value, bytes)):
            continue  # put there by the reader, not by the tar
        if not isinstance(value, bytes):
            return
        crc = zlib.crc32(value, crc)
    if crc != crc32:
        raise located(
            ShardError(
                f"bytes differ from the plan's (crc32 {crc:08x}, planned {crc32:08x}). `adq verify PLAN SHARDS` tells "
                "whether the shard changed: then fetch it again, or plan again. If not, a stage before this one changed the "
                f"fields {shorten(sorted(k for k in sample if k[:2] != '__'))}: pass verify=False; or a hidden file lies "
                "between the members of this sample: write the shard again without it, or read with ShardDataset"
            ),
            shard=shard,
            key=sample["__key__"],
        )
