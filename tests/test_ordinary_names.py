"""Do shards and folders with ordinary characters in their names work everywhere, and are others named before any work?"""

from pathlib import Path

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from tests.conftest import Capsys, jpeg, write_tar

NAMES = [
    "birds & bees-000.tar", "train's-000.tar", "train[1].tar", "2024:05-000.tar", "log-10:00.tar", "a;b!.tar", "中文 é.tar",
    "-1.tar", "R&D/0.tar", "val [2]/0.tar", "it's, 100%/0.tar", "a.tar.gz.tar",
]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """A shard of six samples under each name."""
    for k, name in enumerate(NAMES):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = [(i, (("jpg", jpeg(i)), ("cls", b"%d" % (i % 2)))) for i in range(6 * k, 6 * k + 6)]
        write_tar(path, [(f"s{i:03d}.{name}", data) for i, pairs in fields for name, data in pairs])
    return [str(tmp_path / "in" / name) for name in NAMES]


def test_ordinary_characters_work_everywhere(shards: list[str], tmp_path: Path, capsys: Capsys) -> None:
    out = str(tmp_path / "R&D's [run] 1:2")
    plan, index = f"{out}/plan.parquet", f"{out}/index.parquet"
    run = ["run", *shards, "--encoder", "thumbnail", "--bins", "2", "--keep", "0.5", "-o", out]
    assert main([*run, "--dry-run"]) == 0
    assert main([*run, "--write"]) == 0
    assert main([*run, "--write"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["run", "--from", f"{out}/run.json", "-o", f"{out} again"]) == 0
    assert main(["index", *shards, "-o", index]) == 0
    for listed in (plan, index, f"{out}/features"):
        assert main(["verify", listed, *shards]) == 0
    assert main(["write", *shards, "--plan", plan, "-o", f"{out}/small/kept & [1] %d.tar"]) == 0
    assert main(["index", f"{out}/small/_info.json", "-o", f"{out}/again.parquet"]) == 0
    assert main(["patches", shards[2], "-o", f"{out}/[1].png", "--importance", "random", "--size", "64"]) == 0
    kept = sorted(adq.load_plan(plan).keys())
    assert len(kept) == 36
    assert sorted(sample["__key__"] for sample in adq.ShardDataset(shards, plan=plan)) == kept
    assert len(list(adq.ShardDataset(shards, index=index))) == 72
    assert len(list(adq.ShardDataset(f"{out}/shards"))) == 36


@pytest.mark.parametrize(
    "name", ["a*.tar", "{a}.tar", "a|b.tar", "$HOME.tar", " a.tar", 'a"b.tar', "a\x1b[1m.tar", "a\\b.tar"]
)
def test_a_name_that_cannot_be_is_said_before_any_work(name: str, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"never opened")
    shard, out = str(tmp_path / "in" / name), str(tmp_path / "out")
    cheap = ["--encoder", "thumbnail"]
    for command in (
        ["run", shard, *cheap, "--bins", "1", "-o", out],
        ["run", shard, *cheap, "--bins", "1", "-o", out, "--dry-run"],
        ["embed", shard, *cheap, "-o", out],
        ["embed", shard, *cheap, "-o", out, "--dry-run"],
        ["index", shard, "-o", f"{out}/i.parquet"],
        ["write", shard, "-o", f"{out}/%d.tar"],
    ):
        assert main(command) == 1
        assert "is refused: it " in capsys.readouterr().err
    assert not Path(out).exists()


def test_two_shards_of_one_features_file_are_named(tmp_path: Path, capsys: Capsys) -> None:
    names = ["a/b.tar", "c/b.tar", "a--b.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [str(tmp_path / name) for name in names]
    assert main(["run", *paths, "--encoder", "thumbnail", "-o", str(tmp_path / "o"), "--dry-run"]) == 2
    assert "would both be a--b.parquet; rename one" in capsys.readouterr().err
    long = tmp_path / ("x" * 200)
    (long / "a").mkdir(parents=True)
    (tmp_path / "a").mkdir(exist_ok=True)
    for folder in (long, long / "a"):
        (folder / f"{'y' * 100}.tar").touch()
    command = ["embed", str(long), str(long / "a"), "--encoder", "thumbnail", "-o", str(tmp_path / "o")]
    assert main(command) == 2
    assert "is too long" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["part: %d.tar", "a*%d.tar", "-%d.tar", "$x%d.tar"])
def test_new_shards_get_no_name_that_an_index_cannot_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern .*is refused: it "):
        adq.write_shards([], tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()
