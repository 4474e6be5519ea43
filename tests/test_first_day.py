"""A newcomer's first commands: nothing heavy is loaded to find a mistake, and the answer says what to type."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.cli.arguments import make_parser
from adq_wds.cli.main import main
from adq_wds.cli.parser import keys_in
from adq_wds.samples.label import read_label
from tests.conftest import Capsys, jpeg, write_tar

MakeShard = Callable[..., Path]

HEAVY = ("torch", "timm", "torchvision", "torchdata", "webdataset", "pyarrow", "sklearn", "scipy")
PROBE = (
    "import sys\n"
    "try:\n"
    "    from adq_wds.cli.main import main\n"
    "    code = main(sys.argv[1:])\n"
    "except SystemExit as end:\n"
    "    code = end.code\n"
    f"print('LOADED', code or 0, *(name for name in {HEAVY} if name in sys.modules))\n"
)


def probe(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, heavy libraries loaded, and all that is printed, of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True, timeout=900
    )
    out, _, last = done.stdout.rpartition("LOADED ")
    code, *loaded = last.split()
    return int(code), set(loaded), out + done.stderr


@pytest.mark.parametrize(
    "command", ["--version", "--help", *(f"{name} --help" for name in make_parser().commands)]
)
def test_version_and_help_load_no_heavy_library(command: str) -> None:
    code, loaded, text = probe(*command.split())
    assert (code, loaded) == (0, set())
    start = f"usage: adq {command.removesuffix('--help')}".rstrip()
    assert text.startswith("adq " if command == "--version" else start)


MISTAKES = """
emebd x.tar | did you mean embed?
--verison | did you mean --version?
RUN --kep 0.2 | did you mean --keep?
RUN -keep 0.2 | did you mean --keep?
embed --devcie=cpu | did you mean --device?
plan f --zzz | `adq plan --help` lists them
RUN --keep much | invalid ratio value: 'much'
RUN --keep 20 | for 20 % write 0.2 or 20%
RUN --keep 120% | --keep must be a number in [0, 1], got 1.2
RUN --keep -1 | --keep must be a number in [0, 1], got -1.0
RUN --keep nan | --keep must be a number in [0, 1], got nan
RUN --alpha 65 | for 65 % write 0.65 or 65%
RUN --max-bad-fraction 5 | --max-bad-fraction must be a number in [0, 1], got 5
RUN --bins 0 | --bins must be an integer >= 1, got 0
RUN --limit -5 | --limit must be an integer >= 1, got -5
RUN --seed 9223372036854775808 | seed
RUN --scores textrue | unknown score 'textrue'; did you mean texture?
RUN --allocation uniforn | did you mean uniform?
RUN --kernel feature | choose from 'features', 'gradient'
codebook f --bins -1 | --bins must be an integer >= 1, got -1
demo --seeds 0 | --seeds must be an integer >= 1, got 0
write x.tar -o w/%d.tar --patch-keep 75 | for 75 % write 0.75 or 75%
write x.tar -o w/%d.tar --importance gradcm | did you mean gradcam
run -o out | no shards given
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_is_found_before_a_heavy_library_is_loaded(line: str) -> None:
    command, text = line.replace("RUN", "run x.tar -o out").split(" | ")
    code, loaded, shown = probe(*command.split())
    assert (code, loaded) == (2, set())
    assert text in shown.splitlines()[-1]


@pytest.mark.parametrize("name", ["run", "plan", "codebook", "demo", "show"])
def test_a_percentage_is_a_ratio(name: str) -> None:
    positional = {"demo": [], "run": ["-o", "out"]}.get(name, ["x"])
    parser = make_parser()
    for percent in range(101):
        arguments = parser.parse_args([name, *positional, "--keep", f"{percent}%"])
        assert arguments.keep == float(f"{percent / 100:.2f}")


def test_values_that_begin_with_a_minus_are_values(tmp_path: Path) -> None:
    parser = make_parser()
    assert parser.parse_args(["run", "x", "-o", "out", "--seed", "-3"]).seed == -3
    assert parser.parse_args(["run", "-oout", "-q", "--", "--x.tar"]).shards == ["--x.tar"]
    assert parser.parse_args(["run", "x", "-qo", "out"]).out == "out"
    assert parser.parse_args(["run", "x", "--ou=out"]).out == "out"  # argparse takes a beginning
    assert main(["plan", str(tmp_path), "--alpha", "-0.5"]) == 2


@pytest.fixture
def run(make_shard: MakeShard, tmp_path: Path) -> Path:
    """A run over shards of which two hold the same keys; its folder."""
    for name, first in (("a", 0), ("b", 0), ("c", 20)):
        make_shard(f"in/{name}.tar", 20, first=first)
    flags = f"--encoder thumbnail --bins 2 -o {tmp_path}/run -q".split()
    assert main(["run", str(tmp_path / "in"), *flags]) == 0
    return tmp_path / "run"


def printed(capsys: Capsys, *arguments: object, code: int = 0) -> str:
    """What a command prints, or its last line of error."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err.splitlines()[-1]


def test_a_runs_folder_stands_for_what_is_in_it(run: Path, tmp_path: Path, capsys: Capsys) -> None:
    shards, plan = tmp_path / "in", (run / "plan.parquet").read_bytes()
    assert printed(capsys, "show", run) == printed(capsys, "show", run / "plan.parquet")
    assert main(["run", "--from", str(run), "-o", str(tmp_path / "again"), "-q"]) == 0
    assert (tmp_path / "again" / "plan.parquet").read_bytes() == plan
    flags = ["--bins", "2", "-q", "-o"]
    assert main(["plan", str(run), *flags, str(tmp_path / "p.parquet")]) == 0
    assert (tmp_path / "p.parquet").read_bytes() == plan
    codebooks = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for features, out in zip((run, run / "features"), codebooks, strict=True):
        assert main(["codebook", str(features), "--min-pilot", "5", *flags, str(out)]) == 0
    assert codebooks[0].read_bytes() == codebooks[1].read_bytes()
    assert "plan" in printed(capsys, "verify", run, shards)
    said = printed(capsys, "write", shards, "--plan", run, "-o", tmp_path / "small" / "%d.tar")
    assert f"{adq.load_plan(run / 'plan.parquet').n_kept} samples" in said


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["show", "{}"], "plan.parquet"),
        (["write", "x.tar", "-o", "w/%d.tar", "--plan", "{}"], "plan.parquet"),
        (["run", "-o", "out", "--from", "{}"], "run.json"),
    ],
)
def test_a_folder_without_it_is_told(arguments: list[str], name: str, tmp_path: Path, capsys: Capsys) -> None:
    said = printed(capsys, *(word.format(tmp_path) for word in arguments), code=2)
    assert f"{tmp_path}: a folder without {name}; name the file" in said


def test_what_needs_no_network_loads_no_torch(run: Path, tmp_path: Path) -> None:
    flags = ["--encoder", "thumbnail", "-o", str(tmp_path / "new")]
    for command in (["show", str(run), "--keys"], ["run", str(tmp_path / "in" / "a.tar"), *flags]):
        code, loaded, text = probe(*command)
        assert code == 0, text
        assert loaded <= {"pyarrow"}


def test_printed_keys_are_the_kept_ones_and_are_read_again(run: Path, tmp_path: Path, capsys: Capsys) -> None:
    plan = adq.load_plan(run / "plan.parquet")
    rows = [(shard.name, zip(shard.spans.keys, shard.kept, strict=True)) for shard in plan]
    kept = [(name, key) for name, pairs in rows for key, k in pairs if k]
    text = printed(capsys, "show", run, "--keys")
    lines = [line.split("\t") for line in text.splitlines()]
    assert [line[-1] for line in lines] == [key for _, key in kept]
    assert [len(line) for line in lines] == [1 if shard == "c.tar" else 2 for shard, _ in kept]
    as_json = json.loads(printed(capsys, "show", run, "--keys", "--json"))
    assert as_json == [line if len(line) == 2 else line[0] for line in lines]
    (tmp_path / "keys.txt").write_text(text)
    again = ["plan", run, "--bins", "2", "--seed", "1", "--must-include", tmp_path / "keys.txt"]
    printed(capsys, *again, "-o", tmp_path / "p.parquet")
    assert adq.load_plan(tmp_path / "p.parquet").keys() == plan.keys()


def test_keys_of_any_letters_are_read_again(tmp_path: Path, capsys: Capsys) -> None:
    names = ["a\tb", "-g", " h ", "ü"]
    shard = write_tar(tmp_path / "s.tar", [(f"{name}.txt", b"x") for name in names])
    adq.Plan.from_keys(shard, names).save(tmp_path / "plan.parquet")
    text = printed(capsys, "show", tmp_path, "--keys")
    (tmp_path / "keys.txt").write_text(text, encoding="utf-8")
    assert keys_in(str(tmp_path / "keys.txt")) == [("s.tar", names[0]), *names[1:]]


def test_a_line_of_keys_ends_at_a_line_break_only(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        (tmp_path / "keys.txt").write_bytes(f"c\u2028d{end}{end}e\x0bf{end}".encode())
        assert keys_in(str(tmp_path / "keys.txt")) == ["c\u2028d", "e\x0bf"]
    (tmp_path / "keys.txt").write_bytes(b"\xff\n")
    with pytest.raises(argparse.ArgumentTypeError, match=r"keys\.txt: not UTF-8 text"):
        keys_in(str(tmp_path / "keys.txt"))


@pytest.mark.parametrize("key", ["a\nb", "a\rb", "a\x1b[31mb", "a\u2028b"])
def test_a_key_that_is_no_line_of_text_is_refused(tmp_path: Path, key: str, capsys: Capsys) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), (f"{key}.txt", b"x")])
    adq.Plan.from_keys(shard, ["a", key]).save(tmp_path / "plan.parquet")
    assert "--json lists such keys" in printed(capsys, "show", tmp_path, "--keys", code=2)
    assert json.loads(printed(capsys, "show", tmp_path, "--keys", "--json")) == ["a", key]


def test_printing_keys_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [(f"{i:050d}.txt", b"x") for i in range(3000)])
    adq.Plan.from_keys(shard, [f"{i:050d}" for i in range(3000)]).save(tmp_path / "plan.parquet")
    code = f"set -o pipefail; {sys.executable} -m adq_wds show {tmp_path} --keys | head -n 2"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, timeout=900)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 2)


@pytest.mark.parametrize("text", ["s00003\n", "a.tar/s00003\n", "a.tar,s00003\n"])
def test_an_ambiguous_or_unknown_key_is_answered_with_its_form(
    run: Path, tmp_path: Path, text: str, capsys: Capsys
) -> None:
    (tmp_path / "keys.txt").write_text(text)
    flags = ["--must-include", tmp_path / "keys.txt", "-o", tmp_path / "p.parquet"]
    assert printed(capsys, "plan", run, *flags, code=1).endswith("SHARD<TAB>KEY")
    with pytest.raises(adq.PlanError, match=r"\(shard, key\)$"):
        adq.build_plan(run / "features", must_include=[text.strip()])
    (tmp_path / "keys.txt").write_text("a.tar\ts00003\n")
    printed(capsys, "plan", run, *flags)
    assert ("SHARD<TAB>KEY") in make_parser().commands["plan"].format_help()


def test_quiet_prints_only_what_was_asked_for(make_shard: MakeShard, tmp_path: Path, capsys: Capsys) -> None:
    shards, run = make_shard("in/a.tar", 30), tmp_path / "run"
    for command in (
        f"run {shards} --encoder thumbnail -o {run}",
        f"embed {shards} --encoder thumbnail -o {tmp_path}/f",
        f"plan {run} -o {tmp_path}/p.parquet",
        f"codebook {run} --min-pilot 5 -o {tmp_path}/c.safetensors",
        f"index {shards} -o {tmp_path}/i.parquet",
        f"write {shards} --plan {run} -o {tmp_path}/w/%d.tar",
    ):
        capsys.readouterr()
        assert main([*command.split(), "-q"]) == 0, command
        assert capsys.readouterr() == ("", ""), command
        again = [*command.split(), *(["--overwrite"] if command.startswith("write") else [])]
        assert json.loads(printed(capsys, *again, "-q", "--json")), command
    new = f"run {shards} --encoder thumbnail -o {tmp_path}/new --dry-run"
    for command in (f"show {run}", f"show {run} --keys", f"verify {run} {shards}", new):
        assert printed(capsys, *command.split(), "-q"), command


@pytest.mark.parametrize(
    ("fields", "typed"),
    [
        (("input.jpg", "output.cls"), ["--label", "output.cls", "--image", "input.jpg"]),
        (("left.jpg", "right.jpg", "cls"), ["--image", "left.jpg"]),
        (("0 (clean).jpg", "0 (clean).cls"), ["--label", "0 (clean).cls", "--image", "0 (clean).jpg"]),
        (("it's.jpg", "cls"), ["--image", "it's.jpg"]),
        (("a;b.jpg", "z.png", "cls"), ["--image", "z.png"]),  # ";" parts alternatives
        (("cls", "jpg"), []),
    ],
)
def test_typing_what_the_errors_say_embeds_the_shard(
    fields: tuple[str, ...], typed: list[str], tmp_path: Path, capsys: Capsys
) -> None:
    payload = {"jpg": jpeg(0), "png": jpeg(0), "cls": b"1"}
    members = [(f"s{i}.{field}", payload[field.rpartition(".")[2]]) for i in range(3) for field in fields]
    command = ["embed", str(write_tar(tmp_path / "a.tar", members)), "--encoder", "thumbnail"]
    command += ["-q", "-o", str(tmp_path / "f")]
    followed: list[str] = []
    while main([*command, *followed]):
        (line,) = capsys.readouterr().err.splitlines()
        assert "(a field is all behind a name's first dot)" in line
        followed += shlex.split(line.partition("such as ")[2].partition("; for ")[0])
        assert len(followed) <= len(typed), line
    assert followed == typed


def test_a_field_inside_json_is_offered_with_its_path() -> None:
    with pytest.raises(adq.SampleError, match=r"such as label='meta\.json:a\.b'; for unlabelled data"):
        read_label({"__key__": "k", "jpg": b"", "meta.json": b"{}"}, "json:a.b")


def test_scattered_members_are_answered_with_a_sorting_tar(tmp_path: Path, capsys: Capsys) -> None:
    names = [f"s{i}.{field}" for field in ("jpg", "cls") for i in range(2)]
    shard = write_tar(tmp_path / "a.tar", [(name, b"0") for name in names])
    assert "tar --sort=name -cf" in printed(capsys, "embed", shard, "-o", tmp_path / "f", code=1)
