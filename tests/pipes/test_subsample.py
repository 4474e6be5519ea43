"""A stock WebDataset pipeline with one more line reads exactly the kept samples, bytes untouched."""

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import adq_wds as adq

Setup = tuple[list[str], Path, adq.Plan]


@pytest.fixture
def setup(make_shard: Callable[..., Path], tmp_path: Path) -> Setup:
    """Three shards of 30 samples, the second with the first's keys; a plan of every third sample."""
    shards = [make_shard("t-0.tar", 30), make_shard("t-1.tar", 30), make_shard("t-2.tar", 30, first=30)]
    keys = [
        (path.name, f"s{i:05d}")
        for path, first in zip(shards, (0, 0, 30), strict=True)
        for i in range(first, first + 30, 3)
    ]
    path = tmp_path / "plan.parquet"
    adq.Plan.from_keys(shards, keys).save(path)
    return [str(shard) for shard in shards], path, adq.load_plan(path)


def kept_by(plan: adq.Plan) -> list[tuple[str, str]]:
    return [(s.name, k) for s in plan for k, kept in zip(s.spans.keys, s.kept, strict=True) if kept]


def raw(urls: list[str], **options: Any) -> wds.WebDataset:
    return wds.WebDataset(urls, shardshuffle=False, **options)


def ids(samples: Any) -> list[tuple[str, str]]:
    return [(Path(sample["__url__"]).name, sample["__key__"]) for sample in samples]


def test_exactly_the_kept_samples_pass_with_their_bytes(setup: Setup) -> None:
    urls, path, plan = setup
    everything = {(Path(s["__url__"]).name, s["__key__"]): s for s in raw(urls)}
    out = list(raw(urls).compose(adq.Subsample(path)))
    assert ids(out) == kept_by(plan)
    for sample in out:
        assert sample == everything[Path(sample["__url__"]).name, sample["__key__"]]


def identity(sample: Any) -> Any:
    return sample


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_a_stock_loop_reads_them_in_workers_for_two_epochs(
    setup: Setup, workers: int, start: str | None
) -> None:
    """Spawned workers, of 3 s each, stay for the second epoch; forked ones are started anew."""
    urls, path, plan = setup
    dataset = raw(urls, empty_check=False).compose(adq.Subsample(path)).to_tuple("__url__", "__key__")
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=start == "spawn",
    )
    for _epoch in range(2):
        seen = Counter((Path(url).name, key) for url, key in loader)
        assert seen == Counter(kept_by(plan))


def test_it_works_before_and_after_decode(setup: Setup) -> None:
    urls, path, plan = setup
    before = raw(urls).compose(adq.Subsample(path)).decode("pil")
    after = raw(urls).decode("pil").compose(adq.Subsample(path))
    assert ids(before) == ids(after) == kept_by(plan)


def test_what_is_dropped_is_never_decoded(setup: Setup) -> None:
    """F18."""
    urls, path, plan = setup
    calls = []

    def decoder(key: str, data: bytes) -> Any:
        if key != ".jpg":
            return None
        calls.append(key)
        return Image.open(io.BytesIO(data)).convert("RGB")

    assert sum(1 for _ in raw(urls).compose(adq.Subsample(path)).decode(decoder)) == len(plan)
    assert len(calls) == len(plan)


def test_shuffled_streams_are_subsampled_alike(setup: Setup) -> None:
    urls, path, plan = setup
    shuffled = wds.WebDataset(urls, shardshuffle=3).shuffle(50).compose(adq.Subsample(path))
    assert Counter(ids(shuffled)) == Counter(kept_by(plan))


def test_the_data_may_move(setup: Setup, tmp_path: Path) -> None:
    urls, path, plan = setup
    (tmp_path / "elsewhere").mkdir()
    moved = [str(Path(url).rename(tmp_path / "elsewhere" / Path(url).name)) for url in urls]
    assert ids(raw(moved).compose(adq.Subsample(path))) == kept_by(plan)


def test_a_shard_that_is_not_in_the_plan_is_an_error(setup: Setup, make_shard: Callable[..., Path]) -> None:
    urls, path, _ = setup
    other = str(make_shard("u-0.tar", 3))
    with pytest.raises(adq.PlanError, match=r"shard 'u-0.tar' is not in the plan"):
        list(raw([other, *urls]).compose(adq.Subsample(path)))


def test_a_sample_that_is_not_in_the_plan_is_an_error(setup: Setup, make_shard: Callable[..., Path]) -> None:
    urls, path, _ = setup
    make_shard("t-0.tar", 31)
    with pytest.raises(adq.PlanError, match=r"shard t-0.tar, key 's00030': not in the plan"):
        list(raw(urls).compose(adq.Subsample(path)))


def test_a_changed_byte_is_an_error_that_names_the_sample(setup: Setup) -> None:
    urls, path, _ = setup
    data = bytearray(Path(urls[1]).read_bytes())
    data[512 + 30] ^= 1  # in the payload of the first sample, which is kept
    Path(urls[1]).write_bytes(data)
    with pytest.raises(adq.ShardError, match=r"shard t-1.tar, key 's00000': bytes differ from the plan's"):
        list(raw(urls).compose(adq.Subsample(path)))
    assert len(list(raw(urls).compose(adq.Subsample(path, verify=False)))) == 30


def test_selected_fields_need_verify_off_and_the_error_says_so(setup: Setup) -> None:
    urls, path, plan = setup
    options = {"select_files": lambda name: name.endswith(".cls")}
    with pytest.raises(
        adq.ShardError, match=r"a stage before this one changed the fields \['cls'\].*verify=False"
    ):
        list(raw(urls, **options).compose(adq.Subsample(path)))
    assert len(list(raw(urls, **options).compose(adq.Subsample(path, verify=False)))) == len(plan)


def test_of_shards_with_one_base_name_the_changed_one_is_told_by_its_name_in_the_plan(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in ("A", "B"):
        (tmp_path / "two" / folder).mkdir(parents=True)
    paths = [make_shard(f"two/{folder}/t.tar", 3) for folder in ("A", "B")]
    plan = adq.Plan.from_keys([str(path) for path in paths], None)
    data = bytearray(paths[1].read_bytes())
    data[512 + 30] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(adq.ShardError, match=r"^shard B/t.tar, key 's00000': bytes differ"):
        list(raw([str(path) for path in paths]).compose(adq.Subsample(plan)))


def test_shards_that_take_turns_are_each_held_against_their_own_rows(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    """Two shards of the same keys, one keeping what the other drops, mixed sample by sample."""
    urls = [str(make_shard("a.tar", 8)), str(make_shard("b.tar", 8))]
    kept = [(("a.tar", "b.tar")[i % 2], f"s{i:05d}") for i in range(8)]
    mixed = [sample for pair in zip(raw(urls[:1]), raw(urls[1:]), strict=True) for sample in pair]
    out = adq.Subsample(adq.Plan.from_keys(urls, kept)).apply(mixed)
    assert ids(out) == kept


def test_a_forged_field_is_dropped_and_counts_in_the_checksum(tmp_path: Path) -> None:
    def forge(payload: bytes) -> str:
        with tarfile.open(tmp_path / "f.tar", "w") as tar:
            for name, data in (("a.jpg", b"j"), ("a.__adq_epoch__", payload), ("a.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return str(tmp_path / "f.tar")

    url = forge(b"5")
    stage = adq.Subsample(adq.Plan.from_keys(url, None))
    (sample,) = raw([url]).compose(stage)
    assert set(sample) == {"__key__", "__url__", "__local_path__", "jpg", "cls"}
    with pytest.raises(adq.ShardError, match="key 'a': bytes differ from the plan's"):
        list(raw([forge(b"6")]).compose(stage))


def test_what_is_no_plan_is_refused_with_the_call_that_was_meant(setup: Setup, tmp_path: Path) -> None:
    urls, path, plan = setup
    text = r"^Subsample needs a plan: \.compose\(adq\.Subsample\(plan\)\); got a "
    for wrong in (3, None, b"plan.parquet", iter([]), raw(urls), {"plan": 1}):
        with pytest.raises(TypeError, match=text + type(wrong).__name__):
            adq.Subsample(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=text + "generator"):
        list(raw(urls).compose(adq.Subsample))
    with pytest.raises(adq.PlanError, match="no such file"):
        adq.Subsample(tmp_path / "none.parquet")
    with pytest.raises(TypeError, match=r"os\.PathLike object, not int"):
        adq.Subsample(path, root=3)  # type: ignore[arg-type]
    assert ids(raw(urls).compose(adq.Subsample(path, root=Path(urls[0]).parent))) == kept_by(plan)


def test_a_stage_after_to_tuple_or_batched_is_told_where_to_go(setup: Setup) -> None:
    urls, path, _ = setup
    text = r"^Subsample got a (list|tuple|dict with .*), expected a sample: .* before to_tuple/batched$"
    for stream in (raw(urls).to_tuple("jpg", "cls"), raw(urls).batched(4), raw(urls).batched(4, list)):
        with pytest.raises(TypeError, match=text):
            list(stream.compose(adq.Subsample(path, on_error="skip")))


def test_select_and_map_are_refused_where_they_let_everything_through(setup: Setup) -> None:
    urls, path, _ = setup
    stage = adq.Subsample(path)
    for stream in (
        raw(urls).select(stage),
        raw(urls).map(stage),
        raw(urls).to_tuple("jpg", "cls").map(stage),
    ):
        with pytest.raises(
            TypeError, match=r"got one sample \(a (dict|tuple)\): use \.compose\(Subsample\(\.\.\.\)\)"
        ):
            list(stream)


def test_plan_errors_are_never_skipped(setup: Setup, make_shard: Callable[..., Path]) -> None:
    urls, path, _ = setup
    make_shard("t-0.tar", 31)
    with pytest.raises(adq.PlanError):
        list(raw(urls).compose(adq.Subsample(path, on_error="skip")))


def test_decode_reads_a_stream_and_can_skip_bad_samples(
    setup: Setup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    urls, _, _ = setup
    samples = list(raw(urls[:1]))
    samples[3]["jpg"] = b"<html>"
    del samples[5]["cls"]
    with pytest.raises(adq.SampleError, match=r"shard t-0.tar, key 's00003', field 'jpg': not an image"):
        list(adq.Decode()(iter(samples)))
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        out = list(adq.Decode(on_error="skip")(iter(samples)))
    assert [s["__key__"] for s in out] == [s["__key__"] for i, s in enumerate(samples) if i not in (3, 5)]
    assert "Decode: read 30 = kept 28 + dropped 0 + bad 2" in caplog.text
    assert caplog.text.count('"skipped_by": "Decode"') == 2


@pytest.mark.parametrize("to", ["pil", "numpy", "torch"])
def test_decode_gives_the_same_pixels_in_every_form(setup: Setup, to: str) -> None:
    urls, _, _ = setup
    for sample, expected in zip(adq.Decode(to=to)(raw(urls[:1])), raw(urls[:1]).decode("rgb8"), strict=True):
        image, label = sample["image"], sample["label"]
        if to == "torch":
            assert image.dtype == torch.uint8
            image = image.permute(1, 2, 0).numpy()
        assert (np.asarray(image) == expected["jpg"]).all()
        assert label == expected["cls"]
        assert set(sample) == {"__key__", "__url__", "__local_path__", "image", "label"}


def test_map_draws_are_keyed_by_sample_and_epoch(setup: Setup) -> None:
    urls, _, _ = setup

    def noise(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**sample, "u": rng.random()}

    def run(samples: Any) -> dict[tuple[str, str], float]:
        return {(s["__url__"], s["__key__"]): s["u"] for s in adq.Map(noise, seed=1)(iter(samples))}

    samples = list(raw(urls))
    first = run(samples)
    assert len(set(first.values())) == 90
    assert run(reversed(samples)) == first
    assert run([{**s, "__adq_epoch__": 1} for s in samples]) != first


def test_map_names_the_sample_its_function_fails_on(setup: Setup) -> None:
    urls, _, _ = setup

    def fail(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["__key__"] == "s00007":
            raise ZeroDivisionError("no")
        return sample

    with pytest.raises(adq.SampleError, match=r"shard t-0.tar, key 's00007': Map: ZeroDivisionError: 'no'"):
        list(raw(urls).compose(adq.Map(fail)))
    with pytest.raises(adq.SampleError, match=r"the function gave NoneType, expected a sample"):
        list(adq.Map(lambda sample: None)(raw(urls)))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="Map needs a function"):
        adq.Map(3)  # type: ignore[arg-type]


def test_a_small_net_learns_from_the_stream(tmp_path: Path) -> None:
    """One epoch of a stock loop on a plan: the loss falls."""
    rng = np.random.default_rng(0)
    shards = []
    for number in range(4):
        shards.append(str(tmp_path / f"c-{number}.tar"))
        with wds.TarWriter(shards[-1]) as writer:
            for i in range(60):
                pixels = rng.integers(0, 128, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 * (i % 2)] += 64  # reddish or bluish
                writer.write({"__key__": f"{number}-{i}", "png": Image.fromarray(pixels), "cls": i % 2})
    features = adq.embed_shards(shards, "thumbnail", tmp_path / "features")
    plan = adq.build_plan(features, bins=3, keep=0.5, out=tmp_path / "plan.parquet")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    stream = raw(shards).compose(adq.Subsample(plan)).decode("torchrgb").to_tuple("png", "cls").batched(10)
    losses = []
    for images, labels in stream:
        loss = torch.nn.functional.cross_entropy(net(images), torch.as_tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
