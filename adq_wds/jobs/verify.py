"""Compares shards with a plan, an index or features, by every check that training makes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from adq_wds.checks import Count, no_bar, positive
from adq_wds.engines.choose import EngineName, choose_engine, default_workers
from adq_wds.engines.engine import Engine, Resources, Result, Task
from adq_wds.engines.shared import lock_for
from adq_wds.engines.threads import cores
from adq_wds.errors import PlanError, ShardError, shorten
from adq_wds.jobs.index import Urls
from adq_wds.jobs.verify_kept import KeptCheck
from adq_wds.jobs.verify_listed import Expected, Listed, open_listed
from adq_wds.jobs.verify_shard import Check, Difference, check_shard, lost_shard
from adq_wds.remote.outputs import make_folder
from adq_wds.remote.url_path import AnyPath
from adq_wds.samples.fields import IMAGE_FIELDS, FieldSpec, check_spec
from adq_wds.shards.names import ShardNames, base_name, expand_urls, shown_url
from adq_wds.tables.features import Features
from adq_wds.tables.plan import Plan
from adq_wds.tables.spans import is_empty, warn_empty

SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Report(Check):
    """The sum of `Check` over all listed shards; unlisted shards are at the end of `differences`.

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
    out: str | os.PathLike[str] | None = None,
    workers: Count | None = None,
    progress: bool | None = None,
    engine: EngineName | Engine = "threads",
    address: str | None = None,
) -> Report:
    """Compare shards with a plan, an index or features, to the end, and report all differences.

    Shards are matched by name, wherever their folder is now. Headers, keys, order, offsets, sizes and payload
    checksums are compared; samples behind a damaged header are read by offset.

    Args:
        plan: a plan, an index file or a folder of features, opened or by path.
        urls: the shards, as `expand_urls` reads them.
        root: folder that the names are relative to, where a path fits several.
        decode: also decode the image of every sample that training reads, and check the record of
            patch-dropped ones.
        image: field with the image.
        label: also compare the labels in this field with those listed. None compares none.
        out: folder, or its URL, that keeps the check of each shard: started again the job goes on, and does not read what
            is checked in it and has kept size and date. A new look at all bytes takes a new folder.
        workers: threads that decode; as many as cores by default, one for each process of the engines processes and
            ray.
        progress: show a bar; only on a terminal by default.
        engine: what reads the shards: this process (threads), processes of this machine, ray, or shared, which are equal
            commands with one `out`.
        address: of the Ray cluster, ``host:port``; by default the one that Ray finds, or this machine alone.

    Raises:
        ValueError: no shards, a URL, or a label to compare where none are listed.
        PlanError, ShardError, FeaturesError: the plan, index or features themselves are missing or damaged.
        AdqError: `out` cannot be written, or another job works in it.
    """
    check_spec(image, "image")
    check_spec(label, "label")
    runner = choose_engine(engine, address=address, folder=out)
    workers = default_workers(engine, workers)
    n_workers = positive("workers", cores() if workers is None else workers)
    paths = expand_urls(urls)
    listed = open_listed(plan)
    if label is not None and label != "none" and not listed.labelled:
        raise ValueError(f"label={shorten(label)}: the {listed.kind} lists no labels to compare with")
    options: dict[str, Any] = {"workers": n_workers}
    options |= {"image": image if decode else None, "label": None if label == "none" else label}
    path_of, others = _match(paths, listed, root)
    folder = None if out is None else make_folder(out)
    work = _Compare(plan, listed, options, folder)
    settings = {**work.contents, "shards": sorted(path_of), "samples": listed.n_samples}
    checks = {}
    tasks = [Task(name, path_of[name]) for name in listed.names if name in path_of]
    bar = tqdm(total=listed.n_samples, unit=" samples", desc="verify", disable=no_bar(progress))
    with nullcontext() if folder is None else lock_for(runner, folder, "verify", settings), bar:
        for name in listed.names:
            if name not in path_of:
                expected = listed.shard(name)
                n = len(expected.spans)
                text = f"its {n:,} samples are listed, and it is not among the shards given"
                checks[name] = lost_shard(expected, "missing shard", text)
                bar.update(n)
        for task, result in runner.run(tasks, work, Resources(n_workers)):
            checks[task.name] = result["check"]
            bar.update(result["check"].read)
    return Report(
        against=listed.kind,
        shards=len(listed.names),
        read=listed.n_samples,
        kept=sum(check.kept for check in checks.values()),
        kept_ok=sum(check.kept_ok for check in checks.values()),
        n_contents=sum(check.n_contents for check in checks.values()),
        differences=(*(each for name in listed.names for each in checks[name].differences), *others),
    )


@dataclass
class _Compare:
    """Tasks of a listed shard's path, to its check. Another process opens the list again, where it has a path."""

    plan: Plan | Features | str | os.PathLike[str]
    listed: Listed | None
    options: dict[str, Any]
    folder: AnyPath | None

    @property
    def contents(self) -> dict[str, str | None]:
        """The fields whose contents are compared; functions by their name."""
        fields = {name: self.options[name] for name in ("image", "label")}
        return {
            name: getattr(spec, "__qualname__", repr(type(spec))) if callable(spec) else spec
            for name, spec in fields.items()
        }

    def __call__(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        if self.listed is None:
            self.listed = open_listed(self.plan)
        for task in tasks:
            yield task, {"check": self._check(task.what, self.listed.shard(task.name))}

    def _check(self, path: str, expected: Expected) -> Check:
        try:
            kept = None if self.folder is None else KeptCheck(self.folder, path, expected, self.contents)
        except ShardError:
            kept = None  # which `check_shard` says too
        check = None if kept is None else kept.load()
        if check is None:
            check = check_shard(path, expected, **self.options)
            if kept is not None:
                kept.save(check)
        return check

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"listed": None}


def _match(paths: list[str], listed: Listed, root: str | None) -> tuple[dict[str, str], list[Difference]]:
    """The path of each listed shard that is there, and a difference for every other path."""
    names = ShardNames(listed.names, root=root)
    known = {base_name(name) for name in listed.names}
    path_of: dict[str, str] = {}
    others = []
    for path in paths:
        shard = base_name(path)
        try:
            name = names.find(path)
        except PlanError as error:
            kind, text = "unmatched shard", str(error)  # in several folders, or not below `root`
            if shard not in known:
                if is_empty(path):
                    warn_empty(shard)
                    continue
                again = f"leave it out, or make the {listed.kind} again with it"
                kind, text = "extra shard", f"not in the {listed.kind}; {again}"
        else:
            if path_of.setdefault(name, path) == path:
                continue
            both = f"{shown_url(path)} and {shown_url(path_of[name])}"
            kind, text = "second file", f"{both} both match {name!r}; leave one out"
        others.append(Difference(shard if shard.isprintable() else shorten(shard), None, kind, text, 0))
    return path_of, others
