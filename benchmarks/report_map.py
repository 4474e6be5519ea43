"""How large is the report's map of 1,000,000 samples, and how fast does a browser open and move it?

Command:
    python -m benchmarks.report_map --runs 2 --out benchmarks/results/report_map.json
Seeded samples of 1,000 classes and 10 bins in 100 shards, a page with nothing but the map. Keys are numbered, or digests, which do
not compress. Measured in headless Chromium without a graphics card: processor seconds of all its processes from start to end,
those of an empty page taken off; seconds until the map is drawn; milliseconds of a frame while it moves, from a key to the next
frame, and of the search for the nearest point.

Last measured (two cores of an AMD EPYC that about thirty other processes shared, so that seconds and milliseconds on the clock
say little; two runs): a page of 13.9 MB with numbered keys, 15.2 MB with digests, made in 2.4 and 3.8 s of a processor; opening it,
40 moves and a search take the browser 1.0 and 1.3 s of a processor together.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adq_wds.report.map_section import map_section
from adq_wds.report.page import page
from adq_wds.report.section import Section
from benchmarks.browser import CHROMIUM, visit
from benchmarks.common import parser, report

N, CLASSES, BINS, SHARDS = 1_000_000, 1000, 10, 100
FRAMES = 40
_MOVE = f"""(async () => {{
  const root = document.getElementById("adq-map"), frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  while (!root.dataset.drawn) await frame();
  const opened = performance.now(), canvas = root.querySelector("canvas"), taken = [];
  const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", {{ key }}));
  for (let i = 0; i < {FRAMES}; i++) {{
    const start = performance.now();
    press(i % 2 ? "ArrowLeft" : "ArrowRight");
    await frame();
    taken.push(performance.now() - start);
  }}
  taken.sort((a, b) => a - b);
  const start = performance.now();
  press("Enter");
  return [opened, taken[0], taken[taken.length >> 1], performance.now() - start];
}})()"""


def main() -> None:
    args = parser(__doc__).parse_args()
    if CHROMIUM is None:
        sys.exit("skipped: no chromium here")
    digests = np.random.default_rng(1).bytes(8 * N).hex()
    keys = {
        "numbered": [f"{i // 10_000:03d}_{i % 10_000:05d}" for i in range(N)],
        "digests": [digests[16 * i : 16 * i + 16] for i in range(N)],
    }
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.html"
        empty.write_text(page("Map", [Section("Map", "")]), encoding="utf-8")
        idle = min(_browser_seconds(empty)[0] for _ in range(args.runs))
        measured = {kind: _one(Path(folder), of_kind, idle, args.runs) for kind, of_kind in keys.items()}
    report({"samples": N, **measured}, args.out)


def _one(folder: Path, keys: list[str], idle: float, runs: int) -> dict[str, Any]:
    """Size and times of the map of these keys; the best of all runs, since others share the machine."""
    table, xy = _table(keys)
    start = time.process_time()
    section = map_section(table, xy, {}, {})
    made = time.process_time() - start
    path = folder / "map.html"
    path.write_text(page("Map", [section]), encoding="utf-8")
    seen = [_browser_seconds(path, _MOVE) for _ in range(runs)]
    opened, least, median, nearest = (min(each[1][i] for each in seen) for i in range(4))
    return {
        "made_processor_s": round(made, 1),
        "page_mb": round(path.stat().st_size / 1e6, 1),
        "browser_processor_s": round(min(each[0] for each in seen) - idle, 2),
        "opens_s": round(opened / 1000, 2),
        "frame_ms": {"least": round(least, 1), "median": round(median, 1)},
        "nearest_ms": round(nearest, 1),
    }


def _browser_seconds(path: Path, *scripts: str) -> tuple[float, Any]:
    """Processor seconds of a browser that opens a page, and the script's answer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen = visit(path, *scripts)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if seen.logged:
        raise RuntimeError(str(seen.logged))
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, seen.answers[0] if seen.answers else None


def _table(keys: list[str]) -> tuple[pa.Table, Any]:
    """A table as of `report_table`, and places around the centres of classes."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, N).astype(np.int32)
    rank = rng.integers(0, N // (CLASSES * BINS), N).astype(np.int32)
    kept = rank < N // (CLASSES * BINS) // 10
    shard = pa.array((np.arange(N) * SHARDS // N).astype(np.int32))
    table = pa.table(
        {
            "shard": pa.DictionaryArray.from_arrays(shard, [f"train-{i:06d}.tar" for i in range(SHARDS)]),
            "key": keys,
            "class": pa.DictionaryArray.from_arrays(label, [f"class {i}" for i in range(CLASSES)]),
            "bin": rng.integers(0, BINS, N).astype(np.int16),
            "rank": rank,
            "kept": kept,
            "reason": pa.array(np.where(kept, "kept", "quota")).dictionary_encode(),
        }
    )
    xy = rng.normal(size=(CLASSES, 2))[label] + 0.15 * rng.normal(size=(N, 2))
    return table, xy.astype(np.float32)


if __name__ == "__main__":
    main()
