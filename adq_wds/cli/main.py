"""The command `adq`: arguments in (`arguments`), exit codes out.

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
from typing import Any, TextIO

import adq_wds
from adq_wds.cli.arguments import CODEBOOK, DEMO, INDEX, PACK, PATCHES, VERIFY, WRITE, make_parser
from adq_wds.cli.flag_names import flagged
from adq_wds.cli.parser import check_values, given
from adq_wds.errors import AdqError, PlanError, ShardError, printable
from adq_wds.signatures import EMBED, ENCODER, PLAN


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    logging.basicConfig(format="%(message)s", handlers=[_BesideBars()])
    command = "run"  # whose run.json is read while arguments are
    try:
        arguments = _parse(argv)
        command = arguments.command
        logging.getLogger("adq_wds").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
        check_values(make_parser().commands[command], arguments)
        _COMMANDS[command](arguments)
    except AdqError as error:
        return _fail(error, command, 1)
    except BrokenPipeError:  # `adq show plan.parquet | head`
        _discard(sys.stdout)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, command, 2)
    except KeyboardInterrupt:
        _say("adq: interrupted; run the same command again to go on")
        return 130
    return 0


class _BesideBars(logging.Handler):
    """Log lines above the progress bars, on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record))


def _say(text: str) -> None:
    """Write a line to standard error. Where it cannot be written, nobody can be told, and the job goes on."""
    from tqdm import tqdm

    try:
        tqdm.write(printable(text), file=sys.stderr)
    except OSError:
        _discard(sys.stderr)


def _print_text(text: str) -> None:
    """Write lines to standard output.

    Raises:
        AdqError: its disk is full.
    """
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise AdqError(f"cannot write the standard output: {error.strerror}") from error


def _discard(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python tries to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``--from run.json`` sets defaults, which flags override."""
    arguments = make_parser().parse_args(argv)
    if getattr(arguments, "from_run", None) is not None:
        from adq_wds.jobs.run import load_run

        old = load_run(_inside(arguments.from_run, "run.json"))
        encoder = {"encoder" if name == "spec" else name: value for name, value in old["encoder"].items()}
        earlier = {"shards": old["urls"], "write": old["write"], **encoder, **old["embed"], **old["plan"]}
        earlier = {name: value for name, value in earlier.items() if hasattr(arguments, name)}
        arguments = make_parser(earlier).parse_args(argv)
    if arguments.quiet and arguments.progress is None:
        arguments.progress = False
    return arguments


def _inside(folder: str, name: str) -> str:
    """The file of that name in a run's folder; `folder` itself where it is a file, or nothing yet.

    Raises:
        ValueError: a folder without that file.
    """
    within = Path(folder) / name
    if not within.exists() and Path(folder).is_dir():
        raise ValueError(
            f"{folder}: a folder without {name}; name the file, or a folder that `adq run` wrote"
        )
    return str(within) if within.exists() else folder


def _features_in(folder: str) -> str:
    """The folder of features in a run's folder; `folder` itself where it is no run's."""
    within = Path(folder) / "features"
    return str(within) if within.is_dir() else folder


def _fail(error: Exception, command: str, code: int) -> int:
    kind = f"{type(error).__name__}: " if isinstance(error, AdqError) else ""
    line = " ".join(str(error).split())  # whatever a library says
    text = flagged(line, make_parser().commands[command].flags)
    _say(f"adq: {kind}{text}")
    return code


# ---- Commands


def _embed(a: argparse.Namespace) -> None:
    from adq_wds.embedding.embed_shards import embed_shards
    from adq_wds.embedding.estimate import estimate

    if a.dry_run:
        _print(a, estimate(a.shards, _source(a), **given(a, _ESTIMATE)))
        return
    features = embed_shards(a.shards, _source(a), a.out, **given(a, EMBED))
    shown = {
        "features": str(features.folder),
        "samples": len(features),
        "shards": len(features.files),
        "hash": features.hash,
    }
    _print(a, shown, f"{len(features):,} samples of {len(features.files)} shards in {features.folder}")


def _plan(a: argparse.Namespace) -> None:
    plan = adq_wds.build_plan(_features_in(a.features), **_plan_options(a))
    _show_plan(a, plan)


def _codebook(a: argparse.Namespace) -> None:
    codebook = adq_wds.fit_codebook(_features_in(a.features), **given(a, CODEBOOK))
    _show_codebook(a, codebook)


def _show(a: argparse.Namespace) -> None:
    if Path(a.plan).suffix == ".safetensors":
        _refuse(a, ("keys",), "on a codebook, which lists no samples; leave it out")
        _show_codebook(a, adq_wds.load_codebook(a.plan))
        return
    _refuse(a, ("keep",), "on a plan, which says its own; leave it out")
    try:
        plan = adq_wds.load_plan(_inside(a.plan, "plan.parquet"))
    except (PlanError, ValueError):
        if _like_shards(a.plan):
            raise ValueError(
                f"{a.plan!r} names tar shards, no plan; `adq patches` draws what dropping patches does to their images"
            ) from None
        raise
    if a.keys:
        _print_keys(a, plan)
    else:
        _show_plan(a, plan)


def _print_keys(a: argparse.Namespace, plan: adq_wds.Plan) -> None:
    """The kept samples, a line each as ``--must-include`` reads it, or as one JSON list.

    Raises:
        ValueError: a key is no line that a terminal may show as it is, and an escaped one would be another key.
    """
    from adq_wds.report.text import kept_samples

    kept: list[str | list[str]] = []
    lines = []
    for shard, key in kept_samples(plan):
        kept.append(key if shard is None else [shard, key])
        line = key if shard is None else f"{shard}\t{key}"
        if not a.json and ("\n" in line or printable(line) != line):
            raise ValueError(f"key {key!r} cannot stand in a line of text; --json lists such keys")
        lines.append(line)
    if lines or a.json:
        _print(a, kept, "\n".join(lines))


def _refuse(a: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise `ValueError` for a flag that was given and would do nothing."""
    usual = make_parser().parse_args([a.command, "-"])
    for name in names:
        if getattr(a, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}")


def _like_shards(path: str) -> bool:
    tars = (".tar", ".tar.gz", ".tgz")
    inside = os.listdir(path) if os.path.isdir(path) else []
    return path.endswith(tars) or "::" in path or any(name.endswith(tars) for name in inside)


def _patches(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.show_patches import patches_text, show_patches

    eyes = _eyes(a)
    if a.checkpoint is None:  # then a pickle can only be the autoencoder's
        eyes.pop("allow_pickle", None)
    importance = adq_wds.importance(a.importance, patch=a.patch, **eyes)
    mae = (
        None
        if a.mae is None
        else adq_wds.load_mae(a.mae, allow_pickle=bool(a.allow_pickle) and a.mae != "builtin")
    )
    options = {**given(a, PATCHES), "mae": mae, "size": a.size or None}
    shown = show_patches(a.shards, importance, a.out, **options)
    _print(
        a,
        {"picture": a.out, "images": [asdict(each) for each in shown]},
        f"{a.out}\n{patches_text(shown)}",
    )


def _show_codebook(a: argparse.Namespace, codebook: adq_wds.Codebook) -> None:
    from adq_wds.report.text import describe_codebook, show_codebook

    _print(a, describe_codebook(codebook, a.keep), show_codebook(codebook, a.keep))


def _show_plan(a: argparse.Namespace, plan: adq_wds.Plan) -> None:
    from adq_wds.report.text import describe_plan, show_plan

    _print(a, describe_plan(plan), show_plan(plan))


def _write(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.writing.smaller import totals
    from adq_wds.writing.write_shards import parts_text, write_kept

    plan = None if a.plan is None else _inside(a.plan, "plan.parquet")
    report = write_kept(a.shards, plan, a.out, **{**given(a, WRITE), "importance": _importance(a)})
    share = 100 * report.bytes / max(1, report.source_bytes or 0)
    bad = f" of {report.read:,} read, {report.bad:,} bad ones left out (see the log)," if report.bad else ""
    text = (
        f"{report.samples:,} samples{bad} in {report.shards} shards: {report.bytes:,} bytes on disk "
        f"({report.payload_bytes:,} of them payload), {share:.1f} % of the source files' {report.source_bytes:,}"
    )
    shown = {**asdict(report), "read": report.read}
    if report.parts is not None:
        shown["totals"] = totals(report.parts)
        text += f"\n\n{parts_text(report)}"
    _print(a, shown, text)


def _pack(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.pack import pack_folder, pack_text

    report = pack_folder(a.folder, a.out, **given(a, PACK))
    _print(a, {**asdict(report), "files": report.files}, pack_text(report))


def _index(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.index import index_shards

    report = index_shards(a.shards, a.out, **given(a, INDEX))
    text = (
        f"{report.samples:,} samples of {report.shards:,} shards in {report.path} "
        f"({report.scanned:,} shards read, {report.shards - report.scanned:,} unchanged)"
    )
    _print(a, asdict(report), text)


def _verify(a: argparse.Namespace) -> None:
    from dataclasses import asdict

    from adq_wds.jobs.verify import report_text, verify_shards

    is_run = (Path(a.plan) / "features").is_dir()  # else it may be a folder of features
    plan = _inside(a.plan, "plan.parquet") if is_run else a.plan
    report = verify_shards(plan, a.shards, **given(a, VERIFY))
    _print(a, {"equal": report.equal, **asdict(report)}, report_text(report, lines=a.lines))
    if not report.equal:
        raise ShardError(f"the shards are not those of the {report.against} {a.plan}: see above")


def _run(a: argparse.Namespace) -> None:
    if not a.shards:
        raise ValueError("no shards given: name SHARDS, or --from run.json")
    from adq_wds.embedding.estimate import estimate
    from adq_wds.jobs.run import needed, run_job
    from adq_wds.planning import options as planning
    from adq_wds.report.text import show_plan

    plan_options = _plan_options(a, without=("out", "progress"))
    if a.dry_run:
        planning.plan_options(**plan_options)
        source = _source(a)
        options = given(a, _ESTIMATE, without=_OF_PLAN)
        options |= needed(options, plan_options)
        _print(a, estimate(a.shards, source, plan=plan_options, **options))
        return
    result = run_job(
        a.shards,
        a.out,
        encoder=_encoder(a),
        embed=given(a, EMBED, without=(*_OF_PLAN, "progress")),
        plan=plan_options,
        write=a.write,
        progress=a.progress,
    )
    plan = adq_wds.load_plan(Path(a.out) / "plan.parquet")
    text = "nothing to do: the same run is here already\n" if result["nothing_to_do"] else ""
    _print(a, result, text + show_plan(plan) + f"\n\nplan: {Path(a.out) / 'plan.parquet'}")


def _demo(a: argparse.Namespace) -> None:
    from adq_wds.demo.run_demo import demo_text, run_demo

    result = run_demo(a.out, **given(a, DEMO))
    _print(a, result, demo_text(result, a.out))


def _print(a: argparse.Namespace, value: dict[str, Any] | list[Any], text: str | None = None) -> None:
    """Print JSON, a text, or the entries of a value; of a command that makes something no text where it is to be quiet."""
    if a.json:
        text = json.dumps(value, indent=1)
    elif text is None:
        text = "\n".join(
            f"{name.replace('_', ' ')}: {entry:,}"
            if isinstance(entry, int)
            else f"{name.replace('_', ' ')}: {entry}"
            for name, entry in dict(value).items()
        )
    elif a.quiet and a.command not in ("show", "patches", "verify"):
        return
    _print_text(text)


# ---- What the arguments stand for

_ESTIMATE = "adq_wds.embedding.estimate.estimate"
_OF_PLAN = ("scores",)  # of `adq run`, whose embedding follows from its plan


def _source(a: argparse.Namespace) -> adq_wds.Encoder:
    """The encoder asked for; one that costs nothing where embeddings are given, which go before it."""
    return adq_wds.encoder("thumbnail") if a.embeddings is not None else adq_wds.encoder(**_encoder(a))


def _encoder(a: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `adq_wds.encoder`: those that were given."""
    return {"spec": a.encoder} | {
        name: value for name, value in given(a, ENCODER).items() if value is not None
    }


def _eyes(a: argparse.Namespace) -> dict[str, Any]:
    """What was said of the encoder whose eyes an importance has."""
    options = {name: value for name, value in _encoder(a).items() if name != "spec"}
    return options if a.encoder is None else {"encoder": a.encoder, **options}


def _importance(a: argparse.Namespace) -> str | adq_wds.Importance:
    """The importance asked for: a name, or the object where something is said of its encoder."""
    options = _eyes(a)
    if options and a.patch_keep is None:
        name, value = next(iter(options.items()))
        raise ValueError(
            f"{name}={value!r} is about which patches are kept; give patch_keep too, such as 0.75"
        )
    return adq_wds.importance(a.importance, **options) if options else str(a.importance)


def _plan_options(a: argparse.Namespace, without: Sequence[str] = ()) -> dict[str, Any]:
    options = given(a, PLAN, without=without)
    for name in ("must_include", "exclude"):
        asked = options[name]  # a file's name; keys, where an earlier run read them
        options[name] = _keys_in(asked) if isinstance(asked, str) else list(asked or [])
    return options


def _keys_in(path: str) -> list[Any]:
    """Keys from a file: one a line, or shard and key with a tab between."""
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # not `splitlines`: a key may hold U+2028
    return [tuple(line.split("\t", 1)) if "\t" in line else line for line in lines if line]


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": _run,
    "embed": _embed,
    "plan": _plan,
    "codebook": _codebook,
    "show": _show,
    "patches": _patches,
    "write": _write,
    "pack": _pack,
    "index": _index,
    "verify": _verify,
    "demo": _demo,
}
