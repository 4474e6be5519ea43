"""Does every pipe keep the law? Walked over the registry, so a new pipe is tested the day it is added."""

import copy
import dataclasses
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import adq_wds as adq
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.pipes.base import Pipe
from adq_wds.pipes.batches import batch_of, samples_of
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import iter_spans, read_sample
from tests.conftest import write_tar

Samples = list[dict[str, Any]]


def brighten(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**sample, "gain": float(rng.random())}


def small_mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(MaeSize((32, 32), 16, 16, 1, 2, 8, 1, 2)).eval()


def mixed(images: np.ndarray, labels: np.ndarray | None, noise: np.ndarray) -> np.ndarray:
    """An engine without a network: exact, whatever the batch."""
    assert labels is not None
    return np.clip(images + noise / 8 + labels[:, None, None, None] / 64, -1, 1).astype(np.float32)


TEXTURE = adq.importance("texture", patch=4)
THUMBNAIL = adq.encoder("thumbnail")
# How to make one of each, and variants of some, from a plan beside which a codebook and soft labels lie; a pipe without a line here
# fails the first test.
MAKERS: dict[str, Callable[[Path], Pipe]] = {
    "assign_bins": lambda plan: adq.AssignBins(plan.with_name("codebook.safetensors")),
    "cosine_score": lambda plan: adq.CosineScore(THUMBNAIL, batch_size=7),
    "assign_bins, cleaning": lambda plan: adq.AssignBins(plan.with_name("cleaning.safetensors")),
    "decode": lambda plan: adq.Decode(to="numpy"),
    "decode, stored patches": lambda plan: adq.Decode(to="patches"),
    "drop_patches": lambda plan: adq.DropPatches(TEXTURE, keep=0.75),
    "drop_patches, random": lambda plan: adq.DropPatches(adq.importance("random"), size=32, seed=5),
    "drop_patches, by tolerance": lambda plan: adq.DropPatches(TEXTURE, tolerance=0.01, encoder=THUMBNAIL),
    "embed": lambda plan: adq.Embed(THUMBNAIL, batch_size=7),
    "encode_patches": lambda plan: adq.EncodePatches(),
    "map": lambda plan: adq.Map(brighten, seed=3),
    "reconstruct": lambda plan: adq.Reconstruct(small_mae()),
    "soft_labels": lambda plan: adq.SoftLabels(plan.with_name("soft.parquet")),
    "subsample": lambda plan: adq.Subsample(plan),
    "subsample, fresh": lambda plan: adq.Subsample(plan, epoch=1),
    "subsample, by codebook": lambda plan: adq.Subsample(plan.with_name("codebook.safetensors"), keep=0.5),
    "vary": lambda plan: adq.Vary(mixed, label="cls", seed=4, batch_size=7),
    "vary, always the same": lambda plan: adq.Vary(mixed, label="cls", variant=2),
    "subsample, by cleaning codebook": lambda plan: adq.Subsample(
        plan.with_name("cleaning.safetensors"), keep=0.5
    ),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """40 samples of two classes, each with an embedding of its own."""
    rng = np.random.default_rng(0)
    path = tmp_path / "train-000000.tar"
    with wds.TarWriter(str(path), mtime=0) as writer:
        for i in range(40):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            vector = rng.random(192, dtype=np.float32)
            writer.write({"__key__": f"s{i:05d}", "jpg": image, "cls": i % 2, "emb.npy": vector})
    return path


@pytest.fixture
def plan(shard: Path, tmp_path: Path) -> Path:
    """A plan; beside it lie soft labels and two codebooks, of which one cleans."""
    path = tmp_path / "plan.parquet"
    adq.Plan.from_keys(str(shard), [f"s{i:05d}" for i in range(0, 40, 3)]).save(path)
    features = adq.embed_shards(shard, "thumbnail", tmp_path / "features")
    adq.fit_codebook(features, bins=3, min_pilot=5, out=tmp_path / "codebook.safetensors")
    adq.soften_labels(features, out=tmp_path / "soft.parquet")
    options: dict[str, Any] = {"clean": 0.2, "dedup": "exact", "balance": "equal"}
    adq.fit_codebook(features, bins=3, min_pilot=5, **options, out=tmp_path / "cleaning.safetensors")
    return path


def ready(name: str, samples: Samples, plan: Path) -> Samples:
    """The samples as the stage before this pipe gives them."""
    if name == "subsample, by cleaning codebook":
        return MAKERS["assign_bins, cleaning"](plan).apply(samples)
    if name == "subsample, by codebook":
        return MAKERS["assign_bins"](plan).apply(samples)
    if name == "cosine_score":
        return MAKERS["vary"](plan).apply(MAKERS["embed"](plan).apply(samples))
    if name in ("encode_patches", "decode, stored patches", "reconstruct"):
        samples = MAKERS["drop_patches, random"](plan).apply(samples)
    return adq.EncodePatches().apply(samples) if name == "decode, stored patches" else samples


@pytest.fixture
def raw(shard: Path) -> Samples:
    with open_shard(shard) as buffer:
        spans = list(iter_spans(buffer, shard=shard.name))
        return [read_sample(buffer, span, url=str(shard)) for span in spans]


@pytest.fixture
def samples(name: str, raw: Samples, plan: Path) -> Samples:
    return ready(name, raw, plan)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Image.Image):
        return a.mode == b.mode and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_every_public_pipe_is_tested_here(plan: Path) -> None:
    public = {type_ for name in adq.__all__ if isinstance(type_ := getattr(adq, name), type)}
    made = {type(make(plan)) for make in MAKERS.values()}
    assert made == {each for each in public if issubclass(each, Pipe)} - {Pipe}


@pytest.fixture(params=sorted(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(name: str, plan: Path) -> Pipe:
    return MAKERS[name](plan)


def test_the_cut_into_chunks_never_changes_the_answer(pipe: Pipe, samples: Samples) -> None:
    whole = pipe.apply(samples)
    assert whole, "a law about nothing"
    for cut in range(len(samples) + 1):
        assert same(pipe.apply(samples[:cut]) + pipe.apply(samples[cut:]), whole)


def test_calling_a_pipe_is_applying_it(pipe: Pipe, samples: Samples) -> None:
    assert same(list(pipe(iter(samples))), pipe.apply(samples))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_columns_of_any_batch_size_give_equal_rows(pipe: Pipe, samples: Samples, size: int) -> None:
    """As Ray Data's map_batches hands them to a class."""
    made: Samples = []
    for i in range(0, len(samples), size):
        batch = pipe(batch_of(samples[i : i + size]))
        made += samples_of(batch)
        assert len({len(column) for column in batch.values()}) == 1
    assert same(made, pipe.apply(samples))


def test_inputs_are_left_alone_and_outputs_are_new(pipe: Pipe, samples: Samples) -> None:
    before = copy.deepcopy(samples)
    out = pipe.apply(samples)
    assert same(samples, before)
    assert not {id(sample) for sample in out} & {id(sample) for sample in samples}


def test_outputs_keep_the_order_of_the_inputs(pipe: Pipe, samples: Samples) -> None:
    order = {sample["__key__"]: i for i, sample in enumerate(samples)}
    places = [order[sample["__key__"]] for sample in pipe.apply(samples)]
    assert places == sorted(set(places))


def test_a_pipe_survives_pickling(pipe: Pipe, samples: Samples) -> None:
    assert same(pickle.loads(pickle.dumps(pipe)).apply(samples), pipe.apply(samples))  # noqa: S301 - our own bytes


def test_one_sample_is_refused_at_once(pipe: Pipe, samples: Samples) -> None:
    with pytest.raises(TypeError, match=r"a pipe takes a stream of samples, got one sample \(a dict\)"):
        pipe(samples[0])  # type: ignore[arg-type]


def test_a_stage_in_the_wrong_place_ends_the_stream(pipe: Pipe, samples: Samples) -> None:
    pipe = dataclasses.replace(pipe, on_error="skip")
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for wrong in (tuple(samples[0].values()), ("ab", "cd"), list(samples[0].values()), batch):
        with pytest.raises(TypeError, match=r"expected a sample: .* put this stage before to_tuple/batched"):
            list(pipe(iter([*samples[:5], wrong])))  # type: ignore[list-item]


def test_an_unknown_policy_is_refused_when_a_pipe_is_made(pipe: Pipe) -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise', 'skip' or a function, got 'warn'"):
        dataclasses.replace(pipe, on_error="warn")  # type: ignore[arg-type]


def test_what_a_tar_forges_changes_nothing_and_goes_no_further(
    name: str, raw: Samples, samples: Samples, plan: Path, tmp_path: Path
) -> None:
    honest = MAKERS[name](plan).apply(samples)
    (tmp_path / "forged").mkdir()
    url = str(tmp_path / "forged" / "train-000000.tar")  # the same name, so the same draws
    forged = {"__adq_epoch__": b"1", "__adq_bin__": b"1", "__adq_encoder__": b"1"}
    fields = [{**forged, **{f: data for f, data in sample.items() if f[:2] != "__"}} for sample in raw]
    keyed = zip((sample["__key__"] for sample in raw), fields, strict=True)
    write_tar(Path(url), [(f"{key}.{name}", data) for key, each in keyed for name, data in each.items()])
    keys = [f"s{i:05d}" for i in range(0, 40, 3)]
    adq.Plan.from_keys(url, keys).save(tmp_path / "forged.parquet")
    read = list(wds.WebDataset(url, shardshuffle=False))
    assert read[0]["__adq_epoch__"] == b"1", "webdataset lets it through"
    stream = ready(name, read, plan)  # the stage before took some out
    stream = [sample | {k: v for k, v in forged.items() if k not in sample} for sample in stream]
    out = list(MAKERS[name](tmp_path / "forged.parquet")(stream))
    place = ("__url__", "__local_path__")
    theirs, ours = ([{k: v for k, v in s.items() if k not in place} for s in each] for each in (out, honest))
    assert same(theirs, ours)


def _apply_elsewhere(pipe: Pipe, samples: Samples) -> Samples:
    torch.set_num_threads(1)  # as torch's own workers do: it would wait for threads that a fork has not
    return pipe.apply(samples)


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_pipe_works_in_another_process(start: str, plan: Path, raw: Samples) -> None:
    pipes = [(make(plan), ready(name, raw, plan)) for name, make in MAKERS.items()]
    with multiprocessing.get_context(start).Pool(1) as pool:
        for pipe, samples in pipes:
            assert same(pool.apply(_apply_elsewhere, (pipe, samples)), pipe.apply(samples))


def test_a_stage_is_lazy(pipe: Pipe, samples: Samples) -> None:
    taken = []

    def source() -> Iterator[dict[str, Any]]:
        for sample in samples:
            taken.append(sample)
            yield sample

    next(iter(pipe(source())))
    assert len(taken) <= pipe.chunk


def test_a_pipe_is_a_torchdata_mapper(pipe: Pipe, samples: Samples) -> None:
    from torchdata import nodes

    batches = nodes.Batcher(nodes.IterableWrapper(samples), batch_size=7, drop_last=False)
    node = nodes.Unbatcher(nodes.Mapper(batches, pipe.apply))
    assert same(list(nodes.Loader(node)), pipe.apply(samples))


def test_a_pipe_has_no_settable_field(pipe: Pipe) -> None:
    with pytest.raises(AttributeError):
        pipe.on_error = "skip"  # type: ignore[misc]
