"""Students without data: the benchmark's networks, measures, and both of its loops at a toy's size."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from adq_wds.errors import AdqError
from benchmarks import dda_images
from benchmarks.dda_images import Schedule, distil, hours
from benchmarks.dda_measures import frechet_distance, mean_cosine
from benchmarks.dda_nets import NETS, build
from benchmarks.training import Images, read_images
from tests.conftest import MonkeyPatch, write_tar

FEW = Schedule(
    teacher="wrn10-1", student="wrn10-1", teacher_steps=3, epochs=3, warmup=1, warmup_rounds=1, rounds=1, images=6,
    inversion_steps=2, steps=2, batch=6,
)  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_a_network_knows_its_classes_at_any_side(name: str) -> None:
    net = build(name, 7, seed=0).eval()
    with torch.inference_mode():
        assert [net(torch.zeros(1, 3, side, side)).shape for side in (32, 64)] == [(1, 7), (1, 7)]


@pytest.mark.parametrize(("name", "millions"), [("wrn16-1", 0.17), ("wrn40-2", 2.24), ("resnet34", 21.28)])
def test_networks_have_the_weights_of_their_papers(name: str, millions: float) -> None:
    assert sum(p.numel() for p in build(name, 10, seed=0).parameters()) / 1e6 == pytest.approx(
        millions, abs=0.01
    )


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 5)), rng.normal(1, 2, size=(40, 5))
    covariances = [np.cov(rows.T, bias=True) for rows in (a, b)]
    plainly = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(a, b) == pytest.approx(plainly)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_mean_cosine_is_over_all_pairs() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[:i]]
    assert mean_cosine(rows) == pytest.approx(np.mean(cosines))


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """Shards of two classes of 8 × 8 images: to train the teacher, and to judge."""
    rng, paths = np.random.default_rng(0), []
    for name, n in (("train.tar", 12), ("test.tar", 6)):
        members = []
        for i in range(n):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(png, "PNG")
            members += [(f"{i}.png", png.getvalue()), (f"{i}.cls", b"%d" % (i % 2))]
        paths.append(write_tar(tmp_path / name, members))
    return paths


def decoded(sets: list[Path]) -> tuple[Images, Images]:
    train, test = (read_images([path], torch.device("cpu")) for path in sets)
    return train, test


def test_a_student_goes_on_where_it_was_stopped(
    sets: list[Path], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    train, test = decoded(sets)
    assert set(hours(train, FEW)) == {"teacher", "synthesis", "distillation"}
    whole = distil(train, test, tmp_path / "whole", FEW)
    assert (len(whole["student"]["curve"]), len(list((tmp_path / "whole/bank").glob("*.tar")))) == (2, 3)

    def kill(*anything: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(dda_images, "accuracy", kill)  # at the end of an epoch, before it is saved
        with pytest.raises(KeyboardInterrupt):
            distil(train, test, tmp_path / "killed", FEW)
    again = distil(train, test, tmp_path / "killed", FEW)
    assert (again["teacher"], again["student"]) == (whole["teacher"], whole["student"])
    for tar in (tmp_path / "whole/bank").glob("*.tar"):
        assert (tmp_path / "killed/bank" / tar.name).read_bytes() == tar.read_bytes()
    with pytest.raises(AdqError, match=r"teacher\.pt was made with .*'seed': 0.* now .*'seed': 1.*--work"):
        distil(train, test, tmp_path / "whole", Schedule(**{**vars(FEW), "seed": 1}))


needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("sklearn") is None,
    reason="needs diffusers and scikit-learn",
)


def command(monkeypatch: MonkeyPatch, *words: Any) -> None:
    from benchmarks import dda

    monkeypatch.setattr(sys, "argv", ["dda", *map(str, words)])
    dda.main()


@needs_diffusers
def test_a_folder_of_shards_says_its_hours_first(
    sets: list[Path], tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [word for name, value in vars(FEW).items() for word in (f"--{name.replace('_', '-')}", value)]
    shards = ["--train", sets[0], "--test", sets[1], "--device", "cpu"]
    command(monkeypatch, "folder", *shards, "--work", tmp_path / "work", "--out", tmp_path / "out.json", *few)
    assert " hours on cpu (teacher " in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "out.json").read_text())["schedule"] == vars(FEW)


@needs_diffusers
def test_a_seed_that_is_recorded_is_not_run_again(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import dda

    few = ["--rounds", 1, "--more", 1, "--teacher-steps", 3, "--unet-steps", 2, "--steps", 2]
    out = tmp_path / "out.json"
    command(monkeypatch, "digits", "--seeds", 1, "--work", tmp_path, "--out", out, *few)
    before = json.loads(out.read_text())
    assert "| variants − bank alone | " in capsys.readouterr().out
    command(monkeypatch, "picture", "--work", tmp_path / "seed-0", "--out", tmp_path / "dda.svg")
    assert (tmp_path / "dda.svg").read_text().count(
        "<image "
    ) == 2 * 2 * 10  # of ten classes, kept and dropped
    monkeypatch.setattr(dda, "one_seed", lambda seed, *more: before["seeds"]["0"])
    command(monkeypatch, "digits", "--seeds", 2, "--out", out, *few)
    assert list(json.loads(out.read_text())["seeds"]) == ["0", "1"]
    with pytest.raises(AdqError, match=r"was made with .*'steps': 2.* now .*'steps': 3.*--out"):
        command(monkeypatch, "digits", "--out", out, *few[:-1], 3)
