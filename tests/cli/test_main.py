"""The command: every argument a flag, one line for an error, an exit code for each kind of end."""

import argparse
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.arguments import make_parser
from adq_wds.cli.main import main
from adq_wds.cli.parser import flagged
from adq_wds.writing.write_shards import write_kept

MakeShard = Callable[..., Path]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[str]:
    return [str(make_shard(f"in/t-{i}.tar", 30, first=30 * i)) for i in range(2)]


@pytest.fixture
def plan(shards: list[str], tmp_path: Path) -> str:
    adq.embed_shards(shards, out=tmp_path / "features")
    adq.build_plan(tmp_path / "features", bins=2, keep=0.5, out=tmp_path / "plan.parquet")
    return str(tmp_path / "plan.parquet")


def command(name: str) -> argparse.ArgumentParser:
    (subparsers,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = subparsers.choices[name]
    return found


def files(folder: Path) -> dict[str, int]:
    """Every file but the locks, and when it was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".adq.lock"]
    return {str(path): path.stat().st_mtime_ns for path in paths}


# ---- Arguments


@pytest.mark.parametrize(
    ("name", "function", "positional"),
    [
        ("embed", adq.embed_shards, {"urls": "shards"}),
        ("run", adq.embed_shards, {"urls": "shards"}),
        ("plan", adq.build_plan, {"features": "features"}),
        ("run", adq.build_plan, {"features": None}),
        ("write", write_kept, {"urls": "shards", "pattern": "out"}),
    ],
)
def test_every_argument_is_a_flag_of_the_same_name_with_the_same_default(
    name: str, function: Callable[..., Any], positional: dict[str, str | None]
) -> None:
    actions = {action.dest: action for action in command(name)._actions}
    for parameter in inspect.signature(function).parameters.values():
        dest = positional.get(parameter.name, parameter.name)
        if dest is None or (name, function, dest) == ("run", adq.embed_shards, "scores"):
            continue  # what `run` embeds follows from the scores of its plan
        action = actions[dest]
        if parameter.name in positional:
            continue
        assert f"--{parameter.name.replace('_', '-')}" in action.option_strings
        default = parameter.default
        if parameter.name != "out" and default is not inspect.Parameter.empty:
            given = action.default if not isinstance(action.default, list) else tuple(action.default)
            assert given in (default, None if default == () else default), parameter.name


def test_every_flag_has_a_help_text() -> None:
    for name in ("run", "embed", "plan", "show", "write"):
        assert all(action.help for action in command(name)._actions)
        command(name).format_help()


def test_flags_reach_the_functions(shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("s00003\nt-1.tar\ts00031\n\n")
    flags = "--label none --image jpg;png --batch-size 7 --workers 1 --limit 50 --on-error skip --max-bad-fraction 0.5"
    assert main(["embed", *shards, "-o", str(tmp_path / "f"), *flags.split()]) == 0
    features = adq.Features(tmp_path / "f")
    assert (len(features), features.header["label"], features.header["image"]) == (50, "none", "jpg;png")
    flags = (
        "--keep 0.25 --bins 3 --seed 4 --alpha 0.5 --allocation uniform --balance none --draw ordered "
        "--scores diversity --normalise minmax --memory-bytes 1000 --must-include"
    )
    out = str(tmp_path / "p.parquet")
    assert main(["plan", str(tmp_path / "f"), "-o", out, *flags.split(), str(tmp_path / "keys.txt")]) == 0
    expected = adq.build_plan(
        tmp_path / "f",
        keep=0.25,
        bins=3,
        seed=4,
        alpha=0.5,
        allocation="uniform",
        balance="none",
        draw="ordered",
        scores=["diversity"],
        normalise="minmax",
        must_include=["s00003", ("t-1.tar", "s00031")],
    )
    assert adq.load_plan(out).hash == expected.hash


def test_classes_are_chosen_by_number(shards: list[str], tmp_path: Path) -> None:
    adq.embed_shards(shards, out=tmp_path / "f")
    assert main(["plan", str(tmp_path / "f"), "--classes", "1", "-o", str(tmp_path / "p.parquet")]) == 0
    assert adq.load_plan(tmp_path / "p.parquet").hash == adq.build_plan(tmp_path / "f", classes=[1]).hash


def test_stored_embeddings_are_a_flag(shards: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    assert main(["embed", *shards, "--embeddings", str(tmp_path / "e.npy"), "-o", str(tmp_path / "f")]) == 0
    assert adq.Features(tmp_path / "f").header["encoder"] == "stored:e.npy"


# ---- What is printed


@pytest.mark.parametrize("form", [["show"], ["show", "--json"]])
def test_show_tells_what_a_plan_keeps(plan: str, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*form, plan]) == 0
    out = capsys.readouterr().out
    if "--json" in form:
        said = json.loads(out)
        assert (said["n_kept"], said["n_samples"], len(said["bins"]), len(said["classes"])) == (30, 60, 2, 2)
        assert said["hash"] == adq.load_plan(plan).hash
    else:
        assert out.startswith("keeps 30 of 60 samples (50.0 %) in 2 shards\n")


def test_json_is_json_whatever_the_command(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    commands: list[tuple[list[str], dict[str, Any]]] = [
        (["run", *shards, "-o", out, "--dry-run"], {"shards": 2, "samples": 60, "kept": 18}),
        (["run", *shards, "-o", out], {"samples": 60, "kept": 18, "nothing_to_do": False}),
        (["run", *shards, "-o", out], {"samples": 60, "kept": 18, "nothing_to_do": True}),
        (["embed", *shards, "-o", f"{out}/features"], {"samples": 60, "shards": 2}),
        (["embed", *shards, "-o", f"{out}/features", "--dry-run"], {"samples": 60, "shards": 2}),
        (["plan", f"{out}/features", "-o", f"{out}/p.parquet"], {"n_samples": 60, "n_kept": 18}),
        (
            ["write", *shards, "--plan", f"{out}/p.parquet", "-o", f"{out}/w/%d.tar"],
            {"samples": 18, "shards": 1},
        ),
    ]
    for arguments, expected in commands:
        assert main([*arguments, "--json"]) == 0, arguments
        said = json.loads(capsys.readouterr().out)
        assert {name: said[name] for name in expected} == expected, arguments


def test_run_says_when_there_is_nothing_to_do(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for start in ("keeps 18 of 60", "nothing to do: the same run is here already\nkeeps 18 of 60"):
        before = files(tmp_path / "out")
        assert main(["run", *shards, "-o", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.startswith(start)
    assert files(tmp_path / "out") == before


def test_write_says_how_much_smaller_it_became(
    shards: list[str], plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", *shards, "--plan", plan, "-o", str(tmp_path / "w" / "%d.tar")]) == 0
    n_bytes = (tmp_path / "w" / "0.tar").stat().st_size
    assert f"30 samples in 1 shards: {n_bytes:,} bytes on disk" in capsys.readouterr().out
    assert main(["write", *shards, "--plan", plan, "-o", str(tmp_path / "w" / "%d.tar")]) == 1
    assert capsys.readouterr().err.endswith("of an earlier run; give another folder, or --overwrite\n")
    assert main(["write", *shards, "--plan", plan, "-o", str(tmp_path / "w" / "%d.tar"), "--overwrite"]) == 0


# ---- A dry run


@pytest.mark.parametrize("name", ["run", "embed"])
def test_a_dry_run_writes_nothing(
    shards: list[str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    assert main([name, *shards, "-o", str(tmp_path / "out"), "--dry-run", "--limit", "40"]) == 0
    assert files(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["shards: 2", "samples: 40"]
    assert any(line.startswith("embed seconds: ") for line in lines)


def test_a_dry_run_meets_bad_samples_as_the_run_would(tmp_path: Path, make_shard: MakeShard) -> None:
    path = make_shard("a.tar", 30)
    data = bytearray(path.read_bytes())
    data[512:520] = b"no image"
    path.write_bytes(data)
    assert main(["embed", str(path), "--dry-run"]) == 1
    assert main(["embed", str(path), "--dry-run", "--on-error", "skip"]) == 0
    assert main(["run", str(path), "-o", str(tmp_path / "out"), "--dry-run", "--on-error", "skip"]) == 0


# ---- A run from an earlier one


def test_from_an_earlier_run_takes_its_arguments_and_flags_go_before(
    shards: list[str], tmp_path: Path
) -> None:
    (tmp_path / "keys.txt").write_text("t-0.tar\ts00002\n")
    must = ["--must-include", str(tmp_path / "keys.txt")]
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        main(["run", *shards, "-o", str(first), "--keep", "0.2", "--bins", "3", "--label", "none", *must])
        == 0
    )
    assert main(["run", "--from", str(first / "run.json"), "-o", str(second)]) == 0
    assert (first / "plan.parquet").read_bytes() == (second / "plan.parquet").read_bytes()
    assert (first / "run.json").read_bytes() == (second / "run.json").read_bytes()
    before = files(first)
    assert main(["run", "--from", str(first / "run.json"), "-o", str(first)]) == 0
    assert files(first) == before
    assert (
        main(["run", "--from", str(first / "run.json"), "-o", str(second), "--keep", "0.3", "--write"]) == 0
    )
    plan = adq.load_plan(second / "plan.parquet")
    assert (plan.n_kept, plan.header["settings"]["n_bins"]) == (18, 3)
    assert (second / "shards" / "_info.json").exists()
    assert main(["run", shards[0], "--from", str(first / "run.json"), "-o", str(tmp_path / "third")]) == 0
    assert adq.load_plan(tmp_path / "third" / "plan.parquet").n_samples == 30


# ---- Names of arguments in errors


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("give size=, such as 224", "give --size, such as 224"),
        ("patch_keep=0.0 keeps none", "--patch-keep 0.0 keeps none"),
        ("patch_keep=1e-05 keeps none", "--patch-keep 1e-05 keeps none"),
        ("give patch_keep, size= or quality= too", "give --patch-keep, --size or --quality too"),
        ("at size=64 (224 unless size= says another).", "at --size 64 (224 unless --size says another)."),
        ("importance='random' decides", "--importance random decides"),
        ("importance='two words' decides", "--importance 'two words' decides"),
        ("or overwrite=True", "or --overwrite"),
        ("pass head=False", "pass --no-head"),
        ("pretrained=True.", "--pretrained."),
        ("overwrite=False is odd", "overwrite=False is odd"),  # there is no --no-overwrite
        ("use label=None", "use --label none"),
        ("limit=None", "limit=None"),
        ("amp=True and label=None exclude each other", "--amp and --label none exclude each other"),
        ("it needs amp=True (--amp, or --head)", "it needs --amp, or --head"),
        ("embed with views=20_000 (--views 20000)", "embed with --views 20000"),
        ("embed with views= (--views) again", "embed with --views again"),
        ("quality must be an integer", "--quality must be an integer"),
        ("more than max_bad_fraction=0.1; the last", "more than --max-bad-fraction 0.1; the last"),
        ("a smaller batch_size may help", "a smaller --batch-size may help"),
        # what is no argument of the command, and what only looks like one
        ("use_labels=False, patch=16, encode=adq.EncodePatches()", "use_labels=False, patch=16, encode=adq.EncodePatches()"),
        ("the image has no label of that size; raise quality", "the image has no label of that size; raise quality"),
        ("every image must be RGB", "every image must be RGB"),
        ("key 'size=3', field 'patch_keep': bad", "key 'size=3', field 'patch_keep': bad"),
        ("starts with b'patch_keep size=1'", "starts with b'patch_keep size=1'"),
        ('got ["patch_keep"]', 'got ["patch_keep"]'),
        ("the source's size=3, the plan's limit=4", "the source's --size 3, the plan's --limit 4"),
        ("data/size=3/a.tar: no such file", "data/size=3/a.tar: no such file"),
        ("data/patch_keep: no such file", "data/patch_keep: no such file"),
        ("size=3/a.tar", "size=3/a.tar"),
        ("patch_keep.tar, patch_keep-1, my_patch_keep, patch_keeps", "patch_keep.tar, patch_keep-1, my_patch_keep, patch_keeps"),
        ("shard size=3, key 'k': bad", "shard size=3, key 'k': bad"),
        ("--size=3 --patch-keep", "--size=3 --patch-keep"),
        ("alias.size=3, resize=3", "alias.size=3, resize=3"),
    ],
)  # fmt: skip
def test_arguments_named_in_an_error_are_shown_as_flags(text: str, shown: str) -> None:
    words = (
        "size quality patch-keep importance overwrite head no-head pretrained no-pretrained label limit image"
    )
    words += " amp no-amp views image-size max-bad-fraction batch-size"
    flags = {f"--{word}" for word in words.split()}
    assert flagged(text, flags) == shown
    assert flagged(text, set()) == text


# ---- Ends


def ends_with(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err.splitlines()[-1]


def test_errors_are_one_line_with_a_code(
    shards: list[str], plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_shard: MakeShard
) -> None:
    out = ["-o", str(tmp_path / "out")]
    odd = str(make_shard("odd.tar", 5, label=None))
    cases: list[tuple[list[str], int, str]] = [
        (["show", "none.parquet"], 1, "adq: PlanError: none.parquet: no such file"),
        (["show", shards[0]], 1, f"adq: PlanError: {shards[0]}: not a readable Parquet file"),
        (["show", str(tmp_path / "features")], 2, f"adq: {tmp_path}/features: a folder without plan.parquet"),
        (
            ["show", plan, "--keep", "0.5"],
            2,
            "adq: --keep has no effect on a plan, which says its own; leave it",
        ),
        (
            ["patches", shards[0], "-o", "o.png", "--patch-keep", "7"],
            2,
            "adq: --patch-keep must be a number",
        ),
        (
            ["write", *shards, *out[:1], f"{out[1]}/%d.tar", "--encoder", "builtin"],
            2,
            "adq: --encoder builtin is about which patches are kept; give --patch-keep too, such as 0.75",
        ),
        (
            ["write", *shards, *out[:1], f"{out[1]}/%d.tar", "--size", "8", "--no-pretrained"],
            2,
            "adq: --no-pretrained is about which patches are kept; give --patch-keep too, such as 0.75",
        ),
        (
            ["write", *shards, *out[:1], f"{out[1]}/%d.tar", "--importance", "random"],
            2,
            "adq: --importance random decides which patches are kept; give --patch-keep too, such as 0.75",
        ),
        (
            ["write", *shards, *out[:1], f"{out[1]}/%d.tar", "--on-error", "skip"],
            2,
            "adq: --on-error skip has no effect: no image is written anew; give --patch-keep, --size or --quality too",
        ),
        (
            ["write", *shards, *out[:1], f"{out[1]}/%d.tar", "--patch-keep", "0"],
            2,
            "adq: --patch-keep 0.0 keeps none of the 196 patches",
        ),
        (["plan", "nowhere", *out], 1, "adq: FeaturesError: nowhere: no features here"),
        (["embed", "none.tar", *out], 1, "adq: ShardError: shard none.tar: cannot be opened: No such file"),
        (["embed", "none-*.tar", *out], 2, "adq: no shards match 'none-*.tar'"),
        (["embed", odd, *out], 1, "adq: SampleError: shard odd.tar, key 's00000': no label field"),
        (
            ["embed", *shards, *out, "--encoder", "thumbnial"],
            2,
            "adq: unknown encoder 'thumbnial'; did you mean thumbnail",
        ),
        (
            ["embed", *shards, *out, "--encoder", "resnet81"],
            2,
            "adq: unknown encoder 'resnet81'; did you mean ",
        ),
        (
            ["embed", *shards, *out, "--encoder", "thumbnail", "--head"],
            2,
            "adq: encoder 'thumbnail' takes no options",
        ),
        (
            ["embed", *shards, *out, "--batch-size", "0"],
            2,
            "adq: --batch-size must be an integer >= 1, got 0",
        ),
        (
            ["embed", *shards, *out, "--dry-run", "--batch-size", "0"],
            2,
            "adq: --batch-size must be an integer >= 1",
        ),
        (["embed", *shards, *out, "--limit", "-1"], 2, "adq: --limit must be an integer >= 1, got -1"),
        (["run", *shards, *out, "--keep", "1.5"], 2, "adq: --keep must"),
        (["run", *shards, *out, "--keep", "nan", "--dry-run"], 2, "adq: --keep must"),
        (
            ["run", *shards, *out, "--allocation", "uniforn"],
            2,
            "adq: unknown allocation 'uniforn'; did you mean uniform",
        ),
        (["run", *out], 2, "adq: no shards given: name SHARDS, or --from run.json"),
        (["run", "--from", "none.json", *out], 2, "adq: none.json: not a run.json"),
        (["run", *shards, *out, "--must-include", "none.txt"], 2, "adq: [Errno 2] No such file"),
        (["run", *shards, *out, "--must-include", str(tmp_path)], 2, "adq: [Errno 21] Is a directory"),
        (["write", *shards, "-o", "small.tar"], 2, "adq: pattern 'small.tar' must hold one number"),
        (
            ["write", shards[0], "--plan", plan, "-o", f"{tmp_path}/w/%d.tar"],
            1,
            "adq: PlanError: shard 't-1.tar' of the plan",
        ),
        (["plan", str(tmp_path / "features"), "--classes", "9"], 2, "adq: class '9' has no samples here"),
        (["plan", str(tmp_path / "features"), "-o", str(tmp_path)], 1, "adq: PlanError: "),
    ]
    for arguments, code, text in cases:
        found = ends_with(capsys, arguments)
        assert (found[0], found[1][: len(text)]) == (code, text), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["embed"],
        ["run", "x.tar"],
        ["plan", "f", "--draw", "x"],
        ["plan", "f", "--keep", "x"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: adq" in capsys.readouterr().err


def test_an_error_of_many_lines_is_put_on_one(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, images: object) -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr("adq_wds.models.thumbnail.Thumbnail.__call__", broken)
    code, line = ends_with(
        capsys, ["embed", *shards, "--encoder", "thumbnail", "-q", "-o", str(tmp_path / "f")]
    )
    assert code == 1
    assert line.endswith("key 's00000': encoder 'thumbnail' fails on it: RuntimeError: first second")


def test_a_closed_pipe_is_no_error(plan: str) -> None:
    code = f"{sys.executable} -m adq_wds show {plan} | true"
    out = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {code}"], capture_output=True, text=True, check=False
    )
    assert (out.returncode, out.stderr) == (0, "")


def test_python_m_adq_wds_is_the_command(plan: str) -> None:
    for arguments, code in ((["show", plan], 0), (["show", "none"], 1), (["--version"], 0), ([], 2)):
        out = subprocess.run(
            [sys.executable, "-m", "adq_wds", *arguments], capture_output=True, text=True, check=False
        )
        assert out.returncode == code, out.stderr
    assert out.stderr.startswith("usage: adq ")
