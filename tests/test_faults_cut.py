"""A shard, or a cached block, that another process cuts short while it is read: an error, and never a signal. F41."""

import os
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.samples_in_tar import iter_spans, payload_crc32, read_sample
from adq_wds.tables.index import save_index
from adq_wds.tables.spans import scan_spans
from tests.conftest import Capsys, MonkeyPatch, jpeg
from tests.programs import run
from tests.reading.test_local import write

HOWS = ("half", "zero")
STREAM = """
import os, sys
import adq_wds as adq

if __name__ == "__main__":
    path, how, workers, plan = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
    n = 0
    options = {"prefetch_factor": 1} if workers else {}
    dataset = adq.ShardDataset(path, plan=plan, batch_size=2, shuffle=how == "shuffle")
    try:
        for batch in adq.Loader(dataset, num_workers=workers, **options):
            n += len(batch)
            if n == 6:
                os.truncate(path, 0 if how == "zero" else os.path.getsize(path) // 2)
        print("ended", n)
    except adq.ShardError as error:
        print("ShardError", error)
"""


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """More samples than a worker reads ahead, when there are two."""
    members = [(f"k{i:04d}.{name}", bytes([i % 250]) * 600) for i in range(3000) for name in ("bin", "txt")]
    return write(tmp_path / "t.tar", members)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [*HOWS, "shuffle"])
def test_a_stream_over_a_cut_shard_names_it(shard: Path, how: str, workers: int, planned: bool) -> None:
    plan = ""
    if planned:
        plan = str(shard.with_name("plan.parquet"))
        adq.Plan.from_keys(str(shard), None).save(plan)
    ended = run(STREAM, str(shard), how, str(workers), plan)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("ShardError shard t.tar, key 'k"), ended.stdout + ended.stderr
    assert "truncated" in ended.stdout


@pytest.mark.parametrize("how", HOWS)
def test_a_span_in_a_shard_cut_short_is_an_error_when_read(shard: Path, how: str) -> None:
    with open_shard(shard) as data:
        spans = list(iter_spans(data, shard="t.tar"))
        walk = iter_spans(data, shard="t.tar")
        os.truncate(shard, 0 if how == "zero" else shard.stat().st_size // 2)
        for read in (lambda: payload_crc32(data, spans[-1]), lambda: read_sample(data, spans[-1], url="u")):
            with pytest.raises(adq.ShardError, match=r"t\.tar, key 'k2999': truncated while it was read: "):
                read()
        with pytest.raises(adq.ShardError, match=r"t\.tar: truncated while it was read: .* bytes .* now"):
            list(walk)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    fields = [(f"k{i:03d}", jpeg(i), b"%d" % (i % 3)) for i in range(300)]
    return write(
        tmp_path / "t.tar", [m for key, j, c in fields for m in ((f"{key}.jpg", j), (f"{key}.cls", c))]
    )


@pytest.mark.parametrize(("after", "how"), [(1, "zero"), (2, "half"), (15, "zero")])
@pytest.mark.parametrize(
    "command", ["index", "verify", "verify --decode", "embed", "run", "dry run", "write"]
)
def test_a_command_over_a_shard_cut_short_ends_with_its_name(
    images: Path, command: str, after: int, how: str, monkeypatch: MonkeyPatch, capfd: Capsys
) -> None:
    """Cut just before one of its first reads; `adq write` makes 20, of many samples each."""
    index, plan, size = images.with_name("i.parquet"), images.with_name("p.parquet"), images.stat().st_size
    save_index(index, [("t.tar", scan_spans(images, shard="t.tar"))])
    adq.Plan.from_keys(str(images), None).save(plan)
    out, thumbnail = str(images.parent / "out"), ["--encoder", "thumbnail", "--workers", "1", "-q"]
    arguments = {
        "index": ["index", str(images), "-o", str(images.with_name("new.parquet")), "-q"],
        "verify": ["verify", str(index), str(images), "-q"],
        "verify --decode": ["verify", str(index), str(images), "--decode", "-q"],
        "embed": ["embed", str(images), "-o", out, *thumbnail],
        "run": ["run", str(images), "-o", out, *thumbnail],
        "dry run": ["run", str(images), "-o", out, "--dry-run", *thumbnail],
        "write": ["write", str(images), "--plan", str(plan), "-o", out + "/%06d.tar", "-q"],
    }[command]
    left, whole = [after], os.pread

    def pread(fd: int, n: int, start: int) -> bytes:
        left[0] -= 1
        if left[0] == 0:
            os.truncate(images, 0 if how == "zero" else size // 2)
        return whole(fd, n, start)

    monkeypatch.setattr(os, "pread", pread)
    status = main(arguments)
    said = "".join(capfd.readouterr())
    assert images.stat().st_size < size, "the command read less than this test means"
    assert status == 1, said
    assert "t.tar" in said
    assert "truncated" in said or "empty file" in said
    assert not [path for path in images.parent.rglob("*") if path.name.endswith("lock")]
