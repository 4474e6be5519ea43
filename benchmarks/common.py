"""What every benchmark shares: the machine's description, repeated timing, peak memory, and the result's file."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "pyarrow", "pillow", "torch", "timm", "webdataset")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that all benchmarks take."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--runs", type=int, default=3, help="repetitions; medians are reported")
    made.add_argument("--out", help=f"write the result here as JSON (results live in {RESULTS.name}/)")
    return made


def data_folder(name: str, given: str | None) -> Path:
    """The folder of a set of shards, from --data or ADQ_DATA; ends the program with a reason otherwise."""
    data = given or os.environ.get("ADQ_DATA")
    if data is None or not (Path(data) / name).is_dir():
        sys.exit(f"skipped: needs the {name} shards; give their parent folder by --data or ADQ_DATA")
    return Path(data) / name


def machine() -> dict[str, Any]:
    """Processor, cores, and the versions that matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"cpu": model, "cores": cores, "python": platform.python_version(), **versions}


def seconds(work: Callable[[], Any], runs: int) -> list[float]:
    """Wall seconds of each of `runs` calls."""
    taken = []
    for _ in range(runs):
        gc.collect()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and largest."""
    rounded = (statistics.median(values), min(values), max(values))
    return {name: float(f"{v:.{digits}g}") for name, v in zip(("median", "min", "max"), rounded, strict=True)}


def peak_rss_bytes() -> int:
    """The process's largest resident memory so far, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark with arguments in a fresh process and give the last line it printed, as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def report(result: dict[str, Any], out: str | None) -> None:
    """Print a result with its command and machine, and write it where asked."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    if data := os.environ.get("ADQ_DATA"):
        command = command.replace(data, "DATA")
    whole = {"command": command, "machine": machine(), **result}
    text = json.dumps(whole, indent=1)
    print(text)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n", encoding="utf-8")
