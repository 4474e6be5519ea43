"""Which loader resumes where? torch's DataLoader, torchdata's StatefulDataLoader and ours, over the same data set.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/torch_loaders.py "train-{000000..000009}.tar" run/plan.parquet --workers 2

Each reads one and a half epochs, is broken off and made anew, and says what it reads then. torch's begins the epoch
again; torchdata's goes on, if it has as many workers as before; `adq.Loader` goes on with any number of workers and
ranks, from a state of under 400 bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import adq_wds as adq


def main() -> None:
    """Read, break off, resume, compare."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    a = arguments.parse_args()

    def dataset() -> adq.ShardDataset:
        """Batches are the data set's matter, so every loader gets batch_size=None."""
        return adq.ShardDataset(a.shards, plan=a.plan, shuffle=True, batch_size=a.batch_size)

    def torchs(workers: int) -> Any:
        return DataLoader(dataset(), batch_size=None, num_workers=workers)

    def torchdatas(workers: int) -> Any:
        return StatefulDataLoader(dataset(), batch_size=None, num_workers=workers)

    def ours(workers: int) -> Any:
        return adq.Loader(dataset(), num_workers=workers)

    reference = dataset()
    whole = [[sample["__key__"] for batch in reference for sample in batch] for _ in range(2)]
    half = len(reference) // 2
    print(f"{reference}: {len(reference)} batches an epoch, broken off after {half} of the second")

    kinds: list[tuple[str, Callable[[int], Any], int]] = [
        ("DataLoader", torchs, a.workers),
        ("StatefulDataLoader", torchdatas, a.workers),  # another number of workers fails
        ("adq.Loader", ours, a.workers + 1),
    ]
    for name, make, workers_after in kinds:
        loader = make(a.workers)
        list(loader)
        batches = iter(loader)
        seen = [sample["__key__"] for _ in range(half) for sample in next(batches)]
        assert seen == whole[1][: len(seen)], "one order, whatever reads it"
        state = loader.state_dict() if hasattr(loader, "state_dict") else None
        del batches, loader

        again = make(workers_after)
        if state is not None:
            again.load_state_dict(state)
        rest = [sample["__key__"] for batch in again for sample in batch]
        size = "no state" if state is None else f"a state of {len(json.dumps(state))} bytes"
        verdict = (
            "goes on exactly" if rest == whole[1][len(seen) :] else f"reads {len(rest)} samples, from epoch 0"
        )
        print(f"{name}: {size}; on {workers_after} workers it {verdict}")


if __name__ == "__main__":
    main()
