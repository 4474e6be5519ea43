"""Builds the parser of every command from the signatures of the functions that the command calls."""

from __future__ import annotations

import argparse
from typing import Any

import adq_wds
from adq_wds.cli.parser import Parser, add_options, keys_in, ratio
from adq_wds.signatures import EMBED, ENCODER, PLAN, SDEDIT, SELECT, VARY, default_of, options_of
from adq_wds.tables.exchange import FORMATS

CODEBOOK = "adq_wds.planning.fit_codebook.fit_codebook"
SOFTEN = "adq_wds.planning.soften_labels.soften_labels"
PATCHES = "adq_wds.jobs.show_patches.show_patches"
WHY = "adq_wds.tables.plan_why.explain"
WRITE = "adq_wds.writing.write_shards.write_kept"
PACK = "adq_wds.jobs.pack.pack_folder"
EXPORT = "adq_wds.tables.exchange.export_plan"
INDEX = "adq_wds.jobs.index.index_shards"
VERIFY = "adq_wds.jobs.verify.verify_shards"
REPORT = "adq_wds.jobs.write_report.write_report"
DEMO = "adq_wds.demo.run_demo.run_demo"


def make_parser(earlier_run: dict[str, Any] | None = None) -> Parser:
    """The parser of all commands; `earlier_run` gives defaults to `adq run`, which flags override.

    Options of a function are read from its signature. Below are the flags that only a command has; a
    command's help is its docstring.
    """
    parser = Parser(
        prog="adq",
        description="Adaptive Dataset Quantization: choose a part of your tar shards, and train on it.",
        epilog="Exit codes: 0 ok, 1 data differ or are damaged, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"adq {adq_wds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_flags in (
        _run, _embed, _plan, _codebook, _soften, _show, _why, _export, _patches, _write, _pack, _index, _verify,
        _select, _vary, _report, _demo,
    ):  # fmt: skip
        name, text = add_flags.__name__.removeprefix("_"), add_flags.__doc__
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        _add_output_flags(command)
        add_flags(command)
    parser.commands = commands.choices
    parser.commands["run"].set_defaults(**earlier_run or {})
    return parser


def _run(command: Any) -> None:
    """embed, bin, score and plan in one go; what is done already is not done again"""
    _add_shards(command, nargs="*")
    _add_out(command, "folder for features/, bins.parquet, plan.parquet, run.json")
    command.add_argument("--write", action="store_true", help="also write the kept samples to OUT/shards/")
    command.add_argument("--report", action="store_true", help="also write a page of it to OUT/report.html")
    command.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN.JSON",
        help="the shards and arguments of an earlier run, by its folder or run.json; what is given beside it goes before",
    )
    _add_encoder(command, default_of(EMBED, "encoder"))
    _add_embed(command, without=("scores",))  # what `run` embeds follows from the scores of its plan
    _add_plan(command, without=("engine", "address"))  # those of the embedding


def _embed(command: Any) -> None:
    """embed shards: one features file per shard; resumable"""
    _add_shards(command)
    _add_out(command, "folder for the features", default=default_of(EMBED, "out"))
    _add_encoder(command, default_of(EMBED, "encoder"))
    _add_embed(command)


def _plan(command: Any) -> None:
    """turn features into a plan: bins, scores, quotas, ranks"""
    _add_features(command)
    _add_out(command, "file for the plan", default="plan.parquet")
    _add_plan(command)


def _codebook(command: Any) -> None:
    """learn from features which bin any sample is in, also one never seen"""
    _add_features(command)
    _add_out(command, "file for the codebook, .safetensors", default="codebook.safetensors")
    add_options(command, CODEBOOK, keep={"help": "the ratio that is shown; a codebook serves any"})


def _soften(command: Any) -> None:
    """make soft labels from features: by a fit on all other samples, or of a trained network's logits"""
    _add_features(command)
    _add_out(command, "file for the soft labels", default="soft.parquet")
    add_options(command, SOFTEN)


def _show(command: Any) -> None:
    """what a plan or a codebook keeps, per bin and per class"""
    command.add_argument(
        "plan", metavar="PLAN", help="a plan file, or the folder of a run; or a codebook, .safetensors"
    )
    command.add_argument(
        "--keys",
        action="store_true",
        help="only the kept keys, a line each, as --must-include reads them: KEY, or SHARD<TAB>KEY where a key "
        "stands in several shards",
    )
    command.add_argument(
        "--left-out",
        action="store_true",
        help="only the samples left out before bins, a line each: reason, shard, key, label, and of a copy the "
        "sample that stays, with its label where that differs, or the margin of a doubted label",
    )
    keep = options_of(CODEBOOK)["keep"].default
    command.add_argument("--keep", type=ratio, default=keep, help="of a codebook, whose rates hang on it")


def _why(command: Any) -> None:
    """why one sample is kept or not, and which keep ratio would have kept it"""
    command.add_argument(
        "key", metavar="KEY", help="the sample; SHARD/KEY where a key stands in several shards"
    )
    command.add_argument("--plan", required=True, help="a plan file, or the folder of a run")
    add_options(command, WHY)


def _export(command: Any) -> None:
    """write which samples a plan keeps, as another library reads it"""
    command.add_argument("plan", metavar="PLAN", help="a plan file, or the folder of a run")
    command.add_argument("--to", required=True, choices=FORMATS, help="the form, one of those below")
    _add_out(command, "file to write; a new folder for webshart", metavar="PATH")
    add_options(command, EXPORT)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, FORMATS))
    forms = (f"  {name:{width}}  {form.help}" for name, form in FORMATS.items())
    command.epilog = "forms:\n" + "\n".join(forms)


def _patches(command: Any) -> None:
    """draw what dropping patches does to a few images: original, importance, kept, stored, rebuilt"""
    _add_shards(command)
    _add_out(command, "file for the picture", metavar="OUT.png")
    importance = options_of(WRITE)["importance"]
    command.add_argument("--importance", default=importance.default, help=importance.help)
    add_options(
        command,
        PATCHES,
        size={"help": "side to which images are drawn first; 0: as they are"},
        mae={"help": "what rebuilds: a checkpoint, or builtin (images of 32 x 32, patches of 4)"},
    )
    _add_encoder(command)


def _write(command: Any) -> None:
    """write the kept samples to new shards, bytes untouched unless images are to be smaller"""
    _add_shards(command)
    command.add_argument("--plan", help="the plan, or the folder of a run; all samples without one")
    _add_out(command, "pattern for the new shards, such as small/%%06d.tar", metavar="PATTERN")
    add_options(command, WRITE)
    _add_encoder(command)


def _pack(command: Any) -> None:
    """pack a folder of image files into tar shards, bytes untouched, folders as classes"""
    command.add_argument("folder", metavar="FOLDER", help="one split, such as imagenet/train")
    _add_out(command, "pattern for the shards, such as shards/%%06d.tar", metavar="PATTERN")
    add_options(command, PACK)


def _index(command: Any) -> None:
    """write where every sample lies to one file; unchanged shards are not read again"""
    _add_shards(command, more="; or their _info.json or wids JSON file")
    _add_out(command, "file for the index", default=default_of(INDEX, "out"))
    add_options(command, INDEX)


def _verify(command: Any) -> None:
    """compare shards with a plan, to the end, and list all differences"""
    command.add_argument(
        "plan", metavar="PLAN", help="a plan, the folder of a run, an index file, or a folder of features"
    )
    _add_shards(command)
    _add_out(command, options_of(VERIFY)["out"].help, default=None, metavar="FOLDER")
    add_options(command, VERIFY)
    command.add_argument("--lines", type=int, default=20, help="differences to print; --json prints all")


def _select(command: Any) -> None:
    """a plan by any number that is stored for each sample: the largest share, or all between two bounds"""
    _add_shards(command)
    _add_out(command, "file for the plan", default="plan.parquet")
    bounds = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
    by = "json:NAME, another field of text, FILE.parquet:COLUMN, or a column of features, FOLDER:COLUMN"
    command.add_argument("--by", required=True, help=f"the number of each sample: {by}")
    add_options(command, SELECT, between=bounds)


def _vary(command: Any) -> None:
    """write variants of the images by a diffusion network, each with its likeness to the parent beside it"""
    _add_shards(command)
    _add_out(command, "folder for the sets of shards, variant-0/ and so on")
    command.add_argument("--unet", required=True, metavar="DIR", help="folder of a diffusers UNet2DModel")
    add_options(command, SDEDIT, without=("device",))
    add_options(command, VARY)
    _add_encoder(command, "builtin-free")  # the classes of `builtin` are those of CIFAR-10


def _report(command: Any) -> None:
    """write one HTML page: what a plan keeps, why the rest is not kept, with pictures"""
    command.add_argument("plan", metavar="PLAN", help="a plan file, or the folder of a run")
    _add_shards(command, nargs="*", more="; without any, a run's own where they are local files")
    _add_out(command, "file for the page", default=default_of(REPORT, "out"))
    add_options(command, REPORT)


def _demo(command: Any) -> None:
    """see it work: digits, plans, small trainings and a table; nothing is fetched"""
    default = default_of(DEMO, "out")
    _add_out(command, "folder for it, new or of an earlier demo, which goes on", default=default)
    add_options(command, DEMO)


# ---- Flags of several commands


def _add_output_flags(command: Any) -> None:
    quiet = "warnings only; what was asked for, of show, why, patches, verify, --json or --dry-run, is printed all the same"
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("-q", "--quiet", action="store_true", help=quiet)
    bars = "progress bars; by default only on a terminal"
    command.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None, help=bars)


def _add_shards(command: Any, *, nargs: str = "+", more: str = "") -> None:
    text = "tar shards, before the options: a pattern in quotes (braces, ::, *), a folder, or several paths or URLs"
    command.add_argument("shards", nargs=nargs, metavar="SHARDS", help=text + more)


def _add_features(command: Any) -> None:
    command.add_argument("features", metavar="FEATURES", help="folder that `adq embed` or `adq run` wrote")


def _add_out(command: Any, text: str, **options: Any) -> None:
    command.add_argument("-o", "--out", required="default" not in options, help=text, **options)


def _add_encoder(command: Any, default: str | None = None) -> None:
    """Flags of an encoder, passed on where they are given; without a default name the importance chooses one."""
    group = command.add_argument_group("encoder")
    known = "builtin, builtin-free, thumbnail (8x8 mean colours), or any timm name"
    group.add_argument("--encoder", default=default, help=known)
    add_options(group, ENCODER, **{name: {"default": None} for name in options_of(ENCODER)})


def _add_embed(command: Any, without: tuple[str, ...] = ()) -> None:
    group = command.add_argument_group("embedding")
    add_options(group, EMBED, without=without, embeddings={"metavar": "FILE"})
    group.add_argument("--dry-run", action="store_true", help="say samples, memory, time and bytes, and stop")


def _add_plan(command: Any, without: tuple[str, ...] = ()) -> None:
    keys = "keys that are kept in any case, one a line: KEY, or SHARD<TAB>KEY where a key stands in several shards"
    file = {"nargs": None, "default": None, "type": keys_in, "metavar": "FILE"}
    must_include = {**file, "help": keys}
    exclude = {**file, "help": "keys that are never kept, as a file of the same form"}
    add_options(
        command.add_argument_group("plan"), PLAN, without=without, must_include=must_include, exclude=exclude
    )
