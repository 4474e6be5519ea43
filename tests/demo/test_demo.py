"""The demo: its shards are the digits, its streams the plans, its words the numbers, and it goes on where it was."""

import io
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.demo.digits import load_digits, write_digits
from adq_wds.demo.run_demo import demo_text, make_trainings, run_demo, stream_images
from adq_wds.demo.table import MIN_SEEDS, PAIRS, difference, findings, table_text
from adq_wds.demo.train import Images, Training, accuracy_of
from tests.folders import dates, members

TINY: dict[str, Any] = {"seeds": 2, "epochs": 2, "progress": False}
SELECTED = ("random", "DQ", "ADQ", "fresh random", "fresh ADQ")
Demo = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A small demo's folder, not to be changed, and its result."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, run_demo(folder, **TINY)


def shards(folder: Path, split: str) -> list[str]:
    return sorted(map(str, (folder / split).glob("*.tar")))


def plans(folder: Path) -> dict[tuple[str, int], adq.Plan]:
    names = [(kind, seed) for kind in ("random", "dq", "adq") for seed in (0, 1)]
    return {(kind, s): adq.load_plan(folder / "plans" / f"{kind}-{s}.parquet") for kind, s in names}


def payloads(paths: list[str]) -> dict[str, bytes]:
    """Every member of some tars, read without any of our code."""
    pairs = [pair for path in paths for pair in members(Path(path))]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


# ---- Images, plans, streams


def test_the_shards_hold_every_digit_once_as_it_is(demo: Demo) -> None:
    from sklearn.datasets import load_digits as bundled

    pixels, labels = load_digits()
    assert pixels.tolist() == np.clip(16 * bundled().images, 0, 255).tolist()
    stored = payloads(shards(demo[0], "train") + shards(demo[0], "test"))
    assert len(stored) == 2 * 1797
    for i in range(1797):
        assert stored[f"digit-{i:04d}.cls"] == str(labels[i]).encode()
        image = Image.open(io.BytesIO(stored[f"digit-{i:04d}.png"]))
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), pixels[i])
    test = stream_images(shards(demo[0], "test")).labels
    for digit, n in Counter(labels.tolist()).items():
        assert abs((test == digit).sum() - 0.3 * n) <= 0.5


@pytest.mark.parametrize("last", ["train/train-000001.tar", "train/_info.json"])
def test_shards_that_are_missing_are_written(demo: Demo, tmp_path: Path, last: str) -> None:
    for name in ("train/train-000000.tar", last):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    assert len(write_digits(tmp_path)["train"]) == 4
    for split in ("train", "test"):
        assert payloads(shards(tmp_path, split)) == payloads(shards(demo[0], split))


def test_without_scikit_learn_no_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "-o", str(tmp_path / "new")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"adq: AdqError: .* scikit-learn \(.*pip install \"adq-wds\[demo\]\"\n$", err)
    assert not (tmp_path / "new").exists()


def test_the_plans_are_those_of_the_flags_and_equal_in_size(demo: Demo) -> None:
    folder, _ = demo
    found = plans(folder)
    assert found["adq", 0].hash == adq.load_plan(folder / "run" / "plan.parquet").hash
    options: dict[str, dict[str, Any]] = {"random": {"bins": 1}, "dq": {"allocation": "uniform"}, "adq": {}}
    counts: dict[int, list[list[int]]] = {0: [], 1: []}
    for (kind, seed), plan in found.items():
        same = adq.build_plan(folder / "run" / "features", keep=0.1, seed=seed, **options[kind])
        assert plan.keys() == same.keys()
        kept = np.concatenate([shard.label[shard.kept] for shard in plan])
        counts[seed].append(np.bincount(kept, minlength=10).tolist())
    for first, *others in counts.values():
        assert sum(first) == 126
        assert others == [first] * 2


def test_each_arm_sees_what_its_plan_says(demo: Demo) -> None:
    paths, chosen = shards(demo[0], "train"), plans(demo[0])
    stored, everything = payloads(paths), stream_images(paths)
    keys = [sample["__key__"] for sample in adq.ShardDataset(paths, rank=0, world=1)]
    trainings = {(t.arm, t.seed): t for t in make_trainings(paths, chosen, 2, 10)}
    assert len(trainings) == 12
    for (arm, seed), training in trainings.items():
        assert len(training.epochs) == 10
        if not arm.startswith("fresh"):
            images, kept = training.images, keys if arm == "full" else chosen[arm.lower(), seed].keys()
            assert images.labels.tolist() == [int(stored[f"{key}.cls"]) for key in kept]
            for pixels, key in zip(images.pixels, kept, strict=True):
                assert np.array_equal(pixels, Image.open(io.BytesIO(stored[f"{key}.png"])))
            assert all(rows.tolist() == list(range(len(images.labels))) for rows in training.epochs)
            continue
        assert np.array_equal(training.images.pixels, everything.pixels)
        plan = chosen[arm.split()[1].lower(), seed]
        assert [keys[i] for i in training.epochs[0]] == plan.keys()
        third = np.concatenate([plan.kept_in(name, 3) for name in plan.shards])
        assert training.epochs[3].tolist() == np.flatnonzero(third).tolist()
        assert len(np.unique(np.concatenate(training.epochs))) > 1100


# ---- Trainings


def striped(n: int, seed: int) -> Images:
    """Two classes of noisy 8×8 images that anyone can tell apart: bright on the left, bright on the right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = rng.integers(0, 120, (n, 8, 8), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 100
    return Images(pixels, labels.astype(np.int64))


def trained(images: Images, test: Images, seed: int = 0, epochs: int = 5) -> float:
    rows = [np.arange(len(images.labels))] * epochs
    return accuracy_of(Training("a", seed, images, rows), test)


def test_the_network_learns_from_right_labels_only() -> None:
    train, test = striped(64, 0), striped(100, 1)
    assert trained(train, test) == 1
    assert trained(Images(train.pixels, 1 - train.labels), test) == 0


def test_a_training_depends_on_its_arguments_alone() -> None:
    pixels, labels = load_digits()
    train, test = Images(pixels[:200], labels[:200]), Images(pixels[200:500], labels[200:500])
    expected = [trained(train, test, seed, 2) for seed in (0, 1)]
    assert expected[0] != expected[1]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda seed: trained(train, test, seed, 2), (0, 1))) == expected
    assert torch.equal(torch.get_rng_state(), state)


# ---- The whole


def test_the_table_is_what_the_trainings_gave(demo: Demo) -> None:
    folder, result = demo
    rows = {row["arm"]: row for row in result["table"]}
    assert list(rows) == ["full", *SELECTED]
    for arm, row in rows.items():
        n = 1258 if arm == "full" else 126
        assert (row["images_per_epoch"], row["images_seen"], len(row["accuracies"])) == (n, 2 * n, 2)
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    assert [rows[arm]["different_images"] for arm in SELECTED] == [126, 126, 126, 252, 252]
    assert 0.5 < rows["random"]["mean"] < rows["full"]["mean"]
    saved = json.loads((folder / "demo.json").read_text())
    assert {name: saved[name] for name in result} == json.loads(json.dumps(result))
    assert saved["arguments"] == {"keep": 0.1, "seeds": 2, "epochs": 2, "encoder": "builtin"}
    assert saved["versions"]["adq-wds"] == adq.__version__
    kept = {name: set(plan.keys()) for name, plan in plans(folder).items()}
    both = [len(kept["adq", seed] & kept["dq", seed]) for seed in (0, 1)]
    assert saved["shared_by_adq_and_dq"] == pytest.approx(sum(both) / 252)


def test_it_ends_by_naming_its_report_or_how_to_get_it(demo: Demo, tmp_path: Path) -> None:
    folder, result = demo
    assert "data:image/webp" in (folder / "report.html").read_text(encoding="utf-8")
    assert f"{folder}/report.html" in demo_text(result, folder)
    assert 'pip install "adq-wds[report]"' in demo_text(result, tmp_path)


def test_run_again_shards_and_features_are_reused(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    folder, result = demo
    before = [dates(folder / part) for part in ("train", "test", "run")]
    assert sum(map(len, before)) > 10
    assert main(["demo", "-o", str(folder), "--seeds", "2", "--epochs", "2"]) == 0
    assert capsys.readouterr().out == demo_text(result, folder) + "\n"
    assert [dates(folder / part) for part in ("train", "test", "run")] == before


@pytest.mark.parametrize("name", ["demo.json", "thesis.tex"])
def test_a_folder_that_is_not_the_demos_is_refused_and_left(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(adq.AdqError, match=r"is not empty and holds no demo\.json of ours: give another"):
        run_demo(tmp_path, **TINY)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": float("nan")}, "keep must be a number in"),
        ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"encoder": "thumbnial"}, "unknown encoder 'thumbnial'; did you mean thumbnail"),
        ({"keep": 0.0003}, "keep=0.0003 keeps none of 1,258 images; give a larger one"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_demo(tmp_path / "new", **{**TINY, **wrong})


# ---- What the numbers say


def found(accuracies: dict[str, list[float]], *, different: int = 100, cells: int = 10) -> dict[str, Any]:
    n = len(next(iter(accuracies.values())))
    usual = {"images_per_epoch": 100, "images_seen": 1000, "mean": 0, "std": 0}
    rows = [
        {**usual, "arm": arm, "accuracies": accuracies.get(arm, [0.9] * n)}
        | {"different_images": different if arm == "fresh random" else 100}
        for arm in ("full", *SELECTED)
    ]
    return findings(rows, shared=0.5, cells=cells)


@pytest.mark.parametrize("n", [5, 10, 30])
def test_intervals_are_those_of_the_paired_t_test(n: int) -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(n)
    for shift in (-0.02, 0.0, 0.02):
        values = {"ADQ": 0.9 + shift + 0.01 * rng.random(n), "random": 0.9 + 0.01 * rng.random(n)}
        mine = difference("ADQ", "random", {arm: row.tolist() for arm, row in values.items()})
        test = ttest_rel(values["ADQ"], values["random"])
        between = test.confidence_interval(0.95)
        assert (mine["low"], mine["high"]) == pytest.approx((between.low, between.high))
        assert (mine["verdict"] != "none") == (test.pvalue < 0.05)
        assert mine["verdict"] == "none" or (mine["verdict"] == "higher") == (shift > 0)


def test_below_five_seeds_nothing_is_ranked() -> None:
    for n in range(1, MIN_SEEDS):
        result = found({"ADQ": [0.99] * n, "random": [0.1] * n})
        assert {d["verdict"] for d in result["differences"]} <= {"none", "equal"}
        assert result["conclusion"].startswith("Below 5 seeds the spread itself is a guess")
        assert "ADQ is" not in result["conclusion"]


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        (0.03, "ADQ is higher by 3.0 points, more than chance explains"),
        (-0.03, "ADQ is lower by 3.0 points, more than chance explains"),
        (0.001, r"ADQ shows no difference beyond chance \(\+0.10 points\)"),
        (None, "ADQ is equal in every seed"),
    ],
)
def test_the_paragraph_follows_from_the_numbers(gap: float | None, text: str) -> None:
    noise = np.array([0.002, -0.003, 0.004, -0.002, -0.001])
    values = [0.9] * 5 if gap is None else (0.9 + gap + noise).tolist()
    said = found({"ADQ": values}, different=1000, cells=50)["conclusion"]
    assert re.search(f"of equal size, {text}, and DQ is equal in every seed", said)
    assert "it sees 1,000 different images, not 100" in said
    assert "With 2.0 images for each class and bin, rounding decides" in said
    assert "ADQ and DQ have 50 % of their images in common" in said
    assert "rounding" not in found({"ADQ": values})["conclusion"]


def test_the_text_is_80_columns_wide_and_names_what_to_try(demo: Demo) -> None:
    text = demo_text(demo[1], "adq-demo")
    assert max(map(len, text.splitlines())) <= 80
    assert "adq show adq-demo/run/plan.parquet" in text
    assert "-o 'my demo'" in demo_text(demo[1], "my demo")
    assert all(f"{arm} - {against}" in text for arm, against in PAIRS)
    gap = {"arm": "ADQ", "against": "random", "mean": -0.12345, "low": -0.2, "high": -0.1, "verdict": "lower"}
    wide = table_text({**demo[1], "differences": [gap]})
    assert "ADQ - random               -12.35   -20.00 to -10.00  lower" in wide


@pytest.mark.slow
def test_at_its_defaults_all_digits_give_97_percent(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "new", seeds=2)
    rows = {row["arm"]: row["mean"] for row in result["table"]}
    assert rows["full"] > 0.97
    assert rows["random"] < rows["fresh random"] < 0.99
