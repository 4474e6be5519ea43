"""Select the kept samples of a plan, and embed them, in a Ray Data pipeline.

    pip install "adq-wds[ray]"
    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/ray_data.py "train-{000000..000009}.tar" run/plan.parquet

Every pipe is a class for `map_batches`: Ray Data makes one in each of its actors, with the arguments that are given to
it, and calls it with batches of columns. `decoder=None` leaves the bytes as they are, which the plan's checksums need.
Ray's processes pickle what they send each other, so run this on a cluster that you trust.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray
import ray.data

import adq_wds as adq
from adq_wds.shards.names import expand_urls


def main() -> None:
    """Select, embed, count."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="WebDataset pattern")
    arguments.add_argument("plan", help="plan.parquet, where all nodes see it")
    arguments.add_argument("--encoder", default="builtin", help="see `adq embed --help`")
    arguments.add_argument("--actors", type=int, default=1, help="actors of each stage")
    arguments.add_argument(
        "--num-cpus", type=int, help="of a cluster on this machine; without, RAY_ADDRESS's or all"
    )
    a = arguments.parse_args()

    local: dict[str, Any] = {} if a.num_cpus is None else {"num_cpus": a.num_cpus, "address": "local"}
    ray.init(include_dashboard=False if local else None, log_to_driver=False, **local)
    actors: dict[str, Any] = {
        "concurrency": a.actors,
        "num_cpus": 0.5,
        "batch_size": 64,
        "batch_format": "numpy",
    }
    paths = [os.path.abspath(path) for path in expand_urls(a.shards)]
    samples = (
        ray.data.read_webdataset(paths, decoder=None)
        .map_batches(adq.Subsample, fn_constructor_args=[os.path.abspath(a.plan)], **actors)  # the one line
        .map_batches(adq.Embed, fn_constructor_args=[adq.encoder(a.encoder)], **actors)
    )
    n, width = 0, 0
    for batch in samples.iter_batches(batch_size=256, batch_format="numpy"):
        n, width = n + len(batch["__key__"]), batch["emb.npy"].shape[1]
    plan = adq.load_plan(a.plan)
    print(
        f"{n:,} of the {len(plan):,} kept samples, out of {plan.n_samples:,}, embedded to {width} numbers each"
    )


if __name__ == "__main__":
    main()
