"""Is this version slower than another one, in what users wait for?

Each task runs in a fresh process, in turns, with one checkout of the package on the path and then the other: processor
seconds of the task alone (imports and preparation left out, those of child processes counted) and peak memory, and the
ratio of both, this version over the other, round by round.

    git worktree add --detach /tmp/before COMMIT
    python -m benchmarks.versions --data DATA --before /tmp/before --out benchmarks/results/versions.json

CIFAR-10's training shards; `thumbnail` embeds. Only names that both versions have
are used.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import data_folder, parser, report, spread

STREAM = "ds = adq.ShardDataset({}, batch_size=256, collate=list)"
ADQ = "subprocess.run([sys.executable, '-m', 'adq_wds', {}], check=True, stdout=subprocess.DEVNULL)"
# What is prepared, and what is measured. SHARDS, FEATURES, PLAN and OUT are paths.
TASKS = {
    "--help": ("", ADQ.format("'run', '--help'")),
    "embed": (
        "adq.embed_shards(SHARDS[4:5], 'thumbnail', OUT + '/g', progress=False)",
        "adq.embed_shards(SHARDS[:4], 'thumbnail', OUT + '/f', progress=False)",
    ),
    "plan": (
        "adq.build_plan",
        "adq.build_plan(FEATURES, keep=0.2, progress=False).save(OUT + '/plan.parquet')",
    ),
    "codebook": ("adq.fit_codebook", "adq.fit_codebook(FEATURES, pilot=1000, progress=False)"),
    "assign": (
        """
pipe = adq.AssignBins(adq.fit_codebook(FEATURES, pilot=200, progress=False))
rows = next(iter(adq.Features(FEATURES))).embedding()
samples = [{"__key__": str(i), "__url__": "a.tar", "emb.npy": row, "cls": b"3"} for i, row in enumerate(rows)]
""",
        """
for i in range(0, 4 * len(samples), 256):
    pipe.apply(samples[i % len(samples) :][:256])
""",
    ),
    "subsample": (
        "pipe = adq.Subsample(adq.load_plan(PLAN)); kept = list(adq.ShardDataset(SHARDS[:2], shuffle=False))",
        "for _ in range(8): list(pipe(iter(kept)))",
    ),
    "raw, all": (STREAM.format("SHARDS") + "; list(ds)", "for _ in range(3): list(ds)"),
    "raw, 20 %": (STREAM.format("SHARDS, plan=PLAN") + "; list(ds)", "for _ in range(10): list(ds)"),
    "decoded, 20 %": (
        STREAM.format("SHARDS, plan=PLAN, pipes=[adq.Decode(to='numpy')]") + "; list(ds)",
        "for _ in range(3): list(ds)",
    ),
    "write": ("", ADQ.format("'write', *SHARDS, '--plan', PLAN, '-o', OUT + '/%06d.tar', '--quiet'")),
    "verify": ("", ADQ.format("'verify', PLAN, *SHARDS")),
    "patches": (
        """
pipes = [adq.Decode(to="numpy"), adq.DropPatches(adq.importance("texture"), keep=0.75), adq.EncodePatches()]
ds = adq.ShardDataset(SHARDS[:1], shuffle=False, pipes=pipes)
""",
        "for _ in ds: pass",
    ),
}
_FRAME = """
import json, resource, subprocess, sys
import adq_wds as adq
SHARDS, FEATURES, PLAN, OUT = json.loads(sys.argv[1])
def spent():
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
{prepare}
start = spent()
{work}
peak = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([spent() - start, peak / 1024]))
"""


def measure(task: str, checkout: Path, paths: list[Any]) -> tuple[float, float]:
    """Processor seconds and peak memory, in MiB, of a task with the package of a checkout."""
    prepare, work = TASKS[task]
    with tempfile.TemporaryDirectory() as out:
        code = _FRAME.format(prepare=prepare, work=work)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, json.dumps([*paths, out])]
        done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task} in {checkout} failed:\n{done.stderr}")
    seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, mebibytes


def compare(task: str, before: Path, paths: dict[Path, list[Any]], runs: int) -> dict[str, Any]:
    """A task in both versions, in turns."""
    now = Path(__file__).parents[1]
    rounds = [(measure(task, now, paths[now]), measure(task, before, paths[before])) for _ in range(runs)]
    return {
        "seconds": spread([here[0] for here, _ in rounds]),
        "before": spread([there[0] for _, there in rounds]),
        "ratio": spread([here[0] / there[0] for here, there in rounds]),
        "ratio_of_memory": spread([here[1] / there[1] for here, there in rounds]),
    }


def main() -> None:
    """Compare both versions task by task."""
    made = parser(__doc__)
    made.add_argument("--data", help="folder that holds cifar10/ (or ADQ_DATA)")
    made.add_argument("--before", required=True, type=Path, help="a checkout of the other version")
    made.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    a = made.parse_args()
    a.before = a.before.resolve()
    if not (a.before / "adq_wds").is_dir():
        sys.exit(f"{a.before}: no checkout of the package")
    shards = [str(path) for path in sorted(data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))]
    commit = subprocess.run(
        [shutil.which("git") or "git", "-C", str(a.before), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    result: dict[str, Any] = {"runs": a.runs, "before": commit.stdout.strip(), "tasks": {}}
    with tempfile.TemporaryDirectory() as work:
        paths: dict[Path, list[Any]] = {}
        for checkout in (Path(__file__).parents[1], a.before):  # each version reads what it wrote itself
            folder = f"{work}/{len(paths)}"
            arguments = ["run", *shards, "--encoder", "thumbnail", "--keep", "0.2", "-o", folder, "--quiet"]
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            compileall.compile_dir(checkout / "adq_wds", quiet=1)  # else each process may compile it anew
            subprocess.run(
                [sys.executable, "-m", "adq_wds", *arguments], env=environment, cwd=work, check=True
            )
            paths[checkout] = [shards, f"{folder}/features", f"{folder}/plan.parquet"]
        for task in a.tasks:
            result["tasks"][task] = compare(task, a.before, paths, a.runs)
            print(task, result["tasks"][task], flush=True)
    report(result, a.out)


if __name__ == "__main__":
    main()
