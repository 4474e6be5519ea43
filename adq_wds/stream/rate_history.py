"""Holds the seats of classes since each update of a training, in memory shared with workers."""

from __future__ import annotations

import base64
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adq_wds.errors import AdqError, StateError
from adq_wds.stream.clock import apart, shared

_BYTES = 1 << 24  # for all updates, unless these are too few
_LEAST, _MOST = 256, 4096
_PREFIX = "rates:"
_GENERATION, _N, _BEGUN = range(3)  # places in the first row


class RateHistory:
    """The updates of C >= 2 classes, each with the epoch from which on it counts: 4096, less where 16 MiB hold fewer,
    but 256 at least.

    A row is an epoch and C seats in units of 1/ONE; the first row holds three numbers of its own.
    """

    def __init__(self, n_classes: int) -> None:
        n_rows = 1 + min(max(_BYTES // (8 * n_classes), _LEAST), _MOST)
        self._share(torch.zeros(n_rows, n_classes + 1, dtype=torch.int64))
        self.begun = -1

    def _share(self, values: torch.Tensor) -> None:
        self._tensor, self._pid = shared(values), os.getpid()

    @property
    def _rows(self) -> NDArray[np.int64]:
        """The rows, no longer shared in a process that is no worker of the creating one."""
        if apart(self._pid):
            self._share(self._tensor.clone())
        rows: NDArray[np.int64] = self._tensor.numpy()
        return rows

    @property
    def generation(self) -> int:
        """How often the updates were replaced."""
        return int(self._rows[0, _GENERATION])

    @property
    def n(self) -> int:
        """Updates."""
        return int(self._rows[0, _N])

    @property
    def begun(self) -> int:
        """The last epoch that was read; -1 before the first."""
        return int(self._rows[0, _BEGUN])

    @begun.setter
    def begun(self, epoch: int) -> None:
        self._rows[0, _BEGUN] = epoch

    @property
    def since(self) -> NDArray[np.int64]:
        """(n,) int64, the epochs from which on updates count, ascending."""
        return self._rows[1 : 1 + self.n, 0]

    def of_class(self, number: int) -> NDArray[np.int64]:
        """(C,) int64, the seats of the n-th update, from 1 on."""
        return self._rows[number, 1:]

    def add(self, since: int, of_class: NDArray[np.int64]) -> None:
        """Let an update count from an epoch on, in place of updates that would begin then or later.

        Raises:
            AdqError: there is no room left.
        """
        rows, n = self._rows, int(np.searchsorted(self.since, since))
        if n + 1 == len(rows):
            raise AdqError(
                f"ClassRates: there is room for {n:,} updates, and all are made: the rates stay as they are; stop updating"
            )
        rows[n + 1] = [since, *of_class.tolist()]
        rows[0, _N] = n + 1

    def replace(self, since: NDArray[np.int64], of_class: NDArray[np.int64], *, begun: int) -> None:
        """Put other updates in place of all."""
        rows = self._rows
        rows[1 : 1 + len(since)] = np.column_stack([since, of_class])
        rows[0, :3] = rows[0, _GENERATION] + 1, len(since), begun

    def packed(self, n: int) -> str:
        """The first n updates as text, with 4 + 8·C bytes in base64 for each."""
        rows = self._rows[1 : 1 + n]
        parts = [
            rows[:, :1].astype("<u4").view("u1"),
            np.ascontiguousarray(rows[:, 1:], dtype="<i8").view("u1"),
        ]
        return _PREFIX + base64.b64encode(np.hstack(parts).tobytes()).decode("ascii")

    def unpacked(self, record: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) epochs and (n, C) seats of such a text.

        Raises:
            StateError: it is none, or not of so many classes.
        """
        if not record.startswith(_PREFIX):
            raise StateError(
                "state is of a schedule of ratios, not of ClassRates: give that schedule, or start anew"
            )
        n_bytes = 4 + 8 * (self._rows.shape[1] - 1)
        try:
            data = base64.b64decode(record[len(_PREFIX) :], validate=True)
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, n_bytes)
        except ValueError:
            rows = None
        if rows is None or len(rows) >= len(self._rows):
            raise StateError(
                "damaged state: its rates are not of the plan's classes; load another checkpoint"
            )
        since, of_class = (np.ascontiguousarray(part) for part in (rows[:, :4], rows[:, 4:]))
        return since.view("<u4")[:, 0].astype(np.int64), of_class.view("<i8").astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"tensor": self._tensor, "pid": self._pid}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._tensor, self._pid = shared(state["tensor"]), state["pid"]  # as it is, when sent to a worker
