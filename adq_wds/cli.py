"""The command `adq`: arguments in, exit codes out.

Exit codes: 0 ok; 1 data differ or are damaged; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import adq_wds
from adq_wds.errors import AdqError, ShardError
from adq_wds.pipe import MAX_BAD_FRACTION
from adq_wds.registry import ALLOCATIONS, HEADS, KERNELS, SCORES
from adq_wds.sample import IMAGE_FIELDS

Run = Callable[[argparse.Namespace], None]
_SHARDS_HELP = (
    "tar shards, before the options: a pattern in quotes (braces, ::, *), a folder, or several paths"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    logging.basicConfig(format="%(message)s", handlers=[_BesideBars()])
    try:
        arguments = _parse(argv)
        logging.getLogger("adq_wds").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
        run: Run = arguments.run
        run(arguments)
        sys.stdout.flush()
    except AdqError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # `adq show plan.parquet | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("adq: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


class _BesideBars(logging.Handler):
    """Log lines above the progress bars, on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``--from run.json`` sets defaults, which flags override."""
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "from_run", None) is None:
        return arguments
    from adq_wds.jobs.run import load_run

    old = load_run(arguments.from_run)
    encoder = {"encoder" if name == "spec" else name: value for name, value in old["encoder"].items()}
    earlier = {"shards": old["urls"], "write": old["write"], **encoder, **old["embed"], **old["plan"]}
    return _parser({name: earlier[name] for name in earlier if hasattr(arguments, name)}).parse_args(argv)


def _fail(error: Exception, code: int) -> int:
    kind = f"{type(error).__name__}: " if isinstance(error, AdqError) else ""
    print(f"adq: {kind}{' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a library says
    return code


# ---- Commands


def _embed(a: argparse.Namespace) -> None:
    from adq_wds.jobs.embed import embed_shards
    from adq_wds.jobs.estimate import estimate

    if a.dry_run:
        _print(a, estimate(a.shards, _source(a), **_pick(a, *_ESTIMATE, "scores")))
        return
    features = embed_shards(a.shards, _source(a), a.out, progress=a.progress, **_pick(a, *_EMBED, "scores"))
    shown = {
        "features": str(features.folder),
        "samples": len(features),
        "shards": len(features.files),
        "hash": features.hash,
    }
    _print(a, shown, f"{len(features):,} samples of {len(features.files)} shards in {features.folder}")


def _plan(a: argparse.Namespace) -> None:
    plan = adq_wds.build_plan(a.features, out=a.out, progress=a.progress, **_plan_options(a))
    _show_plan(a, plan)


def _codebook(a: argparse.Namespace) -> None:
    codebook = adq_wds.fit_codebook(a.features, out=a.out, progress=a.progress, **_pick(a, *_CODEBOOK))
    _show_codebook(a, codebook)


def _show(a: argparse.Namespace) -> None:
    if Path(a.plan).suffix == ".safetensors":
        _show_codebook(a, adq_wds.load_codebook(a.plan))
    else:
        _show_plan(a, adq_wds.load_plan(a.plan))


def _show_codebook(a: argparse.Namespace, codebook: adq_wds.Codebook) -> None:
    from adq_wds.jobs.show import describe_codebook, show_codebook

    _print(a, describe_codebook(codebook, a.keep), show_codebook(codebook, a.keep))


def _show_plan(a: argparse.Namespace, plan: adq_wds.Plan) -> None:
    from adq_wds.jobs.show import describe_plan, show_plan

    _print(a, describe_plan(plan), show_plan(plan))


def _write(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.write import write_kept

    options = _pick(a, "root", "max_samples", "max_bytes", "split", "overwrite", "progress")
    report = write_kept(a.shards, a.plan, a.out, **options)
    share = 100 * report.bytes / max(1, report.source_bytes or 0)
    text = (
        f"{report.samples:,} samples in {report.shards} shards: {report.bytes:,} bytes on disk "
        f"({report.payload_bytes:,} of them payload), {share:.1f} % of the source's {report.source_bytes:,}"
    )
    _print(a, asdict(report), text)


def _index(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.index import index_shards

    report = index_shards(a.shards, a.out, **_pick(a, "split", "progress"))
    text = (
        f"{report.samples:,} samples of {report.shards:,} shards in {report.path} "
        f"({report.scanned:,} shards read, {report.shards - report.scanned:,} unchanged)"
    )
    _print(a, asdict(report), text)


def _verify(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.verify import report_text, verify_shards

    options = _pick(a, "root", "decode", "image", "label", "workers", "progress")
    report = verify_shards(a.plan, a.shards, **options)
    _print(a, {"equal": report.equal, **asdict(report)}, report_text(report, lines=a.lines))
    if not report.equal:
        raise ShardError(f"the shards are not those of the {report.against} {a.plan}: see above")


def _run(a: argparse.Namespace) -> None:
    from adq_wds.jobs.estimate import estimate
    from adq_wds.jobs.run import check_plan_options, needed, run_job
    from adq_wds.jobs.show import show_plan

    if not a.shards:
        raise ValueError("no shards given: name SHARDS, or --from run.json")
    plan_options = _plan_options(a)
    if a.dry_run:
        check_plan_options(plan_options)
        source = _source(a)
        options = _pick(a, *_ESTIMATE)
        options |= needed(options, plan_options)
        _print(a, estimate(a.shards, source, plan=plan_options, **options))
        return
    result = run_job(
        a.shards,
        a.out,
        encoder=_encoder(a),
        embed=_pick(a, *_EMBED),
        plan=plan_options,
        write=a.write,
        progress=a.progress,
    )
    plan = adq_wds.load_plan(Path(a.out) / "plan.parquet")
    text = "nothing to do: the same run is here already\n" if result["nothing_to_do"] else ""
    _print(a, result, text + show_plan(plan) + f"\n\nplan: {Path(a.out) / 'plan.parquet'}")


def _demo(a: argparse.Namespace) -> None:
    from adq_wds.jobs.demo import demo_text, run_demo

    result = run_demo(a.out, progress=a.progress, **_pick(a, "keep", "seeds", "epochs", "encoder"))
    _print(a, result, demo_text(result, a.out))


def _print(a: argparse.Namespace, value: dict[str, Any], text: str | None = None) -> None:
    if a.json:
        print(json.dumps(value, indent=1))
    elif text is not None:
        print(text)
    else:
        for name, entry in value.items():
            print(
                f"{name.replace('_', ' ')}: {entry:,}"
                if isinstance(entry, int)
                else f"{name.replace('_', ' ')}: {entry}"
            )


# ---- Arguments

_ENCODER = (
    "checkpoint",
    "device",
    "image_size",
    "pretrained",
    "head",
    "allow_pickle",
    "cache_dir",
    "amp",
    "channels_last",
    "compile",
)
_EMBED = (
    "image", "label", "embeddings", "batch_size", "workers", "on_error", "max_bad_fraction", "limit",
    "logit_grad", "double_softmax", "views",
)  # fmt: skip
_ESTIMATE = tuple(name for name in _EMBED if name != "max_bad_fraction")
_PLAN = (
    "bins",
    "kernel",
    "keep",
    "seed",
    "alpha",
    "allocation",
    "balance",
    "draw",
    "scores",
    "diversity_head",
    "normalise",
    "classes",
    "memory_bytes",
)

_CODEBOOK = (
    "bins",
    "pilot",
    "checkpoints",
    "min_pilot",
    "keep",
    "seed",
    "alpha",
    "allocation",
    "scores",
    "normalise",
    "memory_bytes",
)


def _pick(a: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(a, name) for name in names}


def _source(a: argparse.Namespace) -> adq_wds.Encoder:
    """The encoder asked for; one that costs nothing where embeddings are given, which go before it."""
    return adq_wds.encoder("thumbnail") if a.embeddings is not None else adq_wds.encoder(**_encoder(a))


def _encoder(a: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `adq_wds.encoder`: those that were given."""
    return {
        "spec": a.encoder,
        **{name: getattr(a, name) for name in _ENCODER if getattr(a, name) is not None},
    }


def _plan_options(a: argparse.Namespace) -> dict[str, Any]:
    options = _pick(a, *_PLAN)
    asked = a.must_include  # a file's name; keys, where an earlier run read them
    options["must_include"] = _keys_in(asked) if isinstance(asked, str) else list(asked or [])
    return options


def _keys_in(path: str) -> list[Any]:
    """Keys from a file: one a line, or shard and key with a tab between."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    return [tuple(line.split("\t", 1)) if "\t" in line else line for line in lines if line]


def _parser(earlier_run: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adq",
        description="Adaptive Dataset Quantization: choose a part of your tar shards, and train on it.",
        epilog="Exit codes: 0 ok, 1 data differ or are damaged, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"adq {adq_wds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands).set_defaults(**earlier_run or {})
    _add_embed(commands)
    _add_plan(commands)
    _add_codebook(commands)
    _add_show(commands)
    _add_write(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_demo(commands)
    return parser


def _command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="warnings only")
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bars; only on a terminal unless said",
    )
    return command


def _add_run(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands, "run", _run, "embed, bin, score and plan in one go; what is done already is not done again"
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
        help="the shards and arguments of an earlier run; what is given beside it goes before",
    )
    _encoder_flags(command)
    _embed_flags(command)
    _plan_flags(command)
    return command


def _add_embed(commands: Any) -> None:
    command = _command(commands, "embed", _embed, "embed shards: one features file per shard; resumable")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument("-o", "--out", default="features", help="folder for the features")
    _encoder_flags(command)
    _embed_flags(command).add_argument(
        "--scores", nargs="+", default=(), help="installed scores, a column each; texture is always there"
    )


def _add_plan(commands: Any) -> None:
    command = _command(commands, "plan", _plan, "turn features into a plan: bins, scores, quotas, ranks")
    command.add_argument("features", metavar="FEATURES", help="folder that `adq embed` wrote")
    command.add_argument("-o", "--out", default="plan.parquet", help="file for the plan")
    _plan_flags(command)


def _add_codebook(commands: Any) -> None:
    command = _command(
        commands, "codebook", _codebook, "learn from features which bin any sample is in, also one never seen"
    )
    command.add_argument("features", metavar="FEATURES", help="folder that `adq embed` wrote")
    command.add_argument(
        "-o", "--out", default="codebook.safetensors", help="file for the codebook, .safetensors"
    )
    command.add_argument("--bins", type=int, default=10, help="bins per class")
    command.add_argument("--pilot", type=int, help="samples that each class's rule is fitted on; up to 5,000")
    command.add_argument("--checkpoints", type=int, default=8, help="kept for each bin")
    command.add_argument(
        "--min-pilot", type=int, default=500, help="classes with fewer go by one rule over all"
    )
    command.add_argument(
        "--keep", type=float, default=0.3, help="the ratio that is shown; a codebook serves any"
    )
    command.add_argument("--seed", type=int, default=0, help="of the keyed draw of the pilot")
    command.add_argument(
        "--alpha", type=float, default=0.65, help="share of the importance in a bin's rate; 0 is uniform"
    )
    command.add_argument("--allocation", default="adaptive", help=f"one of {', '.join(ALLOCATIONS)}")
    command.add_argument(
        "--scores", nargs="+", default=list(SCORES), help="which add up to a bin's importance"
    )
    command.add_argument(
        "--normalise", choices=("sum", "minmax"), default="sum", help="of each score over the bins"
    )
    command.add_argument(
        "--memory-bytes", type=int, default=1 << 30, help="for one pilot's similarity matrix"
    )


def _add_show(commands: Any) -> None:
    command = _command(commands, "show", _show, "what a plan or a codebook keeps, per bin and per class")
    command.add_argument("plan", metavar="PLAN", help="a plan file, or a codebook, .safetensors")
    command.add_argument("--keep", type=float, default=0.3, help="of a codebook, whose rates hang on it")


def _add_write(commands: Any) -> None:
    command = _command(commands, "write", _write, "write the kept samples to new shards, bytes untouched")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument("--plan", help="the plan; all samples without one")
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
    command.add_argument("--max-samples", type=int, default=10_000, help="samples in a shard, at most")
    command.add_argument("--max-bytes", type=int, default=1 << 30, help="payload bytes in a shard, at most")
    command.add_argument("--split", default="train", help="name of the split in _info.json")
    command.add_argument(
        "--overwrite", action="store_true", help="replace another run's shards in the folder"
    )


def _add_index(commands: Any) -> None:
    command = _command(
        commands,
        "index",
        _index,
        "write where every sample lies to one file; unchanged shards are not read again",
    )
    command.add_argument(
        "shards", nargs="+", metavar="SHARDS", help=f"{_SHARDS_HELP}; or their _info.json or wids JSON file"
    )
    command.add_argument("-o", "--out", default="index.parquet", help="file for the index")
    command.add_argument("--split", help="one split of the _info.json; all unless said")


def _add_verify(commands: Any) -> None:
    command = _command(
        commands, "verify", _verify, "hold shards against a plan, to the end, and list all that differs"
    )
    command.add_argument("plan", metavar="PLAN", help="a plan, an index file, or a folder of features")
    command.add_argument("shards", nargs="+", metavar="SHARDS", help=_SHARDS_HELP)
    command.add_argument(
        "--root", help="folder that the shard names are relative to, where a path fits several"
    )
    command.add_argument("--decode", action="store_true", help="also decode every kept image")
    command.add_argument(
        "--image", default=IMAGE_FIELDS, help="field with the image, alternatives separated by ;"
    )
    command.add_argument("--label", help="also compare the labels in this field with the plan's")
    command.add_argument("--workers", type=int, help="threads for that; as many as cores unless said")
    command.add_argument("--lines", type=int, default=20, help="differences to print; --json prints all")


def _add_demo(commands: Any) -> None:
    command = _command(
        commands, "demo", _demo, "see it work: digits, plans, small trainings and a table; nothing is fetched"
    )
    command.add_argument(
        "-o", "--out", default="adq-demo", help="folder for it, new or of an earlier demo, which goes on"
    )
    command.add_argument("--keep", type=float, default=0.1, help="ratio of images kept, in (0, 1]")
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
        "--image", default=IMAGE_FIELDS, help="field with the image, alternatives separated by ;"
    )
    group.add_argument(
        "--label", default="cls", help="field with the label: cls, txt, json:label; none for unlabelled data"
    )
    group.add_argument(
        "--embeddings",
        metavar="FILE",
        help="Parquet or .npy file with embeddings made elsewhere, or field:emb.npy in the shards; no encoder then",
    )
    group.add_argument("--batch-size", type=int, default=64, help="images per call of the encoder")
    group.add_argument("--workers", type=int, help="threads; as many as cores unless said")
    group.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with a bad sample (not with a bad view, which ends the job)",
    )
    group.add_argument(
        "--max-bad-fraction", type=float, default=MAX_BAD_FRACTION, help="of a shard, when skipping"
    )
    group.add_argument("--limit", type=int, help="only the first samples, this many")
    group.add_argument(
        "--logit-grad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep logit gradients, for --kernel gradient of a plan",
    )
    group.add_argument(
        "--double-softmax",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="those of the released code: softmax of the softmax",
    )
    group.add_argument(
        "--views", type=int, default=0, help="also embed two views of so many images, for --diversity-head"
    )
    group.add_argument("--dry-run", action="store_true", help="say samples, memory, time and bytes, and stop")
    return group


def _plan_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("plan")
    group.add_argument("--keep", type=float, default=0.3, help="ratio of samples kept, in [0, 1]")
    group.add_argument("--bins", type=int, default=10, help="bins per class")
    group.add_argument(
        "--kernel",
        choices=KERNELS,
        default="features",
        help="similarity: of embeddings, or of gradients by a head",
    )
    group.add_argument("--seed", type=int, default=0, help="of the keyed draw")
    group.add_argument(
        "--alpha", type=float, default=0.65, help="share of the importance in a bin's rate; 0 is uniform"
    )
    group.add_argument("--allocation", default="adaptive", help=f"one of {', '.join(ALLOCATIONS)}")
    group.add_argument(
        "--balance", choices=("class", "none"), default="class", help="keep the classes' proportions?"
    )
    group.add_argument(
        "--draw", choices=("random", "ordered"), default="random", help="how samples of a bin are ranked"
    )
    group.add_argument("--scores", nargs="+", default=list(SCORES), help="which add up to a bin's importance")
    group.add_argument(
        "--diversity-head", choices=HEADS, default="none", help="what the diversity is measured behind"
    )
    group.add_argument(
        "--normalise", choices=("sum", "minmax"), default="sum", help="of each score over the bins"
    )
    group.add_argument("--classes", nargs="+", help="plan these classes only")
    group.add_argument("--must-include", metavar="FILE", help="keys that are kept in any case, one a line")
    group.add_argument("--memory-bytes", type=int, default=1 << 30, help="for one class's similarity matrix")
