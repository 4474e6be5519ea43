"""A stream's bins are those that the codebook gives the stored embeddings, or an error says what does not fit."""

import logging
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.pipes.assign_bins import RULE_FIELD
from adq_wds.tables.codebook import POOLED
from tests.pipes.streams import npy, raw

Samples = list[dict[str, Any]]


def embedded(urls: list[str]) -> Any:
    return raw(urls).compose(adq.Embed(adq.encoder("thumbnail")))


def bins(samples: Any) -> list[int]:
    return [sample["bin.cls"] for sample in samples]


def test_bins_are_the_stored_embeddings(urls: list[str], codebook: adq.Codebook, tmp_path: Path) -> None:
    features = adq.embed_shards(urls, "thumbnail", tmp_path / "all")
    out = list(embedded(urls).compose(adq.AssignBins(codebook)))
    labels = np.concatenate([file.read_columns(["label"])["label"].to_numpy() for file in features])
    rows = np.array([1 + c if c < 3 else POOLED for c in labels.tolist()])
    expected = codebook.checkpoints.assign(np.concatenate([file.embedding() for file in features]), rows)
    assert bins(out) == expected.tolist()
    assert [sample[RULE_FIELD] for sample in out] == [(codebook.hash, row) for row in rows.tolist()]
    assert {type(b) for b in bins(out)} == {int}
    assert len(set(bins(out))) == 4
    assert bins(embedded(urls).compose(adq.AssignBins(tmp_path / "codebook.safetensors"))) == bins(out)


def test_an_unseen_class_and_no_label_go_by_the_pooled_rule(
    urls: list[str], codebook: adq.Codebook, caplog: pytest.LogCaptureFixture
) -> None:
    samples = list(embedded(urls))
    with caplog.at_level(logging.WARNING, logger="adq_wds"):
        out = adq.AssignBins(codebook).apply(samples)
    said = "class 3 is new to the codebook: such samples go by the rule over all"
    assert [r.message for r in caplog.records] == [said]
    unlabelled = adq.AssignBins(codebook, None).apply(samples)
    assert {sample[RULE_FIELD][1] for sample in unlabelled} == {POOLED}
    new = [i for i, sample in enumerate(samples) if sample["cls"] == b"3"]
    assert new
    assert [bins(out)[i] for i in new] == [bins(unlabelled)[i] for i in new]


def test_embeddings_in_the_shards_are_read_in_every_form(urls: list[str], codebook: adq.Codebook) -> None:
    h = [row * 7 for row in adq.encoder("thumbnail")([s["jpg"] for s in raw(urls).decode("pil")])[0]]
    expected = bins(embedded(urls).compose(adq.AssignBins(codebook)))
    samples = list(raw(urls))
    forms: list[Callable[[Any], Any]] = [
        npy,
        lambda row: npy(row[None]),
        lambda row: npy(row.astype(np.float64)),
        lambda row: bytearray(npy(row)),
        lambda row: row,
        lambda row: row.astype(np.float64)[None],
    ]
    for form in forms:
        given = [{**sample, "emb.npy": form(row)} for sample, row in zip(samples, h, strict=True)]
        assert bins(adq.AssignBins(codebook)(given)) == expected
    other = [{**sample, "clip.npy": npy(row)} for sample, row in zip(samples, h, strict=True)]
    assert bins(adq.AssignBins(codebook, embedding="clip.npy")(other)) == expected


def test_labels_may_be_decoded_before(urls: list[str], codebook: adq.Codebook) -> None:
    expected = bins(embedded(urls).compose(adq.AssignBins(codebook)))
    stages = (adq.Decode(), adq.Embed(adq.encoder("thumbnail")))
    by_field = adq.AssignBins(codebook, operator.itemgetter("label"))
    assert bins(raw(urls).compose(*stages, by_field)) == expected
    decoded = raw(urls).decode("pil").compose(stages[1], adq.AssignBins(codebook))
    assert bins(decoded) == expected


def test_a_codebook_of_one_rule_reads_no_label(urls: list[str], tmp_path: Path) -> None:
    features = adq.embed_shards(urls[:1], "thumbnail", tmp_path / "unlabelled", label=None)
    codebook = adq.fit_codebook(features, bins=4)
    samples = [{k: v for k, v in sample.items() if k != "cls"} for sample in embedded(urls)]
    assert len(adq.AssignBins(codebook).apply(samples)) == 100


def test_another_encoder_is_refused_by_name(urls: list[str], codebook: adq.Codebook) -> None:
    stage = adq.Embed(adq.encoder("builtin-free"))
    text = "embeddings of the encoder 'builtin-free' .*fitted on those of 'thumbnail' .1, preprocessing none.: take that"
    with pytest.raises(adq.CodebookError, match=text):
        list(raw(urls).compose(stage, adq.AssignBins(codebook, on_error="skip")))


BAD_EMBEDDINGS: list[tuple[Any, str]] = [
    (None, "no embedding: put adq_wds.Embed.encoder. before AssignBins"),
    (npy(np.zeros(191, np.float32)), "an embedding of 191 numbers, the codebook's have 192"),
    (np.full(192, np.nan), "the embedding holds NaN or infinity"),
    (np.full(192, 1e300), "the embedding holds NaN or infinity"),
    (npy(np.full(192, np.inf, np.float16)), "the embedding holds NaN or infinity"),
    (np.zeros(192, int), "holds int64, expected float16, float32 or float64"),
    (np.zeros(192, complex), "holds complex128, expected"),
    (np.zeros(192, object), "holds object, expected"),
    (npy(np.zeros(192, np.uint8)), "uint8 of shape .192,.; expected one vector"),
    ([0.0] * 192, "holds list, expected"),
    (np.zeros((2, 192)), r"numbers of shape \(2, 192\), expected one vector"),
    (np.zeros(0), r"numbers of shape \(0,\), expected one vector"),
    (np.float32(3), "holds float32, expected"),
    (npy(np.zeros(192)).replace(b"(192,), }           ", b"(8589934592,), }    "), "declares 68719476736 bytes"),
]  # fmt: skip


def test_an_embedding_that_cannot_be_used_is_a_bad_sample(urls: list[str], codebook: adq.Codebook) -> None:
    """S5 among them: an npy file that declares 64 GiB is refused before anything is allocated."""
    good = [{**sample, "emb.npy": npy(np.ones(192, np.float32))} for sample in raw(urls)]
    for value, text in BAD_EMBEDDINGS:
        bad = {k: v for k, v in {**good[7], "emb.npy": value}.items() if v is not None}
        samples = [*good[:7], bad, *good[8:]]
        with pytest.raises(adq.SampleError, match=f"^shard t-0.tar, key 's00007', field 'emb.npy': .*{text}"):
            list(adq.AssignBins(codebook)(samples))
        assert len(list(adq.AssignBins(codebook, on_error="skip")(samples))) == 99


def test_labels_of_another_kind_or_missing_ones_are_errors(urls: list[str], codebook: adq.Codebook) -> None:
    samples = [{**sample, "txt": b"dog"} for sample in embedded(urls)]
    with pytest.raises(adq.CodebookError, match="classes of this codebook are numbers, got the name 'dog'"):
        list(adq.AssignBins(codebook, "txt", on_error="skip")(samples))
    samples = list(embedded(urls))
    del samples[3]["cls"]
    with pytest.raises(adq.SampleError, match=r"shard t-0.tar, key 's00003': no label field: looked for cls"):
        list(adq.AssignBins(codebook)(samples))


def test_wrong_arguments_are_met_when_it_is_made(codebook: adq.Codebook, tmp_path: Path) -> None:
    text = re.escape("AssignBins needs a codebook: .compose(adq_wds.AssignBins(codebook)); got a ")
    for wrong in (3, None, iter([]), {"codebook": 1}):
        with pytest.raises(TypeError, match=text + type(wrong).__name__):
            adq.AssignBins(wrong)  # type: ignore[arg-type]
    with pytest.raises(adq.CodebookError, match="no such file"):
        adq.AssignBins(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="never decoded here"):
        adq.AssignBins(codebook, "pkl")
    with pytest.raises(ValueError, match="embedding must name a field, got 3"):
        adq.AssignBins(codebook, embedding=3)  # type: ignore[arg-type]
