"""Writes the report on a plan: one HTML file with its pictures, the job behind `adq report`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from adq_wds.checks import integer
from adq_wds.errors import PlanError, shorten
from adq_wds.files import write_text
from adq_wds.jobs.index import Urls
from adq_wds.jobs.read_pictures import Pictures
from adq_wds.report.bin_section import BinPart
from adq_wds.report.class_section import class_section
from adq_wds.report.cut_section import CutPart
from adq_wds.report.page import page
from adq_wds.report.render import environment
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.report.summary import summary_section
from adq_wds.report.typical_section import TypicalPart
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, SpecError, check_spec
from adq_wds.shards.names import expand_urls, is_url
from adq_wds.tables.features import Features, as_features
from adq_wds.tables.plan import Plan, as_plan

_MAX_PICTURE_BYTES = 6_000_000  # of all pictures in a report, as text
DEFAULT_OUT = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """What a report holds.

    Attributes:
        path: its file.
        bytes: of the file.
        samples: of the plan.
        kept: those that it keeps.
        reasons: samples by why they are kept or not.
        pictures: samples whose pictures are in the file.
        notes: what is not shown, and why.
    """

    path: str
    bytes: int
    samples: int
    kept: int
    reasons: dict[str, int]
    pictures: int
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([f"{self.path}: {self.bytes:,} bytes, {self.pictures:,} pictures", *self.notes])


def write_report(
    plan: Plan | str | os.PathLike[str],
    urls: Urls | None = None,
    out: str | os.PathLike[str] = DEFAULT_OUT,
    *,
    features: Features | str | os.PathLike[str] | None = None,
    thumbnails: int = 2000,
    image: FieldSpec | None = None,
    root: str | None = None,
) -> WrittenReport:
    """Write what a plan keeps and why, with pictures, to one HTML file that loads nothing from elsewhere.

    Args:
        plan: a plan, its file, or the folder of a run, whose features and local shards are used where none are given.
        urls: the shards, as `expand_urls` reads them, for pictures; a shard or sample that cannot be read is left out.
        out: the file.
        features: embeddings of the samples, for the map, neighbours and typical samples; by default those of the run.
        thumbnails: pictures in the file, at most; 0 reads no shard.
        image: field with the image; by default that of the plan's features.
        root: folder that the names are relative to, where a path fits several.

    Raises:
        ValueError: an argument is out of range.
        PlanError, FeaturesError: the plan or features are damaged.
        AdqError: jinja2 is missing, or the file cannot be written.
    """
    environment()  # raises for a missing package before any work
    thumbnails = integer("thumbnails", thumbnails, least=0)
    run = Path(plan) if not isinstance(plan, Plan) and Path(plan).is_dir() else None
    about = str(plan.path or "a plan in memory") if isinstance(plan, Plan) else os.fspath(plan)
    plan = as_plan(run / "plan.parquet" if run is not None else plan)
    samples = Samples.of_plan(plan)
    if features is None and run is not None and (run / "features").is_dir():
        features = Features(run / "features", shards=plan.shards)
    features = None if features is None else as_features(features)
    notes = [] if features is not None else ["Without features there is no map, and no neighbours are shown."]
    pictures = Pictures(plan, _paths(plan, urls, run, root, thumbnails, notes), _image_of(plan, image))
    parts: list[BinPart | CutPart | TypicalPart] = [BinPart.of(samples), CutPart.of(samples, features)]
    if features is not None:
        parts.append(TypicalPart.of(samples, features))
    wanted = list(dict.fromkeys(row for part in parts for row in part.rows))
    pictures.read(wanted[:thumbnails])
    if pictures.n_lost:
        notes.append(f"{pictures.n_lost:,} pictures could not be read: {pictures.first_loss}")
    first = summary_section(plan, samples, about=about, more=notes)
    sections: list[Section] = [first, class_section(samples), *(part.section(pictures.uri) for part in parts)]
    write_text(out, page("What is kept, and why", sections))
    counts = dict(plan.header.get("reasons", {}))
    return WrittenReport(
        os.fspath(out), os.path.getsize(out), plan.n_samples, plan.n_kept, counts, len(pictures.uri), notes
    )


def _image_of(plan: Plan, image: FieldSpec | None) -> FieldSpec:
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


def _paths(
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
