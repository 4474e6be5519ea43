"""Makes the parser of every command: flags from the signatures of the functions that commands call."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import adq_wds
from adq_wds.cli.parser import Parser, add_options, ratio
from adq_wds.signatures import EMBED, ENCODER, PLAN, options_of

_SHARDS_HELP = (
    "tar shards, before the options: a pattern in quotes (braces, ::, *), a folder, or several paths or URLs"
)
_FEATURES_HELP = "folder that `adq embed` or `adq run` wrote"
CODEBOOK = "adq_wds.planning.fit_codebook.fit_codebook"
PATCHES = "adq_wds.jobs.show_patches.show_patches"
WRITE = "adq_wds.writing.write_shards.write_kept"
PACK = "adq_wds.jobs.pack.pack_folder"
INDEX = "adq_wds.jobs.index.index_shards"
VERIFY = "adq_wds.jobs.verify.verify_shards"
DEMO = "adq_wds.demo.run_demo.run_demo"


def make_parser(earlier_run: dict[str, Any] | None = None) -> Parser:
    """The parser of all commands; `earlier_run` gives defaults to `adq run`, which flags override.

    What a function takes is read from its signature; only what the command alone has is said here.
    """
    parser = Parser(
        prog="adq",
        description="Adaptive Dataset Quantization: choose a part of your tar shards, and train on it.",
        epilog="Exit codes: 0 ok, 1 data differ or are damaged, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"adq {adq_wds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.commands = commands.choices  # filled below
    _add_run(commands).set_defaults(**earlier_run or {})
    _add_embed(commands)
    _add_plan(commands)
    _add_codebook(commands)
    _add_show(commands)
    _add_patches(commands)
    _add_write(commands)
    _add_pack(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_demo(commands)
    return parser


def _command(commands: Any, name: str, text: str) -> Any:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="warnings only; what was asked for, of show, patches, verify, --json or --dry-run, is printed all the same",
    )
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bars; only on a terminal unless said",
    )
    return command


def _add_run(commands: Any) -> Any:
    command = _command(
        commands, "run", "embed, bin, score and plan in one go; what is done already is not done again"
    )
    _takes_shards(command, nargs="*")
    _goes_to(command, "folder for features/, bins.parquet, plan.parquet, run.json")
    command.add_argument("--write", action="store_true", help="also write the kept samples to OUT/shards/")
    command.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN.JSON",
        help="the shards and arguments of an earlier run, by its folder or run.json; what is given beside it goes before",
    )
    _encoder_flags(command)
    _embed_flags(command, without=("scores",))  # what `run` embeds follows from the scores of its plan
    _plan_flags(command)
    return command


def _add_embed(commands: Any) -> None:
    command = _command(commands, "embed", "embed shards: one features file per shard; resumable")
    _takes_shards(command)
    _goes_to(command, "folder for the features", default="features")
    _encoder_flags(command)
    _embed_flags(command)


def _add_plan(commands: Any) -> None:
    command = _command(commands, "plan", "turn features into a plan: bins, scores, quotas, ranks")
    command.add_argument("features", metavar="FEATURES", help=_FEATURES_HELP)
    _goes_to(command, "file for the plan", default="plan.parquet")
    _plan_flags(command)


def _add_codebook(commands: Any) -> None:
    command = _command(
        commands, "codebook", "learn from features which bin any sample is in, also one never seen"
    )
    command.add_argument("features", metavar="FEATURES", help=_FEATURES_HELP)
    _goes_to(command, "file for the codebook, .safetensors", default="codebook.safetensors")
    add_options(command, CODEBOOK, keep={"help": "the ratio that is shown; a codebook serves any"})


def _add_show(commands: Any) -> None:
    command = _command(commands, "show", "what a plan or a codebook keeps, per bin and per class")
    command.add_argument(
        "plan", metavar="PLAN", help="a plan file, or the folder of a run; or a codebook, .safetensors"
    )
    command.add_argument(
        "--keys",
        action="store_true",
        help="only the kept keys, a line each, as --must-include reads them: KEY, or SHARD<TAB>KEY where a key "
        "stands in several shards",
    )
    keep = options_of(CODEBOOK)["keep"].default
    command.add_argument("--keep", type=ratio, default=keep, help="of a codebook, whose rates hang on it")


def _add_patches(commands: Any) -> None:
    command = _command(
        commands,
        "patches",
        "draw what dropping patches does to a few images: original, importance, kept, stored, rebuilt",
    )
    _takes_shards(command)
    _goes_to(command, "file for the picture", metavar="OUT.png")
    importance = options_of(WRITE)["importance"]
    command.add_argument("--importance", default=importance.default, help=importance.help)
    add_options(
        command,
        PATCHES,
        size={"help": "side to which images are drawn first; 0: as they are"},
        mae={"help": "what rebuilds: a checkpoint, or builtin (images of 32 x 32, patches of 4)"},
    )
    _encoder_flags(command, default=None)


def _add_write(commands: Any) -> None:
    command = _command(
        commands,
        "write",
        "write the kept samples to new shards, bytes untouched unless images are to be smaller",
    )
    _takes_shards(command)
    command.add_argument("--plan", help="the plan, or the folder of a run; all samples without one")
    _goes_to(command, "pattern for the new shards, such as small/%%06d.tar", metavar="PATTERN")
    add_options(command, WRITE)
    _encoder_flags(command, default=None)


def _add_pack(commands: Any) -> None:
    command = _command(
        commands, "pack", "pack a folder of image files into tar shards, bytes untouched, folders as classes"
    )
    command.add_argument("folder", metavar="FOLDER", help="one split, such as imagenet/train")
    _goes_to(command, "pattern for the shards, such as shards/%%06d.tar", metavar="PATTERN")
    add_options(command, PACK)


def _add_index(commands: Any) -> None:
    command = _command(
        commands,
        "index",
        "write where every sample lies to one file; unchanged shards are not read again",
    )
    _takes_shards(command, more="; or their _info.json or wids JSON file")
    _goes_to(command, "file for the index", default="index.parquet")
    add_options(command, INDEX)


def _add_verify(commands: Any) -> None:
    command = _command(
        commands, "verify", "hold shards against a plan, to the end, and list all that differs"
    )
    command.add_argument(
        "plan", metavar="PLAN", help="a plan, the folder of a run, an index file, or a folder of features"
    )
    _takes_shards(command)
    add_options(command, VERIFY)
    command.add_argument("--lines", type=int, default=20, help="differences to print; --json prints all")


def _add_demo(commands: Any) -> None:
    command = _command(
        commands, "demo", "see it work: digits, plans, small trainings and a table; nothing is fetched"
    )
    _goes_to(command, "folder for it, new or of an earlier demo, which goes on", default="adq-demo")
    add_options(command, DEMO)


def _takes_shards(command: Any, *, nargs: str = "+", more: str = "") -> None:
    command.add_argument("shards", nargs=nargs, metavar="SHARDS", help=f"{_SHARDS_HELP}{more}")


def _goes_to(command: Any, text: str, **options: Any) -> None:
    command.add_argument("-o", "--out", required="default" not in options, help=text, **options)


def _encoder_flags(command: Any, default: str | None = "builtin") -> None:
    """What is said of an encoder, where something is: its own defaults are the encoder's. None: an importance's own."""
    group = command.add_argument_group("encoder")
    known = "builtin, builtin-free, thumbnail (8x8 mean colours), or any timm name"
    group.add_argument("--encoder", default=default, help=known)
    add_options(group, ENCODER, **{name: {"default": None} for name in options_of(ENCODER)})


def _embed_flags(command: Any, without: Iterable[str] = ()) -> None:
    group = command.add_argument_group("embedding")
    add_options(group, EMBED, without=without, embeddings={"metavar": "FILE"})
    group.add_argument("--dry-run", action="store_true", help="say samples, memory, time and bytes, and stop")


def _plan_flags(command: Any) -> None:
    keys = "keys that are kept in any case, one a line: KEY, or SHARD<TAB>KEY where a key stands in several shards"
    file = {"nargs": None, "default": None, "metavar": "FILE"}
    must_include, exclude = (
        {**file, "help": keys},
        {**file, "help": "keys that are never kept, as a file of the same form"},
    )
    add_options(command.add_argument_group("plan"), PLAN, must_include=must_include, exclude=exclude)
