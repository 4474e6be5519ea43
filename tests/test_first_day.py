"""A newcomer's first commands: nothing heavy is loaded to find a mistake, and the answer says what to type."""

import subprocess
import sys
from pathlib import Path

import pytest

from adq_wds.arguments import make_parser
from adq_wds.cli import main

HEAVY = ("torch", "timm", "torchvision", "torchdata", "webdataset", "pyarrow", "sklearn", "scipy")
PROBE = (
    "import sys\n"
    "try:\n"
    "    from adq_wds.cli import main\n"
    "    code = main(sys.argv[1:])\n"
    "except SystemExit as end:\n"
    "    code = end.code\n"
    f"print('LOADED', code or 0, *(name for name in {HEAVY} if name in sys.modules))\n"
)
RUN = ["run", "x.tar", "-o", "out"]


def probe(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, heavy libraries loaded, and all that is printed, of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    out, _, last = done.stdout.rpartition("LOADED ")
    code, *loaded = last.split()
    return int(code), set(loaded), out + done.stderr


# ---- Start


@pytest.mark.parametrize("command", ["", *make_parser().commands])
def test_help_loads_no_heavy_library(command: str) -> None:
    code, loaded, text = probe(*command.split(), "--help")
    assert (code, loaded) == (0, set())
    assert text.startswith(f"usage: adq {command}".rstrip())


def test_the_version_loads_no_heavy_library() -> None:
    code, loaded, text = probe("--version")
    assert (code, loaded) == (0, set())
    assert text.startswith("adq ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["emebd", "x.tar"], "did you mean embed?"),
        (["--verison"], "did you mean --version?"),
        ([*RUN, "--kep", "0.2"], "did you mean --keep?"),
        ([*RUN, "-keep", "0.2"], "did you mean --keep?"),
        (["embed", "--devcie=cpu"], "did you mean --device?"),
        (["plan", "f", "--zzz"], "`adq plan --help` lists them"),
        ([*RUN, "--keep", "much"], "invalid ratio value: 'much'"),
        ([*RUN, "--keep", "20"], "for 20 % write 0.2 or 20%"),
        ([*RUN, "--keep", "120%"], "--keep must be a number in [0, 1], got 1.2"),
        ([*RUN, "--keep", "-1"], "--keep must be a number in [0, 1], got -1.0"),
        ([*RUN, "--keep", "nan"], "--keep must be a number in [0, 1], got nan"),
        ([*RUN, "--alpha", "65"], "for 65 % write 0.65 or 65%"),
        ([*RUN, "--max-bad-fraction", "5"], "--max-bad-fraction must be a number in [0, 1], got 5"),
        ([*RUN, "--bins", "0"], "--bins must be an integer >= 1, got 0"),
        ([*RUN, "--batch-size", "0"], "--batch-size must be an integer >= 1, got 0"),
        ([*RUN, "--limit", "-5"], "--limit must be an integer >= 1, got -5"),
        ([*RUN, "--seed", str(2**63)], "seed"),
        ([*RUN, "--scores", "textrue"], "unknown score 'textrue'; did you mean texture?"),
        ([*RUN, "--allocation", "uniforn"], "did you mean uniform?"),
        ([*RUN, "--kernel", "feature"], "choose from 'features', 'gradient'"),
        (["codebook", "f", "--bins", "-1"], "--bins must be an integer >= 1, got -1"),
        (["demo", "--seeds", "0"], "--seeds must be an integer >= 1, got 0"),
        (["write", "x.tar", "-o", "w/%d.tar", "--patch-keep", "75"], "for 75 % write 0.75 or 75%"),
        (["write", "x.tar", "-o", "w/%d.tar", "--importance", "gradcm"], "did you mean gradcam"),
        (["run", "-o", "out"], "no shards given"),
    ],
)
def test_a_mistake_is_found_before_a_heavy_library_is_loaded(arguments: list[str], said: str) -> None:
    code, loaded, text = probe(*arguments)
    assert (code, loaded) == (2, set())
    assert said in text.splitlines()[-1]


# ---- Ratios


@pytest.mark.parametrize("name", ["run", "plan", "codebook", "demo", "show"])
def test_a_percentage_is_a_ratio(name: str) -> None:
    positional = {"demo": [], "run": ["-o", "out"]}.get(name, ["x"])
    for percent in range(101):
        arguments = make_parser().parse_args([name, *positional, "--keep", f"{percent}%"])
        assert arguments.keep == float(f"{percent / 100:.2f}")


# ---- Words that look like flags and are none


def test_values_that_begin_with_a_minus_are_values(tmp_path: Path) -> None:
    parser = make_parser()
    assert parser.parse_args(["run", "x", "-o", "out", "--seed", "-3"]).seed == -3
    assert parser.parse_args(["run", "-oout", "-q", "--", "--x.tar"]).shards == ["--x.tar"]
    assert parser.parse_args(["run", "x", "-qo", "out"]).out == "out"
    assert parser.parse_args(["run", "x", "--ou=out"]).out == "out"  # argparse takes a beginning
    assert main(["plan", str(tmp_path), "--alpha", "-0.5"]) == 2
