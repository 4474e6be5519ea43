"""Which samples of a stream go on? Those that the plan keeps, or a codebook's rate lets through."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from adq_wds.checks import integer
from adq_wds.core.allocation import budget_for
from adq_wds.core.rng import check_seed, draws
from adq_wds.errors import AdqError, CodebookError, PlanError, ShardError, located, shorten
from adq_wds.pipes.arrivals import Arrivals, Lost, Visit, is_damage, lost_text, marked_url, reader_error
from adq_wds.pipes.assign_bins import BIN_FIELD, RULE_FIELD
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.embed import EMBEDDING_FIELD, ENCODER_FIELD
from adq_wds.samples.fields import EPOCH_FIELD, Sample, clean_fields
from adq_wds.shards.names import ShardNames, base_name, is_url
from adq_wds.shards.samples_in_tar import split_name
from adq_wds.tables.codebook import SUFFIX, Codebook, load_codebook
from adq_wds.tables.plan import HELD_SHARDS, Plan, as_plan

KEEP = 0.3  # as `build_plan` has it
Epoch = int | Callable[[], int] | str | None
_Rows = dict[str, tuple[bool, int, int]]  # key -> (kept, crc32, row)

logger = logging.getLogger("adq_wds")


@dataclass(frozen=True, eq=False)
class Subsample(Pipe):
    """Let through the samples that a plan keeps, or that a codebook's rates draw; bytes untouched.

    With a plan, put it before decoding, so that what is dropped is never decoded:
    ``wds.WebDataset(urls).compose(adq.Subsample(plan)).decode("pil")``. It works after decoding too. Workers may
    be forked or spawned. The stream is still read whole; to read less in every epoch, write the kept samples to
    shards of their own with ``adq write``.

    With a codebook, put it after `Embed` and `AssignBins`: a sample is kept when its draw, keyed by seed, epoch, shard
    and key, lies below the rate of its class and bin. `keep` is then what is kept on average, of shards that no fit has
    seen too; a smaller `keep` keeps a part of what a larger one does. What those two pipes put is taken off again.
    ``__adq_*`` fields from a tar are dropped in any case.

    Args:
        plan: a plan or a codebook, or the path of one; a codebook's ends in .safetensors.
        root: the folder that the plan's shard names are relative to; needed only where a `__url__` fits
            several of them.
        verify: compare the kept samples' bytes with the plan's checksum, while they are still bytes. Turn it
            off when a stage before this one changes or selects fields.
        keep: with a codebook, ratio of samples kept, in [0, 1]; 0.3 unless said.
        seed: with a codebook, of the draws.
        epoch: None keeps the same samples in every epoch. Else fresh draws: with a plan each epoch takes the next
            samples of every class and bin (epoch 0 is the plan), with a codebook each draws anew. The number of the
            epoch; a function that gives it, called for every chunk, such as one that reads a shared
            ``multiprocessing.Value``; or "sample", for the number that a source of ours has put into the sample.
        keep_fields: with a codebook, leave ``emb.npy`` and ``bin.cls`` in the kept samples.
        missing: with a plan, what to do at the end of a pass that began a shard and did not bring all its kept
            samples: "raise" or "warn", for pipelines that leave samples out before this stage.

    A tar reader such as WebDataset's ends without an error at a damaged header, so a pass over a stream counts what it
    is given of every shard, in any order, and a pass read to its end is held against the plan; one that is left early
    is not. Of a shard that gives no sample at all nothing is known here, since a pipeline may read a part of the plan:
    where one process reads everything such shards are named in one warning.

    Raises:
        TypeError: `plan` is no plan, no codebook and no path, as when the class itself is made a stage.
        ValueError: an option is out of range, or is given with the other of plan and codebook.
        PlanError, CodebookError: the file is missing or damaged.

    Raises (while streaming):
        PlanError: a shard or key is not in the plan, or a `__url__` fits several shards.
        ShardError: a kept sample's bytes are not those that were planned; kept samples of a shard never came; or the
            reader failed. Names the shard.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        opened: Any = self.plan
        if isinstance(opened, str | os.PathLike):
            opened = load_codebook(opened) if Path(opened).suffix == SUFFIX else as_plan(opened)
        if not isinstance(opened, Plan | Codebook):
            kind = type(self.plan).__name__
            raise TypeError(f"Subsample needs a plan: .compose(adq.Subsample(plan)); got a {kind}")
        if isinstance(self.epoch, str | bool) and self.epoch != "sample":
            raise ValueError(f"epoch must be a number, a function, 'sample' or None, got {self.epoch!r}")
        if self.epoch is not None and not callable(self.epoch) and self.epoch != "sample":
            _checked_epoch(self.epoch)
        if self.missing not in ("raise", "warn"):
            raise ValueError(f"missing must be 'raise' or 'warn', got {shorten(self.missing)}")
        choose = _by_plan(self, opened) if isinstance(opened, Plan) else _by_codebook(self, opened)
        object.__setattr__(self, "plan", opened)
        object.__setattr__(self, "_choose", choose)

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The kept samples, as new dicts."""
        out: list[Sample] = self.__dict__["_choose"](samples, self._epoch_now())
        return out

    def counted(self, stream: Iterable[Sample]) -> Iterable[Sample]:
        """The stream; at its end, held against the plan."""
        choose = self.__dict__["_choose"]
        return (
            choose.counted(stream, self._epoch_now, self.missing) if isinstance(choose, _ByPlan) else stream
        )

    def _epoch_now(self) -> int | str | None:
        return _checked_epoch(self.epoch()) if callable(self.epoch) else self.epoch


def _checked_epoch(epoch: object) -> int:
    return integer("epoch", epoch, least=0, most=2**63 - 1)


def _epoch_of(sample: Sample) -> int:
    found = sample.get(EPOCH_FIELD, 0)
    return 0 if isinstance(found, bytes | str) else _checked_epoch(found)  # a tar's is not one


# ---- By a plan


def _by_plan(pipe: Subsample, plan: Plan) -> _ByPlan:
    for name, value, default in (
        ("keep", pipe.keep, None),
        ("seed", pipe.seed, 0),
        ("keep_fields", pipe.keep_fields, False),
    ):
        if value != default:
            raise ValueError(
                f"{name}={value!r} goes with a codebook; a plan has decided that when it was built"
            )
    root = None if pipe.root is None else os.fspath(pipe.root)
    return _ByPlan(plan, plan.names(root=root), pipe.verify)


class _ByPlan:
    """The samples that a plan keeps, in all epochs or in one."""

    def __init__(self, plan: Plan, names: ShardNames, verify: bool) -> None:
        self._plan, self._names, self._verify = plan, names, verify
        self._shards: dict[str, str] = {}  # name by url
        self._fresh: dict[tuple[str, int], _Rows] = {}
        self._said_silent = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fresh": {}}  # soon made again, and large

    def __call__(self, samples: list[Sample], epoch: int | str | None) -> list[Sample]:
        out = []
        verify = self._verify
        by_sample = isinstance(epoch, str)
        number = None if isinstance(epoch, str) else epoch
        url, name = None, ""
        rows: _Rows = {}
        for sample in samples:
            if sample["__url__"] != url or (by_sample and _epoch_of(sample) != number):
                url = sample["__url__"]  # neighbours mostly come from one shard
                number = _epoch_of(sample) if by_sample else number
                name = self._find(url)
                rows = self._rows(name, number)
            row = rows.get(sample["__key__"])
            if row is None:
                if _of_ignored_members(sample):
                    continue
                raise located(
                    PlanError("not in the plan; the shard changed since it was planned, so plan again"),
                    shard=name,
                    key=sample["__key__"],
                )
            kept, crc32, _ = row
            if kept:
                if verify:
                    _check_bytes(sample, crc32, shard=name)
                out.append(clean_fields(sample))
        return out

    def counted(
        self, stream: Iterable[Sample], epoch: Callable[[], int | str | None], missing: str
    ) -> Iterator[Sample]:
        """The samples of one pass; when they end, a `ShardError` or a warning if kept ones never came.

        Args:
            stream: whole shards, in any order.
            epoch: the number whose choice counts, None for the plan's, or text where samples say it.
            missing: "raise" or "warn".
        """
        arrivals = Arrivals()
        samples = iter(stream)
        url, key = None, ""
        name = ""
        rows: _Rows = {}
        visit: Visit | None = None
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                break
            except Exception as error:
                self._raise_named(error, url, key)
            if _has_place(sample):
                if visit is None or sample["__url__"] != url:
                    url, number = sample["__url__"], epoch()
                    number = _epoch_of(sample) if isinstance(number, str) else number
                    name = self._find(url)
                    rows = self._rows(name, number)
                    visit = arrivals.visit(name, len(rows), number)
                key = sample["__key__"]
                row = rows.get(key)
                if row is not None and visit.came(row[2]):
                    arrivals.complete(name)
                    visit = None
            yield sample
        self._judge(arrivals, missing)

    def _raise_named(self, error: Exception, url: str | None, key: str) -> NoReturn:
        """Raise a reader's error as a `ShardError`, any other as it is; `url` and `key` are the last sample's."""
        marked = marked_url(error)
        damaged = marked or (url if is_damage(error) else None)
        name = None if damaged is None or isinstance(error, AdqError) else self._found(damaged)
        if damaged is None or name is None:
            raise error
        after = key if url is not None and marked in (None, url) else None
        cause = None if is_url(damaged) else error  # whose text may hold a URL's secrets
        raise reader_error(error, shard=name, after=after, sure=marked is not None) from cause

    def _found(self, url: str) -> str | None:
        """The shard at `url`; None where that is no shard's of the plan, but what another stage's error ends with."""
        try:
            return self._find(url)
        except PlanError:
            return None

    def _judge(self, arrivals: Arrivals, missing: str) -> None:
        """Say which kept samples never came."""
        lost = []
        for name, visit in arrivals.open_visits():
            shard = self._plan.shard(name)
            masks = [shard.kept if e is None else self._plan.kept_in(name, e) for e in visit.epochs]
            kept = np.logical_or.reduce(masks)
            rows = visit.missing(kept).tolist()
            if rows:
                lost.append(Lost(name, [shard.spans.keys[row] for row in rows], int(kept.sum())))
        if lost:
            error = located(ShardError(lost_text(lost)), shard=lost[0].shard, key=lost[0].keys[0])
            if missing == "raise":
                raise error
            logger.warning("Subsample: %s", error)
        self._say_not_begun(arrivals.begun())

    def _say_not_begun(self, begun: set[str]) -> None:
        """Warn, once, of shards with kept samples that gave none, where no other process may have read them."""
        entries = self._plan.header["shards"]
        silent = [entry["name"] for entry in entries if entry["kept"] and entry["name"] not in begun]
        if silent and not self._said_silent and _reads_alone():
            self._said_silent = True
            logger.warning(
                "Subsample: %d of the plan's %d shards gave no sample, the first %s: as it should be where the pipeline "
                "reads a part of the plan's shards; else `adq verify` tells what is wrong with them",
                len(silent),
                len(entries),
                shorten(silent[0]),
            )

    def _rows(self, name: str, epoch: int | None) -> _Rows:
        shard = self._plan.shard(name)
        if epoch is None:
            return shard.by_key
        rows = self._fresh.get((name, epoch))
        if rows is None:
            rows = shard.rows_by_key(self._plan.kept_in(name, epoch))
            self._fresh[name, epoch] = rows
            while len(self._fresh) > HELD_SHARDS:
                del self._fresh[next(iter(self._fresh))]
        return rows

    def _find(self, url: str) -> str:
        name = self._shards.get(url)
        if name is None:
            name = self._shards[url] = self._names.find(url)
        return name


def _of_ignored_members(sample: Sample) -> bool:
    """Whether a sample is of members that belong to none: WebDataset groups a folder's hidden files as ``folder/``."""
    return split_name(f"{sample['__key__']}.x") is None


def _has_place(sample: object) -> bool:
    return (
        isinstance(sample, dict)
        and isinstance(sample.get("__url__"), str)
        and isinstance(sample.get("__key__"), str)
    )


def _reads_alone() -> bool:
    """Whether this process is no worker, and no rank of several."""
    import torch.distributed as dist
    from torch.utils.data import get_worker_info

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return get_worker_info() is None and not several


# ---- By a codebook


def _by_codebook(pipe: Subsample, codebook: Codebook) -> _ByCodebook:
    if pipe.root is not None:
        raise ValueError(f"root={pipe.root!r} goes with a plan; a codebook knows of no shards")
    if pipe.missing != "raise":
        raise ValueError(f"missing={pipe.missing!r} goes with a plan; a codebook knows of no shards")
    keep = KEEP if pipe.keep is None else pipe.keep
    budget_for(keep, 0)
    # as whole numbers, since a draw near 2^64 would round to 1 as a float
    limits = [[int(rate * 2.0**64) for rate in row] for row in codebook.rates(keep).tolist()]
    return _ByCodebook(codebook.hash, limits, check_seed(pipe.seed), pipe.keep_fields)


@dataclass(frozen=True)
class _ByCodebook:
    """The samples whose draws lie below the rates of their bins."""

    codebook: str  # its hash
    limits: list[list[int]]  # (R, K) rates, times 2^64
    seed: int
    keep_fields: bool

    def __call__(self, samples: list[Sample], epoch: int | str | None) -> list[Sample]:
        out = []

        def place(sample: Sample) -> tuple[str, int]:
            return sample["__url__"], _epoch_of(sample) if isinstance(epoch, str) else epoch or 0

        for (url, number), run in groupby(samples, place):
            mine = list(run)
            drawn = draws(self.seed, number, base_name(url), [s["__key__"] for s in mine], purpose="keep")
            for sample, u in zip(mine, drawn.tolist(), strict=True):
                if u < self._limit(sample):
                    out.append(self._stripped(sample))
        return out

    def _limit(self, sample: Sample) -> int:
        rule, bin = sample.get(RULE_FIELD), sample.get(BIN_FIELD)
        if isinstance(rule, tuple) and isinstance(bin, int):
            codebook, row = rule
            if codebook == self.codebook:
                return self.limits[row][bin]
            trouble = f"its bin is by another codebook ({codebook[:12]}, here {self.codebook[:12]}): use one for both"
        else:
            trouble = "no bin here: put adq_wds.AssignBins(codebook) before Subsample(codebook)"
        raise located(CodebookError(trouble), shard=base_name(sample["__url__"]), key=sample["__key__"])

    def _stripped(self, sample: Sample) -> Sample:
        out = clean_fields(sample)
        ours = {RULE_FIELD, ENCODER_FIELD}
        if not self.keep_fields:
            ours.add(BIN_FIELD)
            if ENCODER_FIELD in out:  # else it came with the sample
                ours.add(EMBEDDING_FIELD)
        for name in ours:
            out.pop(name, None)
        return out


def _check_bytes(sample: Sample, crc32: int, *, shard: str) -> None:
    """Compare a raw sample's payloads, in tar order, with the plan's checksum; a decoded one passes.

    Forged `__adq_*` fields count: they are members of the tar, so the plan's checksum is over them too.
    """
    found = 0
    for name, value in sample.items():
        if name[:2] == "__" and not (name.startswith("__adq_") and isinstance(value, bytes)):
            continue  # put there by the reader, not by the tar
        if not isinstance(value, bytes):
            return
        found = zlib.crc32(value, found)
    if found != crc32:
        raise located(
            ShardError(
                f"bytes differ from the plan's (crc32 {found:08x}, planned {crc32:08x}). `adq verify PLAN SHARDS` tells "
                "whether the shard changed: then fetch it again, or plan again. If not, a stage before this one changed the "
                f"fields {shorten(sorted(k for k in sample if k[:2] != '__'))}: pass verify=False; or a hidden file lies "
                "between the members of this sample: write the shard again without it, or read with ShardDataset"
            ),
            shard=shard,
            key=sample["__key__"],
        )
