"""Which names are public? This list; a name leaves it only with a line in the changelog."""

import pytest

import adq_wds

PUBLIC = [
    "AdqError", "AssignBins", "Bins", "Cache", "ClassRates", "Codebook", "CodebookError", "Column",
    "CosineScore", "Decode", "DropPatches", "Embed", "EncodePatches", "Encoder", "Features",
    "FeaturesError", "Importance", "Loader", "LoaderClosed", "Map", "MarginRecorder", "Pipe", "Plan",
    "PlanError", "Reconstruct", "Sample", "SampleError", "Score", "ShardDataset", "ShardError",
    "SoftLabels", "StateError", "Subsample", "Vary", "as_node", "build_plan", "choose_tolerance",
    "embed_shards", "encoder", "fit_codebook", "importance", "load_codebook", "load_mae", "load_plan",
    "measure_drops", "reconstruct_batches", "select_samples", "soften_labels", "synthesize", "write_shards",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert sorted(n for n in adq_wds.__all__ if not n.startswith("_")) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    value = getattr(adq_wds, name)
    assert name == "Sample" or (value.__doc__ and len(value.__doc__) > 20)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adq_wds.nothing
