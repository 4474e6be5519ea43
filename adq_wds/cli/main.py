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
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import adq_wds
from adq_wds.cli.arguments import (
    CODEBOOK,
    DEMO,
    EXPORT,
    INDEX,
    PACK,
    PATCHES,
    REPORT,
    SOFTEN,
    VERIFY,
    WRITE,
    make_parser,
)
from adq_wds.cli.encoders import encoder_arguments, encoder_options, importance_of, source_of
from adq_wds.cli.output import BesideBars, discard, print_text, say
from adq_wds.cli.parser import check_values, flagged, given
from adq_wds.errors import AdqError, ShardError, printable
from adq_wds.remote.url_path import as_path
from adq_wds.signatures import EMBED, PLAN, SDEDIT, SELECT, VARY


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(format="%(message)s", handlers=[BesideBars()])
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
        discard(sys.stdout)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, command, 2)
    except KeyboardInterrupt:
        say("adq: interrupted; run the same command again to go on")
        return 130
    return 0


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


def _inside(folder: str, name: str, *, required: bool = True) -> str:
    """The file of that name in a run's folder; `folder` itself where it is a file or does not exist.

    Raises:
        ValueError: a folder without that file, which is required.
    """
    within = as_path(folder) / name
    if within.exists():
        return os.fspath(within)
    if required and as_path(folder).is_dir():
        raise ValueError(
            f"{folder}: a folder without {name}; name the file, or a folder that `adq run` wrote"
        )
    return folder


def _print(a: argparse.Namespace, value: Any, text: str | None = None) -> None:
    """Print a value as JSON or as its text; a mapping without a text as its entries.

    With ``--quiet`` a command that makes something prints no text.
    """
    if a.json:
        text = json.dumps(_as_json(value), indent=1)
    elif text is None and isinstance(value, dict):
        text = "\n".join(
            f"{name.replace('_', ' ')}: {entry:,}"
            if isinstance(entry, int)
            else f"{name.replace('_', ' ')}: {entry}"
            for name, entry in value.items()
        )
    elif a.quiet and a.command not in ("show", "why", "patches", "verify"):
        return
    print_text(str(value) if text is None else text)


def _as_json(value: Any) -> Any:
    """A report as the mapping of its fields and properties; any other value as it is."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    properties = [name for name in dir(value) if isinstance(getattr(type(value), name, None), property)]
    return asdict(value) | {name: getattr(value, name) for name in properties}


def _fail(error: Exception, command: str, code: int) -> int:
    kind = f"{type(error).__name__}: " if isinstance(error, AdqError) else ""
    line = " ".join(str(error).split())  # whatever a library says
    text = flagged(line, make_parser().commands[command].flags)
    say(f"adq: {kind}{text}")
    return code


# ---- Commands


def _call(a: argparse.Namespace, function: str, *arguments: Any, **changed: Any) -> Any:
    """Import a function of the package and call it with these arguments and its own flags."""
    module, _, name = function.rpartition(".")
    return getattr(import_module(module), name)(*arguments, **{**given(a, function), **changed})


def _embed(a: argparse.Namespace) -> None:
    if a.dry_run:
        from adq_wds.embedding.estimate import estimate

        _print(
            a, estimate(a.shards, source_of(a), **given(a, EMBED, without=("progress", "engine", "address")))
        )
        return
    features = _call(a, EMBED, a.shards, source_of(a), a.out)
    shown = {
        "features": str(features.folder),
        "samples": len(features),
        "shards": len(features.files),
        "hash": features.hash,
    }
    _print(a, shown, f"{len(features):,} samples of {len(features.files)} shards in {features.folder}")


def _plan(a: argparse.Namespace) -> None:
    _show_plan(a, _call(a, PLAN, _inside(a.features, "features", required=False)))


def _codebook(a: argparse.Namespace) -> None:
    _show_codebook(a, _call(a, CODEBOOK, _inside(a.features, "features", required=False)))


def _soften(a: argparse.Namespace) -> None:
    _print(a, _call(a, SOFTEN, _inside(a.features, "features", required=False)))


def _show(a: argparse.Namespace) -> None:
    if as_path(a.plan).suffix == ".safetensors":
        for name in ("keys", "left_out"):
            _refuse(a, name, "on a codebook, which lists no samples; leave it out")
        _show_codebook(a, adq_wds.load_codebook(a.plan))
        return
    _refuse(a, "keep", "on a plan, which says its own; leave it out")
    plan = adq_wds.load_plan(_inside(a.plan, "plan.parquet"))
    if a.keys:
        _print_keys(a, plan)
    elif a.left_out:
        from adq_wds.report.left_out import left_out_samples, show_left_out

        _print(a, samples := list(left_out_samples(plan)), show_left_out(samples))
    else:
        _show_plan(a, plan)


def _refuse(a: argparse.Namespace, name: str, why: str) -> None:
    """Raise `ValueError` for a flag that was given and would do nothing."""
    if getattr(a, name) != make_parser().commands[a.command].get_default(name):
        raise ValueError(f"--{name.replace('_', '-')} has no effect {why}")


def _print_keys(a: argparse.Namespace, plan: adq_wds.Plan) -> None:
    """The kept samples, a line each as ``--must-include`` reads it, or as one JSON list.

    Raises:
        ValueError: a key is not printable on one line; escaped, it would be another key.
    """
    from adq_wds.tables.key_lists import kept_samples

    kept = [[key] if shard is None else [shard, key] for shard, key in kept_samples(plan)]
    lines = ["\t".join(names) for names in kept]
    for line, names in zip(lines, kept, strict=True):
        if not a.json and ("\n" in line or printable(line) != line):
            raise ValueError(f"key {names[-1]!r} cannot stand in a line of text; --json lists such keys")
    if lines or a.json:
        _print(a, [names if len(names) > 1 else names[0] for names in kept], "\n".join(lines))


def _show_plan(a: argparse.Namespace, plan: adq_wds.Plan) -> None:
    from adq_wds.report.text import describe_plan, show_plan

    _print(a, describe_plan(plan), show_plan(plan))


def _show_codebook(a: argparse.Namespace, codebook: adq_wds.Codebook) -> None:
    from adq_wds.report.text import describe_codebook, show_codebook

    _print(a, describe_codebook(codebook, a.keep), show_codebook(codebook, a.keep))


def _patches(a: argparse.Namespace) -> None:
    options = encoder_options(a)
    if a.checkpoint is None:  # then a pickle can only be the autoencoder's
        options.pop("allow_pickle", None)
    importance = adq_wds.importance(a.importance, patch=a.patch, **options)
    pickled = bool(a.allow_pickle) and a.mae != "builtin"
    mae = None if a.mae is None else adq_wds.load_mae(a.mae, allow_pickle=pickled)
    images = _call(a, PATCHES, a.shards, importance, a.out, mae=mae, size=a.size or None)
    shown = {"picture": a.out, "images": list(map(asdict, images))}
    _print(a, shown, "\n".join([a.out, *map(str, images)]))


def _write(a: argparse.Namespace) -> None:
    plan = None if a.plan is None else _inside(a.plan, "plan.parquet")
    _print(a, _call(a, WRITE, a.shards, plan, a.out, importance=importance_of(a)))


def _pack(a: argparse.Namespace) -> None:
    _print(a, _call(a, PACK, a.folder, a.out))


def _index(a: argparse.Namespace) -> None:
    _print(a, _call(a, INDEX, a.shards, a.out))


def _why(a: argparse.Namespace) -> None:
    plan = adq_wds.load_plan(_inside(a.plan, "plan.parquet"))
    features = None if a.features is None else _inside(a.features, "features", required=False)
    _print(a, plan.why(a.key, features=features))


def _export(a: argparse.Namespace) -> None:
    plan = adq_wds.load_plan(_inside(a.plan, "plan.parquet"))
    _call(a, EXPORT, plan, a.to, a.out)
    _print(
        a, {"path": a.out, "format": a.to, "kept": plan.n_kept}, f"{plan.n_kept:,} kept samples in {a.out}"
    )


def _verify(a: argparse.Namespace) -> None:
    report = _call(a, VERIFY, _inside(a.plan, "plan.parquet", required=False), a.shards)
    _print(a, report, report.text(lines=a.lines))
    if not report.equal:
        raise ShardError(f"the shards are not those of the {report.against} {a.plan}: see above")


def _select(a: argparse.Namespace) -> None:
    _show_plan(a, _call(a, SELECT, a.shards, a.by))


def _vary(a: argparse.Namespace) -> None:
    plan = None if a.plan is None else _inside(a.plan, "plan.parquet")
    engine = _call(a, SDEDIT, a.unet, device=a.device or "cpu")
    reports = _call(a, VARY, a.shards, engine, adq_wds.encoder(**encoder_arguments(a)), a.out, plan=plan)
    _print(a, list(map(asdict, reports)), "\n".join(map(str, reports)))


def _run(a: argparse.Namespace) -> None:
    if not a.shards:
        raise ValueError("no shards given: name SHARDS, or --from run.json")
    from adq_wds.jobs.run import needed, run_job
    from adq_wds.planning.options import plan_options as check_plan_options
    from adq_wds.report.text import show_plan

    plan_options = given(a, PLAN, without=("out", "progress", "engine", "address"))
    embed_options = given(
        a, EMBED, without=("scores", "progress", "engine", "address")
    )  # scores follow from the plan's
    if a.dry_run:
        from adq_wds.embedding.estimate import estimate

        check_plan_options(**plan_options)
        options = embed_options | needed(embed_options, plan_options)
        _print(a, estimate(a.shards, source_of(a), plan=plan_options, **options))
        return
    if a.report:
        from adq_wds.report.render import environment

        environment()  # raises for a missing package before any work
    result = run_job(
        a.shards,
        a.out,
        encoder=encoder_arguments(a),
        embed=embed_options,
        plan=plan_options,
        write=a.write,
        progress=a.progress,
        engine=a.engine,
        address=a.address,
    )
    plan, made = as_path(a.out) / "plan.parquet", ""
    if a.report:
        report = _call(a, REPORT, a.out, a.shards, Path(a.out) / "report.html", image=None)
        made, result["report"] = f"\nreport: {report}", _as_json(report)
    text = "nothing to do: the same run is here already\n" if result["nothing_to_do"] else ""
    _print(a, result, f"{text}{show_plan(adq_wds.load_plan(plan))}\n\nplan: {plan}{made}")


def _report(a: argparse.Namespace) -> None:
    _inside(a.plan, "plan.parquet")  # raises for a folder without one
    features = None if a.features is None else _inside(a.features, "features", required=False)
    _print(a, _call(a, REPORT, a.plan, a.shards or None, a.out, features=features))


def _demo(a: argparse.Namespace) -> None:
    from adq_wds.demo.run_demo import demo_text

    result = _call(a, DEMO, a.out)
    _print(a, result, demo_text(result, a.out))


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    run.__name__.removeprefix("_"): run
    for run in (
        _run, _embed, _plan, _codebook, _soften, _show, _why, _export, _patches, _write, _pack, _index, _verify,
        _select, _vary, _report, _demo,
    )
}  # fmt: skip
