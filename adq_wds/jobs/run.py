"""Runs embed, bin, plan and write in one command; repeats only the steps whose input changed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from adq_wds.embedding.embed_shards import embed_shards
from adq_wds.embedding.settings import names_of_features
from adq_wds.embedding.stored import open_embeddings
from adq_wds.embedding.views import N_VIEWS
from adq_wds.engines.choose import EngineName, choose_engine
from adq_wds.engines.engine import Engine
from adq_wds.engines.shared import Shared, lock_for
from adq_wds.errors import AdqError
from adq_wds.files import canonical_json
from adq_wds.planning.build_plan import make_plan
from adq_wds.planning.class_tasks import Workplace
from adq_wds.planning.options import Options, plan_options
from adq_wds.planning.table import PlanTable
from adq_wds.registry import BUILT_IN_SCORES, GONE
from adq_wds.registry import encoder as named_encoder
from adq_wds.registry import score as named_score
from adq_wds.remote.outputs import local_folder, make_folder, write_text
from adq_wds.remote.url_path import AnyPath, as_path
from adq_wds.shards.names import expand_urls, is_url, without_secrets
from adq_wds.signatures import EMBED, ENCODER, PLAN, options_of
from adq_wds.tables.column import Column
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan, load_plan
from adq_wds.tables.spans import source_stamp
from adq_wds.writing.tars import ShardPattern
from adq_wds.writing.unfinished import is_written

VERSION = 1
# The keys that a run.json may set; the file may come from a stranger.
_KNOWN = {
    "encoder": {"spec", *options_of(ENCODER)},
    "embed": options_of(EMBED).keys() - {"progress", "engine", "address"},
    "plan": options_of(PLAN).keys() - {"out", "progress", "engine", "address"},
}
logger = logging.getLogger("adq_wds")


def run_job(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    encoder: dict[str, Any],
    embed: dict[str, Any],
    plan: dict[str, Any],
    write: bool = False,
    progress: bool | None = None,
    engine: EngineName | Engine = "threads",
    address: str | None = None,
) -> dict[str, Any]:
    """Make ``OUT/features/``, ``OUT/bins.parquet``, ``OUT/plan.parquet``, with `write` ``OUT/shards/``, and ``OUT/run.json``.

    A second run with equal arguments on the same shards does nothing. With other arguments it reuses features
    while shards and encoder are the same, and bins while features and number of bins are.

    Args:
        urls: tar shards: paths, URLs, patterns.
        out: the run's folder, or its URL.
        encoder: arguments of `adq_wds.encoder`, its name under "spec".
        embed: further arguments of `embed_shards`.
        plan: arguments of `build_plan` except `out`.
        write: also write the kept samples to new shards.
        progress: show bars; only on a terminal by default.
        engine: as in `embed_shards`.
        address: as in `embed_shards`.

    Returns:
        the content of ``run.json``, and `nothing_to_do`.

    Raises:
        ValueError: an argument is out of range, a name unknown, or a source lies where shards are to be written.
        AdqError: damaged data, another job in the folder, shards in ``OUT/shards/`` from elsewhere, or, with the engine
            shared, of an earlier plan.
    """
    paths = expand_urls(urls)
    if plan.get("scores"):
        plan = {**plan, "scores": [str(s) if isinstance(s, Column) else s for s in plan["scores"]]}
    asked_embed, embed = embed, {**embed, **needed(embed, plan)}
    runner = choose_engine(engine, address=address, folder=out)
    if write:
        from adq_wds.writing.write_shards import check_engine  # which imports torch

        if isinstance(runner, Shared):
            raise ValueError(
                "write=True with engine='shared': processes would remove each other's shards; write them by `adq write` after the run"
            )
        check_engine(runner, as_path(out), overwrite=True)
    options = plan_options(
        **{**plan, "progress": progress, "engine": runner}
    )  # before hours of embedding, not after
    stored = embed.get("embeddings")
    source = named_encoder(**encoder) if stored is None else named_encoder("thumbnail")  # then it is not used
    used = source if stored is None else open_embeddings(stored)
    arguments = {
        "format": "adq_wds.run",
        "version": VERSION,
        "arguments": {"encoder": encoder, "embed": asked_embed, "plan": plan, "write": write},
        "source": [used.name, used.revision],  # a file may change under the same path
        "scores": {
            score.name: score.revision
            for score in (*map(named_score, embed.get("scores", ())), *options.user_scores)
        },
        "shards": [
            # others may read the file: no password or token
            {
                "path": without_secrets(path) if is_url(path) else os.path.abspath(path),
                "name": name,
                **source_stamp(path),
            }
            for path, name in zip(paths, names_of_features(paths), strict=True)
        ],
    }
    folder = make_folder(out)
    with lock_for(runner, folder, "run", arguments):
        done = _done(folder, arguments)
        if done is not None:
            return {**done, "nothing_to_do": True}
        shards = ShardPattern(os.fspath(folder / "shards" / "%06d.tar"))
        if write:
            _refuse_foreign_shards(folder, shards, paths)
        features = embed_shards(
            paths, source, folder / "features", progress=progress, engine=engine, address=address, **embed
        )
        made = _plan(folder, features, options, runner)
        result = {
            **arguments,
            "features": features.hash,
            "plan": made.hash,
            "samples": made.n_samples,
            "kept": made.n_kept,
            "bad": made.header["bad"],
            "bytes": made.header["bytes"],
        }
        if write:
            from adq_wds.writing.write_shards import write_kept

            alone = not isinstance(runner, Shared)  # one of several must not remove what another has written
            written = write_kept(
                paths, made, shards.pattern, overwrite=alone, engine=runner, progress=progress
            )
            result["written"] = asdict(written)
            if not (alone or is_written(shards.folder, result["written"])):
                raise AdqError(f"{shards.folder} lacks bytes of what was written: remove it, and run again")
        elif shards.existing():
            logger.warning("%s was written for an earlier plan; add --write to write it again", shards.folder)
        write_text(folder / "run.json", canonical_json(result) + "\n")
    return {**result, "nothing_to_do": False}


def needed(embed: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The options of `embed_shards` that this plan needs beyond the given ones."""
    more: dict[str, Any] = {}
    users = [
        score
        for score in plan.get("scores") or ()
        if score not in BUILT_IN_SCORES and not isinstance(named_score(score), Column)
    ]
    if users:
        more["scores"] = sorted({*embed.get("scores", ()), *users})
    if plan.get("kernel") == "gradient":
        more["logit_grad"] = True
    if plan.get("diversity_head", "none") != "none" and not embed.get("views"):
        more["views"] = N_VIEWS
    return more


def _refuse_foreign_shards(folder: AnyPath, shards: ShardPattern, paths: list[str]) -> None:
    """Raise unless the shards that are there were written by an earlier run."""
    from adq_wds.writing.write_shards import refuse_sources

    refuse_sources(paths, shards)
    if shards.existing() and not (folder / "features").exists():
        name = shards.existing()[0].name
        raise AdqError(f"{shards.folder} holds {name}, and no run was made in {folder}: give another folder")


def _plan(folder: AnyPath, features: Features, options: Options, engine: Engine) -> Plan:
    place = Workplace(engine, local_folder(folder))

    def save(table: PlanTable) -> None:
        (folder / "run.json").unlink(missing_ok=True)  # from here on it would describe another plan
        table.save(folder / "plan.parquet")

    place.finish(lambda: make_plan(features, options, place=place, bins_file=folder / "bins.parquet"), save)
    return load_plan(folder / "plan.parquet")


def _done(folder: AnyPath, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier equal run, if its plan and shards still exist."""
    try:
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(old, dict) or any(
        old.get(name) != json.loads(canonical_json(value)) for name, value in arguments.items()
    ):
        return None
    try:
        plan = load_plan(folder / "plan.parquet")
        for _ in plan:  # every row is compared with the header
            pass
        whole = plan.hash == old["plan"] and (
            "written" not in old or is_written(folder / "shards", old["written"])
        )
    except (AdqError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        logger.warning("the earlier run in %s cannot be used (%s); running again", folder, error)
        return None
    return old if whole else None


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments in a ``run.json``, to run them again.

    Raises:
        ValueError: not a run.json, or of a newer version.
    """
    try:
        old = json.loads(as_path(path).read_text(encoding="utf-8"))
        if old["format"] != "adq_wds.run" or old["version"] > VERSION:
            raise ValueError(f"format {old['format']!r}, version {old['version']!r}")
        arguments = old["arguments"]
        if arguments["embed"].pop("double_softmax", False):  # an argument of earlier versions
            raise ValueError(f"double_softmax: {GONE['--double-softmax']}")
        for part, known in _KNOWN.items():
            if unknown := sorted(set(arguments[part]) - known):
                raise ValueError(f"unknown arguments {unknown} under {part!r}")
        for name in ("must_include", "exclude"):
            if not isinstance(arguments["plan"].get(name, []), list):
                raise ValueError(f"{name} is not a list")
        urls = [str(shard["path"]) for shard in old["shards"]]
        return {"urls": urls, "write": bool(arguments["write"]), **{part: arguments[part] for part in _KNOWN}}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a run.json that this adq_wds can read ({error})") from error
