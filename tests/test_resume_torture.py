"""The torture of `benchmarks.resume`: no sample of ours is missing or repeated, and broken resumes are counted."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from benchmarks.resume import ROWS, SETTINGS, N, Row, Tally, table, torture
from benchmarks.resume_libraries import Layout, Open, Opened, adq_ranks

OWN = [("adq, global_batch", "elastic"), ("adq, global_batch", "any"), ("adq, batch_size", "any")]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Open]:
    """Opens ours, with batches of all ranks together or of each."""
    return cache(lambda together: adq_ranks(N, tmp_path_factory.mktemp("set"), together=together))


@pytest.mark.parametrize(("name", "setting"), OWN)
def test_ours_gives_every_sample_once(own: Callable[[bool], Open], name: str, setting: str) -> None:
    row = ROWS[name]
    tally = torture(row, own(row.together), setting, 12, seed=5)
    assert tally.n_changes >= 12
    assert (tally.missing, tally.repeated, tally.differ) == (0, 0, 0)
    assert (tally.n_steps > 0) == row.together
    assert all(reason.startswith("StateError: state has") for reason in tally.refused)
    assert bool(tally.refused) == (setting == "any"), "only another size of batches is refused"


def stand_in(start: Callable[[int, Layout], int]) -> Open:
    """Reads samples by their numbers; `start` says where a run goes on that was saved at a number."""

    def open_(layout: Layout, state: Any, epoch: int) -> Opened:
        done = 0 if state is None else start(state, layout)
        step = layout.batch * layout.world
        given = [0] * layout.world

        def batches(rank: int) -> Any:
            for first in range(done + rank * layout.batch, N, step):
                given[rank] += 1
                yield list(range(first, min(first + layout.batch, N)))

        return Opened([batches(r) for r in range(layout.world)], lambda: min(N, done + given[0] * step))

    return open_


def counted(start: Callable[[int, Layout], int], setting: str) -> Tally:
    return torture(Row(lambda n, folder: stand_in(start)), stand_in(start), setting, 200, seed=1)


def refusing(saved: int, layout: Layout) -> int:
    if layout.world == 5:
        raise ValueError("five")
    return saved


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_right_stand_in_is_not_blamed(setting: str) -> None:
    tally = counted(lambda saved, layout: saved, setting)
    assert (tally.missing, tally.repeated, tally.differ, tally.refused.total()) == (0, 0, 0, 0)
    assert tally.n_changes >= 200
    assert (tally.n_steps > 0) == (setting != "any")


def test_broken_stand_ins_are_counted() -> None:
    """One loses a sample at each change, one reads one again, one counts what workers had read ahead, one refuses."""
    lost = counted(lambda saved, layout: saved + 1, "elastic")
    assert lost.missing > 100
    assert lost.repeated == 0
    assert lost.differ > 0
    again = counted(lambda saved, layout: saved - 1, "kills")
    assert (again.missing, again.repeated) == (0, again.n_changes)
    ahead = counted(lambda saved, layout: saved + layout.workers * layout.batch, "any")
    assert ahead.missing > 1000
    refused = counted(refusing, "any")
    assert (refused.missing, refused.repeated) == (0, 0)
    assert [*refused.refused] == ["ValueError: five"]


def test_the_table_has_a_line_for_each_setting() -> None:
    of = {
        "changes": 1000, "refused": 3, "epochs": 10, "missing": 0, "repeated": 203,
        "steps_compared": 90, "steps_differ": 2, "unbroken_percent": [0.0, 0.1],
    }  # fmt: skip
    text = table({"a library": {"version": "1.2", "settings": dict.fromkeys(SETTINGS, of)}})
    assert "| a library 1.2 | any | 1,000 | 3 | 0 | 203 (10.00%) | 2 of 90 | 0.0 %, 0.1 % |" in text
    assert len(text.splitlines()) == 5
