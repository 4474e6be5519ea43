"""Reads samples of a plan from their shards, by offset, as small pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import AdqError
from adq_wds.reading.listing import Everything
from adq_wds.reading.open_shards import Readers
from adq_wds.reading.places import Place, ShardPlaces, each_place
from adq_wds.remote.fetch import Fetch
from adq_wds.report.picture import small_picture
from adq_wds.samples.fields import FieldSpec
from adq_wds.samples.whole_image import whole_image
from adq_wds.tables.plan import Plan


class _Chosen(Everything):
    """A few samples of each shard."""

    def share(self, shard: int) -> float:
        """Little, so that nothing is read around them."""
        return 0.0


@dataclass
class Pictures:
    """Small pictures of a plan's samples, read when they are first asked for.

    Attributes:
        uri: ``data:`` URIs by row of the plan.
        lost: why a sample could not be read, by row of the plan.
    """

    plan: Plan
    path_of: Mapping[str, str]
    image: FieldSpec
    uri: dict[int, str] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Of all URIs."""
        return sum(map(len, self.uri.values()))

    def read(self, rows: Iterable[int]) -> None:
        """Read samples that were not asked for before; one that cannot be read is lost."""
        wanted = np.array(sorted(set(rows) - self.uri.keys() - self.lost.keys()), dtype=np.int64)
        ends = np.cumsum(self.plan.shard_sizes)
        of_shard = np.searchsorted(ends, wanted, side="right")
        for i in np.unique(of_shard).tolist():
            here = wanted[of_shard == i]
            if self.plan.shards[i] in self.path_of:
                self._read_shard(i, here, int(ends[i]) - int(self.plan.shard_sizes[i]))

    def _read_shard(self, i: int, rows: NDArray[np.int64], first: int) -> None:
        name = self.plan.shards[i]
        spans = self.plan.shard(name, hold=False).spans.take(rows - first)
        listing = _Chosen([name], [self.path_of[name]], [spans], checked=True, scanned=False)
        readers = Readers(listing, Fetch(), 0)
        parts = [(0, ShardPlaces.from_spans(spans), np.arange(len(spans)))]
        places = readers.each(iter([each_place(parts, np.arange(len(spans)), verify=True)]))
        try:
            for row, place in zip(rows.tolist(), places, strict=True):
                self._read_one(row, place, readers)
        except AdqError as error:  # the shard cannot be opened
            self.lost |= dict.fromkeys(set(rows.tolist()) - self.uri.keys() - self.lost.keys(), str(error))
        finally:
            readers.close()

    def _read_one(self, row: int, place: Place, readers: Readers) -> None:
        try:
            (sample,) = readers.read_samples([place])
            self.uri[row] = small_picture(whole_image(sample, self.image)[1])
        except AdqError as error:
            self.lost[row] = str(error)
