"""Which arguments does `adq` take? A parser for every command; what they do stands in `cli`."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import adq_wds
from adq_wds import registry
from adq_wds.checks import positive
from adq_wds.core.allocation import budget_for, check_alpha
from adq_wds.core.rng import check_seed
from adq_wds.errors import printable
from adq_wds.pipes.base import MAX_BAD_FRACTION
from adq_wds.registry import ALLOCATIONS, GONE, HEADS, IMPORTANCES, KERNELS, SCORES
from adq_wds.samples.fields import IMAGE_FIELDS

_SHARDS_HELP = (
    "tar shards, before the options: a pattern in quotes (braces, ::, *), a folder, or several paths or URLs"
)
_RATIOS = ("keep", "patch_keep", "alpha", "max_bad_fraction")
_COUNTS = ("bins", "batch_size", "workers", "limit", "seeds", "epochs")
_NUMBER = re.compile(r"-\.?\d.*")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that names close flags and commands for one it does not know, as a terminal may show them.

    Attributes:
        commands: the parsers of the commands, by name; empty for a command's own.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands: dict[str, Parser] = {}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word == "--":
                break
            if self.commands and not word.startswith("-"):
                if word not in self.commands:
                    self._fail("command", word, self.commands)
                break  # the flags behind it are the command's
            flag = word.partition("=")[0]
            if self._is_flag(word) and not self._knows(flag):
                self._fail("flag", flag, self._option_string_actions)
        return super().parse_known_args(words, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)

    def _is_flag(self, word: str) -> bool:
        return len(word) > 1 and word[0] == "-" and " " not in word and not _NUMBER.fullmatch(word)

    def _knows(self, flag: str) -> bool:
        flags = self._option_string_actions
        return any(known.startswith(flag) for known in flags) or (flag[1] != "-" and flag[:2] in flags)

    def _fail(self, kind: str, name: str, known: Any) -> NoReturn:
        close = difflib.get_close_matches(name, known, n=1)
        remedy = GONE.get(name) or (
            f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists them"
        )
        self.error(f"no {kind} {name}; {remedy}")


def make_parser(earlier_run: dict[str, Any] | None = None) -> Parser:
    """The parser of all commands; `earlier_run` gives defaults to `adq run`, which flags override."""
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


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
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


def _add_run(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands, "run", "embed, bin, score and plan in one go; what is done already is not done again"
    )
    command.add_argument("shards", nargs="*", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument(
        "-o", "--out", required=True, help="folder for features/, bins.parquet, plan.parquet, run.json"
    )
    command.add_argument("--write", action="store_true", help="also write the kept samples to OUT/shards/")
    command.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN.JSON",
        help="the shards and arguments of an earlier run, by its folder or run.json; what is given beside it goes before",
    )
    _encoder_flags(command)
    _embed_flags(command)
    _plan_flags(command)
    return command


def _add_embed(commands: Any) -> None:
    command = _command(commands, "embed", "embed shards: one features file per shard; resumable")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument("-o", "--out", default="features", help="folder for the features")
    _encoder_flags(command)
    _embed_flags(command).add_argument(
        "--scores", nargs="+", default=(), help="installed scores, a column each; texture is always there"
    )


def _add_plan(commands: Any) -> None:
    command = _command(commands, "plan", "turn features into a plan: bins, scores, quotas, ranks")
    command.add_argument("features", metavar="FEATURES", help="folder that `adq embed` or `adq run` wrote")
    command.add_argument("-o", "--out", default="plan.parquet", help="file for the plan")
    _plan_flags(command)


def _add_codebook(commands: Any) -> None:
    command = _command(
        commands, "codebook", "learn from features which bin any sample is in, also one never seen"
    )
    command.add_argument("features", metavar="FEATURES", help="folder that `adq embed` or `adq run` wrote")
    command.add_argument(
        "-o", "--out", default="codebook.safetensors", help="file for the codebook, .safetensors"
    )
    command.add_argument("--pilot", type=int, help="samples that each class's rule is fitted on; up to 5,000")
    command.add_argument("--checkpoints", type=int, default=8, help="kept for each bin")
    command.add_argument(
        "--min-pilot", type=int, default=500, help="classes with fewer go by one rule over all"
    )
    _rate_flags(
        command,
        keep="the ratio that is shown; a codebook serves any",
        seed="of the keyed draw of the pilot",
        memory="for one pilot's similarity matrix",
    )


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
    command.add_argument("--keep", type=ratio, default=0.3, help="of a codebook, whose rates hang on it")


def _add_patches(commands: Any) -> None:
    command = _command(
        commands,
        "patches",
        "draw what dropping patches does to a few images: original, importance, kept, stored, rebuilt",
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument("-o", "--out", required=True, metavar="OUT.png", help="file for the picture")
    command.add_argument("--patch-keep", type=ratio, default=0.75, help="ratio of each image's patches kept")
    command.add_argument("--patch", type=int, default=16, help="side of a patch in pixels")
    command.add_argument(
        "--size", type=int, default=224, help="side to which images are drawn first; 0: as they are"
    )
    command.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100")
    command.add_argument(
        "--mae", help="what rebuilds: a checkpoint, or builtin (images of 32 x 32, patches of 4)"
    )
    command.add_argument("--samples", type=int, default=4, help="images shown")
    command.add_argument("--importance", default="gradcam++", help=f"one of {', '.join(IMPORTANCES)}")
    command.add_argument(
        "--image", default=IMAGE_FIELDS, help="field with the image, alternatives separated by ;"
    )
    _encoder_flags(command)
    command.set_defaults(encoder=None)  # whose eyes an importance has; its own unless said


def _add_write(commands: Any) -> None:
    command = _command(
        commands,
        "write",
        "write the kept samples to new shards, bytes untouched unless images are to be smaller",
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument("--plan", help="the plan, or the folder of a run; all samples without one")
    command.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="PATTERN",
        help="pattern for the new shards, such as small/%%06d.tar",
    )
    command.add_argument(
        "--root", help="folder that the plan's shard names are relative to, where a path fits several"
    )
    command.add_argument(
        "--cache", metavar="FOLDER", help="where bytes of remote shards stay, for another try"
    )
    _shard_flags(command)
    _smaller_flags(command)
    _encoder_flags(command)
    command.set_defaults(encoder=None)  # whose eyes an importance has; its own unless said


def _shard_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-samples", type=int, default=10_000, help="samples in a shard, at most")
    command.add_argument("--max-bytes", type=int, default=1 << 30, help="payload bytes in a shard, at most")
    command.add_argument("--split", default="train", help="name of the split in _info.json")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run's shards in the folder"
    )


def _add_pack(commands: Any) -> None:
    command = _command(
        commands, "pack", "pack a folder of image files into tar shards, bytes untouched, folders as classes"
    )
    command.add_argument("folder", metavar="FOLDER", help="one split, such as imagenet/train")
    command.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="PATTERN",
        help="pattern for the shards, such as shards/%%06d.tar",
    )
    command.add_argument(
        "--label",
        choices=("folder", "none"),
        default="folder",
        help="folder: cls is the number of the first folder on a file's path, by sorted names (see _info.json)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the order in which files lie in the shards")
    _skip_flags(command, "what to do with a file that has an image's extension and is no image")
    _shard_flags(command)


def _smaller_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "smaller images",
        "any of the first three writes images anew, as JPEGs with 4:2:0 and optimised tables",
    )
    group.add_argument(
        "--patch-keep", type=ratio, help="ratio of each image's patches of 16 x 16 pixels that are kept"
    )
    group.add_argument(
        "--size",
        type=int,
        help="side of the new images: short side to it, then the centre; 224 with --patch-keep",
    )
    group.add_argument("--quality", type=int, help="of the JPEGs, 1 to 100; 90 unless said")
    group.add_argument(
        "--importance",
        default="gradcam++",
        help=f"which patches are kept: {', '.join(IMPORTANCES)}; by the classifier builtin unless --encoder says another",
    )
    group.add_argument(
        "--image",
        default=IMAGE_FIELDS,
        help="field with the image, alternatives separated by ;; none beside --embeddings for text and the like",
    )
    group.add_argument("--seed", type=int, default=0, help="of the random importance")
    _skip_flags(group, "what to do with a sample whose image cannot be written anew")


def _add_index(commands: Any) -> None:
    command = _command(
        commands,
        "index",
        "write where every sample lies to one file; unchanged shards are not read again",
    )
    command.add_argument(
        "shards", nargs="+", metavar="SHARDS", help=f"{_SHARDS_HELP}; or their _info.json or wids JSON file"
    )
    command.add_argument("-o", "--out", default="index.parquet", help="file for the index")
    command.add_argument("--split", help="one split of the _info.json; all unless said")


def _add_verify(commands: Any) -> None:
    command = _command(
        commands, "verify", "hold shards against a plan, to the end, and list all that differs"
    )
    command.add_argument(
        "plan", metavar="PLAN", help="a plan, the folder of a run, an index file, or a folder of features"
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument(
        "--root", help="folder that the shard names are relative to, where a path fits several"
    )
    command.add_argument(
        "--decode",
        action="store_true",
        help="also decode every kept image; bytes changed inside a JPEG may decode all the same",
    )
    command.add_argument(
        "--image",
        default=IMAGE_FIELDS,
        help="field with the image, alternatives separated by ;; none beside --embeddings for text and the like",
    )
    command.add_argument("--label", help="also compare the labels in this field with the plan's")
    command.add_argument("--workers", type=int, help="threads for that; as many as cores unless said")
    command.add_argument("--lines", type=int, default=20, help="differences to print; --json prints all")


def _add_demo(commands: Any) -> None:
    command = _command(
        commands, "demo", "see it work: digits, plans, small trainings and a table; nothing is fetched"
    )
    command.add_argument(
        "-o", "--out", default="adq-demo", help="folder for it, new or of an earlier demo, which goes on"
    )
    command.add_argument("--keep", type=ratio, default=0.1, help="ratio of images kept, in (0, 1]")
    command.add_argument("--seeds", type=int, default=10, help="plans and trainings of each kind")
    command.add_argument("--epochs", type=int, default=60, help="of each training")
    command.add_argument(
        "--encoder", default="builtin", help="builtin, builtin-free, thumbnail, any timm name"
    )


def _encoder_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("encoder")
    group.add_argument(
        "--encoder",
        default="builtin",
        help="builtin, builtin-free, thumbnail (8x8 mean colours), or any timm name",
    )
    group.add_argument("--checkpoint", help="weights for it, .safetensors")
    group.add_argument("--device", help="cpu, cuda, or auto")
    group.add_argument(
        "--image-size", type=int, help="input side, where the model allows another than its own"
    )
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fetch timm's weights when there is no checkpoint",
    )
    group.add_argument(
        "--head", action=argparse.BooleanOptionalAction, default=None, help="keep the classifier, for logits"
    )
    group.add_argument(
        "--allow-pickle", action="store_true", default=None, help="also read .pth checkpoints (weights only)"
    )
    group.add_argument("--cache-dir", help="where fetched weights are kept")
    _forward_flags(group)


def _forward_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute in bfloat16, where the device can",
    )
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="colours side by side in memory; so unless said",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the network; needs a C++ compiler",
    )


def _embed_flags(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = command.add_argument_group("embedding")
    group.add_argument(
        "--image",
        default=IMAGE_FIELDS,
        help="field with the image, alternatives separated by ;; none beside --embeddings for text and the like",
    )
    group.add_argument(
        "--label", default="cls", help="field with the label: cls, txt, json:label; none for unlabelled data"
    )
    group.add_argument(
        "--embeddings",
        metavar="FILE",
        help="embeddings made elsewhere: a Parquet or .npy file, a folder of .npy files, or field:emb.npy in the shards; "
        "no encoder then",
    )
    group.add_argument("--batch-size", type=int, default=64, help="images per call of the encoder")
    group.add_argument("--workers", type=int, help="threads; as many as cores unless said")
    _skip_flags(group, "what to do with a bad sample (not with a bad view, which ends the job)")
    group.add_argument("--limit", type=int, help="only the first samples, this many")
    group.add_argument(
        "--logit-grad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep logit gradients, for --kernel gradient of a plan",
    )
    group.add_argument(
        "--views", type=int, default=0, help="also embed two views of so many images, for --diversity-head"
    )
    group.add_argument("--dry-run", action="store_true", help="say samples, memory, time and bytes, and stop")
    return group


def _skip_flags(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument("--on-error", choices=("raise", "skip"), default="raise", help=text)
    group.add_argument(
        "--max-bad-fraction", type=ratio, default=MAX_BAD_FRACTION, help="of all samples, when skipping"
    )


def _plan_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("plan")
    _rate_flags(
        group,
        keep="ratio of samples kept, such as 0.2 or 20%%",
        seed="of the keyed draw",
        memory="for one class's similarity matrix",
    )
    group.add_argument(
        "--kernel",
        choices=KERNELS,
        default="features",
        help="similarity: of embeddings, or of gradients by a head",
    )
    group.add_argument(
        "--balance", choices=("class", "none"), default="class", help="keep the classes' proportions?"
    )
    group.add_argument(
        "--draw", choices=("random", "ordered"), default="random", help="how samples of a bin are ranked"
    )
    group.add_argument(
        "--diversity-head",
        default="none",
        help=f"what the diversity is measured behind: {', '.join(HEADS)}",
    )
    group.add_argument("--classes", nargs="+", help="plan these classes only")
    group.add_argument(
        "--dedup", choices=("exact", "none"), default="exact", help="leave out copies of the same bytes?"
    )
    group.add_argument(
        "--must-include",
        metavar="FILE",
        help="keys that are kept in any case, one a line: KEY, or SHARD<TAB>KEY where a key stands in several shards",
    )


def _rate_flags(group: argparse._ActionsContainer, *, keep: str, seed: str, memory: str) -> None:
    """What a plan and a codebook have in common: bins, and what their rates hang on."""
    group.add_argument("--keep", type=ratio, default=0.3, help=keep)
    group.add_argument("--bins", type=int, default=10, help="bins per class")
    group.add_argument("--seed", type=int, default=0, help=seed)
    group.add_argument(
        "--alpha", type=ratio, default=0.65, help="share of the importance in a bin's rate; 0 is uniform"
    )
    group.add_argument("--allocation", default="adaptive", help=f"one of {', '.join(ALLOCATIONS)}")
    group.add_argument(
        "--scores",
        nargs="+",
        help=f"which add up to a bin's importance; {' and '.join(SCORES)} unless said, diversity alone without images",
    )
    group.add_argument(
        "--normalise", choices=("sum", "minmax"), default="sum", help="of each score over the bins"
    )
    group.add_argument("--memory-bytes", type=int, default=1 << 30, help=memory)


def flags_of(command: str) -> set[str]:
    """The flags that a command takes: ``--patch-keep``, ``--no-amp`` and so on."""
    known = make_parser().commands[command]._option_string_actions
    return {flag for flag in known if flag.startswith("--")}


def ratio(text: str) -> float:
    """A ratio as people write it.

    >>> ratio("0.2"), ratio("20%")
    (0.2, 0.2)
    """
    return float(f"{text.removesuffix('%').strip()}e-2" if text.endswith("%") else text)


def check_values(arguments: argparse.Namespace) -> None:
    """Find the values that are wrong whatever the data, before torch or Arrow are imported.

    Raises:
        ValueError: a number is out of range, or nothing has that name.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in _RATIOS:
        if isinstance(value := given.get(name), int | float) and 2 <= value <= 100:
            meant = f"for {value:g} % write {value / 100:g} or {value:g}%"
            raise ValueError(f"{name} must be a number in [0, 1], got {value:g}; {meant}")
    if "keep" in given:
        budget_for(given["keep"], 0)
    if "alpha" in given:
        check_alpha(given["alpha"])
    if "seed" in given:
        check_seed(given["seed"])
    for name in _COUNTS:
        if name in given:
            positive(name, given[name])
    if "allocation" in given:
        registry.allocation(given["allocation"])
    if "diversity_head" in given:
        registry.look_up("diversity head", given["diversity_head"], dict.fromkeys(HEADS))
    if "importance" in given:
        registry.check_importance(given["importance"])
    for score in given.get("scores", ()):
        if score not in SCORES:
            registry.score(score)
