"""Do the proof's tables, goals, commands and figure say what the result files hold?"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import proof_commands
from benchmarks.arms import ARMS
from benchmarks.proof import finished, read, table
from benchmarks.proof_commands import commands, left, listing, run
from benchmarks.proof_figure import compute_table, figure, points_of
from benchmarks.proof_goals import GOALS, STAGES, goals_table, stages_table


def record(arm: str, seed: int, last: float, keep: float = 0.1, encoder: str | None = None) -> dict[str, Any]:
    keep, encoder = ARMS[arm].keep or keep, encoder or ARMS[arm].encoder or "builtin-free"
    named = {"arm": arm, "encoder": encoder, "keep": keep, "seed": seed}
    return {**named, "last": last, "choosing": 0.1, "seen": 1000 * keep}


def write(folder: Path, name: str, runs: list[dict[str, Any]], net: str = "tiny") -> None:
    (folder / f"{name}-{net}.json").write_text(json.dumps({"settings": {}, "runs": runs}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, base in (("noise20", 0.5), ("clean", 0.7)):
        gains = {"random": 0.0, "adq": 0.02, "chosen": 0.07, "full": 0.1}
        runs = [record(arm, seed, base + gain) for arm, gain in gains.items() for seed in range(2)]
        more = [record("dq", 0, base, 0.2), record("adq", 0, 0.9, encoder="thumbnail")]
        write(tmp_path, name, [*runs, *more, record("random", 2, base)])
    write(tmp_path, "clean", [record("random", 0, 0.1)], "small")
    return tmp_path


def test_all_sets_stand_side_by_side(results: Path) -> None:
    runs = read(results, "tiny")
    assert table(runs, 0.1).splitlines() == [
        "| arm | clean | noise20 |",
        "|---|---|---|",
        "| full | 80.00 ± 0.00 (2) | 60.00 ± 0.00 (2) |",
        "| random | 70.00 ± 0.00 (3) | 50.00 ± 0.00 (3) |",
        "| adq | 72.00 ± 0.00 (2) | 52.00 ± 0.00 (2) |",
        "| chosen | 77.00 ± 0.00 (2) | 57.00 ± 0.00 (2) |",
    ]
    assert table(runs, 0.1, "random").splitlines()[2:4] == [
        "| full | +10.00 ± 0.00 (2) | +10.00 ± 0.00 (2) |",
        "| adq | +2.00 ± 0.00 (2) | +2.00 ± 0.00 (2) |",
    ]
    assert finished(runs["clean"], 0.1) == [0, 1]


def test_a_goal_is_met_missed_or_not_measured_yet(results: Path) -> None:
    rows = [line.split(" | ") for line in goals_table(read(results, "tiny")).splitlines()[2:]]
    verdicts = {(row[0].strip("| "), *row[1:4]): row[-1].strip(" |") for row in rows}
    assert len(rows) == len(GOALS)
    assert verdicts["noise20", "10 %", "chosen", "random"] == "met so far"
    assert verdicts["clean", "10 %", "clean-20", "random"] == "not measured yet"
    runs = read(results, "tiny")
    runs["clean"] = [
        record(arm, seed, last) for arm, last in (("random", 0.5), ("clean-20", 0.6)) for seed in range(5)
    ]
    assert "| clean | 10 % | clean-20 | random | ≥ +1.5 | +10.00 ± 0.00 (5) | met |" in goals_table(runs)
    runs["noise20"] = [run for run in runs["noise20"] if run["arm"] != "chosen"]
    runs["noise20"] += [record("chosen", 0, 0.559), record("chosen", 4, 0.9)]  # no seed 4 of random
    (row,) = (line for line in goals_table(runs).splitlines() if line.startswith("| noise20 | 10 % | chosen"))
    assert row.endswith("| ≥ +6 | +5.90 (1) | missed so far |")


def test_stages_add_up_to_the_whole_difference(tmp_path: Path) -> None:
    arms = ["random", *(arm for _, arm, _ in STAGES)]
    assert [base for _, _, base in STAGES] == arms[:-1]
    write(tmp_path, "all-three", [record(arm, 0, 0.3 + 0.01 * i**2) for i, arm in enumerate(arms)])
    lines = stages_table(read(tmp_path, "tiny"), 0.1).splitlines()[2:]
    assert [line.split(" | ")[1].split()[0] for line in lines] == [
        "+1.00",
        "+3.00",
        "+5.00",
        "+7.00",
        "+9.00",
    ]


def test_what_is_recorded_or_listed_before_is_not_listed_again(tmp_path: Path) -> None:
    empty = list(left(tmp_path))
    first = empty[0][0]
    assert (first.of, first.net, first.seed) == ("all-three", "tiny", 0)
    tasks = [(command.out(tmp_path), task) for command in commands() for task in command.tasks()]
    assert sum(n for _, n, _ in empty) == len(set(tasks)) < len(tasks)
    done = first.tasks()[:-1]
    runs = [record(task.arm, task.seed, 0.5, task.keep) for task in done]
    write(tmp_path, "all-three", runs)
    again = list(left(tmp_path))
    assert (again[0][0], again[0][1]) == (first, 1)
    assert again[0][2] < empty[0][2]
    assert again[1:] == empty[1:]
    lines = listing(tmp_path, "DATA", "WORK", 2).splitlines()
    assert len(lines) == 2 * len(again)
    assert lines[1].startswith(
        "python -m benchmarks.accuracy --data DATA --work WORK --set all-three --net tiny"
    )


def test_a_run_ends_before_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    costs = [seconds for _, _, seconds in left(tmp_path)]
    run(tmp_path, "DATA", "WORK", 1, max(costs[:2]) - 1)
    assert ran == []
    clock = iter([0.0, 0.0, costs[0]])  # the clock when it starts, and before each command
    monkeypatch.setattr(proof_commands.time, "monotonic", lambda: next(clock))
    run(tmp_path, "DATA", "WORK", 1, costs[0] + 1)
    assert [command[1:3] for command in ran] == [["-m", "benchmarks.accuracy"]]


def test_the_figure_has_a_mark_for_each_arm_and_ratio(results: Path) -> None:
    runs = read(results, "tiny")
    runs["all-three"] = [record(arm, seed, 0.5, 0.2) for _, arm, base in STAGES for seed in range(2)]
    marks = re.findall('<circle class="([^"]*)"', figure(runs, "tiny", 0.2))
    assert marks.count("chosen") == 2 + 2 + 1  # by compute and by samples, on two sets; the legend
    assert marks.count("random fresh") == 1
    assert figure({}, "tiny", 0.1).startswith("<svg")


def test_compute_is_that_of_the_recipe() -> None:
    runs = [record("random", 0, 0.5), record("full-chosen", 0, 0.6), record("full", 0, 0.7)]
    assert [points_of(runs, arm, "tiny")[0].compute for arm in ("random", "full-chosen", "full")] == [
        0.1,
        1,
        1,
    ]
    assert points_of(runs, "random", "small")[0].compute == pytest.approx(0.1 * 34 / 24)
    assert compute_table({"clean": runs}, "tiny").splitlines() == [
        "| set | arm | 10 % | 100 % |",
        "|---|---|---|---|",
        "| clean | random | 50.00 (1) |  |",
        "| clean | full |  | 70.00 (1) |",
        "| clean | full-chosen |  | 60.00 (1) |",
    ]
