"""A sound shard without samples counts as 0 everywhere, with one warning; a set without samples is an error."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.embedding.estimate import estimate
from tests.conftest import Caplog, Capsys, jpeg
from tests.reading.test_local import write

N = 16
WARNING = "shard b.tar: no samples"


def ignored_only() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        tar.addfile(tarfile.TarInfo("data/._a.jpg"))
    return file.getvalue()


EMPTY = {"of one record": bytes(10_240), "of two blocks": bytes(1024), "of ignored members": ignored_only()}
THUMBNAIL = {"encoder": adq.encoder("thumbnail"), "workers": 1, "progress": False}


@pytest.fixture(params=sorted(EMPTY))
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Eight samples, none, eight more."""
    paths = [tmp_path / "set" / name for name in ("a.tar", "b.tar", "c.tar")]
    paths[0].parent.mkdir()
    for path, first in ((paths[0], 0), (paths[2], 8)):
        keys = [f"k{i:02d}" for i in range(first, first + 8)]
        fields = [(key, jpeg(i), b"%d" % (i % 2)) for i, key in enumerate(keys)]
        write(path, [m for key, j, c in fields for m in ((f"{key}.jpg", j), (f"{key}.cls", c))])
    paths[1].write_bytes(EMPTY[request.param])
    return [str(path) for path in paths]


def warnings(caplog: Caplog) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return [text for text in texts if "no samples" in text]


def test_every_reader_counts_none_with_one_warning(shards: list[str], tmp_path: Path, caplog: Caplog) -> None:
    index, out = tmp_path / "i.parquet", tmp_path / "f"

    def once(work: Callable[[], object]) -> object:
        result = work()
        (warning,) = warnings(caplog)
        assert warning.startswith(WARNING)
        return result

    assert once(lambda: len(list(adq.ShardDataset(shards)))) == N
    for _ in range(2):  # the second time nothing is scanned
        assert once(lambda: main(["index", *shards, "-o", str(index), "-q"])) == 0
    assert once(lambda: estimate(shards, adq.encoder("thumbnail"))["samples"]) == N
    for _ in range(2):
        assert once(lambda: len(adq.embed_shards(shards, out=out, **THUMBNAIL))) == N
    plan = adq.build_plan(out, bins=2, keep=0.5, out=tmp_path / "p.parquet")
    assert not warnings(caplog)
    assert once(lambda: len(list(adq.ShardDataset(shards, plan=plan, shuffle=True)))) == plan.n_kept
    assert once(lambda: main(["verify", str(tmp_path / "p.parquet"), *shards, "-q"])) == 0
    assert once(lambda: main(["verify", str(out), *shards, "-q"])) == 0
    assert once(lambda: main(["write", *shards, "-o", str(tmp_path / "w/%06d.tar"), "-q"])) == 0
    everything = once(lambda: adq.Plan.from_keys(shards, None))
    assert isinstance(everything, adq.Plan)
    everything.save(tmp_path / "all.parquet")
    assert main(["verify", str(tmp_path / "all.parquet"), *shards, "-q"]) == 0
    assert main(["verify", str(index), *shards, "-q"]) == 0
    for options in ({"index": index}, {"plan": tmp_path / "all.parquet", "shuffle": True}):
        assert len(list(adq.ShardDataset(shards, **options))) == N
    assert adq.load_plan(tmp_path / "all.parquet").n_samples == N


def test_features_of_a_shard_that_lost_its_samples_go(shards: list[str], tmp_path: Path) -> None:
    out = tmp_path / "f"
    Path(shards[1]).write_bytes(Path(shards[0]).read_bytes().replace(b"k0", b"m0"))
    write(Path(shards[1]), [("m.jpg", jpeg(3)), ("m.cls", b"1")])
    assert len(adq.embed_shards(shards, out=out, **THUMBNAIL)) == N + 1
    Path(shards[1]).write_bytes(bytes(1024))
    assert len(adq.embed_shards(shards, out=out, **THUMBNAIL)) == N
    assert len(adq.Features(out)) == N


def test_a_set_without_any_sample_is_an_error(tmp_path: Path, capsys: Capsys) -> None:
    paths = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    for path in paths:
        Path(path).write_bytes(bytes(1024))
    with pytest.raises(adq.ShardError, match=r"^no samples in 2 shards"):
        len(adq.ShardDataset(paths))
    for command in (
        ["index", *paths, "-o", str(tmp_path / "i.parquet")],
        ["embed", *paths, "-o", str(tmp_path / "f"), "--encoder", "thumbnail"],
        ["run", *paths, "-o", str(tmp_path / "r"), "--encoder", "thumbnail"],
        ["run", *paths, "-o", str(tmp_path / "r"), "--encoder", "thumbnail", "--dry-run"],
        ["write", *paths, "-o", str(tmp_path / "w/%06d.tar")],
    ):
        assert main([*command, "-q"]) == 1
        assert "no samples in 2 shards" in capsys.readouterr().err


def test_a_file_of_no_bytes_is_no_shard(shards: list[str], tmp_path: Path) -> None:
    Path(shards[1]).write_bytes(b"")
    for work in (
        lambda: list(adq.ShardDataset(shards)),
        lambda: adq.embed_shards(shards, adq.encoder("thumbnail"), tmp_path / "f", progress=False),
        lambda: adq.Plan.from_keys(shards, None),
    ):
        with pytest.raises(adq.ShardError, match=r"b\.tar: empty file, expected a tar file"):
            work()
