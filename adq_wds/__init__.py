"""Adaptive Dataset Quantization for WebDataset and torchdata.

Two movements: fit (shards → features → bins → scores → plan) and stream (shards + plan → kept samples).
Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adq_wds.errors import (
        AdqError,
        CodebookError,
        FeaturesError,
        LoaderClosed,
        PlanError,
        SampleError,
        ShardError,
        StateError,
    )
    from adq_wds.jobs.embed import embed_shards
    from adq_wds.jobs.plan import build_plan
    from adq_wds.jobs.write import write_shards
    from adq_wds.pipe import Pipe
    from adq_wds.pipes.decode import Decode
    from adq_wds.pipes.map import Map
    from adq_wds.pipes.subsample import Subsample
    from adq_wds.registry import encoder
    from adq_wds.sample import Encoder, Importance, Sample
    from adq_wds.score import Score
    from adq_wds.tables.bins import Bins
    from adq_wds.tables.features import Features
    from adq_wds.tables.plan import Plan, load_plan

_HOME = {
    "AdqError": "errors",
    "Bins": "tables.bins",
    "CodebookError": "errors",
    "Decode": "pipes.decode",
    "Encoder": "sample",
    "Features": "tables.features",
    "FeaturesError": "errors",
    "Importance": "sample",
    "LoaderClosed": "errors",
    "Map": "pipes.map",
    "Pipe": "pipe",
    "Plan": "tables.plan",
    "PlanError": "errors",
    "Sample": "sample",
    "SampleError": "errors",
    "Score": "score",
    "ShardError": "errors",
    "StateError": "errors",
    "Subsample": "pipes.subsample",
    "build_plan": "jobs.plan",
    "embed_shards": "jobs.embed",
    "encoder": "registry",
    "load_plan": "tables.plan",
    "write_shards": "jobs.write",
}

__all__ = [
    "AdqError",
    "Bins",
    "CodebookError",
    "Decode",
    "Encoder",
    "Features",
    "FeaturesError",
    "Importance",
    "LoaderClosed",
    "Map",
    "Pipe",
    "Plan",
    "PlanError",
    "Sample",
    "SampleError",
    "Score",
    "ShardError",
    "StateError",
    "Subsample",
    "__version__",
    "build_plan",
    "embed_shards",
    "encoder",
    "load_plan",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adq_wds' has no attribute {name!r}")
    value = getattr(import_module(f"adq_wds.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
