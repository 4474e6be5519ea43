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
    from adq_wds.embedding.embed_shards import embed_shards
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
    from adq_wds.mae.checkpoints import load_mae
    from adq_wds.mae.reconstruct_batches import reconstruct_batches
    from adq_wds.pipes.assign_bins import AssignBins
    from adq_wds.pipes.base import Pipe
    from adq_wds.pipes.decode import Decode
    from adq_wds.pipes.drop_patches import DropPatches
    from adq_wds.pipes.embed import Embed
    from adq_wds.pipes.encode_patches import EncodePatches
    from adq_wds.pipes.map import Map
    from adq_wds.pipes.reconstruct import Reconstruct
    from adq_wds.pipes.subsample import Subsample
    from adq_wds.pipes.tolerance import choose_tolerance, measure_drops
    from adq_wds.planning.build_plan import build_plan
    from adq_wds.planning.fit_codebook import fit_codebook
    from adq_wds.protocols import Encoder, Importance
    from adq_wds.registry import encoder, importance
    from adq_wds.remote.cache import Cache
    from adq_wds.samples.fields import Sample
    from adq_wds.score import Score
    from adq_wds.stream.dataset import ShardDataset
    from adq_wds.stream.loader import Loader
    from adq_wds.stream.nodes import as_node
    from adq_wds.tables.bins import Bins
    from adq_wds.tables.codebook import Codebook, load_codebook
    from adq_wds.tables.features import Features
    from adq_wds.tables.plan import Plan, load_plan
    from adq_wds.writing.write_shards import write_shards

_HOME = {
    "AdqError": "errors",
    "AssignBins": "pipes.assign_bins",
    "Bins": "tables.bins",
    "Cache": "remote.cache",
    "Codebook": "tables.codebook",
    "CodebookError": "errors",
    "Decode": "pipes.decode",
    "DropPatches": "pipes.drop_patches",
    "Embed": "pipes.embed",
    "EncodePatches": "pipes.encode_patches",
    "Encoder": "protocols",
    "Features": "tables.features",
    "FeaturesError": "errors",
    "Importance": "protocols",
    "Loader": "stream.loader",
    "LoaderClosed": "errors",
    "Map": "pipes.map",
    "Pipe": "pipes.base",
    "Plan": "tables.plan",
    "PlanError": "errors",
    "Reconstruct": "pipes.reconstruct",
    "Sample": "samples.fields",
    "SampleError": "errors",
    "Score": "score",
    "ShardDataset": "stream.dataset",
    "ShardError": "errors",
    "StateError": "errors",
    "Subsample": "pipes.subsample",
    "as_node": "stream.nodes",
    "build_plan": "planning.build_plan",
    "choose_tolerance": "pipes.tolerance",
    "embed_shards": "embedding.embed_shards",
    "encoder": "registry",
    "fit_codebook": "planning.fit_codebook",
    "importance": "registry",
    "load_codebook": "tables.codebook",
    "load_mae": "mae.checkpoints",
    "load_plan": "tables.plan",
    "measure_drops": "pipes.tolerance",
    "reconstruct_batches": "mae.reconstruct_batches",
    "write_shards": "writing.write_shards",
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
