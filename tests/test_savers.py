"""Do several writers of one path ever tear its file, fail, or leave something behind? F40."""

import selectors
from collections.abc import Iterator
from pathlib import Path

import pytest

from adq_wds.files import atomic_path, write_text
from tests.programs import Program
from tests.savers import KINDS

SAVER = "import runpy; runpy.run_module('tests.savers', run_name='__main__')"


def tell(process: Program, kind: str) -> None:
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()


def hear(process: Program) -> str:
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def savers(folder: Path) -> Iterator[list[Program]]:
    """Four that save what they are told, and the one that is killed."""
    processes = [Program(SAVER, str(folder)) for _ in range(5)]
    assert [hear(process) for process in processes] == ["ready"] * 5
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_four_writers_of_one_path_all_succeed(kind: str, folder: Path, savers: list[Program]) -> None:
    """F40: two versions by turns until a reader beside them has read six; the plan's fifth writer is killed then."""
    name, _, read = KINDS[kind]
    victim = savers[4] if kind == "plan" else None
    n_reads, replies = 0, []
    with selectors.DefaultSelector() as done:
        for process in savers[: 5 if victim else 4]:
            done.register(process.stdout, selectors.EVENT_READ, process)
            tell(process, kind)
        while len(replies) < 4:
            if (folder / name).exists() or n_reads:  # once there, it is never missing
                read(folder / name)
                n_reads += 1
            if victim and n_reads == 6:
                victim.kill()
                done.unregister(victim.stdout)
            for event, _ in done.select(0):
                reply = hear(event.data)
                if n_reads < 6 and reply == "0 []":
                    tell(event.data, kind)
                else:
                    replies.append(reply)
                    done.unregister(event.fileobj)
    assert replies == ["0 []"] * 4
    write_text(folder / "other", "")  # another path's writer removes nothing
    if victim:
        tell(savers[0], kind)
        assert hear(savers[0]) == "0 []"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


WRITER = """
import sys
from adq_wds.files import atomic_path
with atomic_path(sys.argv[1]) as partial:
    partial.write_text(sys.argv[2])
    print(partial, flush=True)
    sys.stdin.readline()
"""


def begin_to_write(path: Path, text: str) -> tuple[Program, Path]:
    process = Program(WRITER, str(path), text)
    return process, Path(hear(process))


@pytest.mark.parametrize("name", ["a.txt", "é" * 125 + ".json"])
def test_the_next_writer_removes_only_a_dead_ones_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    dead, left_over = begin_to_write(path, "dead")
    living, written = begin_to_write(path, "living")
    other, elsewhere = begin_to_write(tmp_path / "b.txt", "other")
    for process in (dead, other):
        process.kill()
        process.communicate()
    assert left_over.exists()
    with atomic_path(path) as partial:
        assert partial.read_text() == ""
        partial.write_text("new")
        assert left_over == partial or not left_over.exists()
        assert {written, elsewhere, partial} == {each for each in tmp_path.iterdir() if each != path}
    assert path.read_text() == "new"
    living.communicate("\n")
    assert living.returncode == 0
    assert path.read_text() == "living"
    write_text(tmp_path / "b.txt", "")
    assert {each.name for each in tmp_path.iterdir()} == {name, "b.txt"}
