"""Does the accuracy harness measure what it says: equal compute for all arms, each training on its own, none twice?"""

import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adq_wds as adq
from adq_wds.errors import AdqError
from adq_wds.planning.options import plan_options
from benchmarks import accuracy, plans, training
from benchmarks.accuracy import run_all
from benchmarks.altered import WAYS, altered, highest
from benchmarks.arms import ARMS, Arm
from benchmarks.nets import build_net
from benchmarks.plans import Plans, Task, draws_of, rows_of, tasks
from benchmarks.records import Results, differences, markdown, summary
from benchmarks.training import Images, Recipe, augment, read_images, recipe_for, train
from benchmarks.training import accuracy as accuracy_of

LEAST = Recipe(
    "least",
    epochs=3,
    batch=8,
    lr=0.1,
    warmup=0.2,
    weight_decay=5e-4,
    nesterov=True,
    label_smoothing=0.1,
    evaluations=2,
)
CPU = torch.device("cpu")


def least(n_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, n_classes),
    )


class Bench:
    """Two training shards, a test shard, and a result file for each name asked for."""

    def __init__(self, folder: Path, shards: list[Path], test: Path) -> None:
        self.folder, self.shards = folder, shards
        self.plans = Plans(shards, folder / "work")
        self.data, self.test = read_images(shards, CPU), read_images([test], CPU)

    def run(
        self,
        todo: list[Task],
        *,
        file: str = "out.json",
        settings: str = "a",
        recipe: Recipe = LEAST,
        at_once: int = 1,
    ) -> dict[str, Any]:
        path = self.folder / file
        results = Results(path, {"name": settings}, "command")
        run_all(todo, self.plans, self.data, self.test, results, lambda keep: recipe, at_once=at_once)
        content: dict[str, Any] = json.loads(path.read_text())
        return content


@pytest.fixture
def bench(tmp_path: Path, make_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(training.NETS, "least", least)
    shards = [make_shard(f"train-{i}.tar", 60, first=60 * i) for i in range(2)]
    return Bench(tmp_path, shards, make_shard("test-0.tar", 40, first=500))


def numbers(content: dict[str, Any]) -> list[str]:
    """The records without their times, in an order of their own."""
    return sorted(
        json.dumps({k: v for k, v in run.items() if not k.endswith("seconds")}) for run in content["runs"]
    )


def test_a_result_does_not_depend_on_what_runs_beside_it(bench: Bench) -> None:
    todo = tasks(["random", "adq", "fresh-adq"], ["thumbnail"], [0.2, 0.4], [0, 1])
    torch.manual_seed(5)
    alone = bench.run(todo, file="alone.json")
    torch.manual_seed(6)
    together = bench.run(todo[::-1], file="together.json", at_once=2)
    assert len(alone["runs"]) == len(todo)
    assert numbers(alone) == numbers(together)


def test_weights_do_not_depend_on_what_runs_beside_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies on 40 images could hide a difference; the weights at the end cannot."""
    ended: dict[str, nn.Module] = {}

    def keep_net(net: nn.Module, test: Images, precision: str) -> tuple[float, float]:
        ended[test.keys["name"][0]] = net
        return 0.0, 0.0

    def weights(name: str) -> torch.Tensor:
        test = replace(bench.test, keys={"name": [name]})  # tells the networks apart
        train(LEAST, bench.data, test, lambda epoch: np.arange(64), seed=int(name[-1]))
        return torch.cat([p.detach().flatten() for p in ended[name].parameters()])

    monkeypatch.setattr(training, "accuracy", keep_net)
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}  # as `trained` has it on a CPU
    with ThreadPoolExecutor(1, **one_thread) as pool:
        alone = list(pool.map(weights, [f"alone {seed}" for seed in range(6)]))
    torch.manual_seed(7)
    with ThreadPoolExecutor(3, **one_thread) as pool:
        together = list(pool.map(weights, [f"together {seed}" for seed in range(6)]))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len({tuple(vector.tolist()) for vector in alone}) == 6


def test_arms_of_a_ratio_get_equal_compute_and_fresh_see_more(bench: Bench) -> None:
    arms = ["full", "random", "dq", "adq", "k-centre", "easiest-20", "chosen", "chosen-strata"]
    arms += [
        "fresh-random",
        "fresh-dq",
        "fresh-adq",
        "full-chosen",
        "recompressed",
        "soft-proxy",
        "chosen-soft",
    ]
    runs = {run["arm"]: run for run in bench.run(tasks(arms, ["thumbnail"], [0.2], [0]))["runs"]}
    full, chosen = runs.pop("full"), runs.pop("full-chosen")
    assert (chosen["kept"], chosen["steps"]) == (12, 10 * 3 * (12 // 8))
    assert {(run["kept"], run["steps"]) for run in runs.values()} == {(24, 3 * (24 // 8))}
    assert (full["kept"], full["steps"], full["seen"]) == (120, 3 * (120 // 8), 120)
    for arm in ("random", "dq", "adq"):
        assert runs[arm]["seen"] == 24
        assert runs[f"fresh-{arm}"]["seen"] > 48
        assert runs[f"fresh-{arm}"]["plan"] == runs[arm]["plan"]
    assert len({runs[arm]["plan"] for arm in ("random", "dq", "adq", "chosen")}) == 4
    assert runs["recompressed"]["selection"] == runs["random"]["selection"] == runs["soft-proxy"]["selection"]


@pytest.mark.parametrize("name", list(ARMS))
def test_every_option_of_an_arm_is_one_of_embedding_or_plan(name: str) -> None:
    options = dict(ARMS[name].options)
    for option in plans.OF_EMBEDDING:
        options.pop(option, None)
    plan_options(**options)


def test_a_schedule_takes_other_numbers_and_as_many_in_all(bench: Bench) -> None:
    arms = ["fresh-chosen", "fresh-chosen-rising", "fresh-chosen-falling"]
    small = replace(LEAST, batch=1)
    runs = {
        run["arm"]: run for run in bench.run(tasks(arms, ["thumbnail"], [0.2], [0]), recipe=small)["runs"]
    }
    assert [runs[arm]["steps"] for arm in arms] == [3 * 24] * 3
    assert len({runs[arm]["selection"] for arm in arms}) == 1  # the plan's, which the draws depart from


def test_rates_follow_the_losses_of_classes(bench: Bench) -> None:
    plan = bench.plans.plan(Task("fresh-random-rates", "thumbnail", 0.2, 0))
    rates = draws_of(ARMS["fresh-random-rates"], plan, bench.shards, 0.2, 3)
    assert isinstance(rates, adq.ClassRates)
    rows = rows_of(plan, bench.data.keys, fresh=True, draws=rates)
    before = np.bincount(bench.data.label[rows(0)])
    rates.update(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    after = np.bincount(bench.data.label[rows(1)])
    assert before.tolist() == [12, 12]
    assert (after.sum(), after[1] > 12) == (24, True)
    assert bench.run(tasks(["fresh-random-rates"], ["thumbnail"], [0.2], [0]))["runs"][0]["steps"] == 9


def test_the_easiest_fifth_is_left_out(bench: Bench) -> None:
    plan = bench.plans.plan(Task("easiest-20", "thumbnail", 0.7, 0))
    kept = np.concatenate([shard.bin[shard.kept] for shard in plan])
    assert np.unique(kept).tolist() == [1, 2, 3, 4]


def test_arms_that_differ_in_fresh_draws_alone_share_a_plan(bench: Bench) -> None:
    of = {arm: bench.plans.plan(Task(arm, "thumbnail", 0.2, 0)) for arm in ("adq", "fresh-adq", "dq")}
    assert of["adq"] is of["fresh-adq"]
    assert of["dq"].hash != of["adq"].hash


@pytest.mark.parametrize("way", list(WAYS))
def test_altered_images_are_those_of_the_plan_in_order(make_shard: Any, tmp_path: Path, way: str) -> None:
    shards = [make_shard(f"train-{i}.tar", 12, first=12 * i, side=32) for i in range(2)]
    data = read_images(shards, CPU)
    plan = Plans(shards, tmp_path / "work").plan(Task("random", "thumbnail", 0.5, 0))
    rows = rows_of(plan, data.keys, fresh=False)(0)
    images, record = altered(way, shards, plan, data, seed=0)
    assert images.pixels.shape == (12, 3, 32, 32)
    assert torch.equal(images.label, data.label[rows])
    assert record["bytes"] <= 0.75 * record["bytes_whole"] + 0.1
    error = (images.pixels.float() - data.pixels[rows].float()).square().mean((1, 2, 3))
    others = (images.pixels.float() - data.pixels[rows].roll(1, 0).float()).square().mean((1, 2, 3))
    assert (error > 0).all()
    assert (error < others).all()


def test_no_quality_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="no JPEG quality is small enough"):
        highest(lambda quality: False)


def test_the_images_trained_on_are_those_the_plan_keeps(bench: Bench) -> None:
    plan = bench.plans.plan(Task("adq", "thumbnail", 0.2, 0))
    keys = [key for name in sorted(bench.data.keys) for key in bench.data.keys[name]]
    fixed, fresh = (rows_of(plan, bench.data.keys, fresh=fresh) for fresh in (False, True))
    assert [keys[row] for row in fixed(0)] == plan.keys() == [keys[row] for row in fresh(0)]
    assert fixed(1).tolist() == fixed(0).tolist()
    assert fresh(1).tolist() != fresh(0).tolist()
    others = {name: [f"other{key}" for key in keys] for name, keys in bench.data.keys.items()}
    with pytest.raises(AdqError, match="the plan's samples are not the images read"):
        rows_of(plan, others, fresh=False)


def test_what_is_recorded_is_not_trained_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = tasks(["random", "dq"], ["thumbnail"], [0.2], [0, 1])
    first = bench.run(todo[:3])
    seen = []
    real = accuracy.trained
    monkeypatch.setattr(accuracy, "trained", lambda task, *rest: seen.append(task) or real(task, *rest))
    second = bench.run(todo)
    assert seen == todo[3:]
    assert second["runs"][:3] == first["runs"]
    assert bench.run(todo)["runs"] == second["runs"]
    assert seen == todo[3:]


def test_what_is_finished_is_kept_when_a_later_training_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = tasks(["random", "dq"], ["thumbnail"], [0.2], [0, 1])
    real = accuracy.trained

    def fails_at_third(task: Task, *rest: Any) -> dict[str, Any]:
        if task == todo[2]:
            raise RuntimeError("out of memory")
        return real(task, *rest)

    monkeypatch.setattr(accuracy, "trained", fails_at_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.run(todo)
    kept = json.loads((bench.folder / "out.json").read_text())
    assert [run["arm"] for run in kept["runs"]][:2] == ["random", "dq"]


def test_results_of_other_settings_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [Task("adq", "thumbnail", 0.2, 0)]
    bench.run(todo)
    with pytest.raises(AdqError, match=r"made with other settings: \{'name': 'a'\}, now \{'name': 'b'\}"):
        bench.run(todo, settings="b")
    with pytest.raises(
        AdqError, match=r"made with other recipes of 0\.2, 3 epochs: .*'lr': 0\.1.*'lr': 0\.2.*--out"
    ):
        bench.run(todo, recipe=replace(LEAST, lr=0.2))
    monkeypatch.setitem(ARMS, "adq", Arm({"bins": 3}))
    with pytest.raises(AdqError, match=r"made with other selection for Task\(arm='adq'"):
        bench.run(todo)
    monkeypatch.undo()
    content = json.loads((bench.folder / "out.json").read_text())
    content["encoders"]["thumbnail"] = "older"
    (bench.folder / "out.json").write_text(json.dumps(content))
    with pytest.raises(AdqError, match="made with other encoders of thumbnail: older, now"):
        bench.run(todo)


def test_an_arm_takes_options_of_embedding_binning_and_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Arm({"batch_size": 7, "bins": 3, "alpha": 0.1}, encoder="thumbnail")
    monkeypatch.setitem(ARMS, "own", own)
    (task,) = tasks(["own"], ["builtin-free"], [0.2], [4])
    plan = bench.plans.plan(task)
    settings = plan.header["settings"]
    assert [settings[name] for name in ("n_bins", "alpha", "seed", "keep")] == [3, 0.1, 4, 0.2]
    assert bench.plans.features(task).header["encoder"] == "thumbnail"
    assert [p.name for p in (bench.folder / "work").iterdir()] == ["thumbnail--batch_size=7"]


def test_trainings_go_seed_by_seed_and_binless_arms_run_once() -> None:
    todo = tasks(["full", "random", "dq"], ["a", "b"], [0.1, 0.2], [3, 4])
    assert [task.seed for task in todo] == [3] * 7 + [4] * 7
    assert [(t.arm, t.encoder, t.keep) for t in todo[:7]] == [
        ("full", "thumbnail", 1.0),
        ("random", "thumbnail", 0.2),
        ("dq", "a", 0.2),
        ("dq", "b", 0.2),
        ("random", "thumbnail", 0.1),
        ("dq", "a", 0.1),
        ("dq", "b", 0.1),
    ]


def test_every_augmented_image_is_a_window_of_its_own_image() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (200, 3, 10, 10), generator=generator).to(torch.uint8)
    found = []
    for image, out in zip(pixels, augment(pixels, generator), strict=True):
        padded = F.pad(image, (4, 4, 4, 4))
        found += [
            (down, right, mirror)
            for down in range(9)
            for right in range(9)
            for mirror in (False, True)
            if torch.equal(out.flip(2) if mirror else out, padded[:, down : down + 10, right : right + 10])
        ]
    assert len(found) == len(pixels)
    for values, expected in zip(zip(*found, strict=True), (range(9), range(9), (False, True)), strict=True):
        assert set(values) == set(expected)


def test_first_weights_follow_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    nets = [build_net("small", 10, seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    a, again, b = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", list(training.NETS))
def test_every_network_takes_uint8_and_has_a_recipe_per_ratio(name: str) -> None:
    net = build_net(name, 7, 0).eval()
    assert net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 7)
    recipes = [recipe_for(name, keep) for keep in (0.025, 0.05, 0.1, 0.2, 1.0)]
    assert [r.epochs for r in recipes] == sorted((r.epochs for r in recipes), reverse=True)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        recipe_for(name, 0)


def test_rows_that_change_in_number_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="epoch 1 has 17 rows, expected 16"):
        train(LEAST, bench.data, bench.test, lambda epoch: np.arange(16 + epoch), seed=0)
    with pytest.raises(ValueError, match="epoch 0 has 0 rows"):
        train(LEAST, bench.data, bench.test, lambda epoch: np.arange(0), seed=0)


def test_epochs_of_unlike_size_take_all_steps(bench: Bench) -> None:
    told: list[list[int]] = []
    outcome = train(
        LEAST, bench.data, bench.test, lambda epoch: np.arange(16 * (epoch + 1)), seed=0,
        n_rows=lambda epoch: 16 * (epoch + 1), after=lambda sums, counts: told.append(counts.tolist()),
    )  # fmt: skip
    assert outcome.n_steps == (16 + 32 + 48) // LEAST.batch
    assert told == [[8, 8], [16, 16], [24, 24]]


def test_an_easy_task_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.NETS, "least", least)
    label = torch.arange(200) % 2
    pixels = (label * 200).view(-1, 1, 1, 1).expand(200, 3, 12, 12).to(torch.uint8)
    images = Images(pixels, label, {})
    outcome = train(
        replace(LEAST, epochs=5), images, images, lambda epoch: np.arange(0, 200, 3, dtype=np.int64), seed=0
    )
    assert outcome.curve[-1] == (5, 1.0, 1.0)
    assert (outcome.n_seen, outcome.n_steps) == (67, 5 * (67 // 8))


def test_accuracy_is_chosen_on_the_even_half_reported_on_odd() -> None:
    right = torch.tensor([1, 0, 1, 0, 1, 1])  # even rows 3 of 3, odd rows 1 of 3
    net = nn.Sequential(nn.Flatten(), nn.Identity())
    pixels = F.one_hot(right, 2).to(torch.uint8).view(6, 2, 1, 1)
    reported, choosing = accuracy_of(net, Images(pixels, torch.ones(6, dtype=torch.int64), {}), "float32")
    assert reported == pytest.approx(1 / 3)
    assert choosing == 1


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    runs = [
        {"arm": arm, "encoder": "e", "keep": 0.1, "seed": seed, "last": last}
        for arm, values in (("random", (0.5, 0.6, 0.4)), ("dq", (0.52, 0.66, 0.41)))
        for seed, last in enumerate(values)
    ]
    full = {"arm": "full", "encoder": "e", "keep": 1.0, "seed": 0, "last": 0.9}
    row, against_full = differences([*runs, full], "random")
    assert (row["arm"], row["n"], row["mean"]) == ("dq", 3, 3.0)
    assert (against_full["arm"], against_full["keep"], against_full["mean"]) == ("full", 0.1, 40)
    assert row["half_width"] == pytest.approx(4.30 * statistics.stdev((2, 6, 1)) / 3**0.5, abs=0.01)
    to_full = {row["arm"]: row for row in differences([*runs, full], "full")}
    assert to_full["random"]["mean"] == -40
    assert to_full["random"]["half_width"] is None


def test_the_summary_is_mean_and_deviation_of_last_accuracy() -> None:
    run = {"arm": "dq", "encoder": "e", "keep": 0.1, "choosing": 0.9, "seen": 10}
    last = [0.5, 0.6, 0.65]
    rows = summary([{**run, "last": value} for value in last] + [{**run, "arm": "random", "last": 0.4}])
    assert [(row["arm"], row["n"]) for row in rows] == [("random", 1), ("dq", 3)]
    assert rows[1]["mean"] == pytest.approx(100 * statistics.mean(last), abs=1e-3)
    assert rows[1]["std"] == pytest.approx(100 * statistics.stdev(last), abs=1e-3)
    assert rows[0]["std"] is None
    assert markdown(rows).splitlines() == [
        "| arm | encoder | 10 % |",
        "|---|---|---|",
        "| random | – | 40.00 (1) |",
        "| dq | e | 58.33 ± 7.64 (3) |",
    ]
