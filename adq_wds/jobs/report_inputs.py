"""Finds what a report is made of beside its plan: shards, the field with the image."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from adq_wds.errors import AdqError, PlanError, shorten
from adq_wds.jobs.index import Urls
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, SpecError, check_spec
from adq_wds.shards.names import expand_urls, is_url
from adq_wds.tables.parquet import HEADER_KEY
from adq_wds.tables.plan import Plan


def table_beside(out: str | os.PathLike[str]) -> Path:
    """The file for the report's table: that of the page, with the ending ``.parquet``.

    Raises:
        ValueError: the page's name does not end in ``.html``.
        AdqError: another table has that name, such as the plan.
    """
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{shorten(os.fspath(out))} will hold a page; give it a name that ends in .html")
    path = Path(out).with_suffix(".parquet")
    if path.exists():
        try:
            about = (pq.read_schema(path).metadata or {}).get(HEADER_KEY, b"")
        except (OSError, pa.ArrowException):
            about = b""
        if b'"adq_wds.report"' not in about:
            raise AdqError(
                f"{path} is no report's table and would be replaced; give the page another name (-o)"
            )
    return path


def image_of(plan: Plan, image: FieldSpec | None) -> FieldSpec:
    """The field with the image: as given, or that of the plan's features."""
    if image is not None:
        check_spec(image, "image")
        return image
    spec = plan.header.get("features", {}).get("image")
    try:
        check_spec(spec, "image")
    except SpecError:  # a function, or no image at all
        return IMAGE_FIELDS
    return IMAGE_FIELDS if spec == "none" else str(spec)


def find_shards(
    plan: Plan, urls: Urls | None, run: Path | None, root: str | None, thumbnails: int, notes: list[str]
) -> dict[str, str]:
    """The path of each shard of the plan that is there; appends what is missing to the notes."""
    if not thumbnails:
        return {}
    paths = expand_urls(urls) if urls is not None else _local_shards(run)
    names, path_of = plan.names(root=root), {}
    for path in paths:
        try:
            path_of[names.find(path)] = path
        except PlanError:
            continue  # not of this plan
    if not path_of:
        notes.append("No shards of the plan were given, so there are no pictures: name SHARDS.")
    elif len(path_of) < len(plan.shards):
        lost = next(name for name in plan.shards if name not in path_of)
        n = len(plan.shards) - len(path_of)
        notes.append(
            f"{n:,} of {len(plan.shards):,} shards were not given, such as {shorten(lost)}: no pictures of these."
        )
    return path_of


def _local_shards(run: Path | None) -> list[str]:
    """The shards that a run's ``run.json`` names and that are local files; it may come from a stranger."""
    if run is None:
        return []
    try:
        shards = json.loads((run / "run.json").read_text(encoding="utf-8"))["shards"]
        paths = [str(shard["path"]) for shard in shards]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [path for path in paths if not is_url(path) and os.path.isfile(path)]
