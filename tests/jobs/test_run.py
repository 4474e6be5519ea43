"""One command from shards to plan: run again it does what is missing, and nothing else."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.engines.shared import Shared
from adq_wds.jobs.run import load_run, run_job
from tests.conftest import MakeShard
from tests.folders import contents, dates, flip

PLAN: dict[str, Any] = {"bins": 3, "keep": 0.5}


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    return [make_shard(f"in/t-{i}.tar", 30, first=30 * i) for i in range(3)]


def run(
    shards: list[Path],
    out: Path,
    *,
    write: bool = False,
    embed: Any = None,
    engine: Any = "threads",
    **plan: Any,
) -> dict[str, Any]:
    options: Any = {
        "engine": engine,
        "encoder": {"spec": "thumbnail"},
        "embed": embed or {},
        "plan": {**PLAN, **plan},
    }
    return run_job(shards, out, write=write, **options)


def test_the_folder_holds_what_it_should(shards: list[Path], tmp_path: Path) -> None:
    result = run(shards, tmp_path / "out")
    features = [f"features/t-{i}.parquet" for i in range(3)]
    assert list(dates(tmp_path / "out")) == ["bins.parquet", *features, "plan.parquet", "run.json"]
    plan = adq.load_plan(tmp_path / "out" / "plan.parquet")
    assert (result["samples"], result["kept"], result["plan"]) == (90, 45, plan.hash)
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in result.items() if k != "nothing_to_do"}))


def test_a_run_gives_the_plan_of_the_single_steps(shards: list[Path], tmp_path: Path) -> None:
    run(shards, tmp_path / "out")
    features = adq.embed_shards(shards, "thumbnail", out=tmp_path / "features")
    adq.build_plan(features, **PLAN, out=tmp_path / "plan.parquet")
    assert (tmp_path / "plan.parquet").read_bytes() == (tmp_path / "out" / "plan.parquet").read_bytes()


def test_a_second_run_touches_nothing(shards: list[Path], tmp_path: Path) -> None:
    first = run(shards, tmp_path / "out", write=True)
    before = dates(tmp_path / "out")
    again = run(shards, tmp_path / "out", write=True)
    assert (first.pop("nothing_to_do"), again.pop("nothing_to_do")) == (False, True)
    assert again == json.loads(json.dumps(first))
    assert dates(tmp_path / "out") == before


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    "other",
    [
        {"keep": 0.2},
        {"seed": 7},
        {"memory_bytes": 0},
        {"must_include": ["s00003"]},
        {"bins": 4},
        {"classes": [1]},
    ],
)
def test_other_arguments_redo_what_depends(shards: list[Path], tmp_path: Path, other: dict[str, Any]) -> None:
    run(shards, tmp_path / "out")
    before = dates(tmp_path / "out")
    assert not run(shards, tmp_path / "out", **other)["nothing_to_do"]
    of_bins = {"bins.parquet"} if other.keys() & {"bins", "classes"} else set()
    assert changed(before, dates(tmp_path / "out")) == {"plan.parquet", "run.json"} | of_bins
    run(shards, tmp_path / "fresh", **other)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"limit": 0}, "limit"),
        ({"workers": 0}, "workers"),
        ({"max_bad_fraction": 7}, "max_bad_fraction"),
        ({"label": "txt"}, "txt"),
        ({"image": "jpg"}, r"made with image 'jpg;.*, now 'jpg'"),  # needs another folder
    ],
)
def test_failure_keeps_the_old_run(
    shards: list[Path], tmp_path: Path, wrong: dict[str, Any], text: str
) -> None:
    run(shards, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises((ValueError, adq.AdqError), match=text):
        run(shards, tmp_path / "out", embed=wrong)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("encoder", {"run": "x"}, "unknown arguments .'run'. under 'encoder'"),
        ("embed", {"out": "elsewhere"}, "unknown arguments .'out'. under 'embed'"),
        ("plan", {"out": "elsewhere"}, "unknown arguments .'out'. under 'plan'"),
        ("plan", {"must_include": "/etc/passwd"}, "must_include is not a list"),
        ("embed", {"double_softmax": True}, "double_softmax: it is gone"),
    ],
)
def test_a_strangers_run_json_sets_nothing_but_arguments(
    shards: list[Path], tmp_path: Path, part: str, change: dict[str, Any], text: str
) -> None:
    run(shards, tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    hostile = json.loads(path.read_text())
    hostile["arguments"][part].update(change)
    path.write_text(json.dumps(hostile))
    with pytest.raises(ValueError, match=text):
        load_run(path)


def test_a_changed_shard_is_embedded_again_and_binned_again(
    shards: list[Path], make_shard: MakeShard, tmp_path: Path
) -> None:
    run(shards, tmp_path / "out")
    before = dates(tmp_path / "out")
    make_shard("in/t-1.tar", 31, first=30)
    result = run(shards, tmp_path / "out")
    assert result["samples"] == 91
    redone = {"features/t-1.parquet", "bins.parquet", "plan.parquet", "run.json"}
    assert changed(before, dates(tmp_path / "out")) == redone


def test_write_adds_the_shards_to_a_run(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(shards, out)
    before = dates(out)
    result = run(shards, out, write=True)
    assert result["written"]["samples"] == 45
    redone = {name for name in changed(before, dates(out)) if not name.startswith("shards/")}
    assert redone == {"plan.parquet", "run.json"}
    assert adq.Plan.from_keys(str(out / "shards"), []).n_samples == 45
    run(shards, out, write=True, keep=0.1)
    assert adq.Plan.from_keys(str(out / "shards"), []).n_samples == 9


def test_commands_that_share_write_the_shards_of_a_run_together(shards: list[Path], tmp_path: Path) -> None:
    def shared(**plan: Any) -> dict[str, Any]:
        return run(shards, out, write=True, engine=Shared(out, beat=0.1), **plan)

    run(shards, tmp_path / "one", write=True)
    out = tmp_path / "two"
    with ThreadPoolExecutor(2) as pool:
        results = [each.result() for each in [pool.submit(shared) for _ in range(2)]]
    assert results[0]["written"] == results[1]["written"]
    (out / "shards" / ".adq.write" / "job.json").unlink()
    assert contents(out) == contents(tmp_path / "one")
    assert shared()["nothing_to_do"]


def test_shards_of_an_earlier_plan_are_not_removed_by_one_of_several_commands(
    shards: list[Path], tmp_path: Path
) -> None:
    def shared(**plan: Any) -> dict[str, Any]:
        return run(shards, out, write=True, engine="shared", **plan)

    out = tmp_path / "out"
    shared()
    (out / "shards" / "000000.tar").write_bytes(b"x")
    with pytest.raises(
        adq.AdqError, match="shards lacks bytes of what was written: remove it, and run again"
    ):
        shared()
    with pytest.raises(adq.AdqError, match=r"holds _info.json of an earlier run; .* empty this one"):
        shared(keep=0.1)
    shutil.rmtree(out / "shards")
    assert shared(keep=0.1)["written"]["samples"] == 9


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no plan": lambda out: (out / "plan.parquet").unlink(),
    "plan cut": lambda out: (out / "plan.parquet").write_bytes((out / "plan.parquet").read_bytes()[:-50]),
    "a byte in the plan": lambda out: flip(out / "plan.parquet", 0.3),
    "plan of keys": lambda out: adq.Plan.from_keys(str(out.parent / "in"), []).save(out / "plan.parquet"),
    "bins and plan": lambda out: [flip(out / "bins.parquet", 0.5), (out / "plan.parquet").unlink()],
    "bins are text": lambda out: [(out / "bins.parquet").write_text("x"), (out / "plan.parquet").unlink()],
    "run.json empty": lambda out: (out / "run.json").write_text(""),
    "run.json a list": lambda out: (out / "run.json").write_text("[]"),
    "run.json of bytes": lambda out: (out / "run.json").write_bytes(b"\xff\xfe"),
    "run.json without plan": lambda out: edit_run(out, lambda run: run.pop("plan")),
    "no run.json": lambda out: (out / "run.json").unlink(),
    "no info": lambda out: (out / "shards" / "_info.json").unlink(),
    "info empty": lambda out: (out / "shards" / "_info.json").write_text("{}"),
    "a shard gone": lambda out: (out / "shards" / "000000.tar").unlink(),
    "a shard cut": lambda out: (out / "shards" / "000000.tar").write_bytes(b"x"),
    "features byte": lambda out: [flip(out / "features/t-1.parquet", 0.5), (out / "plan.parquet").unlink()],
    "no features": lambda out: [p.unlink() for p in (*(out / "features").glob("*"), out / "run.json")],
}


def edit_run(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    saved = json.loads((out / "run.json").read_text())
    edit(saved)
    (out / "run.json").write_text(json.dumps(saved))


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_or_gone_is_made_again(shards: list[Path], tmp_path: Path, damage: str) -> None:
    run(shards, tmp_path / "out", write=True)
    before = contents(tmp_path / "out")
    DAMAGES[damage](tmp_path / "out")
    assert not run(shards, tmp_path / "out", write=True)["nothing_to_do"]
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"keep": 1.5}, r"keep.*1.5"),
        ({"keep": float("nan")}, r"keep.*nan"),
        ({"bins": 0}, r"bins.*0"),
        ({"alpha": -1}, r"alpha.*-1"),
        ({"allocation": "adaptiv"}, r"unknown allocation 'adaptiv'; did you mean adaptive"),
        ({"scores": ["textur"]}, r"unknown score 'textur'; did you mean texture"),
        ({"draw": "first"}, r"draw must be one of .*'first'"),
    ],
)
def test_wrong_plan_arguments_are_refused_before_embedding(
    shards: list[Path], tmp_path: Path, plan: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        run(shards, tmp_path / "out", **plan)
    assert not (tmp_path / "out").exists()
    run(shards, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=text):
        run(shards, tmp_path / "out", **plan)
    assert contents(tmp_path / "out") == before


def test_a_missing_shard_is_named_before_anything_is_made(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(adq.ShardError, match=r"none.tar: cannot be opened: No such file"):
        run([*shards, tmp_path / "none.tar"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_never_writes_over_sources_or_others_shards(
    shards: list[Path], make_shard: MakeShard, tmp_path: Path
) -> None:
    mine = make_shard("out/shards/000000.tar", 10)
    data = mine.read_bytes()
    with pytest.raises(adq.AdqError, match=r"shards holds 000000.tar, and no run was made in"):
        run(shards, tmp_path / "out", write=True)
    with pytest.raises(ValueError, match=r"000000.tar' would be written over"):
        run([mine], tmp_path / "out", write=True)
    run([mine], tmp_path / "out")
    with pytest.raises(ValueError, match=r"000000.tar' would be written over"):
        run([mine], tmp_path / "out", write=True)
    assert mine.read_bytes() == data


def test_a_run_again_from_its_json_is_the_same_run(shards: list[Path], tmp_path: Path) -> None:
    run(shards, tmp_path / "out", must_include=[("t-1.tar", "s00031")], seed=5)
    path = tmp_path / "out" / "run.json"
    saved = load_run(path)
    earlier = json.loads(path.read_text())
    earlier["arguments"]["embed"]["double_softmax"] = False
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    assert load_run(tmp_path / "earlier.json") == saved
    assert run_job(out=tmp_path / "out", **saved)["nothing_to_do"]
    run_job(out=tmp_path / "again", **saved)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "adq_wds.run", "version": 99}', '{"format": "x", "version": 1}', None],
)
def test_what_is_no_run_json_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run.json: not a run.json that this adq_wds can read"):
        load_run(tmp_path / "run.json")


def test_a_limit_plans_the_first_samples_and_completes_later(shards: list[Path], tmp_path: Path) -> None:
    assert run(shards, tmp_path / "out", embed={"limit": 40})["samples"] == 40
    assert run(shards, tmp_path / "out")["samples"] == 90
    before = dates(tmp_path / "out")
    assert run(shards, tmp_path / "out", embed={"limit": 40})["samples"] == 40
    assert not any(name.startswith("features") for name in changed(before, dates(tmp_path / "out")))


def test_cifar10_keeps_a_thousand_of_each_class(cifar10: Path, tmp_path: Path) -> None:
    shards = sorted(map(str, cifar10.glob("cifar10-train-*.tar")))
    assert len(shards) == 10
    flags = ["--encoder", "thumbnail", "--keep", "0.2", "-o", str(tmp_path / "out"), "-q"]
    assert main(["run", *shards, *flags]) == 0
    plan = adq.load_plan(tmp_path / "out" / "plan.parquet")
    assert (plan.n_samples, plan.n_kept) == (50_000, 10_000)
    labels = plan.table().filter(plan.table()["kept"])["label"].to_pylist()
    assert Counter(labels) == dict.fromkeys(range(10), 1_000)
    assert os.listdir(tmp_path / "out" / "features").count("cifar10-train-000003.parquet") == 1
