"""The walks of docs/architecture.md are true: the files they name run, in a stream and in `adq run`."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.signatures import options_of
from benchmarks.journey import trace
from tests.conftest import MakeShard

PACKAGE = Path(adq.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
# Named as the other way, which a local, plain and correct set does not go; or a form of data, without functions.
OTHER_WAYS = {
    "models/builtin.py",
    "models/network_encoder.py",
    "models/timm_encoder.py",
    "reading/ranged.py",
    "reading/whole.py",
    "shards/samples_in_tar.py",
    "shards/tar_headers.py",
}


def walk(title: str) -> set[str]:
    """The files that the numbered steps below a title name, without the other ways."""
    (section,) = re.findall(rf"^## {title}.*?\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    steps = re.findall(r"^\d+\. .*?(?=^\S|\Z)", section, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([\w/]+\.py)`", "".join(steps))) - OTHER_WAYS


@contextmanager
def files_that_run() -> Iterator[set[str]]:
    """Files of the package in which a function is called meanwhile, in any thread."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        found.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        inside = [Path(name) for name in found if name.startswith(f"{PACKAGE}/")]
        found.clear()
        found.update(str(path.relative_to(PACKAGE)) for path in inside)


@pytest.fixture
def run(make_shard: MakeShard, tmp_path: Path) -> Callable[[], Path]:
    for i in range(2):
        make_shard(f"train-{i:06d}.tar", 40, first=40 * i)
    shards, out = str(tmp_path / "train-{000000..000001}.tar"), tmp_path / "run"

    def once() -> Path:
        assert main(["run", shards, "--keep", "0.9", "--encoder", "thumbnail", "-o", str(out), "-q"]) == 0
        return out / "plan.parquet"

    return once


def test_the_walk_to_the_byte_is_true(run: Callable[[], Path], tmp_path: Path) -> None:
    plan = run()
    vars(adq).pop("ShardDataset", None)  # so that the table of names is asked
    with files_that_run() as found:
        ds = adq.ShardDataset(
            str(tmp_path / "train-{000000..000001}.tar"),
            plan=plan,
            shuffle=True,
            batch_size=64,
            pipes=[adq.Decode(to="numpy"), adq.Map(dict)],
        )
        loader = adq.Loader(ds)
        for _ in loader:
            loader.state_dict()
        ds.as_map()[0]  # a single sample is not cut together with others
    assert walk("From the README") - found == set()


def test_the_walk_to_the_seat_is_true(run: Callable[[], Path]) -> None:
    options_of.cache_clear()
    with files_that_run() as found:
        run()
    assert walk("From `adq run`") - found == set()


def test_the_walks_are_long() -> None:
    assert len(walk("From the README")) > 20
    assert len(walk("From `adq run`")) > 20


def test_a_sample_travels_through_few_files_and_objects() -> None:
    files, objects = trace()
    assert len(files) <= 15
    assert len(objects) <= 3
