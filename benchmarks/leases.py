"""What does it cost a task that its command shares the folder, and takes a lease for it?

Tasks without any work, by the engine `threads` and by `shared`, alone in a local folder: what is left is the engine. Processor
time beside wall time, which other programs of the machine lengthen.

    python -m benchmarks.leases --out benchmarks/results/leases.json

Last measured: see docs/scale.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator

from adq_wds.engines.engine import Engine, Resources, Result, Task, ThisProcess
from adq_wds.engines.shared import Shared
from benchmarks.common import parser, report, spread


def do_nothing(tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
    """A work whose tasks are done already."""
    for task in tasks:
        yield task, {}


def milliseconds(engine: Engine, n_tasks: int) -> tuple[float, float]:
    """Wall and processor time of a task."""
    tasks = [Task(f"train-{i:06d}.tar", None) for i in range(n_tasks)]
    wall, processor = time.perf_counter(), time.process_time()
    assert sum(1 for _ in engine.run(tasks, do_nothing, Resources())) == n_tasks
    return (
        1e3 * (time.perf_counter() - wall) / n_tasks,
        1e3 * (time.process_time() - processor) / n_tasks,
    )


def main() -> None:
    """Measure both engines, in turn."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=2000, help="tasks of a run")
    args = arguments.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {"threads": [], "shared": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for name, engine in (("threads", ThisProcess()), ("shared", Shared(folder))):
                runs[name].append(milliseconds(engine, args.tasks))
    result = {
        name: {
            "wall_ms": spread([wall for wall, _ in of]),
            "processor_ms": spread([processor for _, processor in of]),
        }
        for name, of in runs.items()
    }
    report({"tasks": args.tasks, "per_task": result}, args.out)


if __name__ == "__main__":
    main()
