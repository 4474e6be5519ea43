"""With a global batch and draws that change by the epoch, a training that changes its ranks is the unbroken training."""

import json
import math
import random
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

import adq_wds as adq
from adq_wds.core.order import Uneven
from tests.embedded import shard_of
from tests.stream.conftest import Names, ids, slow

N_EPOCHS, STEP = 4, 10
Planned = tuple[list[str], adq.Plan]
Epochs = list[list[Names]]  # of each epoch its global steps


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Three shards of 40 samples of classes 0, 1 and 2, and a plan of 36."""
    folder: Path = tmp_path_factory.mktemp("set")
    third = {i: {"cls": b"2"} for i in range(0, 120, 5)}
    shards = [str(shard_of(folder / f"f-{i}.tar", range(40 * i, 40 * i + 40), third)) for i in range(3)]
    features = adq.embed_shards(shards, "thumbnail", folder / "features")
    return shards, adq.build_plan(features, bins=3, keep=0.3, out=folder / "plan.parquet")


def scheduled(epoch: int) -> float:
    """36 samples, 7, which are fewer than a step, then 43 and 10."""
    return (0.3, 0.06, 0.36, 1 / 12)[epoch]


def schedule(plan: adq.Plan) -> Any:
    return scheduled


def losses_after(epoch: int) -> dict[int, float]:
    return {c: 0.5 + math.sin(epoch + c) ** 2 for c in range(3)}


class Ranks:
    """A training on some ranks, each with a data set and draws of its own, from a state on."""

    def __init__(
        self,
        planned: Planned,
        keep: Callable[[adq.Plan], Any],
        world: int,
        n_workers: int,
        state: Any,
        uneven: Uneven,
    ) -> None:
        shards, plan = planned
        self.keeps = [keep(plan) for _ in range(world)]
        self.loaders = [
            adq.Loader(
                adq.ShardDataset(
                    shards, plan=plan, fresh=True, keep=self.keeps[rank], shuffle=True, seed=3, global_batch=STEP,
                    rank=rank, world=world, uneven=uneven,
                ),
                num_workers=n_workers,
            )
            for rank in range(world)
        ]  # fmt: skip
        for loader in self.loaders if state is not None else []:
            loader.load_state_dict(json.loads(json.dumps(state)))
        self.iterators: list[Any] = []

    def step(self) -> Names:
        """The samples of the next global step; none where the epoch has no step."""
        self.iterators = self.iterators or [iter(loader) for loader in self.loaders]
        return sorted(ids(batch for each in self.iterators if (batch := next(each, None)) is not None))

    def end_epoch(self, epoch: int) -> None:
        self.iterators = []
        for keep in self.keeps:
            if isinstance(keep, adq.ClassRates):
                keep.update(losses_after(epoch))

    def state(self) -> dict[str, Any]:
        """The same on all ranks."""
        states = [loader.state_dict() for loader in self.loaders]
        assert all(state == states[0] for state in states)
        return states[0]


def trained(
    planned: Planned, keep: Any, uneven: Uneven, draw: Callable[[], tuple[int, int, float]]
) -> Epochs:
    """The global steps of a training: `draw` gives ranks, workers, and the steps after which all are killed."""
    epochs: Epochs = [[] for _ in range(N_EPOCHS)]
    epoch, state = 0, None
    while epoch < N_EPOCHS:
        world, n_workers, n_steps = draw()
        ranks = Ranks(planned, keep, world, n_workers, state, uneven)
        while n_steps > 0 and epoch < N_EPOCHS:
            n_steps -= 1
            if step := ranks.step():
                epochs[epoch].append(step)
            state = ranks.state()
            if state["epoch"] > epoch:
                ranks.end_epoch(epoch)
                epoch, state = epoch + 1, ranks.state()
        if epoch < N_EPOCHS:
            ranks.step()  # lost
    return epochs


def unbroken(planned: Planned, keep: Any, uneven: Uneven) -> Epochs:
    return trained(planned, keep, uneven, lambda: (1, 0, math.inf))


KEEPS = [
    (schedule, "drop"),
    (adq.ClassRates, "ragged"),
    slow(schedule, "pad"),
    slow(schedule, "ragged"),
    slow(adq.ClassRates, "pad"),
    slow(adq.ClassRates, "drop"),
]


@pytest.mark.parametrize(("keep", "uneven"), KEEPS)
def test_a_training_on_changing_ranks_is_the_unbroken_one(
    planned: Planned, keep: Any, uneven: Uneven
) -> None:
    """Ranks that divide the step and ranks that do not, one a sample, epochs without a full step; killed anywhere."""
    expected = unbroken(planned, keep, uneven)
    worlds, rng = cycle([3, 2, 10, 1, 4]), random.Random(uneven)
    assert trained(planned, keep, uneven, lambda: (next(worlds), 0, rng.randint(1, 4))) == expected
    n_totals = [round(120 * scheduled(e)) if keep is schedule else 36 for e in range(N_EPOCHS)]
    assert [[*map(len, steps)] for steps in expected] == [sizes_by_hand(n, uneven) for n in n_totals]
    if uneven != "pad":
        assert all(
            len({name for step in steps for name in step}) == sum(map(len, steps)) for steps in expected
        )


def sizes_by_hand(n_total: int, uneven: str) -> list[int]:
    """Samples in each global step."""
    n_full, left = divmod(n_total, STEP)
    last = {"pad": STEP, "drop": 0, "ragged": left}[uneven] if left else 0
    return [STEP] * n_full + [last] * bool(last)


def test_rates_move_between_epochs_of_global_batches(planned: Planned) -> None:
    """So that the test above would see rates that a resumed run had lost."""
    rates, plain = (unbroken(planned, keep, "ragged") for keep in (adq.ClassRates, lambda plan: 0.3))
    assert rates[0] == plain[0]
    assert rates[2] != plain[2]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [adq.ClassRates, schedule])
def test_workers_read_the_same_steps(planned: Planned, keep: Any) -> None:
    """Two ranks of two workers, and then three without."""
    layouts = iter([(2, 2, 5), (3, 0, math.inf)])
    assert trained(planned, keep, "ragged", lambda: next(layouts)) == unbroken(planned, keep, "ragged")
