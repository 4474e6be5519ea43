"""The demo: its shards are the digits, its streams the plans, its words the numbers, and it goes on where it was."""

import argparse
import inspect
import io
import json
import re
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adq_wds as adq
from adq_wds.cli.arguments import make_parser
from adq_wds.cli.main import main
from adq_wds.demo import train as demo_train
from adq_wds.demo.arms import fresh_rows, make_trainings, stream_images, stream_kept
from adq_wds.demo.digits import load_digits, write_digits
from adq_wds.demo.net import Images, accuracy_after
from adq_wds.demo.run_demo import demo_text, run_demo
from adq_wds.demo.table import MIN_SEEDS, PAIRS, Difference, Row, conclusion, differences
from adq_wds.demo.train import training_id

TINY: dict[str, Any] = {"seeds": 2, "epochs": 2, "progress": False}
SELECTED = ("random", "DQ", "ADQ", "fresh random", "fresh ADQ")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small demo's folder, not to be changed, and its result."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, run_demo(folder, **TINY)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> float:
        raise AssertionError("trained")

    monkeypatch.setattr(demo_train, "accuracy_after", refuse)


def shards(folder: Path, split: str) -> list[str]:
    return sorted(map(str, (folder / split).glob("*.tar")))


def plans(folder: Path) -> dict[tuple[str, int], adq.Plan]:
    kinds = ("random", "dq", "adq")
    return {
        (kind, s): adq.load_plan(folder / "plans" / f"{kind}-{s}.parquet") for kind in kinds for s in (0, 1)
    }


def members(paths: list[str]) -> dict[str, bytes]:
    """Every member of some tars, read without any of our code."""
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def listing(folder: Path, *parts: str) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns for part in parts for p in (folder / part).rglob("*.*") if p.is_file()
    }


# ---- Images


def test_the_shards_hold_every_digit_once_as_it_is(demo: tuple[Path, Any]) -> None:
    pixels, labels = load_digits()
    held = members(shards(demo[0], "train") + shards(demo[0], "test"))
    assert len(held) == 2 * 1797
    for i in range(1797):
        assert held[f"digit-{i:04d}.cls"] == str(labels[i]).encode()
        image = Image.open(io.BytesIO(held[f"digit-{i:04d}.png"]))
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), pixels[i])


def test_sixteen_levels_of_ink_become_256_of_grey() -> None:
    from sklearn.datasets import load_digits as bundled

    pixels, labels = load_digits()
    assert pixels.tolist() == np.clip(16 * bundled().images, 0, 255).tolist()
    assert labels.tolist() == bundled().target.tolist()


def test_the_split_keeps_the_classes_proportions(demo: tuple[Path, Any]) -> None:
    _, all_labels = load_digits()
    labels = {split: stream_images(shards(demo[0], split))[1].labels for split in ("train", "test")}
    for digit, n in Counter(all_labels.tolist()).items():
        assert abs((labels["test"] == digit).sum() - 0.3 * n) <= 0.5
        assert (labels["train"] == digit).sum() + (labels["test"] == digit).sum() == n


def test_without_scikit_learn_it_says_what_to_install_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "-o", str(tmp_path / "new")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adq: AdqError: the demo's images come with scikit-learn (")
    assert err.endswith('pip install "adq-wds[demo]"\n')
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


# ---- Plans, streams, rows


def test_all_plans_of_a_seed_keep_equally_many_of_each_class(demo: tuple[Path, Any]) -> None:
    counts: dict[int, list[list[int]]] = {}
    for (_, seed), plan in plans(demo[0]).items():
        kept = np.concatenate([shard.label[shard.kept] for shard in plan])
        counts.setdefault(seed, []).append(np.bincount(kept, minlength=10).tolist())
    for same in counts.values():
        assert sum(same[0]) == 126
        assert all(count == same[0] for count in same)


def test_the_plans_are_those_of_the_flags_that_people_give(demo: tuple[Path, Any]) -> None:
    folder, _ = demo
    found = plans(folder)
    assert found["adq", 0].hash == adq.load_plan(folder / "run" / "plan.parquet").hash
    options: dict[str, dict[str, Any]] = {"random": {"bins": 1}, "dq": {"allocation": "uniform"}, "adq": {}}
    for (kind, seed), plan in found.items():
        same = adq.build_plan(folder / "run" / "features", keep=0.1, seed=seed, **options[kind])
        assert plan.keys() == same.keys()


def test_streams_give_what_the_plans_keep(demo: tuple[Path, Any]) -> None:
    paths = shards(demo[0], "train")
    held = members(paths)
    for plan in plans(demo[0]).values():
        keys, images = stream_images(paths, plan)
        assert keys == plan.keys()
        assert images.labels.tolist() == [int(held[f"{key}.cls"]) for key in keys]
        first = Image.open(io.BytesIO(held[f"{keys[0]}.png"]))
        assert np.array_equal(images.pixels[0], np.asarray(first))


def test_a_stream_that_differs_from_its_plan_is_an_error(
    demo: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans(demo[0])["adq", 1]
    monkeypatch.setattr(plan, "keys", lambda: ["digit-9999", *adq.Plan.keys(plan)])
    text = r"plan adq-1: 126 samples streamed, the plan keeps 126; first differences \['digit-9999'\]"
    with pytest.raises(adq.AdqError, match=text):
        stream_kept(shards(demo[0], "train"), {("adq", 1): plan}, progress=False)


def test_fixed_arms_see_their_plan_and_fresh_ones_start_with_it_and_go_on(demo: tuple[Path, Any]) -> None:
    paths, chosen = shards(demo[0], "train"), plans(demo[0])
    keys, everything = stream_images(paths)
    kept = stream_kept(paths, chosen, progress=False)
    trainings = {(t.arm, t.seed): t for t in make_trainings(everything, kept, chosen, seeds=2, epochs=10)}
    assert len(trainings) == 12
    for (arm, seed), training in trainings.items():
        assert len(training.epochs) == 10
        if arm == "full":
            assert all(rows.tolist() == list(range(1258)) for rows in training.epochs)
        elif arm in ("random", "DQ", "ADQ"):
            assert np.array_equal(training.images.pixels, kept[arm.lower(), seed].pixels)
            assert all(rows.tolist() == list(range(126)) for rows in training.epochs)
        else:
            plan = chosen[arm.split()[1].lower(), seed]
            assert [keys[i] for i in training.epochs[0]] == plan.keys()
            assert all(len(rows) == 126 for rows in training.epochs)
            assert np.array_equal(training.epochs[3], fresh_rows(plan, 3))
    assert trainings["fresh random", 0].n_different == len(
        np.unique(np.concatenate(trainings["fresh random", 0].epochs))
    )
    assert trainings["fresh random", 0].n_different > 1200


# ---- Trainings


def striped(n: int, seed: int) -> Images:
    """Two classes of noisy 8×8 images that anyone can tell apart: bright on the left, bright on the right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = rng.integers(0, 120, (n, 8, 8), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 100
    return Images(pixels, labels.astype(np.int64))


def test_the_network_learns_what_can_be_learnt_and_nothing_from_wrong_labels() -> None:
    train, test = striped(64, 0), striped(100, 1)
    epochs = [np.arange(64)] * 5
    assert accuracy_after(train, epochs, 5, test, seed=0) == 1
    assert accuracy_after(Images(train.pixels, 1 - train.labels), epochs, 5, test, seed=0) == 0


def test_a_training_depends_on_its_arguments_alone() -> None:
    pixels, labels = load_digits()
    train, test = Images(pixels[:200], labels[:200]), Images(pixels[200:500], labels[200:500])
    epochs = [np.arange(200)] * 2
    expected = [accuracy_after(train, epochs, 2, test, seed=seed) for seed in (0, 1)]
    assert expected[0] != expected[1]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    found: dict[int, float] = {}
    threads = [
        threading.Thread(target=lambda s=s: found.update({s: accuracy_after(train, epochs, 2, test, seed=s)}))
        for s in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_an_id_changes_with_everything_that_an_accuracy_follows_from() -> None:
    train, test, rows = striped(8, 0), striped(8, 1), [np.arange(4), np.arange(4)]

    def named(
        arm: str = "a", seed: int = 0, images: Images = train, epochs: Any = rows, on: Images = test
    ) -> str:
        return training_id(demo_train.Training(arm, seed, images, epochs), on)

    others = [
        named(seed=1),
        named(images=striped(8, 2)),
        named(images=Images(train.pixels, 1 - train.labels)),
        named(epochs=[np.arange(4), np.arange(4)[::-1]]),
        named(epochs=[np.arange(3), np.array([3, 0, 1, 2, 3])]),
        named(on=striped(8, 3)),
    ]
    assert len({named(), *others}) == 7
    assert named(arm="b") == named()


# ---- The whole


def test_the_table_is_what_the_trainings_gave(demo: tuple[Path, dict[str, Any]]) -> None:
    _, result = demo
    rows = {row["arm"]: row for row in result["table"]}
    assert list(rows) == ["full", *SELECTED]
    for arm, row in rows.items():
        n = 1258 if arm == "full" else 126
        assert (row["images_per_epoch"], row["images_seen"]) == (n, 2 * n)
        assert len(row["accuracies"]) == 2
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    assert [rows[arm]["different_images"] for arm in SELECTED] == [126, 126, 126, 252, 252]
    assert 0.5 < rows["random"]["mean"] < rows["full"]["mean"]
    gaps = {(d["arm"], d["against"]): d["mean"] for d in result["differences"]}
    assert gaps["ADQ", "DQ"] == pytest.approx(rows["ADQ"]["mean"] - rows["DQ"]["mean"])


def test_the_file_holds_the_result_its_arguments_and_versions(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, result = demo
    saved = json.loads((folder / "demo.json").read_text())
    assert {name: saved[name] for name in result} == json.loads(json.dumps(result))
    assert saved["arguments"] == {"keep": 0.1, "seeds": 2, "epochs": 2, "encoder": "builtin"}
    assert saved["versions"]["adq-wds"] == adq.__version__
    kept = {name: set(plan.keys()) for name, plan in plans(folder).items()}
    # where ADQ and DQ keep the same images, one training stands for both
    equal = [kept["adq", seed] == kept["dq", seed] for seed in (0, 1)]
    assert len(saved["trainings"]) == 12 - sum(equal)
    both = [len(kept["adq", seed] & kept["dq", seed]) for seed in (0, 1)]
    assert saved["shared_by_adq_and_dq"] == pytest.approx(sum(both) / 252)


def test_another_folder_gives_the_same_table(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert run_demo(tmp_path / "other", **TINY) == demo[1]


@pytest.mark.usefixtures("no_training")
def test_run_again_nothing_is_made_or_trained_again(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, result = demo
    before = listing(folder, "train", "test", "run")
    assert len(before) > 10
    assert run_demo(folder, **TINY) == result
    assert listing(folder, "train", "test", "run") == before


def test_interrupted_it_goes_on_with_what_is_missing(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_trainings = len(json.loads((demo[0] / "demo.json").read_text())["trainings"])
    done: list[int] = []

    def counted(*arguments: Any, seed: int) -> float:
        if len(done) == 4:
            raise KeyboardInterrupt
        accuracy = accuracy_after(*arguments, seed=seed)
        done.append(seed)
        return accuracy

    monkeypatch.setattr(demo_train, "_threads", lambda: 1)
    monkeypatch.setattr(demo_train, "accuracy_after", counted)
    threads = torch.get_num_threads()
    assert main(["demo", "-o", str(tmp_path / "new"), "--seeds", "2", "--epochs", "2"]) == 130
    assert torch.get_num_threads() == threads
    saved = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert (len(saved["trainings"]), "table" in saved) == (4, False)
    done[:] = [-1] * 100
    assert run_demo(tmp_path / "new", **TINY) == demo[1]
    assert len(done) == 100 + n_trainings - 4


# ---- Other people's files


def test_a_folder_of_other_files_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(
        adq.AdqError, match=r"is not empty and holds no demo\.json: give another folder with -o"
    ):
        run_demo(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a demo.json of this adq_wds"),
        ("{", "not a demo.json of this adq_wds"),
        ('{"format": "mine", "version": 1, "trainings": {}}', "format 'mine'"),
        ('{"format": "adq_wds.demo", "version": 2, "trainings": {}}', "version 2"),
        ('{"format": "adq_wds.demo", "version": 1, "trainings": {"x": 7.0}}', "an accuracy is out of range"),
        ('{"format": "adq_wds.demo", "version": 1, "trainings": {"x": NaN}}', "an accuracy is out of range"),
        ('{"format": "adq_wds.demo", "version": 1, "trainings": []}', "not a demo.json of this adq_wds"),
    ],
)
def test_a_demo_json_that_is_not_ours_is_refused_and_left(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(adq.AdqError, match=said):
        run_demo(tmp_path, **TINY)
    assert (tmp_path / "demo.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[520] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def another(path: Path) -> None:
    path.with_name("train-000007.tar").write_bytes(b"mine")


@pytest.mark.parametrize("harm", [changed, cut, another])
def test_a_shard_that_is_not_the_demos_is_refused_and_left(
    demo: tuple[Path, Any], tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    for name in ("demo.json", "train/_info.json", *(f"train/train-00000{i}.tar" for i in range(4))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    harm(tmp_path / "train" / "train-000001.tar")
    before = {path: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    with pytest.raises(adq.AdqError, match=r"train-00000[17]\.tar is not as this demo writes it; it is left"):
        write_digits(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "train").iterdir()} == before


@pytest.mark.parametrize("last", ["train/train-000001.tar", "train/_info.json"])
def test_shards_that_are_missing_are_written(demo: tuple[Path, Any], tmp_path: Path, last: str) -> None:
    for name in ("train/train-000000.tar", last):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    assert [Path(path).name for path in write_digits(tmp_path).train] == [
        f"train-00000{i}.tar" for i in range(4)
    ]
    for split in ("train", "test"):
        assert members(shards(tmp_path, split)) == members(shards(demo[0], split))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": 1.5}, "keep must be a number in"),
        ({"keep": float("nan")}, "keep must be a number in"),
        ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"encoder": "thumbnial"}, "unknown encoder 'thumbnial'; did you mean thumbnail"),
        ({"keep": 0.0}, "keep=0.0 keeps none of 1,258 images; give a larger one"),
        ({"keep": 0.0003}, "keep=0.0003 keeps none of 1,258 images; give a larger one"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_demo(tmp_path / "new", **{**TINY, **wrong})


# ---- What the numbers say


def rows_of(accuracies: dict[str, list[float]], different: dict[str, int] | None = None) -> list[Row]:
    rows = []
    for arm in ("full", *SELECTED):
        values = accuracies.get(arm, [0.9] * len(next(iter(accuracies.values()))))
        rows.append(Row(arm, 100, (different or {}).get(arm, 100), 1000, float(np.mean(values)), 0.0, values))
    return rows


def said(rows: list[Row], **options: Any) -> str:
    return conclusion(rows, differences(rows), options.get("shared", 0.5), options.get("cells", 10))


@pytest.mark.parametrize("n", [5, 10, 30])
def test_intervals_are_those_of_the_paired_t_test(n: int) -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(n)
    for shift in (-0.02, 0.0, 0.02):
        adq_values, random = 0.9 + shift + 0.01 * rng.random(n), 0.9 + 0.01 * rng.random(n)
        found = differences(rows_of({"ADQ": adq_values.tolist(), "random": random.tolist()}))
        (mine,) = [d for d in found if (d.arm, d.against) == ("ADQ", "random")]
        test = ttest_rel(adq_values, random)
        between = test.confidence_interval(0.95)
        assert (mine.low, mine.high) == pytest.approx((between.low, between.high))
        assert (mine.verdict != "none") == (test.pvalue < 0.05)
        assert mine.verdict == "none" or (mine.verdict == "higher") == (shift > 0)


def test_below_five_seeds_nothing_is_ranked_however_clear_it_looks() -> None:
    for n in range(1, MIN_SEEDS):
        rows = rows_of({"ADQ": [0.99] * n, "random": [0.1] * n})
        assert {d.verdict for d in differences(rows)} <= {"none", "equal"}
        text = said(rows)
        assert text.startswith("Below 5 seeds the spread itself is a guess")
        assert "ADQ is" not in text


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
    assert re.search(f"of equal size, {text}, and DQ is equal in every seed", said(rows_of({"ADQ": values})))


def test_the_paragraph_tells_of_different_images_and_of_rounding_where_it_is_so() -> None:
    same = {"random": [0.9] * 5}
    fewer = said(rows_of(same, {"fresh random": 1000}), cells=50)
    assert "it sees 1,000 different images, not 100" in fewer
    assert "With 2.0 images for each class and bin, rounding decides" in fewer
    assert "ADQ and DQ have 50 % of their images in common" in fewer
    equal = said(rows_of(same, {"fresh random": 1000}), cells=10)
    assert "rounding" not in equal


def test_the_text_is_80_columns_wide_and_names_what_to_try(demo: tuple[Path, dict[str, Any]]) -> None:
    text = demo_text(demo[1], "adq-demo")
    assert max(map(len, text.splitlines())) <= 80
    assert "adq show adq-demo/run/plan.parquet" in text
    assert "-o 'my demo'" in demo_text(demo[1], "my demo")
    found = [Difference("ADQ", "random", -0.12345, -0.2, -0.1, "lower")]
    wide = demo_text({**demo[1], "differences": [d.__dict__ for d in found]}, "adq-demo")
    assert "ADQ - random               -12.35   -20.00 to -10.00  lower" in wide
    assert all(f"{arm} - {against}" in text for arm, against in PAIRS)


# ---- The command


def demo_parser() -> argparse.ArgumentParser:
    (subparsers,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = subparsers.choices["demo"]
    return found


def test_every_argument_is_a_flag_with_the_same_default_and_a_help_text() -> None:
    actions = {action.dest: action for action in demo_parser()._actions}
    for parameter in inspect.signature(run_demo).parameters.values():
        assert f"--{parameter.name}" in actions[parameter.name].option_strings
        assert actions[parameter.name].default == parameter.default
    assert all(action.help for action in actions.values())


@pytest.mark.usefixtures("no_training")
def test_the_command_prints_the_table_or_json(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "-o", str(demo[0]), "--seeds", "2", "--epochs", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out == demo_text(demo[1], demo[0]) + "\n"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(demo[1]))


@pytest.mark.slow
def test_at_its_defaults_all_digits_give_97_percent(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "new", seeds=2)
    rows = {row["arm"]: row["mean"] for row in result["table"]}
    assert rows["full"] > 0.97
    assert rows["random"] < rows["fresh random"] < 0.99
