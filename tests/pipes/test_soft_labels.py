"""Is a sample's soft label the asked blend of its label and of what is stored, in every host?"""

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchdata import nodes

import adq_wds as adq
from adq_wds.tables.soft_labels import SoftTable
from tests.conftest import MakeShard, jpeg, write_tar
from tests.pipes.streams import raw


@pytest.fixture
def soft(urls: list[str], tmp_path: Path) -> Path:
    """Soft labels of the two shards: 4 classes, given by number."""
    features = adq.embed_shards(urls, "thumbnail", tmp_path / "features")
    adq.soften_labels(features, out=tmp_path / "soft.parquet")
    return tmp_path / "soft.parquet"


def expected(soft: Path, share: float) -> dict[tuple[str, str], Any]:
    """The soft label of each (shard, key), by the plain rule."""
    table, rows = SoftTable(soft), {}
    for entry in table.header["shards"]:
        stored = table.shard(entry["name"])
        for key, top, probability in zip(stored.keys, stored.top, stored.probability, strict=True):
            number = int(key[1:])
            row = (1 - share) * np.eye(4)[number % (3 if number < 60 else 4)]
            for c, p in zip(top, probability, strict=True):
                row[c] += share * p
            rows[entry["name"], key] = row
    return rows


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("decoded", [False, True])
def test_the_weight_is_the_share_of_the_probabilities(
    share: float, decoded: bool, urls: list[str], soft: Path
) -> None:
    stream = raw(urls).decode("pil") if decoded else raw(urls)
    out = list(stream.compose(adq.SoftLabels(soft, share)))
    rows = expected(soft, share)
    assert len(out) == len(rows) == 100
    for sample in out:
        target = sample["soft.npy"]
        assert (target.shape, target.dtype) == ((4,), np.float32)
        assert target == pytest.approx(rows[Path(sample["__url__"]).name, sample["__key__"]], abs=1e-6)
        assert target.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_train_a_network_with_cross_entropy(n_workers: int, urls: list[str], soft: Path) -> None:
    pipes = [adq.Decode(to="torch"), adq.SoftLabels(soft)]
    ds = adq.ShardDataset(urls, pipes=pipes, batch_size=25, fields=("image", "soft.npy"))
    assert len(ds) == 4
    rows = list(expected(soft, 0.5).values())  # shards by name, samples as they lie
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    n = 0
    for images, targets in adq.Loader(ds, num_workers=n_workers):
        assert (targets.shape, targets.dtype) == ((25, 4), torch.float32)
        assert targets.numpy() == pytest.approx(np.array(rows[n : n + 25]), abs=1e-6)
        F.cross_entropy(net(images.float()), targets).backward()
        n += len(images)
    assert n == 100


def test_torchdata_nodes_and_maps_give_the_same(urls: list[str], soft: Path) -> None:
    pipe = adq.SoftLabels(soft)
    plain = [sample["soft.npy"].tolist() for sample in raw(urls).compose(pipe)]
    node = adq.as_node(adq.ShardDataset(urls), pipe)
    assert [sample["soft.npy"].tolist() for sample in nodes.Loader(node)] == plain
    view = adq.ShardDataset(urls, pipes=[pipe]).as_map()
    assert [view[i]["soft.npy"].tolist() for i in range(100)] == plain


def test_names_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    words = ["dog", "cat", "dog", "owl", "cat", "owl"] * 3
    members = [
        m for i, word in enumerate(words) for m in ((f"k{i}.jpg", jpeg(i)), (f"k{i}.txt", word.encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    adq.embed_shards(tmp_path / "a.tar", "thumbnail", tmp_path / "features", label="txt")
    adq.soften_labels(tmp_path / "features", out=tmp_path / "soft.parquet")
    pipe = adq.SoftLabels(tmp_path / "soft.parquet", share=0.0, label="txt")
    assert (pipe.names, pipe.n_classes) == (["cat", "dog", "owl"], 3)
    samples = list(raw(str(tmp_path / "a.tar")))
    by_name = [sample["soft.npy"].argmax() for sample in pipe.apply(samples)]
    assert by_name == [pipe.names.index(word) for word in words]
    numbered = adq.Decode(label="txt", classes=pipe.names).apply(samples)
    by_number = adq.SoftLabels(tmp_path / "soft.parquet", share=0.0).apply(numbered)
    assert [sample["soft.npy"].argmax() for sample in by_number] == by_name
    with pytest.raises(adq.SampleError, match=r"key 'k0', field 'txt': label 'cow' is none of the 3 classes"):
        pipe.apply([{**samples[0], "txt": b"cow"}])


def test_share_one_needs_no_label(urls: list[str], soft: Path) -> None:
    samples = [{k: v for k, v in sample.items() if k != "cls"} for sample in raw(urls)]
    assert len(adq.SoftLabels(soft, share=1.0).apply(samples)) == 100
    with pytest.raises(adq.SampleError, match=r"shard t-0\.tar, key 's00000': no label field"):
        list(adq.SoftLabels(soft)(samples))


Change = Callable[[dict[str, Any]], dict[str, Any]]
BAD: dict[str, tuple[Change, type[adq.AdqError], str]] = {
    "another key": (
        lambda s: {**s, "__key__": "new"},
        adq.FeaturesError,
        r"shard t-0\.tar, key 'new': no soft label in .*soft\.parquet; make them from features",
    ),
    "another shard": (
        lambda s: {**s, "__url__": "u.tar"},
        adq.FeaturesError,
        r"shard .u\.tar. has no soft labels in .*; make them from features of it",
    ),
    "a class beyond": (lambda s: {**s, "cls": b"4"}, adq.SampleError, "label 4 is none of the 4 classes"),
    "a name for a number": (lambda s: {**s, "cls": b"cat"}, adq.SampleError, "label 'cat' is none of the 4"),
    "its field is there": (
        lambda s: {**s, "soft.npy": b""},
        adq.SampleError,
        "field 'soft.npy': is there already",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_does_not_fit_is_named(case: str, urls: list[str], soft: Path) -> None:
    change, error, text = BAD[case]
    samples = [change(sample) if i == 0 else sample for i, sample in enumerate(raw(urls))]
    with pytest.raises(error, match=text) as caught:
        list(adq.SoftLabels(soft)(samples))
    assert "\n" not in str(caught.value)


def test_a_shard_is_read_when_it_is_first_needed(
    urls: list[str], soft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, asked = adq.SoftLabels(soft), []
    real = SoftTable.shard
    monkeypatch.setattr(SoftTable, "shard", lambda self, name: asked.append(name) or real(self, name))
    pipe.apply(list(islice(raw(urls), 10)))
    assert set(asked) == {"t-0.tar"}


def test_two_shards_of_one_name_are_told_apart_by_their_folders(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    urls = [str(make_shard(f"{folder}/t.tar", 20, first=i)) for i, folder in enumerate("ab")]
    adq.soften_labels(adq.embed_shards(urls, "thumbnail", tmp_path / "f"), out=tmp_path / "soft.parquet")
    pipe = adq.SoftLabels(tmp_path / "soft.parquet")
    assert len(list(raw(urls).compose(pipe))) == 40
    sample = next(iter(raw(urls)))
    with pytest.raises(
        adq.FeaturesError, match=r"'t.tar' may be 'a/t.tar' or 'b/t.tar'; open .* longer paths"
    ):
        pipe.apply([{**sample, "__url__": "t.tar"}])


def test_a_file_that_changed_is_not_read_by_a_worker(urls: list[str], soft: Path, tmp_path: Path) -> None:
    pickled = pickle.dumps(adq.SoftLabels(soft))
    adq.soften_labels(tmp_path / "features", temperature=3.0, out=soft)
    with pytest.raises(adq.FeaturesError, match="changed since it was opened"):
        pickle.loads(pickled)  # noqa: S301 - our own bytes
