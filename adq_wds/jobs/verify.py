"""Compares shards with a plan, an index or features: every check that training would make, without training."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from adq_wds.checks import Count, positive
from adq_wds.engines.threads import cores
from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.jobs.index import Urls
from adq_wds.jobs.verify_listed import Expected, Listed, open_listed
from adq_wds.jobs.verify_shard import Check, Difference, check_shard, lost_shard
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, check_spec
from adq_wds.shards.names import ShardNames, base_name, expand_urls, shown_url
from adq_wds.shards.samples_in_tar import iter_spans, payload_crc32
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from adq_wds.tables.spans import is_empty, warn_empty

SHOWN = 20
EXTRA_SHARD = "extra shard"


@dataclass(frozen=True, kw_only=True)
class Report(Check):
    """The same of all shards that a table lists; other shards stand at the end of `differences`.

    Attributes:
        against: what the shards were compared with: "plan", "index" or "features".
        shards: shards it lists.
    """

    against: str
    shards: int

    def text(self, *, lines: int = SHOWN) -> str:
        """The counts, and the first `lines` differences, one line each."""
        lines = max(0, lines)
        text = [
            f"{self.read:,} samples of {self.shards:,} shards in the {self.against}: {self.ok:,} ok, "
            f"{self.differs:,} differ, {self.missing:,} missing; {self.extra:,} more are not listed"
        ]
        if self.against != "index":
            used = {"plan": "kept", "features": "usable"}[self.against]
            text.append(f"{self.kept:,} {used}: {self.kept_ok:,} ok")
        if self.n_contents:
            text.append(f"{self.n_contents:,} opened")
        text.extend(map(str, self.differences[:lines]))
        rest = Counter(difference.kind for difference in self.differences[lines:])
        if rest:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in rest.most_common())
            text.append(f"… and {rest.total():,} more differences: {kinds} (--json lists them all)")
        return "\n".join(text)


def verify_shards(
    plan: Plan | Features | str | os.PathLike[str],
    urls: Urls,
    *,
    root: str | None = None,
    decode: bool = False,
    image: FieldSpec = IMAGE_FIELDS,
    label: FieldSpec | None = None,
    workers: Count | None = None,
    progress: bool | None = None,
) -> Report:
    """Hold shards against a plan, an index or features, to the end, and tell all that differs.

    Shards are matched by name, wherever their folder is now. Of each, headers, keys, order, places, sizes and the
    checksums of all payloads are compared; what stands behind a damaged header is found by its offset.

    Args:
        plan: a plan, an index file or a folder of features, opened or by path.
        urls: the shards, as `expand_urls` reads them.
        root: folder that the names are relative to, where a path fits several.
        decode: also decode the image of every sample that training reads; of one stored without some of its patches,
            places and geometry too.
        image: field with the image.
        label: also compare the labels in this field with those listed. None compares none.
        workers: threads that decode; as many as cores by default.
        progress: show a bar; only on a terminal by default.

    Raises:
        ValueError: no shards, a URL, or a label to compare where none are listed.
        PlanError, ShardError, FeaturesError: the plan, index or features themselves are missing or damaged.
    """
    check_spec(image, "image")
    check_spec(label, "label")
    n_workers = positive("workers", cores() if workers is None else workers)
    paths = expand_urls(urls)
    listed = open_listed(plan)
    if label is not None and label != "none" and not listed.labelled:
        raise ValueError(f"label={shorten(label)}: the {listed.kind} lists no labels to compare with")
    options: dict[str, Any] = {"workers": n_workers}
    options |= {"image": image if decode else None, "label": None if label == "none" else label}
    path_of, others = _match(paths, listed, root)
    unknown = [path for path, difference in others if difference.kind == EXTRA_SHARD]
    renamed = _renamed(unknown, listed, [name for name in listed.names if name not in path_of])
    checks = []
    quiet = None if progress is None else not progress
    with tqdm(total=listed.n_samples, unit=" samples", desc="verify", disable=quiet) as bar:
        for expected in listed:
            if expected.name in path_of:
                checks.append(check_shard(path_of[expected.name], expected, **options))
            else:
                checks.append(_missing_shard(expected, renamed.get(expected.name)))
            bar.update(len(expected.spans))
    more = [difference for path, difference in others if path not in renamed.values()]
    return Report(
        against=listed.kind,
        shards=len(listed.names),
        read=listed.n_samples,
        kept=sum(check.kept for check in checks),
        kept_ok=sum(check.kept_ok for check in checks),
        n_contents=sum(check.n_contents for check in checks),
        differences=(*(each for check in checks for each in check.differences), *more),
    )


# ---- Which file is which shard


def _match(
    paths: list[str], listed: Listed, root: str | None
) -> tuple[dict[str, str], list[tuple[str, Difference]]]:
    """The path of each listed shard that is there, and a difference for every other path."""
    names = ShardNames(listed.names, root=root)
    known = {base_name(name) for name in listed.names}
    found: dict[str, str] = {}
    others = []
    for path in paths:
        try:
            name = names.find(path)
        except PlanError as error:
            if base_name(path) in known:  # in several folders, or not below `root`
                kind, text = "unmatched shard", str(error)
            else:
                if is_empty(path):
                    warn_empty(base_name(path))
                    continue
                again = f"leave it out, or make the {listed.kind} again with it"
                kind, text = EXTRA_SHARD, f"not in the {listed.kind}; {again}"
        else:
            if name not in found:
                found[name] = path
                continue
            both = f"{shown_url(path)} and {shown_url(found[name])}"
            kind, text = "second file", f"{both} both match {name!r}; leave one out"
        others.append((path, Difference(_printable(base_name(path)), None, kind, text, 0)))
    return found, others


def _renamed(paths: list[str], listed: Listed, missing: list[str]) -> dict[str, str]:
    """The path, among those of no listed shard, that holds exactly the samples of a missing shard; by name."""
    firsts = {name: listed.shard(name).spans.rows()[:1] for name in missing if paths}
    found: dict[str, str] = {}
    for path in paths if firsts else []:
        first = _first_row(path)
        for name in missing:
            if (
                first
                and firsts[name] == first
                and name not in found
                and check_shard(path, listed.shard(name)).equal
            ):
                found[name] = path
                break
    return found


def _first_row(path: str) -> list[tuple[int, str, int, int, int]]:
    """The first of a shard's `Spans.rows`, in a list; none where it cannot be read."""
    try:
        with open_shard(path) as buffer:
            spans = islice(iter_spans(buffer, shard=base_name(path)), 1)
            return [(0, s.key, s.byte_offset, s.n_bytes, payload_crc32(buffer, s)) for s in spans]
    except ShardError:
        return []


def _missing_shard(expected: Expected, path: str | None) -> Check:
    if path is not None:
        text = f"{shorten(base_name(path))} holds its samples; give it its name again, or start anew with it"
        return lost_shard(expected, "renamed shard", text)
    text = f"its {len(expected.spans):,} samples are listed, and it is not among the shards given"
    return lost_shard(expected, "missing shard", text)


def _printable(name: str) -> str:
    return name if name.isprintable() else shorten(name)
