"""The command: every argument a flag, one line for an error, an exit code for each kind of end."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import adq_wds as adq
from adq_wds.cli.arguments import WRITE, make_parser
from adq_wds.cli.main import main
from adq_wds.cli.parser import flagged
from adq_wds.signatures import EMBED, ENCODER, PLAN, options_of
from tests.conftest import MakeShard
from tests.folders import dates

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[str]:
    return [str(make_shard(f"in/t-{i}.tar", 30, first=30 * i)) for i in range(2)]


@pytest.fixture
def plan(shards: list[str], tmp_path: Path) -> str:
    adq.embed_shards(shards, out=tmp_path / "features")
    adq.build_plan(tmp_path / "features", bins=2, keep=0.5, out=tmp_path / "plan.parquet")
    return str(tmp_path / "plan.parquet")


# ---- Arguments


@pytest.mark.parametrize(
    ("name", "functions"),
    {
        "embed": (EMBED, ENCODER),
        "run": (EMBED, PLAN, ENCODER),
        "plan": (PLAN,),
        "write": (WRITE, ENCODER),
    }.items(),
)
def test_every_argument_is_a_flag_with_the_same_default(name: str, functions: tuple[str, ...]) -> None:
    command = make_parser().commands[name]
    actions = {action.dest: action for action in command._actions}
    for function in functions:
        for option in options_of(function).values():
            assert f"--{option.name.replace('_', '-')}" in actions[option.name].option_strings
            if option.name not in ("out", "scores") and function != ENCODER:
                assert actions[option.name].default in (option.default, option.default or None), option.name


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
    must = ["s00003", ("t-1.tar", "s00031")]
    expected = adq.build_plan(
        tmp_path / "f", keep=0.25, bins=3, seed=4, alpha=0.5, allocation="uniform", balance="none", draw="ordered",
        scores=["diversity"], normalise="minmax", must_include=must,
    )  # fmt: skip
    assert adq.load_plan(out).hash == expected.hash


def test_classes_and_stored_embeddings_are_flags(shards: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    assert main(["embed", *shards, "--embeddings", str(tmp_path / "e.npy"), "-o", str(tmp_path / "f")]) == 0
    assert adq.Features(tmp_path / "f").header["encoder"] == "stored:e.npy"
    assert main(["plan", str(tmp_path / "f"), "--classes", "1", "-o", str(tmp_path / "p.parquet")]) == 0
    assert adq.load_plan(tmp_path / "p.parquet").hash == adq.build_plan(tmp_path / "f", classes=[1]).hash


# ---- What is printed


def test_show_tells_what_a_plan_keeps(plan: str, capsys: Capture) -> None:
    assert main(["show", plan]) == 0
    assert capsys.readouterr().out.startswith("keeps 30 of 60 samples (50.0 %) in 2 shards\n")
    assert main(["show", plan, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["n_kept"], about["n_samples"], len(about["bins"]), len(about["classes"])) == (30, 60, 2, 2)
    assert about["hash"] == adq.load_plan(plan).hash


def test_json_is_json_whatever_the_command(shards: list[str], tmp_path: Path, capsys: Capture) -> None:
    out, urls = tmp_path / "out", " ".join(shards)
    for line, expected in {
        f"run {urls} -o {out} --dry-run": {"shards": 2, "samples": 60, "kept": 18},
        f"run {urls} -o {out}": {"samples": 60, "kept": 18, "nothing_to_do": False},
        f"run {urls} -o {out} -q": {"samples": 60, "kept": 18, "nothing_to_do": True},
        f"embed {urls} -o {out}/features": {"samples": 60, "shards": 2},
        f"embed {urls} -o {out}/features --dry-run": {"samples": 60, "shards": 2},
        f"plan {out}/features -o {out}/p.parquet": {"n_samples": 60, "n_kept": 18},
        f"write {urls} --plan {out}/p.parquet -o {out}/w/%d.tar": {"samples": 18, "shards": 1, "read": 18},
        f"verify {out}/p.parquet {urls}": {"equal": True, "read": 60, "ok": 60},
        f"codebook {out}/features -o {out}/c.safetensors --bins 3": {"n_bins": 3, "n_classes": 2},
        f"show {out}/c.safetensors --keep 0.5": {"n_bins": 3, "keep": 0.5},
        f"index {urls} -o {out}/i.parquet": {"shards": 2, "samples": 60},
        f"export {out}/p.parquet --to csv -o {out}/p.csv": {"kept": 18, "format": "csv"},
    }.items():
        assert main([*line.split(), "--json"]) == 0, line
        value = json.loads(capsys.readouterr().out)
        assert {name: value[name] for name in expected} == expected, line


def test_show_lists_what_is_kept_and_what_is_left_out(plan: str, capsys: Capture) -> None:
    kept = adq.load_plan(plan).keys()
    assert main(["show", plan, "--keys"]) == 0
    assert [line.split("\t")[-1] for line in capsys.readouterr().out.split()] == kept
    for flags, expected in ((["--keys"], kept), (["--left-out"], [])):
        assert main(["show", plan, *flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    assert main(["show", plan, "--left-out"]) == 0
    assert capsys.readouterr().out == "no sample is left out\n"
    assert main(["show", plan, "--keep", "0.5"]) == 2
    assert "--keep has no effect on a plan, which says its own; leave it out" in capsys.readouterr().err


def test_run_says_when_there_is_nothing_to_do(shards: list[str], tmp_path: Path, capsys: Capture) -> None:
    for start in ("keeps 18 of 60", "nothing to do: the same run is here already\nkeeps 18 of 60"):
        before = dates(tmp_path / "out")
        assert main(["run", *shards, "-o", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.startswith(start)
    assert dates(tmp_path / "out") == before


def test_write_says_how_much_it_saved(shards: list[str], plan: str, tmp_path: Path, capsys: Capture) -> None:
    command = ["write", *shards, "--plan", plan, "-o", str(tmp_path / "w" / "%d.tar")]
    assert main(command) == 0
    n_bytes = (tmp_path / "w" / "0.tar").stat().st_size
    assert f"30 samples in 1 shards: {n_bytes:,} bytes on disk" in capsys.readouterr().out
    assert main(command) == 1
    assert capsys.readouterr().err.endswith(
        "of an earlier run; give another folder, empty this one, or --overwrite\n"
    )
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["run", "embed"])
def test_a_dry_run_writes_nothing(shards: list[str], tmp_path: Path, name: str, capsys: Capture) -> None:
    before = dates(tmp_path)
    assert main([name, *shards, "-o", str(tmp_path / "out"), "--dry-run", "--limit", "40"]) == 0
    assert dates(tmp_path) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["shards: 2", "samples: 40"]
    assert any(line.startswith("embed seconds: ") for line in lines)


def test_a_dry_run_meets_bad_samples_as_the_run_would(tmp_path: Path, make_shard: MakeShard) -> None:
    path = make_shard("a.tar", 30)
    data = path.read_bytes()
    path.write_bytes(data[:512] + b"no image" + data[520:])
    assert main(["embed", str(path), "--dry-run"]) == 1
    for name in ("embed", "run"):
        assert main([name, str(path), "-o", str(tmp_path / "out"), "--dry-run", "--on-error", "skip"]) == 0


# ---- A run from an earlier one


def test_from_an_earlier_run_takes_its_arguments_under_flags(shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("t-0.tar\ts00002\n")
    first, second = tmp_path / "first", tmp_path / "second"
    flags = f"--keep 0.2 --bins 3 --label none --must-include {tmp_path / 'keys.txt'}"
    assert main(["run", *shards, "-o", str(first), *flags.split()]) == 0
    again = ["run", "--from", str(first / "run.json"), "-o"]
    assert main([*again, str(second)]) == 0
    for name in ("plan.parquet", "run.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    before = dates(first)
    assert main([*again, str(first)]) == 0
    assert dates(first) == before
    assert main([*again, str(second), "--keep", "0.3", "--write"]) == 0
    plan = adq.load_plan(second / "plan.parquet")
    assert (plan.n_kept, plan.header["settings"]["n_bins"]) == (18, 3)
    assert (second / "shards" / "_info.json").exists()
    assert main([*again, str(tmp_path / "third"), "--", shards[0]]) == 0
    assert adq.load_plan(tmp_path / "third" / "plan.parquet").n_samples == 30


# ---- Names of arguments in errors

FLAGGED = {
    "give size=, such as 224": "give --size, such as 224",
    "patch_keep=0.0 keeps none": "--patch-keep 0.0 keeps none",
    "patch_keep=1e-05 keeps none": "--patch-keep 1e-05 keeps none",
    "give patch_keep, size= or quality= too": "give --patch-keep, --size or --quality too",
    "at size=64 (224 unless size= says another).": "at --size 64 (224 unless --size says another).",
    "importance='random' decides": "--importance random decides",
    "importance='two words' decides": "--importance 'two words' decides",
    "or overwrite=True": "or --overwrite",
    "pass head=False": "pass --no-head",
    "pretrained=True.": "--pretrained.",
    "use label=None": "use --label none",
    "amp=True and label=None exclude each other": "--amp and --label none exclude each other",
    "it needs amp=True (--amp, or --head)": "it needs --amp, or --head",
    "embed with views=20_000 (--views 20000)": "embed with --views 20000",
    "embed with views= (--views) again": "embed with --views again",
    "quality must be an integer": "--quality must be an integer",
    "more than max_bad_fraction=0.1; the last": "more than --max-bad-fraction 0.1; the last",
    "a smaller batch_size may help": "a smaller --batch-size may help",
    "the source's size=3, the plan's limit=4": "the source's --size 3, the plan's --limit 4",
}
UNCHANGED = [  # no argument of the command, or what only looks like one
    "overwrite=False is odd",  # there is no --no-overwrite
    "limit=None",
    "use_labels=False, patch=16, encode=adq.EncodePatches()",
    "the image has no label of that size; raise quality",
    "every image must be RGB",
    "key 'size=3', field 'patch_keep': bad",
    "starts with b'patch_keep size=1'",
    'got ["patch_keep"]',
    "data/size=3/a.tar: no such file",
    "data/patch_keep: no such file",
    "size=3/a.tar",
    "patch_keep.tar, patch_keep-1, my_patch_keep, patch_keeps",
    "shard size=3, key 'k': bad",
    "--size=3 --patch-keep",
    "alias.size=3, resize=3",
]


WORDS = """size quality patch-keep importance overwrite head no-head pretrained no-pretrained label limit image amp
no-amp views image-size max-bad-fraction batch-size"""


@pytest.mark.parametrize("text", [*FLAGGED, *UNCHANGED])
def test_arguments_named_in_an_error_are_shown_as_flags(text: str) -> None:
    assert flagged(text, {f"--{word}" for word in WORDS.split()}) == FLAGGED.get(text, text)
    assert flagged(text, set()) == text


# ---- Ends


def ends_with(capsys: Capture, arguments: list[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err.splitlines()[-1]


# Arguments, exit code, beginning of the last line. IN are the shards, A is one of them, T the folder of all.
ENDS = """
show none.parquet | 1 | PlanError: none.parquet: no such file
show A | 1 | PlanError: A: not a readable Parquet file
show T/features | 2 | T/features: a folder without plan.parquet
show T/plan.parquet --keep 0.5 | 2 | --keep has no effect on a plan, which says its own; leave it
patches A -o o.png --patch-keep 7 | 2 | --patch-keep must be a number
write IN -o T/w/%d.tar --encoder builtin | 2 | --encoder builtin is about which patches are kept; give --patch-keep
write IN -o T/w/%d.tar --size 8 --no-pretrained | 2 | --no-pretrained is about which patches are kept; give --patch-k
write IN -o T/w/%d.tar --importance random | 2 | --importance random decides which patches are kept; give --patch-keep
write IN -o T/w/%d.tar --on-error skip | 2 | --on-error skip has no effect: no image is written anew; give --patch-k
write IN -o T/w/%d.tar --patch-keep 0 | 2 | --patch-keep 0.0 keeps none of the 196 patches
write IN -o small.tar | 2 | pattern 'small.tar' must hold one number
write A --plan T/plan.parquet -o T/w/%d.tar | 1 | PlanError: shard 't-1.tar' of the plan
plan nowhere -o T/p | 1 | FeaturesError: nowhere: no features here
plan T/features --classes 9 | 2 | class '9' has no samples here
plan T/features -o T | 1 | PlanError: T
embed none.tar -o T/f | 1 | ShardError: shard none.tar: cannot be opened: No such file
embed none-*.tar -o T/f | 2 | no shards match 'none-*.tar'
embed T/odd.tar -o T/f | 1 | SampleError: shard odd.tar, key 's00000': no label field
embed IN -o T/f --encoder thumbnial | 2 | unknown encoder 'thumbnial'; did you mean thumbnail
embed IN -o T/f --encoder resnet81 | 2 | unknown encoder 'resnet81'; did you mean
embed IN -o T/f --encoder thumbnail --head | 2 | encoder 'thumbnail' takes no options
embed IN -o T/f --dry-run --batch-size 0 | 2 | --batch-size must be an integer >= 1, got 0
embed IN -o T/f --limit -1 | 2 | --limit must be an integer >= 1, got -1
run IN -o T/r --keep nan --dry-run | 2 | --keep must
run IN -o T/r --allocation uniforn | 2 | unknown allocation 'uniforn'; did you mean uniform
run -o T/r | 2 | no shards given: name SHARDS, or --from run.json
run --from none.json -o T/r | 2 | none.json: not a run.json
run IN -o T/r --must-include none.txt | 2 | [Errno 2] No such file
run IN -o T/r --must-include T | 2 | [Errno 21] Is a directory
"""


def test_errors_are_one_line_with_a_code(
    shards: list[str], plan: str, tmp_path: Path, capsys: Capture, make_shard: MakeShard
) -> None:
    make_shard("odd.tar", 5, label=None)
    words = {"T": str(tmp_path), "A": shards[0]}

    def whole(word: str) -> str:
        for short, path in words.items():
            if word.rstrip(":") == short or word.startswith(f"{short}/"):
                return path + word[1:]
        return word

    for line in ENDS.strip().splitlines():
        command, code, text = line.split(" | ")
        arguments = [whole(word) for word in command.replace("IN", " ".join(shards)).split()]
        text = " ".join(map(whole, text.split()))
        found = ends_with(capsys, arguments)
        assert (found[0], found[1].removeprefix("adq: ")[: len(text)]) == (int(code), text), arguments


@pytest.mark.parametrize(
    "line", ["", "frobnicate", "embed", "run x.tar", "plan f --draw x", "plan f --keep x"]
)
def test_wrong_usage_ends_with_2(line: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    assert caught.value.code == 2
    assert "usage: adq" in capsys.readouterr().err


def test_an_error_of_many_lines_is_put_on_one(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(self: object, images: object) -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr("adq_wds.models.thumbnail.Thumbnail.__call__", broken)
    command = ["embed", *shards, "--encoder", "thumbnail", "-q", "-o", str(tmp_path / "f")]
    code, line = ends_with(capsys, command)
    assert code == 1
    assert line.endswith("key 's00000': encoder 'thumbnail' fails on it: RuntimeError: first second")


def test_python_m_adq_wds_is_the_command(plan: str) -> None:
    for arguments, code in ((["show", plan], 0), (["show", "none"], 1), (["--version"], 0), ([], 2)):
        command = [sys.executable, "-m", "adq_wds", *arguments]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        assert out.returncode == code, out.stderr
    assert out.stderr.startswith("usage: adq ")
