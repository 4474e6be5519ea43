"""Small real shards, made once per test; and the folder of large ones, where there is one."""

import gc
import hashlib
import importlib.util
import io
import os
import socket
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads only wait for each other

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from adq_wds.tables.features import file_name
from adq_wds.tables.features_file import ShardFeatures
from adq_wds.tables.spans import Spans

# a loaded machine fails no test
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_SILENT = socket.socket()
_SILENT.bind(("127.0.0.1", 0))
NOBODY = f"127.0.0.1:{_SILENT.getsockname()[1]}"  # where nobody listens, and no other program can begin to

MakeShard = Callable[..., Path]
MakeFeatures = Callable[..., ShardFeatures]
MonkeyPatch, Caplog, Capsys = pytest.MonkeyPatch, pytest.LogCaptureFixture, pytest.CaptureFixture[str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("ADQ_DATA"),
        help="folder with cifar10/ and imagenet-sample/ as tar shards (or the environment's ADQ_DATA)",
    )


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays; to look at it again at each collection takes a second


@pytest.fixture(scope="session")
def cifar10(request: pytest.FixtureRequest) -> Path:
    """The folder of the CIFAR-10 shards, or a skip."""
    return _folder(request, "cifar10")


@pytest.fixture(scope="session")
def photographs(request: pytest.FixtureRequest) -> Path:
    """The folder of the ImageNet photographs, or a skip."""
    return _folder(request, "imagenet-sample")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Work this small is slower in several threads, far slower where other processes want the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_example(name: str) -> ModuleType:
    """A file of examples/ as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def pictures(n: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> list[Image.Image]:
    """Images that differ, with some structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    return [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c in coarse]


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


def synthetic_features(
    shard: str,
    label: Sequence[int],
    *,
    names: list[str] | None = None,
    embedding: Any = None,
    bad: Sequence[int] = (),
    width: int = 6,
    signed: bool = False,
    first: int = 0,
    n_classes: int | None = None,
    scores: dict[str, str] | None = None,
    contents: Sequence[int] | None = None,
    **header: str,
) -> ShardFeatures:
    """Features without images: random unit rows that depend on the shard's name alone, one row per label.

    `bad` are positions in the shard of samples that could not be used, between the usable ones; keys count
    from `first`, bad samples included. With `n_classes` there are logit gradients, with `scores` (revision by name)
    random numbers for each, with `contents` digests, equal for equal numbers.
    """
    n = len(label)
    rng = np.random.default_rng(zlib.crc32(shard.encode()))
    if embedding is None:
        embedding = rng.normal(size=(n, width))
        embedding = embedding if signed else np.maximum(embedding, 0)
        embedding /= np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-9)
    total = n + len(bad)
    rows = [(i, f"k{first + i:04d}", i * 2048, 1024 + i % 1000, i + 7) for i in range(total)]
    spans = Spans.from_rows(rows)
    good = np.setdiff1d(np.arange(total), bad)
    return ShardFeatures(
        shard=shard,
        spans=spans.take(good),
        label=np.array(label, dtype=np.int32).reshape(n),
        embedding=np.asarray(embedding).astype(np.float16),
        norm=np.ones(n, dtype=np.float32),
        texture=(0.1 + rng.random(n)).astype(np.float32),
        header={
            "encoder": "synthetic",
            "revision": "1",
            "preprocessing_hash": "0",
            "image": "jpg",
            "label": "cls",
            "complete": True,
            "source": {"bytes": 1, "mtime_ns": 1},
            **({"logit_grad": "softmax", "head_right": n} if n_classes else {}),
            **({"scores": scores} if scores else {}),
            **header,
        },
        names=names,
        bad=spans.take(np.array(sorted(bad), dtype=np.int64)),
        bad_reasons=["not an image"] * len(bad),
        logit_grad=_unit(rng.normal(size=(n, n_classes))) if n_classes else None,
        scores={name: rng.random(n).astype(np.float32) for name in scores or {}},
        digest=None if contents is None else _digests(contents),
    )


def _digests(contents: Sequence[int]) -> Any:
    rows = [hashlib.blake2b(str(number).encode(), digest_size=16).digest() for number in contents]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16)


def _unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def make_features(tmp_path: Path) -> MakeFeatures:
    """make_features("a.tar", labels, folder=None, …): `synthetic_features`, saved to a folder, tmp_path/features."""

    def make(
        shard: str, label: Sequence[int], *, folder: Path = tmp_path / "features", **options: Any
    ) -> ShardFeatures:
        features = synthetic_features(shard, label, **options)
        folder.mkdir(parents=True, exist_ok=True)
        features.save(folder / file_name(shard))
        return features

    return make
