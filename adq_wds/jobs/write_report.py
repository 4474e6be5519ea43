"""Writes the report on a plan: one HTML file with its pictures, the job behind `adq report`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from adq_wds.checks import integer
from adq_wds.core.rng import generator
from adq_wds.errors import PlanError
from adq_wds.files import make_folder, write_text
from adq_wds.jobs.index import Urls
from adq_wds.jobs.read_pictures import Pictures
from adq_wds.jobs.report_inputs import find_shards, image_of, table_beside
from adq_wds.report.bin_section import BinPart
from adq_wds.report.class_section import class_section
from adq_wds.report.cut_section import CutPart
from adq_wds.report.figures import draw_figures
from adq_wds.report.map_section import map_section
from adq_wds.report.neighbours import nearest_kept
from adq_wds.report.page import page
from adq_wds.report.patch_section import patch_section
from adq_wds.report.projection import Projection, project
from adq_wds.report.render import environment
from adq_wds.report.report_table import report_table, save_report_table
from adq_wds.report.samples import Samples
from adq_wds.report.section import Section
from adq_wds.report.summary import summary_section
from adq_wds.report.text import damage_named
from adq_wds.report.typical_section import TypicalPart
from adq_wds.samples.fields import FieldSpec
from adq_wds.tables.features import Features, as_features
from adq_wds.tables.plan import Plan, as_plan
from adq_wds.tables.plan_rows import BAD, REASONS

_MAX_PICTURE_BYTES = 6_000_000  # of all pictures in a report, as text
DEFAULT_OUT = "report.html"


@dataclass(frozen=True)
class WrittenReport:
    """What a report holds.

    Attributes:
        path: its file.
        table: the file beside it with a row for each sample.
        bytes: of the file.
        samples: of the plan.
        kept: those that it keeps.
        reasons: samples by why they are kept or not.
        pictures: samples whose pictures are in the file.
        notes: what is not shown, and why.
    """

    path: str
    table: str
    bytes: int
    samples: int
    kept: int
    reasons: dict[str, int]
    pictures: int
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.path}: {self.bytes:,} bytes, {self.pictures:,} pictures; {self.table}", *self.notes]
        )


def write_report(
    plan: Plan | str | os.PathLike[str],
    urls: Urls | None = None,
    out: str | os.PathLike[str] = DEFAULT_OUT,
    *,
    features: Features | str | os.PathLike[str] | None = None,
    thumbnails: int = 2000,
    projection: Projection = "pca",
    patches: str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
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
        projection: how the map is made of the features: pca, or umap, which needs umap-learn and takes minutes.
        patches: a picture that ``adq patches`` drew, to be shown; by default ``patches.png`` in the folder of the run.
        figures: folder for figures of reasons, classes and bins, as SVG and PNG, light and dark.
        image: field with the image; by default that of the plan's features.
        root: folder that the names are relative to, where a path fits several.

    Raises:
        ValueError: an argument is out of range, or `out` is not called a page.
        SampleError: `patches` holds no picture.
        PlanError, FeaturesError: the plan or features are damaged.
        AdqError: jinja2 or matplotlib is missing, or a file cannot be written, or would replace another table.
    """
    environment()  # raises for a missing package before any work
    rows = table_beside(out)
    thumbnails = integer("thumbnails", thumbnails, least=0)
    run = Path(plan) if not isinstance(plan, Plan) and Path(plan).is_dir() else None
    about = str(plan.path or "a plan in memory") if isinstance(plan, Plan) else os.fspath(plan)
    plan = as_plan(run / "plan.parquet" if run is not None else plan)
    with damage_named(PlanError, "plan", plan.path):
        samples = Samples.of_plan(plan)
    make_folder(rows.parent)
    if figures is not None:
        draw_figures(samples, figures)
    if features is None and run is not None and (run / "features").is_dir():
        features = Features(run / "features", shards=plan.shards)
    features = None if features is None else as_features(features)
    notes = [] if features is not None else ["Without features there is no map, and no neighbours are shown."]
    table = report_table(plan, features, None if features is None else project(features, projection))
    pictures = Pictures(plan, find_shards(plan, urls, run, root, thumbnails, notes), image_of(plan, image))
    parts: list[BinPart | CutPart | TypicalPart] = [BinPart.of(samples), CutPart.of(samples, features)]
    if features is not None:
        parts.append(TypicalPart.of(samples, features))
    wanted = list(dict.fromkeys(row for part in parts for row in part.rows))
    pictures.read(wanted[:thumbnails])
    drawn = _map(samples, features, table, pictures, thumbnails)
    if pictures.lost:
        notes.append(
            f"{len(pictures.lost):,} pictures could not be read: {next(iter(pictures.lost.values()))}"
        )
    with damage_named(PlanError, "plan", plan.path):
        first = summary_section(plan, samples, about=about, more=notes)
    bins, *others = (part.section(pictures.uri) for part in parts)
    if patches is None and run is not None and (run / "patches.png").is_file():
        patches = run / "patches.png"
    if patches is not None:
        others.append(patch_section(patches))
    write_text(out, page("What is kept, and why", [first, class_section(samples), bins, *drawn, *others]))
    save_report_table(table, rows)
    return WrittenReport(
        os.fspath(out),
        str(rows),
        os.path.getsize(out),
        plan.n_samples,
        plan.n_kept,
        dict(zip(REASONS, samples.counts, strict=True)),
        len(pictures.uri),
        notes,
    )


def _map(
    samples: Samples, features: Features | None, table: pa.Table, pictures: Pictures, thumbnails: int
) -> list[Section]:
    """The map, with the pictures of some samples and of the nearest kept one of each; none without features."""
    if features is None:
        return []
    n = thumbnails - len(pictures.uri)
    if pictures.uri:  # they are in the page twice: in their sections and in the map
        mean = pictures.n_bytes / len(pictures.uri)
        n = min(n, int((_MAX_PICTURE_BYTES - 2 * pictures.n_bytes) / mean))
    order = generator(0, 0, "", "", purpose="report pictures").permutation(len(samples))
    order = order[samples.reason[order] != BAD]
    rows = order[: max(0, n) // 2].tolist() if pictures.path_of else []
    nearest = nearest_kept(samples, features, [*rows, *pictures.uri])
    pictures.read([*rows, *(nearest[row] for row in rows if row in nearest)])
    xy = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    return [map_section(table, xy, pictures.uri, nearest)]
