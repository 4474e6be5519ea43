"""A stock WebDataset pipeline with one more line reads exactly the kept samples, bytes untouched."""

import io
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
from tests.conftest import write_tar
from tests.pipes.streams import ids, raw

Setup = tuple[list[str], Path, adq.Plan]


@pytest.fixture
def setup(make_shard: Callable[..., Path], tmp_path: Path) -> Setup:
    """Three shards of 30 samples, the second with the first's keys; a plan of every third sample."""
    shards = [make_shard("t-0.tar", 30), make_shard("t-1.tar", 30), make_shard("t-2.tar", 30, first=30)]
    places = zip(shards, (0, 0, 30), strict=True)
    keys = [(path.name, f"s{i:05d}") for path, first in places for i in range(first, first + 30, 3)]
    path = tmp_path / "plan.parquet"
    adq.Plan.from_keys(shards, keys).save(path)
    return [str(shard) for shard in shards], path, adq.load_plan(path)


def kept_by(plan: adq.Plan) -> list[tuple[str, str]]:
    return [(s.name, k) for s in plan for k, kept in zip(s.spans.keys, s.kept, strict=True) if kept]


def test_exactly_the_kept_samples_pass_with_their_bytes(setup: Setup) -> None:
    urls, path, plan = setup
    everything = {(Path(s["__url__"]).name, s["__key__"]): s for s in raw(urls)}
    out = list(raw(urls).compose(adq.Subsample(path)))
    assert ids(out) == kept_by(plan)
    for sample in out:
        assert sample == everything[Path(sample["__url__"]).name, sample["__key__"]]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_a_stock_loop_reads_them_in_workers_twice(setup: Setup, workers: int, start: str | None) -> None:
    """Spawned workers, of 3 s each, stay for the second epoch; forked ones are started anew."""
    urls, path, plan = setup
    dataset = raw(urls, empty_check=False).compose(adq.Subsample(path)).to_tuple("__url__", "__key__")
    options: Any = {"multiprocessing_context": start, "persistent_workers": start == "spawn"}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, **options)
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


def test_the_data_may_be_shuffled_and_move(setup: Setup, tmp_path: Path) -> None:
    urls, path, plan = setup
    shuffled = wds.WebDataset(urls, shardshuffle=3).shuffle(50).compose(adq.Subsample(path))
    assert Counter(ids(shuffled)) == Counter(kept_by(plan))
    (tmp_path / "elsewhere").mkdir()
    moved = [str(Path(url).rename(tmp_path / "elsewhere" / Path(url).name)) for url in urls]
    assert ids(raw(moved).compose(adq.Subsample(path))) == kept_by(plan)


def test_what_is_not_in_the_plan_is_an_error_also_when_skipping(
    setup: Setup, make_shard: Callable[..., Path]
) -> None:
    urls, path, _ = setup
    other = str(make_shard("u-0.tar", 3))
    make_shard("t-0.tar", 31)
    for given, text in (([other], "shard 'u-0.tar' is not"), (urls, "shard t-0.tar, key 's00030': not in")):
        for on_error in ("raise", "skip"):
            with pytest.raises(adq.PlanError, match=text):
                list(raw(given).compose(adq.Subsample(path, on_error=on_error)))


def change_a_byte(path: Path) -> None:
    """In the payload of the first sample."""
    data = bytearray(path.read_bytes())
    data[512 + 30] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_an_error_that_names_the_sample(setup: Setup) -> None:
    urls, path, _ = setup
    change_a_byte(Path(urls[1]))
    with pytest.raises(adq.ShardError, match=r"shard t-1.tar, key 's00000': bytes differ from the plan's"):
        list(raw(urls).compose(adq.Subsample(path)))
    assert len(list(raw(urls).compose(adq.Subsample(path, verify=False)))) == 30


def test_selected_fields_need_verify_off_and_the_error_says_so(setup: Setup) -> None:
    urls, path, plan = setup
    options = {"select_files": lambda name: name.endswith(".cls")}
    with pytest.raises(adq.ShardError, match=r"changed the fields \['cls'\].*verify=False"):
        list(raw(urls, **options).compose(adq.Subsample(path)))
    assert len(list(raw(urls, **options).compose(adq.Subsample(path, verify=False)))) == len(plan)


def test_a_changed_shard_is_told_by_its_name_in_the_plan(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [make_shard(f"two/{folder}/t.tar", 3) for folder in ("A", "B")]
    plan = adq.Plan.from_keys([str(path) for path in paths], None)
    change_a_byte(paths[1])
    with pytest.raises(adq.ShardError, match=r"^shard B/t.tar, key 's00000': bytes differ"):
        list(raw([str(path) for path in paths]).compose(adq.Subsample(plan)))


def test_shards_that_take_turns_have_their_own_rows(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    """Two shards of the same keys, one keeping what the other drops, mixed sample by sample."""
    urls = [str(make_shard("a.tar", 8)), str(make_shard("b.tar", 8))]
    kept = [(("a.tar", "b.tar")[i % 2], f"s{i:05d}") for i in range(8)]
    mixed = [sample for pair in zip(raw(urls[:1]), raw(urls[1:]), strict=True) for sample in pair]
    out = adq.Subsample(adq.Plan.from_keys(urls, kept)).apply(mixed)
    assert ids(out) == kept


def test_a_forged_field_is_dropped_and_counts_in_the_checksum(tmp_path: Path) -> None:
    def forge(payload: bytes) -> str:
        members = [("a.jpg", b"j"), ("a.__adq_epoch__", payload), ("a.cls", b"1")]
        return str(write_tar(tmp_path / "f.tar", members))

    url = forge(b"5")
    stage = adq.Subsample(adq.Plan.from_keys(url, None))
    (sample,) = raw([url]).compose(stage)
    assert set(sample) == {"__key__", "__url__", "__local_path__", "jpg", "cls"}
    with pytest.raises(adq.ShardError, match="key 'a': bytes differ from the plan's"):
        list(raw([forge(b"6")]).compose(stage))


def test_what_is_no_plan_is_refused_with_the_right_call(setup: Setup, tmp_path: Path) -> None:
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
