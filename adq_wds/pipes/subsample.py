"""Which samples of a stream go on? Those that the plan keeps."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field

from adq_wds.errors import PlanError, ShardError, located, shorten
from adq_wds.pipe import Pipe
from adq_wds.sample import Sample, clean_fields
from adq_wds.shards import ShardNames
from adq_wds.tables.plan import Plan, as_plan


@dataclass(frozen=True, eq=False)
class Subsample(Pipe):
    """Let through the samples that a plan keeps, bytes untouched; only `__adq_*` fields from a tar are dropped.

    Put it before decoding, so that what is dropped is never decoded:
    ``wds.WebDataset(urls).compose(adq.Subsample(plan)).decode("pil")``. It works after decoding too. Workers may
    be forked or spawned. The stream is still read whole; to read less in every epoch, write the kept samples to
    shards of their own with ``adq write``.

    Args:
        plan: a plan, or its path.
        root: the folder that the plan's shard names are relative to; needed only where a `__url__` fits
            several of them.
        verify: compare the kept samples' bytes with the plan's checksum, while they are still bytes. Turn it
            off when a stage before this one changes or selects fields.

    Raises:
        TypeError: `plan` is no plan and no path, as when the class itself is made a stage.
        PlanError: the plan's file is missing or damaged.

    Raises (while streaming):
        PlanError: a shard or key is not in the plan, or a `__url__` fits several shards.
        ShardError: a kept sample's bytes are not those that were planned.
    """

    plan: Plan | str | os.PathLike[str]
    root: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    verify: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.plan, Plan | str | os.PathLike):
            kind = type(self.plan).__name__
            raise TypeError(f"Subsample needs a plan: .compose(adq.Subsample(plan)); got a {kind}")
        object.__setattr__(self, "plan", as_plan(self.plan))
        root = None if self.root is None else os.fspath(self.root)
        object.__setattr__(self, "_names", self._plan.names(root=root))
        object.__setattr__(self, "_shards", {})

    @property
    def _plan(self) -> Plan:
        assert isinstance(self.plan, Plan)
        return self.plan

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The kept samples, as new dicts."""
        out = []
        verify = self.verify
        url, name = None, ""
        by_key: dict[str, tuple[bool, int]] = {}
        for sample in samples:
            if sample["__url__"] != url:  # neighbours mostly come from one shard
                url = sample["__url__"]
                name = self._find(url)
                by_key = self._plan.shard(name).by_key
            row = by_key.get(sample["__key__"])
            if row is None:
                raise located(
                    PlanError("not in the plan; the shard changed since it was planned, so plan again"),
                    shard=name,
                    key=sample["__key__"],
                )
            kept, crc32 = row
            if kept:
                if verify:
                    _check_bytes(sample, crc32, shard=name)
                out.append(clean_fields(sample))
        return out

    def _find(self, url: str) -> str:
        known: dict[str, str] = self._shards  # type: ignore[attr-defined]
        name = known.get(url)
        if name is None:
            names: ShardNames = self._names  # type: ignore[attr-defined]
            name = known[url] = names.find(url)
        return name


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
                f"bytes differ from the plan's (crc32 {found:08x}, planned {crc32:08x}): the shard changed since it "
                "was planned, so plan again; or a stage before this one changed the fields "
                f"{shorten(sorted(k for k in sample if k[:2] != '__'))}, then pass verify=False"
            ),
            shard=shard,
            key=sample["__key__"],
        )
