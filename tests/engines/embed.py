"""A process that embeds shards together with others: ``python -m tests.engines.embed OUT SHARD ...``."""

import sys

import adq_wds as adq
from adq_wds.engines.shared import Shared

if __name__ == "__main__":
    out, *shards = sys.argv[1:]
    adq.embed_shards(shards, "thumbnail", out, workers=2, progress=False, engine=Shared(out, beat=0.5))
