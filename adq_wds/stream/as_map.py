"""Gives kept samples by number, for samplers that choose the order themselves."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from adq_wds.reading.listing import Planned
from adq_wds.stream.clock import Clock
from adq_wds.stream.epoch_order import EpochOrder, Recipe
from adq_wds.stream.iterator import Stages


class MapView(Dataset[Any]):
    """All kept samples of all ranks, numbered by shard name and place in the shard; made by `ShardDataset.as_map`.

    ``DataLoader(view, batch_size=64, sampler=DistributedSampler(view))``: sampler and loader decide batches, order
    and ranks. `set_epoch` of the data set sets the epoch of `Map`'s draws.
    """

    def __init__(self, recipe: Recipe, clock: Clock) -> None:
        if recipe.drops or recipe.on_error != "raise" or any(p.on_error != "raise" for p in recipe.pipes):
            raise TypeError(
                "as_map: each number must give a sample, but a pipe may drop some, or on_error skip them; "
                "leave that pipe out, and on_error as it is"
            )
        if recipe.fresh:
            raise ValueError("as_map: with fresh=True a number would mean another sample in every epoch")
        self._recipe, self._clock = replace(recipe, shuffle=False), clock
        self._epoch: tuple[int, EpochOrder, Stages] | None = None  # the one that is read

    def __len__(self) -> int:
        return self._recipe.listing.n_total(0)

    def __getitem__(self, i: SupportsIndex) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[SupportsIndex]) -> list[Any]:
        """Several samples, as torch's loaders request a batch.

        Raises:
            IndexError: a number is not one of these.
        """
        n = len(self)
        t = np.array([operator.index(i) for i in numbers], dtype=np.int64)
        if ((t < -n) | (t >= n)).any():
            raise IndexError(f"sample {t[(t < -n) | (t >= n)][0]} of {n}")
        epoch = self._clock.epoch
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, EpochOrder(self._recipe, epoch), Stages(self._recipe, epoch)
        _, order, stages = self._epoch
        places = order.places(np.where(t < 0, t + n, t))
        return stages.run(list(stages.readers.each(iter([places]))))

    def labels(self) -> NDArray[np.int32]:
        """The plan's label of each sample, for a WeightedRandomSampler: (n,) int32, -1 for unlabelled data.

        Raises:
            TypeError: there is no plan, so no labels.
        """
        listing = self._recipe.listing
        if not isinstance(listing, Planned):
            raise TypeError("labels: the plan knows them, and this data set has none")
        return np.concatenate([shard.label[shard.kept] for shard in listing.plan] or [np.empty(0, np.int32)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}  # open files stay here
