"""Adaptive Dataset Quantization for WebDataset and torchdata.

Two movements: fit (shards → features → bins → scores → plan or codebook) and stream (shards and one of these → kept
samples).
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
    from adq_wds.io.loader import Loader
    from adq_wds.io.nodes import as_node
    from adq_wds.io.source import ShardDataset
    from adq_wds.jobs.codebook import fit_codebook
    from adq_wds.jobs.embed import embed_shards
    from adq_wds.jobs.plan import build_plan
    from adq_wds.jobs.write import write_shards
    from adq_wds.models.mae_checkpoints import load_mae
    from adq_wds.models.rebuild import reconstruct_batches
    from adq_wds.pipe import Pipe
    from adq_wds.pipes.assign import AssignBins
    from adq_wds.pipes.decode import Decode
    from adq_wds.pipes.drops import choose_tolerance, measure_drops
    from adq_wds.pipes.embed import Embed
    from adq_wds.pipes.encode_patches import EncodePatches
    from adq_wds.pipes.map import Map
    from adq_wds.pipes.patches import DropPatches
    from adq_wds.pipes.reconstruct import Reconstruct
    from adq_wds.pipes.subsample import Subsample
    from adq_wds.registry import encoder, importance
    from adq_wds.remote.cache import Cache
    from adq_wds.sample import Encoder, Importance, Sample
    from adq_wds.score import Score
    from adq_wds.tables.bins import Bins
    from adq_wds.tables.codebook import Codebook, load_codebook
    from adq_wds.tables.features import Features
    from adq_wds.tables.plan import Plan, load_plan

_HOME = {
    "AdqError": "errors",
    "AssignBins": "pipes.assign",
    "Bins": "tables.bins",
    "Cache": "remote.cache",
    "Codebook": "tables.codebook",
    "CodebookError": "errors",
    "Decode": "pipes.decode",
    "DropPatches": "pipes.patches",
    "Embed": "pipes.embed",
    "EncodePatches": "pipes.encode_patches",
    "Encoder": "sample",
    "Features": "tables.features",
    "FeaturesError": "errors",
    "Importance": "sample",
    "Loader": "io.loader",
    "LoaderClosed": "errors",
    "Map": "pipes.map",
    "Pipe": "pipe",
    "Plan": "tables.plan",
    "PlanError": "errors",
    "Reconstruct": "pipes.reconstruct",
    "Sample": "sample",
    "SampleError": "errors",
    "Score": "score",
    "ShardDataset": "io.source",
    "ShardError": "errors",
    "StateError": "errors",
    "Subsample": "pipes.subsample",
    "as_node": "io.nodes",
    "build_plan": "jobs.plan",
    "choose_tolerance": "pipes.drops",
    "embed_shards": "jobs.embed",
    "encoder": "registry",
    "fit_codebook": "jobs.codebook",
    "importance": "registry",
    "load_codebook": "tables.codebook",
    "load_mae": "models.mae_checkpoints",
    "load_plan": "tables.plan",
    "measure_drops": "pipes.drops",
    "reconstruct_batches": "models.rebuild",
    "write_shards": "jobs.write",
}

__all__ = [
    "AdqError",
    "AssignBins",
    "Bins",
    "Cache",
    "Codebook",
    "CodebookError",
    "Decode",
    "DropPatches",
    "Embed",
    "EncodePatches",
    "Encoder",
    "Features",
    "FeaturesError",
    "Importance",
    "Loader",
    "LoaderClosed",
    "Map",
    "Pipe",
    "Plan",
    "PlanError",
    "Reconstruct",
    "Sample",
    "SampleError",
    "Score",
    "ShardDataset",
    "ShardError",
    "StateError",
    "Subsample",
    "__version__",
    "as_node",
    "build_plan",
    "choose_tolerance",
    "embed_shards",
    "encoder",
    "fit_codebook",
    "importance",
    "load_codebook",
    "load_mae",
    "load_plan",
    "measure_drops",
    "reconstruct_batches",
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
