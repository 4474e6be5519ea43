"""Defines `Plan`: whether each sample of a set of shards is kept."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from operator import lt
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adq_wds.core.allocation import fresh_draw
from adq_wds.core.fresh import CACHED_EPOCHS, Draws
from adq_wds.core.order import LANES
from adq_wds.errors import PlanError, shorten
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.shards.names import ShardNames, check_shard_names
from adq_wds.tables.chosen import choose_indices, choose_keys, read_indices
from adq_wds.tables.exchange import export_plan
from adq_wds.tables.headers import reopened
from adq_wds.tables.key_lists import read_keys
from adq_wds.tables.notebook import plan_html
from adq_wds.tables.parquet import Header
from adq_wds.tables.plan_header import PlanHeader, fresh_draws, header_without_bins
from adq_wds.tables.plan_rows import ALWAYS, MARGIN, OPTIONAL, REASON_COLUMNS, SCHEMA, PlanShard
from adq_wds.tables.plan_why import AnyFeatures, Why, explain
from adq_wds.tables.table import InMemory, Table, open_table
from adq_wds.tables.write_table import write_table

VERSION = 2
"""1: no reasons, no shares; fresh draws by whole rounds. 2: `reason`, `duplicate_of` and the header's `cells.share`;
where labels were doubted also `margin`."""
CACHED_SHARDS = LANES + 8
"""Shards whose rows are cached: those that a stream reads in turn, and a few that it has just left."""
_ROWS = [name for name in SCHEMA.names if name not in (*REASON_COLUMNS, MARGIN.name)]


class Plan:
    """A selection for a set of shards; opened lazily, one shard at a time.

    Make one with `build_plan`, `load_plan` or `Plan.from_keys`. It pickles as its path and hash when it has a
    file, so that workers read the same file instead of copying it. Iterating gives its shards, a `PlanShard` each;
    `len` counts kept samples, not shards.

    Attributes:
        header: settings, counts per class and bin, scores; see `adq show`. Of up to 10,000 shards also `shards`.
        path: its file, or None while it is only in memory.
        shards: names of the S shards, sorted: the order of the plan's rows.
        shard_sizes, shard_kept: (S,) int64, samples of each shard, and kept ones.
    """

    def __init__(self, table: Table, *, path: AnyPath | None = None) -> None:
        self.header, self.path, self._table = table.header, path, table
        self._cached_shards: OrderedDict[str, PlanShard] = OrderedDict()
        made = cast(PlanHeader, self.header)  # so it is, or one of these lines raises
        try:
            self.shards = check_shard_names(table.names)
            self.shard_sizes, self.shard_kept = table.counts("n"), table.counts("kept")
            self._classes = [int(entry["label"]) for entry in made["classes"]]
            quota, size = (
                np.array(cells, dtype=np.int64) for cells in (made["cells"]["quota"], made["cells"]["size"])
            )
            self._quota = quota.reshape(len(self._classes) or 1, -1)
            self._size = size.reshape(self._quota.shape)
            self._draws = None if made["version"] == 1 else fresh_draws(made, self._size, self._quota)
            if self._draws is not None:  # every shard uses the seats of an epoch
                self._seats = lru_cache(CACHED_EPOCHS)(self._draws.seats)
            self.n_samples, self.n_kept = int(self.shard_sizes.sum()), int(self.shard_kept.sum())
            agrees = (made["n_samples"], made["n_kept"]) == (self.n_samples, self.n_kept)
        except PlanError as cause:
            raise PlanError(f"{self._where}: damaged header: {cause}") from cause
        except (KeyError, TypeError, ValueError, OverflowError) as cause:
            raise PlanError(f"{self._where}: damaged header: {shorten(str(cause))}") from cause
        if (
            not agrees
            or not all(map(lt, self.shards, islice(self.shards, 1, None)))
            or self._classes != sorted(set(self._classes))
        ):
            raise PlanError(
                f"{self._where}: damaged header: its counts, shards or classes contradict each other"
            )

    @classmethod
    def from_shards(cls, shards: Iterable[PlanShard], header: Header) -> Plan:
        """A plan in memory from the rows of each shard; the header's counts per shard are filled in here.

        With reasons in the rows and shares in the header it is of version 2, without both of version 1.
        """
        shards = sorted(shards, key=lambda shard: shard.name)
        reasons = {shard.reason is not None for shard in shards} or {"share" in header["cells"]}
        if reasons != {"share" in header["cells"]}:
            raise PlanError("a plan has reasons for all samples and shares of all cells, or neither")
        members = any(shard.spans.members is not None for shard in shards)
        n_kept = [int(shard.kept.sum()) for shard in shards]
        counts = {"n_samples": sum(len(shard.spans) for shard in shards), "n_kept": sum(n_kept)}
        version = VERSION if reasons == {True} else 1
        groups: Iterator[tuple[Header, pa.Table]] = (
            ({"name": shard.name, "kept": n}, shard.table(members=members))
            for shard, n in zip(shards, n_kept, strict=True)
        )
        plan = cls(InMemory.of({**header, **counts, "format": "adq_wds.plan", "version": version}, groups))
        for _ in plan:  # a plan that would be refused when loaded is refused when made
            pass
        return plan

    @classmethod
    def from_keys(cls, urls: str | Iterable[str], keys: Iterable[str | tuple[str, str]] | None) -> Plan:
        """A plan that keeps the samples you name, for a selection made elsewhere.

        Args:
            urls: the shards, as `expand_urls` reads them; every one is scanned once.
            keys: the keys to keep; (shard, key) where a key stands in several shards; None keeps all.

        Raises:
            PlanError: a key is in no shard, or in several and given without its shard.
            ShardError: a shard is damaged, or none holds a sample.

        The samples have no bins: `kept_in` keeps the same ones in every epoch, and `adq show` has no table.
        """
        return cls.from_shards(choose_keys(urls, keys), header_without_bins({"source": "keys"}))

    @classmethod
    def from_indices(cls, urls: str | Iterable[str], indices: Any) -> Plan:
        """A plan that keeps samples by their positions, or by a mask; else as `from_keys`.

        Args:
            urls: the shards, in the order of their names, which is that of a plan's rows.
            indices: (n,) integers, positions among all samples of these shards; or (N,) bools, True for a kept sample.

        Raises:
            ValueError: another type, shape or length, a position out of range or given twice, or shards in another
                order.
            ShardError: a shard is damaged, or none holds a sample.
        """
        return cls.from_shards(choose_indices(urls, indices), header_without_bins({"source": "keys"}))

    @classmethod
    def from_file(cls, urls: str | Iterable[str], path: str | os.PathLike[str]) -> Plan:
        """A plan that keeps the samples listed in a file, such as one that `export` wrote.

        Args:
            urls: as in `from_keys`; for an array as in `from_indices`.
            path: keys (.txt, .csv, .jsonl), or an array of indices or of a mask (.npy).

        Raises:
            ValueError, ShardError: as in `from_indices`; or the file has another ending.
            PlanError: the file is missing or damaged, or as in `from_keys`.
        """
        if as_path(path).suffix == ".npy":
            return cls.from_indices(urls, read_indices(path))
        return cls.from_keys(urls, read_keys(path))

    @property
    def hash(self) -> str:
        """SHA-256 of the header, which has a hash of every column: equal hashes, equal plans."""
        return self._table.hash

    @property
    def _where(self) -> str:
        return str(self.path) if self.path is not None else "plan"

    def __len__(self) -> int:
        """Kept samples."""
        return self.n_kept

    def __repr__(self) -> str:
        return f"<Plan {self.n_kept:,} of {self.n_samples:,} samples in {len(self.shards)} shards, {self.hash[:12]}>"

    def _repr_html_(self) -> str:
        return plan_html(self.header, self.n_kept, len(self.shards), self.hash)

    def shard(self, name: str, *, hold: bool = True) -> PlanShard:
        """The rows of one shard without their reasons, checked.

        Args:
            name: the shard's.
            hold: keep them for the next call; the last 72 are.

        Raises:
            PlanError: the shard is not in the plan, or its rows are damaged.
        """
        if name in self._cached_shards:
            return self._cached_shards[name]
        i = self._position(name)
        table = self._table.group(i, SCHEMA, _ROWS, optional=OPTIONAL)
        if table["shard"].unique().to_pylist() not in ([name], []):
            raise PlanError(f"{self._where}: damaged: rows of another shard under {shorten(name)}")
        shard = PlanShard.from_table(name, table)
        try:
            shard.check(int(self.shard_kept[i]), self._classes, self._quota)
        except PlanError as error:
            raise PlanError(f"{self._where}: {error}") from None
        if hold:
            self._cached_shards[name] = shard
            while len(self._cached_shards) > CACHED_SHARDS:
                self._cached_shards.popitem(last=False)
        return shard

    def _position(self, name: str) -> int:
        i = bisect_left(self.shards, name)
        if i == len(self.shards) or self.shards[i] != name:
            raise PlanError(f"shard {shorten(name)} is not in the plan {self._where}")
        return i

    def kept_in(self, name: str, epoch: int, draws: Draws | None = None) -> NDArray[np.bool_]:
        """Which samples of a shard an epoch keeps, with fresh draws: (n,) bool, rows as in `shard(name)`.

        Every epoch keeps as many samples as the plan and goes through each class and bin in the order of ranks, each
        sample once before any twice; epoch 0 is the plan itself. Over the epochs each class and bin gets its exact
        share of `cells.share`, so that every sample of a share above 0 is reached. Must-include samples are kept in
        all. A plan of version 1 takes its quotas in every epoch. With `draws`, such as a `Schedule`, their seats are
        taken in place of the plan's.

        Raises:
            PlanError: the shard is not in the plan, its rows are damaged, or a rank contradicts its cell's size.
        """
        rows = self.shard(name)
        kept: NDArray[np.bool_] = rows.rank == ALWAYS
        drawn = np.flatnonzero((rows.bin >= 0) & ~kept)
        cell = np.searchsorted(self._classes, rows.label[drawn]) * self._size.shape[1] + rows.bin[drawn]
        rank, size = rows.rank[drawn], self._size.ravel()[cell]
        if (rank >= size).any():
            raise PlanError(f"{self._where}: shard {shorten(name)}: a rank is beyond the size of its bin")
        if draws is None and self._draws is None:
            kept[drawn] = fresh_draw(rank, size, self._quota.ravel()[cell], epoch)
        else:
            first, n = self._seats(epoch) if draws is None else draws.seats(epoch)
            kept[drawn] = (rank - first[cell]) % size < n[cell]
        return kept

    def __iter__(self) -> Iterator[PlanShard]:
        """The rows of each shard with their reasons, in order."""
        return map(self.with_reasons, self.shards)

    def with_reasons(self, name: str) -> PlanShard:
        """The rows of one shard with their reasons, where the plan has these columns; streams do not need them."""
        shard = self.shard(name)
        if not set(REASON_COLUMNS) <= set(self._schema.names):
            return shard
        try:
            columns = (*REASON_COLUMNS, MARGIN.name)
            return shard.with_reasons(
                self._table.group(self._position(name), SCHEMA, columns, optional=OPTIONAL)
            )
        except PlanError as error:
            raise PlanError(f"{self._where}: {error}") from None

    def names(self, *, root: str | None = None) -> ShardNames:
        """Maps a sample's `__url__` to a shard of this plan."""
        return ShardNames(self.shards, root=root)

    def table(self) -> pa.Table:
        """All rows as one Arrow table: shard, index, key, byte_offset, n_bytes, crc32, label, bin, pick, rank, kept.

        Plans of version 2 also have `reason` (kept, quota, duplicate, label, bad, excluded), `duplicate_of`
        ("SHARD/KEY" of the sample that a copy is one of, else "") and, if made since there is one, `members` ("jpg/cls/2345/1/77":
        field and size in bytes of each member, and the crc32 of the whole span); where labels were doubted also `margin`.
        """
        if not self.shards:
            return self._schema.empty_table()
        return pa.concat_tables([shard.table() for shard in self])

    @property
    def _schema(self) -> pa.Schema:
        """The columns that this plan has."""
        no_rows, columns = not self.shards, self._table.columns
        return pa.schema(
            [field for field in SCHEMA if field.name in columns or (no_rows and field.name not in OPTIONAL)]
        )

    def keys(self) -> list[str]:
        """The kept keys, in the order of shards and of samples in them."""
        shards = map(self.shard, self.shards)
        return [
            key for shard in shards for key, kept in zip(shard.spans.keys, shard.kept, strict=True) if kept
        ]

    def export(self, to: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write which samples are kept for another library; see docs/exchange.md.

        Args:
            to: "txt", "csv" or "jsonl" (keys), "indices" (positions, .npy), "parquet-filter", "lancedb" (SQL), "tags"
                (keys by reason), or "webshart" (a folder of indexes).
            path: the file to write; a new folder for "webshart".
            overwrite: replace a file that exists.

        Raises:
            ValueError: no such form.
            PlanError: the form has keys only and one stands in several shards, or it cannot hold a sample. Located.
            AdqError: `path` exists, or cannot be written.
        """
        export_plan(self, to, path, overwrite=overwrite)

    def why(self, key: str | tuple[str, str], *, features: AnyFeatures | None = None) -> Why:
        """Why one sample is kept or not; `print` shows it in words.

        Args:
            key: the sample's; "SHARD/KEY" or (shard, key) where a key stands in several shards.
            features: the features, or their folder, for the nearest kept sample of its class.

        Raises:
            PlanError: no sample has that key (close ones are named), or several do (their shards are named).
            FeaturesError: the features of a shard are missing or damaged.
        """
        return explain(self, key, features=features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one Parquet file, of more than 10,000 shards with a folder of parts beside it.

        It is written whole or not at all, and one shard at a time is in memory. The hash stays; only one file of more
        than 10,000 shards, which earlier versions wrote, gets another as parts.
        """
        header = {name: value for name, value in self.header.items() if name != "shards"}
        kept = self.shard_kept.tolist()
        groups = (
            ({"name": shard.name, "kept": n}, shard.table()) for shard, n in zip(self, kept, strict=True)
        )
        write_table(path, self._schema, groups, header, n_shards=len(self.shards))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return reopened, (load_plan, PlanError, os.fspath(self.path), self.hash)
        return Plan, (InMemory(self.header, [shard.table() for shard in self]),)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Open a plan's file: the header is read and checked now, each shard's rows when first needed.

    Raises:
        PlanError: missing, damaged, of another kind, or of a newer version.
    """
    table = open_table(path, kind="plan", version=VERSION, error=PlanError, header=PlanHeader)
    return Plan(table, path=as_path(path).absolute())


def as_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """`plan` itself, or the plan at that path."""
    return plan if isinstance(plan, Plan) else load_plan(plan)
