"""One of the equal commands that share a plan: ``python -m tests.planning.by_shared FEATURES OUT BEAT``."""

import sys
from pathlib import Path

import adq_wds as adq
from adq_wds.engines.shared import Shared


def main(features: str, out: str, beat: str) -> None:
    plan = adq.build_plan(
        features, bins=4, dedup=0.999, out=out, engine=Shared(Path(out).parent, beat=float(beat))
    )
    sys.stdout.write(plan.hash)


if __name__ == "__main__":
    main(*sys.argv[1:])
