"""What do the engines cost beyond `threads`, once they have started, and does the job's own process stay small?

The same shards embedded by each engine with as many computing threads as cores: `threads` in one process; `processes` and
`ray` (a cluster of this machine that the job starts) in as many processes of one thread; `shared` in as many commands of one
thread that share the folder. So the same work is divided in four ways, and the difference is the engine's. Each job runs in
a fresh process. Its start-up is the same job with a shard of one image for each core, measured apart and taken off. Processor
time is that of all processes together, Ray's own included, read from /proc. All engines run side by side, so that whatever
else the machine does, and they themselves, slow all of them alike: wall times are to be compared with each other only.

    python -m benchmarks.engines --data DATA --out benchmarks/results/engines.json
    python -m benchmarks.engines --idle --out benchmarks/results/engines_idle.json
    python -m benchmarks.engines --data DATA --shards 4 --memory --out benchmarks/results/engines_memory.json

The first embeds photographs by a resnet18 of random weights, a hundred images a shard; the second lets Ray's actors sleep; the
third embeds CIFAR-10 by the encoder `thumbnail`, and reports the peak memory of the job's process, on some shards
and on four times as many.

Last measured: see docs/scale.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import adq_wds as adq
from adq_wds.engines.choose import choose_engine
from adq_wds.engines.engine import Resources, Result, Task
from adq_wds.engines.threads import cores
from benchmarks.common import data_folder, parser, peak_rss_bytes, report, spread

ENGINES = ("threads", "processes", "ray", "shared")
PAUSE_S = 0.25  # between two looks at the processes' times
TICK = os.sysconf("SC_CLK_TCK")


def job(step: str, engine: Any, shards: str, folder: str, network: str) -> None:
    """One step of a job, in this process; prints the peak of its memory."""
    workers = cores() if engine == "threads" else 1
    if step == "embed":
        encoder: Any = network
        if network != "thumbnail":
            import torch

            torch.manual_seed(0)
            encoder = adq.encoder(network, pretrained=False)
        adq.embed_shards(
            shards, encoder, f"{folder}/features", workers=workers, engine=engine, progress=False
        )
    elif step.startswith("sleep-"):
        tasks = [Task(str(i), float(step.removeprefix("sleep-"))) for i in range(cores())]
        list(choose_engine(engine, folder=folder).run(tasks, sleep, Resources()))
    print(json.dumps(peak_rss_bytes()))


def sleep(tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
    """A work that does nothing for some seconds."""
    for task in tasks:
        time.sleep(task.what)
        yield task, {}


def run(step: str, engine: str, shards: Path, folder: Path, network: str) -> dict[str, float]:
    """Wall and processor seconds of one step of a job in processes of its own, and peak bytes of the first."""
    n_commands = cores() if engine == "shared" else 1
    command = [sys.executable, "-m", "benchmarks.engines", "--job", step, engine]
    command += [f"{shards}/*.tar", str(folder), network]
    # Ray's own niceness of 15 would yield to the other engines.
    environment = os.environ | {"RAY_worker_niceness": "0"}
    start = time.perf_counter()
    commands = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(n_commands)
    ]
    times: dict[int, float] = {}  # of each process that was seen, its last
    while any(each.poll() is None for each in commands):
        times |= processor_seconds({each.pid for each in commands})
        time.sleep(PAUSE_S)
    wall = time.perf_counter() - start
    peaks = [int(str(each.communicate()[0]).splitlines()[-1]) for each in commands]
    assert all(each.returncode == 0 for each in commands)
    return {"wall_s": wall, "processor_s": sum(times.values()), "peak_bytes": max(peaks)}


def processor_seconds(roots: set[int]) -> dict[int, float]:
    """Seconds of user and system time of some processes and of all below them, by process id."""
    parent: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has just ended
                continue
            parent[int(entry)] = int(fields[1])
            seconds[int(entry)] = (int(fields[11]) + int(fields[12])) / TICK
    below = set(roots)
    while more := {pid for pid, above in parent.items() if above in below} - below:
        below |= more
    return {pid: seconds[pid] for pid in below if pid in seconds}


def link(shards: list[Path], n: int, folder: Path) -> Path:
    """A folder of n shards: links to the given ones, over and over."""
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"set-{i:06d}.tar").symlink_to(shards[i % len(shards)].resolve())
    return folder


def times(shards: list[Path], n: int, runs: int, scratch: Path) -> dict[str, Any]:
    """Seconds of each engine, after its start-up, beside those of `threads` in the same round."""
    many = link(shards, n, scratch / "many")
    adq.write_shards(
        islice(adq.ShardDataset(shards[0], rank=0, world=1), cores()),
        scratch / "one" / "%06d.tar",
        max_samples=1,
        progress=False,
    )

    def embed(engine: str, of: Path, name: str) -> dict[str, float]:
        return run("embed", engine, of, scratch / name, "resnet18")

    rounds: list[dict[str, dict[str, float]]] = []
    with ThreadPoolExecutor(len(ENGINES)) as pool:
        for i in range(runs):
            starts = {e: pool.submit(embed, e, scratch / "one", f"start-{e}-{i}") for e in ENGINES}
            first = {engine: future.result() for engine, future in starts.items()}
            jobs = {e: pool.submit(embed, e, many, f"{e}-{i}") for e in ENGINES}
            rounds.append({})
            for engine, future in jobs.items():
                seconds = {name: future.result()[name] for name in ("wall_s", "processor_s")}
                rounds[-1][engine] = {f"start_{name}": first[engine][name] for name in seconds}
                rounds[-1][engine] |= {name: value - first[engine][name] for name, value in seconds.items()}
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    same = {hashes(scratch / f"{engine}-{i}") for engine in ENGINES for i in range(runs)}
    assert len(same) == 1, "all engines make the same files"
    result: dict[str, Any] = {}
    for engine in ENGINES:
        result[engine] = {name: spread([r[engine][name] for r in rounds]) for name in rounds[0][engine]}
        for name in ("wall_s", "processor_s"):
            ratios = [r[engine][name] / r["threads"][name] for r in rounds]
            result[engine][f"{name[:-2]}_over_threads"] = spread(ratios)
    return {"shards": n, "samples": n_samples(scratch / "threads-0"), "engines": result}


def idle(runs: int, scratch: Path) -> dict[str, Any]:
    """Processor seconds that Ray takes in each second that all tasks sleep."""
    shares = []
    for _ in range(runs):
        short, long = (run(f"sleep-{s}", "ray", scratch, scratch, "") for s in (5, 45))
        shares.append((long["processor_s"] - short["processor_s"]) / (45 - 5))
    return {"processor_s_in_each_idle_s": spread(shares)}


def hashes(folder: Path) -> str:
    """The hash of the features in a folder."""
    return adq.Features(folder / "features").hash


def n_samples(folder: Path) -> int:
    """Samples of the features in a folder."""
    return sum(file.n for file in adq.Features(folder / "features"))


def memory(shards: list[Path], n: int, scratch: Path) -> dict[str, Any]:
    """Peak memory of the job's process, in MB, on n shards and on four times as many; and bytes for each sample more."""
    peaks: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    samples = []
    for factor in (1, 4):
        many = link(shards, factor * n, scratch / f"times-{factor}")

        def peak(engine: str, factor: int = factor, many: Path = many) -> float:
            return run("embed", engine, many, scratch / f"{engine}-{factor}", "thumbnail")["peak_bytes"]

        with ThreadPoolExecutor(len(ENGINES)) as pool:
            for engine, n_bytes in zip(ENGINES, pool.map(peak, ENGINES), strict=True):
                peaks[engine].append(n_bytes)
        samples.append(n_samples(scratch / f"threads-{factor}"))
        print(factor, peaks, file=sys.stderr, flush=True)
    return {
        "samples": samples,
        "engines": {
            engine: {
                "peak_mb": [round(each / 1e6, 1) for each in (less, more)],
                "bytes_a_sample_more": round((more - less) / (samples[1] - samples[0]), 1),
            }
            for engine, (less, more) in peaks.items()
        },
    }


def main() -> None:
    """Measure times or memory of all engines."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", help="folder with imagenet-sample/ and cifar10/ (default: ADQ_DATA)")
    arguments.add_argument("--shards", type=int, default=20, help="shards of a timed job")
    arguments.add_argument("--memory", action="store_true", help="measure memory, not times")
    arguments.add_argument("--idle", action="store_true", help="measure Ray while all tasks sleep")
    arguments.add_argument(
        "--job", nargs=5, help="run one step in this process (used by the benchmark itself)"
    )
    args = arguments.parse_args()
    if args.job is not None:
        job(*args.job)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.idle:
            result = idle(args.runs, Path(folder))
        elif args.memory:
            shards = sorted(data_folder("cifar10", args.data).glob("*.tar"))
            result = memory(shards, args.shards, Path(folder))
        else:
            shards = sorted(data_folder("imagenet-sample", args.data).glob("*.tar"))
            result = times(shards, args.shards, args.runs, Path(folder))
    report(result, args.out)


if __name__ == "__main__":
    main()
