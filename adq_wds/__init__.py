"""Adaptive Dataset Quantization for WebDataset and torchdata.

Two stages: fit (shards → features → bins → scores → plan or codebook) and stream (shards and one of these →
kept samples). Names are loaded when first used, so that importing the package costs nothing.
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
    from adq_wds.jobs.select import select_samples
    from adq_wds.jobs.synthesize import synthesize
    from adq_wds.mae.checkpoints import load_mae
    from adq_wds.mae.reconstruct_batches import reconstruct_batches
    from adq_wds.pipes.assign_bins import AssignBins
    from adq_wds.pipes.base import Pipe
    from adq_wds.pipes.cosine import CosineScore
    from adq_wds.pipes.decode import Decode
    from adq_wds.pipes.drop_patches import DropPatches
    from adq_wds.pipes.embed import Embed
    from adq_wds.pipes.encode_patches import EncodePatches
    from adq_wds.pipes.map import Map
    from adq_wds.pipes.reconstruct import Reconstruct
    from adq_wds.pipes.soft_labels import SoftLabels
    from adq_wds.pipes.subsample import Subsample
    from adq_wds.pipes.tolerance import choose_tolerance, measure_drops
    from adq_wds.pipes.vary import Vary
    from adq_wds.planning.build_plan import build_plan
    from adq_wds.planning.fit_codebook import fit_codebook
    from adq_wds.planning.soften_labels import soften_labels
    from adq_wds.protocols import Encoder, Importance
    from adq_wds.registry import encoder, importance
    from adq_wds.remote.cache import Cache
    from adq_wds.samples.fields import Sample
    from adq_wds.score import Score
    from adq_wds.stream.class_rates import ClassRates
    from adq_wds.stream.dataset import ShardDataset
    from adq_wds.stream.loader import Loader
    from adq_wds.stream.nodes import as_node
    from adq_wds.tables.bins import Bins
    from adq_wds.tables.codebook import Codebook, load_codebook
    from adq_wds.tables.column import Column
    from adq_wds.tables.features import Features
    from adq_wds.tables.margin_recorder import MarginRecorder
    from adq_wds.tables.plan import Plan, load_plan
    from adq_wds.writing.write_shards import write_shards

_NAMES = {  # of each module; type checkers read them above, and programs when one is first used
    "embedding.embed_shards": "embed_shards",
    "errors": "AdqError CodebookError FeaturesError LoaderClosed PlanError SampleError ShardError StateError",
    "jobs.select": "select_samples",
    "jobs.synthesize": "synthesize",
    "mae.checkpoints": "load_mae",
    "mae.reconstruct_batches": "reconstruct_batches",
    "pipes.assign_bins": "AssignBins",
    "pipes.base": "Pipe",
    "pipes.cosine": "CosineScore",
    "pipes.decode": "Decode",
    "pipes.drop_patches": "DropPatches",
    "pipes.embed": "Embed",
    "pipes.encode_patches": "EncodePatches",
    "pipes.map": "Map",
    "pipes.reconstruct": "Reconstruct",
    "pipes.soft_labels": "SoftLabels",
    "pipes.subsample": "Subsample",
    "pipes.tolerance": "choose_tolerance measure_drops",
    "pipes.vary": "Vary",
    "planning.build_plan": "build_plan",
    "planning.fit_codebook": "fit_codebook",
    "planning.soften_labels": "soften_labels",
    "protocols": "Encoder Importance",
    "registry": "encoder importance",
    "remote.cache": "Cache",
    "samples.fields": "Sample",
    "score": "Score",
    "stream.class_rates": "ClassRates",
    "stream.dataset": "ShardDataset",
    "stream.loader": "Loader",
    "stream.nodes": "as_node",
    "tables.bins": "Bins",
    "tables.codebook": "Codebook load_codebook",
    "tables.column": "Column",
    "tables.features": "Features",
    "tables.margin_recorder": "MarginRecorder",
    "tables.plan": "Plan load_plan",
    "writing.write_shards": "write_shards",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AdqError", "AssignBins", "Bins", "Cache", "ClassRates", "Codebook", "CodebookError", "Column",
    "CosineScore", "Decode", "DropPatches", "Embed", "EncodePatches", "Encoder", "Features",
    "FeaturesError", "Importance", "Loader", "LoaderClosed", "Map", "MarginRecorder", "Pipe", "Plan",
    "PlanError", "Reconstruct", "Sample", "SampleError", "Score", "ShardDataset", "ShardError",
    "SoftLabels", "StateError", "Subsample", "Vary", "__version__", "as_node", "build_plan",
    "choose_tolerance", "embed_shards", "encoder", "fit_codebook", "importance", "load_codebook",
    "load_mae", "load_plan", "measure_drops", "reconstruct_batches", "select_samples", "soften_labels",
    "synthesize", "write_shards",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adq_wds' has no attribute {name!r}")
    value = getattr(import_module(f"adq_wds.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
