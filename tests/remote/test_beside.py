"""An index beside shards on a server saves fetching them whole."""

import logging
import shutil
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.remote.backend import Access
from adq_wds.remote.fetch import Fetch
from adq_wds.tables import beside
from adq_wds.tables.beside import IndexesBeside
from tests.conftest import Caplog, MonkeyPatch
from tests.golden.others import make
from tests.remote.conftest import Server

pytest.importorskip("obstore")
GOLDEN = Path(make.__file__).parent


@pytest.fixture
def shards(server: Server, request: pytest.FixtureRequest) -> list[str]:
    """Shards in a folder of the server, with the indexes that a test names."""
    folder = server.folder / request.node.name.replace("[", "_")
    make.make_shards(folder)
    for name in request.param:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(GOLDEN / name, folder / name)
    return [f"{server.url}/ok/{folder.name}/{name}" for name in make.NAMES]


WEBSHART = [name.replace(".tar", ".json") for name in make.NAMES]
ENERGON = [".nv-meta/.info.json", ".nv-meta/index.sqlite"]


@pytest.mark.parametrize("shards", [WEBSHART, ENERGON], ids=["webshart", "energon"], indirect=True)
def test_no_shard_is_fetched_whole(shards: list[str], tmp_path: Path, server: Server, caplog: Caplog) -> None:
    local = [str(path) for path in make.make_shards(tmp_path)]
    server.asked()
    ds = adq.ShardDataset(shards)
    of_tars = [part for name, part in server.asked() if name.endswith(".tar")]
    assert all(part is not None for part in of_tars)
    n_bytes = sum(int(b) - int(a) + 1 for a, b in (p.removeprefix("bytes=").split("-") for p in of_tars if p))
    assert n_bytes < 45_000  # of 61,440 in shards this small: headers, and the zeros at the end
    assert len(ds) == 11
    strip = [{k: v for k, v in sample.items() if k != "__url__"} for sample in ds]
    assert strip == [{k: v for k, v in s.items() if k != "__url__"} for s in adq.ShardDataset(local)]
    assert "are fetched whole" not in caplog.text


@pytest.mark.parametrize("shards", [[]], ids=["none"], indirect=True)
def test_without_an_index_shards_are_fetched_whole_as_ever(shards: list[str], caplog: Caplog) -> None:
    assert len(adq.ShardDataset(shards)) == 11
    assert "2 remote shards are fetched whole" in caplog.text
    assert "is not used" not in caplog.text


@pytest.mark.parametrize("shards", [ENERGON], ids=["energon"], indirect=True)
def test_a_huge_remote_database_is_not_fetched(
    shards: list[str], server: Server, caplog: Caplog, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "MAX_DATABASE_BYTES", 1000)
    with IndexesBeside() as indexes:
        assert [indexes.spans(url, shard="a.tar") for url in shards] == [None, None]
    assert "Energon's index is not used: it has 28,672 bytes, at most 1,000 are fetched" in caplog.text
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1


@pytest.mark.parametrize("shards", [ENERGON + WEBSHART], ids=["both"], indirect=True)
@pytest.mark.parametrize("fault", ["403", "whole", "page", "500"])
def test_a_server_that_answers_otherwise_is_no_error_here(
    shards: list[str], server: Server, fault: str
) -> None:
    """Whoever reads the shard says why it cannot be read."""
    urls = [url.replace("/ok/", f"/{fault}/") for url in shards]
    with IndexesBeside(impatient()) as indexes:
        assert [indexes.spans(url, shard="a.tar") for url in urls] == [None, None]


def impatient() -> Fetch:
    return Fetch(access=Access(timeout=1.0))


@pytest.mark.parametrize("shards", [WEBSHART], ids=["webshart"], indirect=True)
def test_signed_urls_have_no_neighbours(shards: list[str], server: Server) -> None:
    server.asked()
    with IndexesBeside() as indexes:
        assert indexes.spans(f"{shards[0]}?signature=1", shard="a.tar") is None
        assert indexes.spans(f"pipe:curl {shards[0]}", shard="a.tar") is None
    assert server.asked() == []
