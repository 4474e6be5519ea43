"""Small real shards, made once per test; and the folder of large ones, where there is one."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeShard = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("ADQ_DATA"),
        help="folder with cifar10/ and imagenet-sample/ as tar shards (or the environment's ADQ_DATA)",
    )


@pytest.fixture(scope="session")
def cifar10(request: pytest.FixtureRequest) -> Path:
    """The folder of the CIFAR-10 shards, or a skip."""
    return _folder(request, "cifar10")


@pytest.fixture(scope="session")
def photographs(request: pytest.FixtureRequest) -> Path:
    """The folder of the ImageNet photographs, or a skip."""
    return _folder(request, "imagenet-sample")


def _folder(request: pytest.FixtureRequest, name: str) -> Path:
    data = request.config.getoption("--data")
    if data is None or not (Path(data) / name).is_dir():
        pytest.skip(f"needs the {name} shards: give their folder by --data or ADQ_DATA")
    return Path(data) / name


def picture(seed: int, side: int = 16) -> Image.Image:
    """A small image with some structure of its own."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def jpeg(seed: int, side: int = 16) -> bytes:
    out = io.BytesIO()
    picture(seed, side).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, payload) members, as they are."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """make_shard(name, n, first=0, classes=2, side=16, label="cls"): a shard of n images; keys count from `first`."""

    def make(
        name: str, n: int, *, first: int = 0, classes: int = 2, side: int = 16, label: str | None = "cls"
    ) -> Path:
        members = []
        for i in range(first, first + n):
            members.append((f"s{i:05d}.jpg", jpeg(i, side)))
            if label is not None:
                members.append((f"s{i:05d}.{label}", str(i % classes).encode()))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_tar(path, members)

    return make
