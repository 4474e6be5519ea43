"""Does diffusion, or its filter, help a student that is trained without data? And what does `Vary` cost?

    python -m benchmarks.dda digits --seeds 5 --out benchmarks/results/dda_digits.json
    python -m benchmarks.dda overhead --runs 10 --out benchmarks/results/dda_overhead.json

`digits` runs `examples/dda.py` once a seed, which varies split, teacher, bank, diffusion and students, and gives for each arm the
accuracy on held-out digits and the agreement with the teacher on all 1,797, and paired differences from the bank alone and
from a random half, with 95 % intervals (Student's t). `overhead` times `Vary` beside its engine called alone on the same
images, in turns.

Last measured, `overhead`: 1.03 times the engine's CPU time (an engine of 8 ms an image, 32 x 32, batches of 64, one thread of
a loaded machine).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import adq_wds as adq
from benchmarks.common import parser, report
from benchmarks.records import mean_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "dda.py"
ROW = re.compile(r"^(\S.*?) +(\d+) +([\d.]+) +([\d.]+)$", re.MULTILINE)
PAIRS = [
    ("bank + variants", "bank"),
    ("bank + top half by cosine", "bank + random half"),
    ("real digits", "bank + variants"),
]


def digits(seeds: int, work: Path, options: list[str]) -> dict[str, Any]:
    """The table of each seed, means, and paired differences."""
    tables = []
    for seed in range(seeds):
        command = [
            sys.executable,
            str(EXAMPLE),
            "-o",
            str(work / f"seed-{seed}"),
            "--seed",
            str(seed),
            *options,
        ]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        tables.append({arm: [float(a), float(b)] for arm, _, a, b in ROW.findall(text)})
        print(text, flush=True)
    arms = {
        arm: {"accuracy": mean(t[arm][0] for t in tables), "agreement": mean(t[arm][1] for t in tables)}
        for arm in tables[0]
    }
    pairs = {
        f"{a} − {b}": {
            measure: mean_of([t[a][i] - t[b][i] for t in tables])
            for i, measure in enumerate(("accuracy", "agreement"))
        }
        for a, b in PAIRS
    }
    return {"seeds": tables, "mean": arms, "paired": pairs}


def overhead(side: int, batch: int, runs: int) -> dict[str, Any]:
    """CPU seconds of a batch through `Vary`, as a multiple of the engine's own; a convolution stands for the network."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 64, 3, padding=1),
        *[torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(7)],
    ]
    network = torch.nn.Sequential(*layers, torch.nn.Conv2d(64, 3, 3, padding=1)).eval()

    @torch.inference_mode()
    def engine(images: Any, labels: Any, noise: Any) -> Any:
        return network(torch.from_numpy(images + noise)).numpy()

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    samples = [
        {"__key__": str(i), "__url__": "a.tar", "image": image, "label": i % 10}
        for i, image in enumerate(pixels)
    ]
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    vary, noise = adq.Vary(engine, batch_size=batch), rng.standard_normal(images.shape, np.float32)
    labels, times = np.arange(batch) % 10, []
    for _ in range(runs + 1):
        a = time.process_time()
        vary.apply(samples)
        b = time.process_time()
        engine(images, labels, noise)
        times.append((b - a, time.process_time() - b))
    ratios = [with_vary / alone for with_vary, alone in times[1:]]  # the first warms up
    return {
        "side": side, "batch": batch, "runs": runs, "ratio": median(ratios), "ratios": ratios,
        "engine_ms_an_image": median(1000 * alone / batch for _, alone in times[1:]),
    }  # fmt: skip


def main() -> None:
    """Run one of the two."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["digits", "overhead"])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    a, options = arguments.parse_known_args()  # what is left goes to the example
    if a.what == "digits":
        with tempfile.TemporaryDirectory() as folder:
            result = digits(a.seeds, a.work or Path(folder), options)
    else:
        torch.set_num_threads(1)
        result = overhead(32, 64, a.runs)
    report(result, a.out)


if __name__ == "__main__":
    main()
