"""Declares what functions of a plan need of it, so that `Plan` may call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from adq_wds.remote.url_path import AnyPath

if TYPE_CHECKING:
    from adq_wds.tables.plan_rows import PlanShard


class PlanView(Protocol):
    """A plan to read; `Plan` says what each is."""

    header: Any
    path: AnyPath | None
    shards: list[str]
    n_samples: int
    n_kept: int

    def shard(self, name: str, *, hold: bool = True) -> PlanShard: ...

    def with_reasons(self, name: str) -> PlanShard: ...

    def __iter__(self) -> Iterator[PlanShard]: ...
