"""How many bytes and requests does a tenth of remote shards take, and how long?

`ShardDataset` with plans that keep a tenth of the samples at random (another in each run), over HTTP from a file server in another process that
waits 1 or 50 ms before each answer: without a cache (a request for each sample) and with an empty one (blocks), shuffled,
one process. Beside it, in the same run, WebDataset's `select_files` over its own HTTP reader (curl), which fetches all
bytes, and the same stream from local files. Bytes and requests are counted by the server. The first sample is timed too.

    python -m benchmarks.remote --data DATA --out benchmarks/results/remote.json

Needs aiohttp and obstore (``pip install -e ".[test]"``) and curl.

Last measured (two cores of an AMD EPYC, medians of seven plans; server and reader share them): 200 photographs, 0.101 of
the bytes (as much as the kept samples have; 0.081 to 0.118) in 20 requests, 0.024 s at 1 ms and 0.074 s at 50 ms, with a
cache 18 requests, 0.028 and 0.081 s; WebDataset all bytes, 0.060 and 0.156 s. CIFAR-10: 0.100 in 5,000 requests, 1.6 and
8.4 s; with a cache 0.234 in 2,400, 0.77 and 1.8 s; WebDataset 1.9 and 2.3 s.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

import adq_wds as adq
from benchmarks.common import data_folder, parser, report, spread

SETS = {"imagenet-sample": "imagenet-sample-*.tar", "cifar10": "cifar10-train-*.tar"}


def serve(folder: str, latency: float, said: Connection) -> None:
    """A file server with ranges that counts what it sends."""
    from aiohttp import web

    counts = {"requests": 0, "bytes": 0}

    async def file(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency)
        path = Path(folder) / request.match_info["name"]
        asked = request.http_range
        size = path.stat().st_size
        start, stop = asked.start or 0, size if asked.stop is None else min(asked.stop, size)
        counts["requests"] += 1
        counts["bytes"] += stop - start
        return web.FileResponse(path)

    async def stats(request: web.Request) -> web.Response:
        now = dict(counts)
        counts.update(requests=0, bytes=0)
        return web.json_response(now)

    app = web.Application()
    app.router.add_get("/stats", stats)
    app.router.add_get("/data/{name}", file)

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        said.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def server(folder: Path, latency: float) -> Iterator[str]:
    """The server's URL, while it runs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(str(folder), latency, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def fetched(url: str) -> dict[str, int]:
    """Bytes and requests since it was last asked."""
    with urllib.request.urlopen(f"{url}/stats") as answer:  # noqa: S310 - our own server
        found: dict[str, int] = json.load(answer)
        return found


def timed(stream: Iterable[Any]) -> tuple[float, float, int]:
    """Seconds to the first sample and to the last, and samples."""
    begin = time.perf_counter()
    first, n = 0.0, 0
    for _ in stream:
        first = first or time.perf_counter() - begin
        n += 1
    return first, time.perf_counter() - begin, n


def by_select_files(urls: list[str], keys: set[str]) -> Iterable[Any]:
    """WebDataset's way to a subset."""
    return wds.WebDataset(  # type: ignore[no-any-return]
        urls, shardshuffle=False, select_files=lambda name: name.rpartition(".")[0] in keys
    )


def tenth(paths: list[str], places: list[tuple[str, str]], seed: int) -> adq.Plan:
    """A plan that keeps a tenth of the samples at random."""
    chosen = np.random.default_rng(seed).choice(len(places), len(places) // 10, replace=False)
    return adq.Plan.from_keys(paths, [places[i] for i in chosen])


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=3)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    results: dict[str, Any] = {}
    for name, pattern in SETS.items():
        folder = data_folder(name, a.data)
        paths = sorted(map(str, folder.glob(pattern)))
        whole = adq.Plan.from_keys(paths, None)
        places = [(shard.name, key) for shard in whole for key in shard.spans.keys]
        plans = [tenth(paths, places, seed) for seed in range(a.runs)]
        size = sum(os.path.getsize(path) for path in paths)
        result: dict[str, Any] = {"samples": len(places), "kept": len(plans[0]), "bytes_of_shards": size}
        kept = [sum(int(s.spans.n_bytes[s.kept].sum()) for s in plan) / size for plan in plans]
        found: dict[str, list[float]] = {"kept_bytes_share": kept}
        for latency in (0.001, 0.050):
            with server(folder, latency) as url, tempfile.TemporaryDirectory() as scratch:
                urls = [f"{url}/data/{Path(path).name}" for path in paths]

                def ours(plan: adq.Plan, **options: Any) -> Iterable[Any]:
                    return adq.ShardDataset(urls, plan=plan, shuffle=True, **options)

                ways: dict[str, Callable[[adq.Plan], Iterable[Any]]] = {
                    "a_request_each": ours,
                    "cached": lambda plan: ours(plan, cache=Path(scratch) / plan.hash),
                    "webdataset": lambda plan: by_select_files(urls, set(plan.keys())),
                }
                for plan in plans:
                    for way, make in ways.items():
                        fetched(url)
                        first, seconds, n = timed(make(plan))
                        counts = fetched(url)
                        if n != len(plan):
                            raise SystemExit(f"{way}: {n} samples, the plan keeps {len(plan)}")
                        at = f"{way}_{latency * 1000:.0f}ms"
                        for what, value in (
                            (f"{at}_seconds", seconds),
                            (f"{at}_first_sample_s", first),
                            (f"{way}_requests", counts["requests"]),
                            (f"{way}_bytes_share", counts["bytes"] / size),
                        ):
                            found.setdefault(what, []).append(value)
        for plan in plans:
            local = timed(adq.ShardDataset(paths, plan=plan, shuffle=True))
            found.setdefault("local_seconds", []).append(local[1])
        results[name] = {**result, **{key: spread(values) for key, values in found.items()}}
    report(results, a.out)


if __name__ == "__main__":
    main()
