"""Does a shard name in a table that a stranger wrote ever make a job open what it was not given? S2."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import adq_wds as adq
from adq_wds.jobs.index import index_shards
from adq_wds.tables.index import read_index
from tests.shards.test_names import HOSTILE
from tests.tampering import rewritten
from tests.test_security import FORBIDDEN, main_fails, make_home, stream


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    make_home(tmp_path)
    adq.Plan.from_keys(str(tmp_path / "in/a.tar"), None).save(tmp_path / "plan.parquet")
    index_shards(tmp_path / "in", tmp_path / "index.parquet")
    adq.embed_shards(tmp_path / "in", "thumbnail", tmp_path / "features")
    return tmp_path


OPENED: list[str] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir", "glob.glob", *FORBIDDEN):
        OPENED.append(f"{event} {arguments[0]}")


@pytest.fixture
def opened() -> Iterator[Callable[[], list[str]]]:
    """What has been opened or run since it was last asked."""
    global OPENED
    if OPENED is None:
        sys.addaudithook(note)  # for ever: it cannot be taken off
    OPENED = []

    def take() -> list[str]:
        taken = list(OPENED or [])
        OPENED.clear() if OPENED is not None else None
        return taken

    yield take
    OPENED = None


def name_it(name: str) -> Callable[[dict[str, Any], list[pa.Table]], None]:
    """Rename a table's first shard, in its header and in its rows."""

    def change(header: dict[str, Any], columns: list[pa.Table]) -> None:
        header["shards"][0]["name"] = name
        if "shard" in columns[0].schema.names:
            field = columns[0].schema.field("shard")
            columns[0] = columns[0].set_column(0, field, pa.array([name] * len(columns[0]), field.type))

    return change


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_away_open_nothing(name: str, tables: Path, opened: Callable[[], list[str]]) -> None:
    """S2: in plans, indexes and features whose hashes agree."""
    said = "|".join(re.escape(text) for text in (repr(name), repr(repr(name))[1:-1]))  # as a value, or in one
    shard = tables / "in" / "a.tar"
    plan = rewritten(tables / "plan.parquet", name_it(name), tables / "p.parquet")
    index = rewritten(tables / "index.parquet", name_it(name), tables / "i.parquet")
    rewritten(tables / "features/a.parquet", name_it(name))
    openers: list[tuple[type[adq.AdqError], Callable[[], object]]] = [
        (adq.PlanError, lambda: adq.load_plan(plan)),
        (adq.PlanError, lambda: adq.Subsample(plan)),
        (adq.PlanError, lambda: stream(shard, plan=plan)),
        (adq.PlanError, lambda: main_fails("show", plan)),
        (adq.PlanError, lambda: main_fails("verify", plan, shard)),
        (adq.PlanError, lambda: main_fails("write", shard, "--plan", plan, "-o", tables / "out/%d.tar")),
        (adq.ShardError, lambda: read_index(index)),
        (adq.ShardError, lambda: stream(shard, index=index)),
        (adq.ShardError, lambda: main_fails("verify", index, shard)),
        (adq.FeaturesError, lambda: adq.Features(tables / "features")),
        (adq.FeaturesError, lambda: main_fails("verify", tables / "features", shard)),
    ]
    opened()
    for i, (kind, opener) in enumerate(openers):
        with pytest.raises(kind, match=rf"parquet: .*shard name ({said}) is (refused|not a name)"):
            opener()
        elsewhere = [one for one in opened() if str(tables) not in one and not one.startswith("open /dev/")]
        assert [one for one in elsewhere if not one.endswith((".py", ".pyc"))] == [], (i, elsewhere)
