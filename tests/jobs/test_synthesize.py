"""A bank is ordinary shards, made of a teacher alone; killed, split or grown it has the bytes of an unbroken run."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adq_wds as adq
from adq_wds.jobs import synthesize as module
from adq_wds.jobs.synthesize import hash_of, synthesize
from adq_wds.models.adversaries import kl_adversary
from adq_wds.models.inversion import Recipe
from tests.models.test_inversion import net

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"side": 8, "images": 7, "recipe": Recipe(3, 0.05, shift=1)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Unbroken runs of five rounds, by kind."""
    banks = {}
    for kind in ("pixels", "generator", "noisy"):
        folder = tmp_path_factory.mktemp(kind)
        synthesize(net(), folder, kind=kind, rounds=5, **QUICK)  # type: ignore[arg-type]
        banks[kind] = files(folder)
    return banks


def test_a_bank_is_read_as_any_other_set(tmp_path: Path) -> None:
    paths = synthesize(net(), tmp_path / "bank", rounds=3, classes=["a", "b", "c"], **QUICK)
    assert [Path(path).name for path in paths] == [f"round-{r:06d}.tar" for r in range(3)]
    ds = adq.ShardDataset(paths, pipes=[adq.Decode(to="numpy")])
    samples = list(ds)
    assert Counter(sample["label"] for sample in samples) == {0: 7, 1: 7, 2: 7}
    assert {sample["image"].shape for sample in samples} == {(8, 8, 3)}
    assert samples[9]["__key__"] == "r000001-00002"
    info = json.loads((tmp_path / "bank" / "_info.json").read_text())
    assert (info["splits"]["train"]["num_samples"], info["classes"]) == (21, ["a", "b", "c"])
    features = adq.embed_shards(paths, "thumbnail", tmp_path / "features")
    assert len(adq.build_plan(features, bins=2, keep=0.5)) == 10
    bank = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert (bank["teacher"], bank["kind"], bank["steps"]) == (hash_of(net()), "pixels", 3)


def killed_at(n: int, write: Callable[..., None], after: bool) -> Callable[..., None]:
    """`write`, which is interrupted at its n-th call, before or after it."""
    calls = []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == n and not after:
            raise KeyboardInterrupt
        write(*arguments)
        if len(calls) == n:
            raise KeyboardInterrupt

    return killed


@pytest.mark.parametrize("kind", ["pixels", "generator", "noisy"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    kind: Any, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at ten moments: at a first or second round of what is left, before and after its tar is written."""
    write = module._write_round
    kills = [(n, after) for n in (1, 2, 1, 2, 1) for after in (True, False)]
    for kill, (n, after) in enumerate(kills):
        monkeypatch.setattr(module, "_write_round", killed_at(n, write, after))
        folder = tmp_path / str(kill // 5)
        with suppress(KeyboardInterrupt):
            synthesize(net(), folder, kind=kind, rounds=5, **QUICK)
    monkeypatch.setattr(module, "_write_round", write)
    for part in ("0", "1"):
        synthesize(net(), tmp_path / part, kind=kind, rounds=5, **QUICK)
        assert files(tmp_path / part) == whole[kind]


def test_two_processes_share_the_rounds(whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    first = synthesize(net(), tmp_path, rounds=5, rank=1, world=2, **QUICK)
    assert [Path(path).name for path in first] == ["round-000001.tar", "round-000003.tar"]
    assert not (tmp_path / "_info.json").exists()
    assert len(synthesize(net(), tmp_path, rounds=5, rank=0, world=2, **QUICK)) == 5
    assert files(tmp_path) == whole["pixels"]
    with pytest.raises(ValueError, match="one process makes them; give world=1"):
        synthesize(net(), tmp_path / "n", kind="noisy", world=2, **QUICK)


@pytest.mark.parametrize("kind", ["pixels", "noisy"])
def test_a_bank_grows(kind: Any, whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    for rounds in (1, 2, 5, 5):
        assert len(synthesize(net(), tmp_path, kind=kind, rounds=rounds, **QUICK)) == rounds
    assert files(tmp_path) == whole[kind]


@pytest.mark.parametrize("kind", ["pixels", "noisy"])
def test_a_bank_that_was_killed_while_it_grew_is_described_anew(
    kind: Any, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(net(), tmp_path, kind=kind, rounds=2, **QUICK)
    describe: Any = vars(module)["describe_shards"]
    monkeypatch.setattr(module, "describe_shards", killed_at(1, describe, after=False))
    with pytest.raises(KeyboardInterrupt):
        synthesize(net(), tmp_path, kind=kind, rounds=5, **QUICK)
    monkeypatch.setattr(module, "describe_shards", describe)
    assert not (tmp_path / "_info.json").exists()
    synthesize(net(), tmp_path, kind=kind, rounds=5, **QUICK)
    assert files(tmp_path) == whole[kind]


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    teacher = net().train().requires_grad_(True)
    first = next(teacher.children()).eval()
    next(first.parameters()).requires_grad_(False)
    before = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    assert len({*before[0]}) == len({*before[1]}) == 2
    synthesize(teacher, tmp_path, rounds=1, **QUICK)
    assert (
        [m.training for m in teacher.modules()],
        [p.requires_grad for p in teacher.parameters()],
    ) == before
    with pytest.raises(ValueError, match="tells 3 classes apart"):
        synthesize(teacher, tmp_path / "b", classes=["a"], **QUICK)
    assert (
        [m.training for m in teacher.modules()],
        [p.requires_grad for p in teacher.parameters()],
    ) == before


def test_another_seed_or_round_makes_other_images(whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    synthesize(net(), tmp_path, rounds=2, seed=1, **QUICK)
    tars = {files(tmp_path)[f"round-00000{r}.tar"] for r in (0, 1)} | {whole["pixels"]["round-000000.tar"]}
    assert len(tars) == 3


def test_an_adversary_is_noted_in_the_bank(tmp_path: Path) -> None:
    synthesize(net(), tmp_path, rounds=1, terms=[kl_adversary(net(seed=4))], **QUICK)
    assert json.loads((tmp_path / "bank.json").read_text())["terms"] == ["kl_adversary.<locals>.loss"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def folded() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no BatchNorm": (folded, {}, "no BatchNorm layer.*with bn=0 the cross-entropy remains"),
    "other classes": (net, {"classes": ["a"]}, "tells 3 classes apart, and classes= names 1"),
    "no logits": (Odd, {}, r"gives \(2, 3, 8, 8\) for 2 images, expected logits \(2, C\)"),
    "a side": (net, {"side": 10, "kind": "generator"}, "makes no images of 10 x 10; use pixels"),
    "a kind": (net, {"kind": "gan"}, "kind must be one of pixels, generator, noisy, got 'gan'"),
    "a rank": (net, {"rank": 2, "world": 2}, "rank must be an integer from 0 to 1, got 2"),
    "rounds": (net, {"rounds": 0}, "rounds must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_made_is_refused_before_a_file_is(case: str, tmp_path: Path) -> None:
    teacher, options, message = BAD[case]
    if options.get("side") == 10:
        teacher = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(8), *net())  # noqa: E731
    with pytest.raises(ValueError, match=message):
        synthesize(teacher(), tmp_path / "bank", **{**QUICK, **options})
    assert not (tmp_path / "bank").exists()


def test_without_batchnorm_the_cross_entropy_remains(tmp_path: Path) -> None:
    assert len(synthesize(folded(), tmp_path, side=8, images=3, rounds=1, recipe=Recipe(2, 0.1, bn=0))) == 1


def test_a_bank_of_another_teacher_or_other_settings_is_refused(tmp_path: Path) -> None:
    synthesize(net(), tmp_path, rounds=1, **QUICK)
    before = files(tmp_path)
    with pytest.raises(
        adq.AdqError, match=r"holds a bank of another teacher, '.*', not '.*'; give another folder"
    ):
        synthesize(net(seed=1), tmp_path, rounds=1, **QUICK)
    with pytest.raises(adq.AdqError, match="holds a bank of another steps, 3, not 4"):
        synthesize(net(), tmp_path, rounds=1, **{**QUICK, "recipe": Recipe(4, 0.05, shift=1)})
    assert files(tmp_path) == before
    (tmp_path / "bank.json").write_text("[")
    with pytest.raises(adq.AdqError, match=r"bank.json: damaged"):
        synthesize(net(), tmp_path, rounds=1, **QUICK)


def test_a_loss_that_is_not_finite_names_round_and_step(tmp_path: Path) -> None:
    with pytest.raises(adq.AdqError, match=r"round 0, step 1: the loss is (nan|inf)"):
        synthesize(net(), tmp_path, rounds=1, terms=[NanAtSecond()], **QUICK)
    assert list(files(tmp_path)) == ["bank.json"]


class NanAtSecond:
    calls = 0

    def __call__(self, seen: Any) -> torch.Tensor:
        self.calls += 1
        return torch.tensor(float("nan") if self.calls > 1 else 0.0)
