"""A stream drops the copies and doubted labels that a codebook recognises, says why, and keeps its classes balanced."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.pipes.assign_bins import MARGIN_FIELD, REASON_FIELD, RULE_FIELD
from tests.conftest import MakeShard, jpeg, write_tar
from tests.pipes.streams import ids, npy, raw

Samples = list[dict[str, Any]]


@pytest.fixture
def urls(make_shard: MakeShard, tmp_path: Path) -> list[str]:
    """A shard of three classes, whose last ten images are its first; a new one with two of these images and a new class."""
    again = [(f"again{i}.jpg", jpeg(i % 60)) for i in range(10)] + [
        (f"again{i}.cls", b"1") for i in range(10)
    ]
    first = make_shard("t-0.tar", 60, classes=3)
    write_tar(tmp_path / "t-1.tar", sorted(again))
    new = [(f"n{i}.jpg", jpeg(i if i < 2 else 500 + i)) for i in range(40)]
    new += [(f"n{i}.cls", str(i % 4).encode()) for i in range(40)]
    return [str(first), str(tmp_path / "t-1.tar"), str(write_tar(tmp_path / "t-2.tar", sorted(new)))]


@pytest.fixture
def codebook(urls: list[str], tmp_path: Path) -> adq.Codebook:
    """Of the first two shards."""
    features = adq.embed_shards(urls[:2], "thumbnail", tmp_path / "features")
    out = tmp_path / "codebook.safetensors"
    options: dict[str, Any] = {"clean": 0.25, "dedup": "exact", "balance": "equal", "bins": 3, "min_pilot": 5}
    return adq.fit_codebook(features, **options, out=out)


def embedded(urls: list[str]) -> Any:
    return raw(urls).compose(adq.Embed(adq.encoder("thumbnail")))


@pytest.fixture
def assigned(urls: list[str], codebook: adq.Codebook) -> Samples:
    return list(embedded(urls).compose(adq.AssignBins(codebook)))


def test_each_sample_has_its_margin_and_its_reason(assigned: Samples, codebook: adq.Codebook) -> None:
    assert codebook.margins is not None
    for sample in assigned:
        label = codebook.class_number(int(sample["cls"]))
        copy = sample["__key__"].startswith("again") or sample["__key__"] in ("n0", "n1")
        if label is None:
            assert sample[MARGIN_FIELD] is None
            doubted = False
        else:
            margin = codebook.margins.margins(sample["emb.npy"][None], np.array([label - 1]))[0]
            assert sample[MARGIN_FIELD] == float(margin)
            doubted = margin < codebook.margins.least[label - 1]
        assert sample[REASON_FIELD] == ("duplicate" if copy else "label" if doubted else "")
    reasons = [sample[REASON_FIELD] for sample in assigned]
    assert reasons.count("duplicate") == 12
    assert reasons.count("label") > 3


def test_one_of_equal_samples_stays(assigned: Samples) -> None:
    """Of the fit's samples the first; in any order."""
    originals = [s for s in assigned if s["__key__"] in {f"s{i:05d}" for i in range(10)}]
    assert {s[REASON_FIELD] for s in originals} <= {"", "label"}


def test_what_is_left_out_is_dropped_at_any_keep_and_counted(
    assigned: Samples, codebook: adq.Codebook, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        kept = list(adq.Subsample(codebook, keep=1.0)(assigned))
    expected = [s for s in assigned if not s[REASON_FIELD]]
    assert ids(kept) == ids(expected)
    n_label = sum(s[REASON_FIELD] == "label" for s in assigned)
    counts = f"Subsample: read 110 = kept {len(kept)} + dropped {110 - len(kept)} + bad 0"
    assert f"{counts}; of the dropped 12 duplicate, {n_label} label" in caplog.text
    assert not {REASON_FIELD, MARGIN_FIELD, RULE_FIELD, "bin.cls", "emb.npy"} & kept[0].keys()
    with_fields = adq.Subsample(codebook, keep=1.0, keep_fields=True)(assigned)
    assert {REASON_FIELD, MARGIN_FIELD, "bin.cls", "emb.npy"} <= next(with_fields).keys()


def test_a_stream_like_the_fit_is_kept_as_asked_and_balanced(
    assigned: Samples, codebook: adq.Codebook
) -> None:
    """Over many seeds, of samples that are left; new classes at the ratio asked for."""
    some = [s for s in assigned if not s[REASON_FIELD]]
    rate = codebook.class_rates(0.3)
    expected = np.array([rate[s[RULE_FIELD][1], s["bin.cls"]] for s in some])
    kept, place = np.zeros(len(some)), {one: i for i, one in enumerate(ids(some))}
    for seed in range(200):
        for one in ids(adq.Subsample(codebook, keep=0.3, seed=seed).apply(some)):
            kept[place[one]] += 1
    assert np.abs(kept / 200 - expected).max() <= 5 * np.sqrt(0.25 / 200)
    of_class = (rate * codebook.frequency()[codebook.rows])[1:].sum(axis=1)
    n = np.array(codebook.header["n"])
    assert n @ of_class == pytest.approx(0.3 * sum(codebook.header["clean"]["of"]))
    assert np.ptp(n * of_class) < 1e-9


def test_a_source_of_ours_drops_the_same(
    urls: list[str], codebook: adq.Codebook, assigned: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    stages = [
        adq.Embed(adq.encoder("thumbnail")),
        adq.AssignBins(codebook),
        adq.Subsample(codebook, keep=0.5),
    ]
    dataset = adq.ShardDataset(urls, pipes=stages, shuffle=True, batch_size=7)
    with caplog.at_level(logging.INFO, logger="adq_wds"):
        kept = [sample for batch in dataset for sample in batch]
    assert sorted(ids(kept)) == sorted(ids(adq.Subsample(codebook, keep=0.5)(assigned)))
    assert "of the dropped 12 duplicate" in caplog.text


def test_a_field_of_that_name_in_the_shard_decides_nothing(
    urls: list[str], codebook: adq.Codebook, tmp_path: Path
) -> None:
    plain = adq.fit_codebook(tmp_path / "features", bins=3, min_pilot=5)
    forged = [{**s, REASON_FIELD: b"label"} for s in embedded(urls)]
    kept = list(adq.Subsample(plain, keep=1.0)(adq.AssignBins(plain)(forged)))
    assert len(kept) == 110
    assert {s[REASON_FIELD] for s in kept} == {b"label"}
    for name in (REASON_FIELD, MARGIN_FIELD):
        own = [{**s, name: b"1"} if i == 3 else s for i, s in enumerate(embedded(urls))]
        text = f"^shard t-0.tar, key 's00003', field '{name}': is there already; rename or drop it before AssignBins"
        with pytest.raises(adq.SampleError, match=text):
            list(adq.AssignBins(codebook)(own))
        assert len(list(adq.AssignBins(codebook, on_error="skip")(own))) == 109


@pytest.mark.parametrize("in_shards", [False, True])
def test_copies_without_images_are_told_by_their_other_fields(in_shards: bool, tmp_path: Path) -> None:
    """The embedding is one of the contents only where the shards brought it."""
    h = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    h[::10] = h[0]
    fields = [(("txt", b"text %d" % (i if i % 10 else 0)), ("cls", b"0")) for i in range(60)]
    given = [
        ((*two, ("emb.npy", npy(row))) if in_shards else two) for two, row in zip(fields, h, strict=True)
    ]
    members = [(f"k{i:02d}.{name}", data) for i, of in enumerate(given) for name, data in of]
    tar = str(write_tar(tmp_path / "t.tar", members))
    np.save(tmp_path / "e.npy", h)
    source = "field:emb.npy" if in_shards else str(tmp_path / "e.npy")
    features = adq.embed_shards(tar, out=tmp_path / "features", image=None, embeddings=source)
    codebook = adq.fit_codebook(features, bins=2, min_pilot=3, dedup="exact")
    samples = list(raw(tar))
    forms: list[Callable[[Any], Any]] = [npy] if in_shards else [npy, np.asarray]
    for form in forms:
        with_rows = [{**sample, "emb.npy": form(row)} for sample, row in zip(samples, h, strict=True)]
        out = list(adq.AssignBins(codebook)(with_rows))
        assert [s[REASON_FIELD] for s in out] == ["duplicate" if i and i % 10 == 0 else "" for i in range(60)]


def test_copies_need_the_bytes_of_the_image(urls: list[str], codebook: adq.Codebook) -> None:
    decoded = raw(urls).decode("pil").compose(adq.Embed(adq.encoder("thumbnail")))
    text = "^shard t-0.tar, key 's00000', field 'jpg': holds Image, expected the bytes of a file; put this stage before"
    with pytest.raises(adq.SampleError, match=text):
        list(decoded.compose(adq.AssignBins(codebook)))


def test_embeddings_of_another_encoder_are_refused(urls: list[str], codebook: adq.Codebook) -> None:
    stages = (adq.Embed(adq.encoder("builtin-free")), adq.AssignBins(codebook, on_error="skip"))
    with pytest.raises(adq.CodebookError, match="embeddings of the encoder 'builtin-free'"):
        list(raw(urls).compose(*stages))


def test_a_cleaning_codebook_of_one_rule_reads_labels(urls: list[str], tmp_path: Path) -> None:
    features = adq.embed_shards(urls[:2], "thumbnail", tmp_path / "features")
    one_rule = adq.fit_codebook(features, bins=3, clean=0.25)
    assert one_rule.label.tolist() == [-1]
    out = adq.AssignBins(one_rule).apply(list(embedded(urls)))
    assert "label" in {s[REASON_FIELD] for s in out}
    assert {s[RULE_FIELD][1] for s in out} == {0, 1, 2, 3}
