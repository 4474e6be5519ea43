"""Applies a user's function to each sample of a stream, with repeatable randomness."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adq_wds.core.rng import check_seed, generator
from adq_wds.pipes.base import Pipe
from adq_wds.samples.fields import EPOCH_FIELD, Sample, clean_fields
from adq_wds.shards.names import base_name


@dataclass(frozen=True, eq=False)
class Map(Pipe):
    """Apply a function to every sample.

    A function with a parameter named ``rng`` gets a numpy generator keyed by seed, epoch, shard and key: its draws
    are the same on any worker, and differ between epochs.

    Args:
        function: gets a shallow copy of the sample, without `__adq_*` fields that a tar brought, and gives a
            sample. Must pickle to run in spawned workers.
        seed: of the generators.

    Raises (while streaming):
        SampleError: the function raised, or did not give a sample; names shard and key.

    >>> def flip(sample, rng):
    ...     return {**sample, "flip": bool(rng.random() < 0.5)}
    >>> [s["flip"] for s in Map(flip, seed=1)({"__key__": k, "__url__": "a.tar"} for k in "abcd")]
    [False, True, False, False]
    """

    one_to_one: ClassVar[bool] = True
    function: Callable[..., Sample]
    seed: int = field(default=0, kw_only=True)
    _takes_rng: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if not callable(self.function):
            raise ValueError(f"Map needs a function of a sample, got {self.function!r}")
        object.__setattr__(self, "_takes_rng", _takes_rng(self.function))

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The function's result for each sample."""
        return [self._mapped(sample) for sample in samples]

    def _mapped(self, sample: Sample) -> Sample:
        sample = clean_fields(sample)  # a copy, and no epoch but a source's
        options: dict[str, Any] = {}
        if self._takes_rng:
            shard, key = base_name(sample["__url__"]), sample["__key__"]
            options["rng"] = generator(self.seed, int(sample.get(EPOCH_FIELD, 0)), shard, key)
        out = self.function(sample, **options)
        if not isinstance(out, dict):
            raise TypeError(f"the function gave {type(out).__name__}, expected a sample (a dict)")
        return out


def _takes_rng(function: Callable[..., Any]) -> bool:
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False
