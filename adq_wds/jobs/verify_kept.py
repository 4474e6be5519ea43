"""Keeps the check of each shard in a folder, so that a killed verification goes on, and commands can share one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypedDict

import pyarrow as pa

from adq_wds.files import canonical_json, sha256_text
from adq_wds.jobs.verify_listed import Expected
from adq_wds.jobs.verify_shard import Check, Difference
from adq_wds.remote.outputs import write_text
from adq_wds.remote.url_path import AnyPath
from adq_wds.tables.bounds import MAX_HEADER_BYTES
from adq_wds.tables.headers import Natural, checked, parse_json
from adq_wds.tables.parquet import column_hashes
from adq_wds.tables.spans import source_stamp


class _Difference(TypedDict):
    shard: str
    key: str | None
    kind: str
    text: str
    n: Natural


class _Counts(TypedDict):
    read: Natural
    kept: Natural
    kept_ok: Natural
    n_contents: Natural
    differences: list[_Difference]


class KeptCheck:
    """The file of one shard's check; see FORMAT.md.

    Args:
        folder: of the checks.
        path: the shard.
        expected: what it is compared with.
        contents: which contents are compared, as JSON has it.

    Raises:
        ShardError: there is no such shard.
    """

    def __init__(self, folder: AnyPath, path: str, expected: Expected, contents: dict[str, Any]) -> None:
        self._file = folder / f"{expected.name.removesuffix('.tar').replace('/', '--')}.json"
        self._header = {
            "format": "adq_wds.check",
            "version": 1,
            "shard": expected.name,
            "source": source_stamp(path),
            "listed": _hash(expected),
            "contents": contents,
        }

    def load(self) -> Check | None:
        """The check of an earlier verification of the same; None where there is none, or it is damaged."""
        try:
            if self._file.stat().st_size > MAX_HEADER_BYTES:
                return None
            file = parse_json(self._file.read_bytes())
            if not isinstance(file, dict) or {name: file.get(name) for name in self._header} != self._header:
                return None
            counts: dict[str, Any] = {name: file.get(name) for name in _Counts.__annotations__}
            differences = tuple(Difference(**each) for each in checked(counts, _Counts)["differences"])
        except (OSError, TypeError, ValueError):
            return None
        return Check(**counts | {"differences": differences})

    def save(self, check: Check) -> None:
        """Write the check, whole or not at all."""
        write_text(self._file, canonical_json({**self._header, **asdict(check)}) + "\n")


def _hash(expected: Expected) -> str:
    """SHA-256 over all that a shard is compared with."""
    columns = {**expected.spans.columns(expected.name), "used": expected.used}
    if expected.labels is not None:
        columns["label"] = [repr(label) for label in expected.labels]
    return sha256_text(canonical_json([column_hashes(pa.table(columns)), expected.complete]))
