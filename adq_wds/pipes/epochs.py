"""Says which epoch a sample of a stream belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter

from adq_wds.checks import integer
from adq_wds.samples.fields import EPOCH_FIELD, Sample

Epoch = int | Callable[[], int] | str | None


def checked_epoch(epoch: object) -> int:
    """The number of an epoch; `ValueError` where it is none."""
    return integer("epoch", epoch, least=0, most=2**63 - 1)


def epoch_of(sample: Sample) -> int:
    """The epoch that a source of ours put into a sample; 0 where none did."""
    number = sample.get(EPOCH_FIELD, 0)
    return 0 if isinstance(number, bytes | str) else checked_epoch(number)  # bytes come from a tar


def runs(
    samples: list[Sample], epoch: int | str | None
) -> Iterator[tuple[str, int | None, Iterator[Sample]]]:
    """Runs of neighbours with one URL and epoch, mostly those of one shard."""
    if isinstance(epoch, str):  # each sample says its own
        by_both = groupby(samples, lambda sample: (sample["__url__"], epoch_of(sample)))
        return ((url, number, run) for (url, number), run in by_both)
    return ((url, epoch, run) for url, run in groupby(samples, itemgetter("__url__")))
