"""How far does a sample travel from its tar to the batch it is in?

One epoch of a local shard with a plan, raw, in batches of one: the second epoch, so that what a shard needs once is done. It
lists the files of the package whose code runs while one batch is made, and the objects that hold the sample's key then.

    python -m benchmarks.journey

Last measured: 13 files (an epoch's start included), and 3 objects: the places of the shard's kept samples, the place of
this one, and the sample. `tests/test_architecture.py` holds them to 15 and 3.
"""

from __future__ import annotations

import gc
import io
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import adq_wds as adq

PACKAGE = Path(adq.__file__).parent
N = 64


def write_shard(path: Path) -> None:
    """N samples of an image's and a label's bytes."""
    with tarfile.open(path, "w") as tar:
        for i in range(N):
            for field, size in (("jpg", 900 + i), ("cls", 1)):
                member = tarfile.TarInfo(f"sample{i:04d}.{field}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))


def files_of(work: Callable[[], object]) -> Counter[str]:
    """Functions of the package that run meanwhile, by file."""
    calls: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            calls.add((str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return Counter(file for file, _ in calls)


def holders_of(key: str) -> Counter[str]:
    """Objects that hold a text equal to `key`, by their class of the package."""
    names: Counter[str] = Counter({"dict, the sample": 1})  # which Python's collector does not list
    for thing in gc.get_objects():
        if str(type(thing).__module__).startswith("adq_wds.") and _holds(thing, key):
            names[f"{type(thing).__module__}.{type(thing).__name__}"] += 1
    return names


def _holds(thing: Any, key: str) -> bool:
    values = thing if isinstance(thing, tuple) else getattr(thing, "__dict__", {}).values()
    return any(
        (isinstance(value, str) and value == key)
        or (isinstance(value, list) and key in value)
        or (isinstance(value, np.ndarray) and value.dtype == object and key in value.tolist())
        for value in values
    )


def trace() -> tuple[Counter[str], Counter[str]]:
    """Functions that run for one sample, by file; and the objects that hold its key, by class."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train-000000.tar"
        write_shard(shard)
        plan = Path(folder) / "plan.parquet"
        adq.Plan.from_keys(str(shard), [f"sample{i:04d}" for i in range(0, N, 2)]).save(plan)
        dataset = adq.ShardDataset(str(shard), plan=plan, shuffle=True, batch_size=1)
        for _ in dataset:
            pass
        stream, batches = iter(dataset), []
        files = files_of(lambda: batches.append(next(stream)))
        ((sample,),) = batches
        return files, holders_of(sample["__key__"])


def main() -> None:
    """Print both."""
    files, objects = trace()
    print(f"{len(files)} files run code for one sample:")
    for file, n in sorted(files.items()):
        print(f"  {file}: {n} functions")
    print(f"{len(objects)} kinds of objects hold its key:")
    for name, n in objects.items():
        print(f"  {name} ({n})")


if __name__ == "__main__":
    main()
