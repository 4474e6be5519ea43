"""Are these the shards that were planned? Every check that training would make, without training."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from adq_wds.checks import Count, positive
from adq_wds.engines.threads import cores
from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.jobs.index import Urls
from adq_wds.jobs.verify_listed import Expected, Listed, open_listed
from adq_wds.jobs.verify_shard import Contents, Difference, ShardCheck, check_shard, gone
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, check_spec
from adq_wds.shards.names import ShardNames, base_name, expand_urls, shown_url
from adq_wds.shards.samples_in_tar import iter_spans, payload_crc32
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from adq_wds.tables.spans import is_empty, warn_empty

SHOWN = 20
EXTRA = "extra shard"


@dataclass(frozen=True)
class Report:
    """What was found. Every listed sample is one of three: read = ok + differs + missing.

    Attributes:
        against: what the shards were held against: "plan", "index" or "features".
        shards: shards it lists.
        read: samples it lists, each looked for.
        ok: as listed: key, position, place, size, checksum; and contents, where they were asked for.
        differs: there, but not as listed.
        missing: not there.
        extra: samples of its shards that it does not list.
        kept: those of `read` that training reads: kept by the plan, or usable.
        kept_ok: those of `kept` that are ok.
        n_contents: samples that were decoded, or whose labels were compared.
        differences: everything that differs, in the order of the table's shards; other shards at the end.
    """

    against: str
    shards: int
    read: int
    ok: int
    differs: int
    missing: int
    extra: int
    kept: int
    kept_ok: int
    n_contents: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Is nothing different?"""
        return not self.differences


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
    compared = None if label == "none" else label
    contents = Contents(image if decode else None, compared, n_workers)
    look_inside = contents if decode or compared is not None else None
    path_of, others = _matched(paths, listed, root)
    unknown = [path for path, difference in others if difference.kind == EXTRA]
    renamed = _renamed(unknown, listed, [name for name in listed.names if name not in path_of])
    checks = []
    n_used = 0
    quiet = None if progress is None else not progress
    with tqdm(total=listed.n_samples, unit=" samples", desc="verify", disable=quiet) as bar:
        for expected in listed:
            n_used += int(expected.used.sum())
            checks.append(_check(expected, path_of, renamed, look_inside))
            bar.update(len(expected.spans))
    left = [difference for path, difference in others if path not in renamed.values()]
    return _summed(listed, n_used, checks, left)


def report_text(report: Report, *, lines: int = SHOWN) -> str:
    """A report for people: its counts, and the first `lines` differences, one line each."""
    lines = max(0, lines)
    text = [
        f"{report.read:,} samples of {report.shards:,} shards in the {report.against}: {report.ok:,} ok, "
        f"{report.differs:,} differ, {report.missing:,} missing; {report.extra:,} more are not listed"
    ]
    if report.against != "index":
        used = {"plan": "kept", "features": "usable"}[report.against]
        text.append(f"{report.kept:,} {used}: {report.kept_ok:,} ok")
    if report.n_contents:
        text.append(f"{report.n_contents:,} opened")
    text.extend(map(str, report.differences[:lines]))
    rest = Counter(difference.kind for difference in report.differences[lines:])
    if rest:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in rest.most_common())
        text.append(f"… and {rest.total():,} more differences: {kinds} (--json lists them all)")
    return "\n".join(text)


# ---- Which file is which shard


def _matched(
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
                kind, text = EXTRA, f"not in the {listed.kind}; {again}"
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
    by_first: dict[tuple[str, int, int], list[str]] = {}
    for name in missing if paths else []:
        for _, key, _, n_bytes, crc32 in listed.shard(name).spans.rows()[:1]:
            by_first.setdefault((key, n_bytes, crc32), []).append(name)
    found: dict[str, str] = {}
    for path in paths if by_first else []:
        for name in by_first.get(_first_sample(path), []):
            if name not in found and not check_shard(path, listed.shard(name)).differences:
                found[name] = path
                break
    return found


def _first_sample(path: str) -> tuple[str, int, int]:
    try:
        with open_shard(path) as buffer:
            for span in iter_spans(buffer, shard=base_name(path)):
                return span.key, span.n_bytes, payload_crc32(buffer, span)
    except ShardError:
        pass  # it is nobody's shard, and listed as that
    return "", 0, 0


def _check(
    expected: Expected, path_of: dict[str, str], renamed: dict[str, str], contents: Contents | None
) -> ShardCheck:
    name = expected.name
    if name in path_of:
        return check_shard(path_of[name], expected, contents)
    if name in renamed:
        text = f"{shorten(base_name(renamed[name]))} holds its samples; give it its name again, or start anew with it"
        return gone(expected, "renamed shard", text)
    text = f"its {len(expected.spans):,} samples are listed, and it is not among the shards given"
    return gone(expected, "missing shard", text)


def _printable(name: str) -> str:
    return name if name.isprintable() else shorten(name)


def _summed(listed: Listed, n_used: int, checks: list[ShardCheck], others: list[Difference]) -> Report:
    differences = [difference for check in checks for difference in check.differences]
    return Report(
        against=listed.kind,
        shards=len(listed.names),
        read=listed.n_samples,
        ok=sum(check.ok for check in checks),
        differs=sum(check.differs for check in checks),
        missing=sum(check.missing for check in checks),
        extra=sum(check.extra for check in checks),
        kept=n_used,
        kept_ok=sum(check.used_ok for check in checks),
        n_contents=sum(check.n_contents for check in checks),
        differences=(*differences, *others),
    )
