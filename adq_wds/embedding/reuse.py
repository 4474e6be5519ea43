"""Decides which columns of a shard's earlier features can be reused: all, some, or none."""

from __future__ import annotations

import logging
from typing import Any

from adq_wds.embedding.shard import ShardJob
from adq_wds.errors import FeaturesError
from adq_wds.remote.url_path import AnyPath
from adq_wds.tables.features_file import FeaturesFile
from adq_wds.tables.spans import scan_spans, source_stamp

logger = logging.getLogger("adq_wds")


def earlier_features(
    path: str, file: AnyPath, header: dict[str, Any], limit: int | None
) -> FeaturesFile | None:
    """The features of a shard, or of its first `limit` samples, made by the same encoder from the same bytes; or None.

    They may lack requested columns (see `lacking`), or have labels by another field (`is_stale`). Features of other
    settings raise `FeaturesError`.
    """
    if not file.exists():
        return None
    try:
        old = FeaturesFile(file)
        old.read_columns(old.header["columns"])  # every column is compared with its hash
    except FeaturesError as error:
        logger.warning("%s; embedding the shard again", error)
        return None
    kind = {} if old.n_classes is None else {"logit_grad": header.get("logit_grad", old.header["logit_grad"])}
    not_here = ("scores", "logit_grad", "label")
    wanted = {name: value for name, value in header.items() if name not in not_here} | kind
    differs = [name for name, value in wanted.items() if old.header.get(name) != value]
    if differs:
        raise FeaturesError(
            f"{file} was made with {differs[0]} {old.header.get(differs[0])!r}, now {wanted[differs[0]]!r}: "
            "give another folder, or remove the old features"
        )
    is_enough = old.header["complete"] or (limit is not None and old.n_read >= limit)
    stamp = source_stamp(path)
    if not is_enough or old.header["source"]["bytes"] != stamp["bytes"]:
        return None
    if old.header["source"] != stamp:  # do the checksums match what was embedded?
        rows, now = old.all_spans()[0].rows(), scan_spans(path, shard=old.shard).rows()
        if (now if old.header["complete"] else now[: len(rows)]) != rows:
            return None
    if columns := lacking(old, header):
        logger.info("%s has no %s; embedding the shard again", file, ", ".join(columns))
    return old


def n_wanted(old: FeaturesFile, limit: int | None) -> int | None:
    """Number of samples of a shard to embed again for a further column: at least those embedded before."""
    return None if old.header["complete"] else max(old.n_read, limit or 0)


def lacking(old: FeaturesFile, header: dict[str, Any]) -> list[str]:
    """Requested columns that are missing, or have another revision."""
    scores = header.get("scores", {})
    columns = [name for name, revision in scores.items() if old.scores.get(name) != revision]
    if "logit_grad" in header:
        if old.n_classes is None:
            columns.append("logit_grad")
        elif old.header["label"] != header["label"]:
            columns.append(f"logit_grad by label {header['label']!r}")
    return columns


def is_stale(old: FeaturesFile, header: dict[str, Any]) -> bool:
    """Whether a column must be read again from the samples' bytes, without an encoder: other labels, or no digests
    yet."""
    return bool(old.header["label"] != header["label"] or not old.has_digest)


def take_known(job: ShardJob, old: FeaturesFile, header: dict[str, Any]) -> str:
    """Reuse the embeddings of old features, so that a job reads only labels and digests; returns text for the log.

    Bad samples are retried where the label differs, which may have been their fault.
    """
    if job.spans.rows() != old.all_spans()[0].rows():
        logger.warning("shard %s changed since %s was made; embedding it again", job.name, old.path)
        job.old = None
        return ""
    job.known = frozenset(old.spans().index.tolist())
    if old.header["label"] != header["label"]:
        return f"labels are read again, by {header['label']!r}"
    job.settled = {row[0]: row[5] for row in old.bad}
    return "digests are added to older features"
