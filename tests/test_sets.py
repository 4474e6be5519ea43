"""Are the benchmark's sets what they say: how many labels are wrong, how long the tail is, how often a copy stands?"""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adq_wds as adq
from benchmarks import sets
from benchmarks.labels import judged
from benchmarks.sets import PAIRS, SETS, TIMES, make_set, read_source
from tests.conftest import write_tar

N, C = 2000, 10


def images() -> list[sets.Image]:
    return [sets.Image(f"{i:05d}", b"image %d" % i, i % C, i % C) for i in range(N)]


def made(name: str, seed: int = 1) -> list[sets.Image]:
    return SETS[name](images(), np.random.default_rng(seed))


@pytest.mark.parametrize("name", list(SETS))
def test_keys_are_unique_and_truths_kept(name: str) -> None:
    out = made(name)
    assert len({image.key for image in out}) == len(out)
    source = {image.key: image for image in images()}
    for image in out:
        first = source[image.copy_of or image.key]
        assert (image.jpg, image.true) == (first.jpg, first.true)


@pytest.mark.parametrize(("name", "share"), [("noise20", 0.2), ("noise40", 0.4)])
def test_symmetric_noise_is_exact_and_even(name: str, share: float) -> None:
    out = made(name)
    wrong = [image for image in out if image.label != image.true]
    assert len(wrong) == round(share * N)
    shifts = Counter((image.label - image.true) % C for image in wrong)
    assert set(shifts) == set(range(1, C))
    assert max(shifts.values()) < 2 * min(shifts.values())


def test_paired_noise_goes_to_the_counterpart_only() -> None:
    wrong = Counter((image.true, image.label) for image in made("noise-pairs") if image.label != image.true)
    assert wrong == {pair: round(0.4 * N / C) for pair in PAIRS.items()}


@pytest.mark.parametrize(("name", "ratio"), [("tail50", 50), ("tail100", 100)])
def test_a_tail_falls_by_its_ratio(name: str, ratio: int) -> None:
    counts = Counter(image.label for image in made(name))
    assert [counts[c] for c in range(C)] == [round(N / C * ratio ** (-c / (C - 1))) for c in range(C)]


def test_copies_are_stored_eight_times() -> None:
    out = made("copies")
    times = Counter(Counter(image.copy_of or image.key for image in out).values())
    assert times == {TIMES: 160, 1: 720}  # 880 images, 4 in 22 of them copied: N samples, as before
    assert len(out) == N
    assert made("copies") == out != made("copies", seed=2)


def test_all_three_holds_all_three() -> None:
    out = made("all-three")
    once = [image for image in out if image.copy_of is None]
    share = sum(image.label != image.true for image in once) / len(once)
    assert 0.1 < share < 0.3
    counts = Counter(image.label for image in once)
    assert counts[0] > 30 * counts[9]
    assert len(out) - len(once) == (TIMES - 1) * round(0.1 * len(once))


def test_shards_read_back_and_are_made_once(tmp_path: Path) -> None:
    fields = [(i, (("jpg", b"%d" % i), ("cls", b"%d" % (i % 4)))) for i in range(40)]
    members = [(f"{i:03d}.{e}", d) for i, pairs in fields for e, d in pairs]
    source = [write_tar(tmp_path / "cifar10-train-0.tar", members)]
    paths = make_set("noise40", source, tmp_path / "sets")
    truth = json.loads((paths[0].parent / "truth.json").read_text())
    again = read_source(paths)
    assert sum(image.label != truth[image.key][0] for image in again) == 16
    urls = [str(path) for path in paths]
    assert len(adq.ShardDataset(urls, plan=adq.Plan.from_keys(urls, None))) == 40
    before = paths[0].read_bytes()
    assert make_set("noise40", [], tmp_path / "sets") == paths
    assert make_set("noise40", source, tmp_path / "others")[0].read_bytes() == before


def test_doubted_labels_are_judged_against_the_truth(tmp_path: Path) -> None:
    """Bright and dark images: what is left out, and what of it is wrong, is counted right."""
    rng, members = np.random.default_rng(0), []
    for i in range(400):
        pixels = rng.integers(0, 90, (16, 16, 3)) + 160 * (i % 2)
        image = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(image, "PNG")
        members += [(f"{i:04d}.jpg", image.getvalue()), (f"{i:04d}.cls", b"%d" % (i % 2))]
    paths = make_set("noise20", [write_tar(tmp_path / "cifar10-train-0.tar", members)], tmp_path / "sets")
    truth = json.loads((paths[0].parent / "truth.json").read_text())
    features = adq.embed_shards(paths, "thumbnail", tmp_path / "features", progress=False)
    result = judged(truth, features)
    assert (result["samples"], result["wrong"]) == (400, 0.2)
    out, precision, recall = (result[name] for name in ("left_out", "precision", "recall"))
    assert 0.2 < precision < 1
    assert out * precision == pytest.approx(0.2 * recall, abs=1e-3)
    assert result["wrong_of_the_rest"] == pytest.approx(0.2 * (1 - recall) / (1 - out), abs=1e-3)
