"""Records the margin of each sample during a training, and writes a file that `Column` reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adq_wds.errors import AdqError, shorten
from adq_wds.files import atomic_path
from adq_wds.shards.names import path_of
from adq_wds.tables import bounds

_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("aum", pa.float64()),
        ("last", pa.float32()),
        ("n", pa.int32()),
    ]
)


class MarginRecorder:
    """Records the margin of each sample over a training: the logit of its label less the largest other logit.

    The mean over the epochs (``aum``) is low for wrong labels, and high for samples that are learnt early. Three
    lines in any training loop::

        recorder = adq.MarginRecorder("margins.parquet")
        ...
            recorder.note(batch["__url__"], batch["__key__"], logits, label)  # in each step
        recorder.save()  # after each epoch, where the checkpoint is saved

    and then ``adq.Column("margins.parquet", "aum")``. An existing file is continued, so a training that resumes from
    its checkpoint resumes its margins too. Each rank of a distributed training writes a separate file; `merge` joins
    them.

    Args:
        path: the Parquet file: columns ``shard, key, aum`` (float64, the mean margin), ``last`` (float32, the latest)
            and ``n`` (int32, how often it was noted).

    Raises:
        AdqError: the file exists and is not one of a `MarginRecorder`.

    Source: Pleiss et al. 2020 (arXiv 2001.10528).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._notes: dict[tuple[str, str], tuple[float, float, int]] = {}  # by shard and key: sum, last, n
        if self.path.exists():
            self._add(self.path)

    def __len__(self) -> int:
        """How many samples were noted."""
        return len(self._notes)

    def note(self, urls: Sequence[str] | str, keys: Sequence[str], logits: Any, labels: Any) -> None:
        """Note a batch.

        Args:
            urls: the samples' ``__url__``, or one for all; a query and a password are left out.
            keys: B keys.
            logits: (B, C) floating numbers, C >= 2, a tensor of any device or an array.
            labels: (B,) integers in [0, C).

        Raises:
            ValueError: shapes that do not fit, a label outside [0, C), or a margin that is not finite (with its key);
                nothing of the batch is noted then.
        """
        margins = _margins(logits, labels)
        shards = [urls] * len(keys) if isinstance(urls, str) else list(urls)
        if not len(shards) == len(keys) == len(margins):
            raise ValueError(
                f"{len(shards)} URLs, {len(keys)} keys and {len(margins)} rows of logits; expected equal"
            )
        bad = ~np.isfinite(margins)
        if bad.any():
            raise ValueError(f"key {shorten(keys[int(bad.argmax())])}: the margin is not a finite number")
        for shard, key, margin in zip(shards, keys, margins.tolist(), strict=True):
            self._put(path_of(shard), key, margin, margin, 1)

    def _put(self, shard: str, key: str, total: float, last: float, n: int) -> None:
        before = self._notes.get((shard, key), (0.0, 0.0, 0))
        self._notes[shard, key] = (before[0] + total, last, before[2] + n)

    def save(self) -> None:
        """Write the file, whole or not at all, rows in order of shard and key.

        Raises:
            AdqError: it cannot be written; the old one, if any, is intact.
        """
        rows = [(*where, total / n, last, n) for where, (total, last, n) in sorted(self._notes.items())]
        table = pa.Table.from_pylist([dict(zip(_SCHEMA.names, row, strict=True)) for row in rows], _SCHEMA)
        with atomic_path(self.path) as partial:
            pq.write_table(table, partial, compression="zstd")

    def _add(self, path: Path) -> None:
        try:
            bounds.check_footer(path)
            table = pq.read_table(path)
        except (pa.ArrowException, OSError, ValueError) as cause:
            raise AdqError(f"{path}: not a readable Parquet file ({shorten(str(cause))})") from cause
        if not table.schema.equals(_SCHEMA):
            raise AdqError(f"{path}: not made by MarginRecorder: columns {shorten(table.column_names, 200)}")
        columns = (table[name].to_pylist() for name in _SCHEMA.names)
        for shard, key, aum, last, n in zip(*columns, strict=True):
            self._put(shard, key, aum * n, last, n)

    @classmethod
    def merge(cls, paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]) -> MarginRecorder:
        """One file of those of several ranks: means weighed by counts, ``last`` from the last path that has a sample.

        Raises:
            AdqError: a file is missing, or not one of a `MarginRecorder`; `out` cannot be written.
        """
        merged = cls.__new__(cls)
        merged.path, merged._notes = Path(out), {}
        for path in paths:
            merged._add(Path(path))
        merged.save()
        return merged


def _margins(logits: Any, labels: Any) -> NDArray[np.float64]:
    """(B,) the logit of the label less the largest other one."""
    z, y = (
        np.asarray(each.detach().float().cpu() if hasattr(each, "detach") else each)
        for each in (logits, labels)
    )
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != (len(z),):
        raise ValueError(f"logits of shape {z.shape} and labels of {y.shape}; expected (B, C >= 2) and (B,)")
    rows, y = np.arange(len(z)), y.astype(np.int64)
    if len(z) and (y.min() < 0 or y.max() >= z.shape[1]):
        raise ValueError(f"labels {y.min()} … {y.max()} for {z.shape[1]} logits")
    others = z.astype(np.float64)
    labelled = others[rows, y].copy()
    others[rows, y] = -np.inf
    margins: NDArray[np.float64] = labelled - others.max(axis=1)
    return margins
