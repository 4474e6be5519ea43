"""What does a network learn from images that lost a quarter of their patches, rebuilt or with holes?

CIFAR-10, a class-balanced random tenth of it, the same images and the same training (`small` of benchmarks.accuracy) for
all; patches of 4, 48 of 64 kept, read through the package's own pipes, tested on whole images. Patches are dropped where
Grad-CAM++ of the `builtin` classifier sees least, or by chance; once for all epochs, or by chance anew in every epoch (four
draws by turns). What was dropped is rebuilt by the `builtin` masked autoencoder or left grey. `whole` is the baseline. Both
networks of the package have seen all of CIFAR-10 train, the classifier its labels too, so what they choose and rebuild
brings in more than the tenth.

    python -m benchmarks.patch_training --data DATA --at-once 2 --out benchmarks/results/patch_training.json

Last measured (two cores of an AMD EPYC, torch 2.15, seeds 0 to 2; mean and standard deviation in percent): whole 73.54 ±
0.21; Grad-CAM++ rebuilt 72.34 ± 0.34, grey 69.96 ± 0.89; by chance rebuilt 72.05 ± 0.16, grey 67.74 ± 0.37; by chance anew
rebuilt 72.64 ± 0.68, grey 69.26 ± 0.41. So a quarter of the patches costs 0.9 to 1.5 points where it is rebuilt, 3.6 to 5.8
where it is not; as an augmentation it does not pay here, and Grad-CAM++ is ahead of chance by less than the spread once
patches are rebuilt.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import adq_wds as adq
from adq_wds.samples.patch_file import PatchImage
from benchmarks.accuracy import ONE_BIN
from benchmarks.common import data_folder, parser, report
from benchmarks.training import Images, read_images, recipe_for, train

PATCH = 4
DRAWS = 4  # that take turns where epochs differ
WHOLE = "whole"
ARMS: dict[str, tuple[str, bool, bool]] = {
    "gradcam++, rebuilt": ("gradcam++", False, True),
    "gradcam++, grey": ("gradcam++", False, False),
    "random, rebuilt": ("random", False, True),
    "random, grey": ("random", False, False),
    "random anew, rebuilt": ("random", True, True),
    "random anew, grey": ("random", True, False),
}
"""Name → (importance, whether epochs draw anew, whether holes are rebuilt)."""


def with_grey_holes(sample: dict[str, Any]) -> dict[str, Any]:
    """The image, grey where patches are missing; for `Map`."""
    rows, columns = sample["grid"].tolist()
    kept = PatchImage(sample["patches"], sample["positions"], (rows, columns), PATCH)
    return {"image": kept.to_image(), "label": sample["label"]}


def images_of(shards: list[Path], plan: adq.Plan, arm: str, *, seed: int, keep: float) -> Images:
    """All images that a training gets: once, or for `DRAWS` epochs, one after another."""
    pipes: list[adq.Pipe] = [adq.Decode(to="numpy" if arm == WHOLE else "pil")]
    anew = False
    if arm != WHOLE:
        name, anew, rebuilt = ARMS[arm]
        importance = adq.importance(name, patch=PATCH)
        pipes.append(adq.DropPatches(importance, keep=keep, patch=PATCH, seed=seed))
        pipes.append(adq.Reconstruct(adq.load_mae("builtin")) if rebuilt else adq.Map(with_grey_holes))
    dataset = adq.ShardDataset(shards, plan=plan, pipes=pipes, fields=("image", "label"))
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for epoch in range(DRAWS if anew else 1):
        dataset.set_epoch(epoch)
        for image, label in dataset:
            pixels.append(image)
            labels.append(label)
    return Images(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), {}
    )


def reached(shards: list[Path], test: Images, keep: float, task: tuple[str, int, adq.Plan]) -> float:
    """The last accuracy of one training, in percent."""
    torch.set_num_threads(1)
    arm, seed, plan = task
    recipe = recipe_for("small", plan.n_kept / plan.n_samples)
    data = images_of(shards, plan, arm, seed=seed, keep=keep)
    n = plan.n_kept

    def rows(epoch: int) -> NDArray[np.int64]:
        return np.arange(n) + n * (epoch % (len(data.label) // n))

    last = 100 * train(recipe, data, test, rows, seed=seed).curve[-1][1]
    print(f"{arm}, seed {seed}: {last:.2f} %", flush=True)
    return last


def main() -> None:
    """Train all, and report means and spreads."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=3)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--keep", type=float, default=0.1, help="ratio of the images kept")
    arguments.add_argument("--patch-keep", type=float, default=0.75, help="ratio of the patches kept")
    arguments.add_argument("--at-once", type=int, default=1, help="trainings side by side, each in a thread")
    a = arguments.parse_args()
    folder = data_folder("cifar10", a.data)
    shards, test_shards = (sorted(folder.glob(f"cifar10-{part}-*.tar")) for part in ("train", "test"))
    test = read_images(test_shards, torch.device("cpu"))
    options: dict[str, Any] = {name: value for name, value in ONE_BIN.items() if name != "encoder"}
    with tempfile.TemporaryDirectory() as scratch:
        features = adq.embed_shards(shards, "thumbnail", Path(scratch) / "features", progress=False)
        plans = [
            adq.build_plan(features, keep=a.keep, seed=seed, progress=False, **options)
            for seed in range(a.runs)
        ]
        tasks = [(arm, seed, plan) for seed, plan in enumerate(plans) for arm in (WHOLE, *ARMS)]
        with ThreadPoolExecutor(a.at_once) as pool:
            found = list(pool.map(partial(reached, shards, test, a.patch_keep), tasks))
    rows = {}
    for arm in (WHOLE, *ARMS):
        values = [value for value, task in zip(found, tasks, strict=True) if task[0] == arm]
        spread = statistics.stdev(values) if len(values) > 1 else None
        rows[arm] = {
            "n": len(values),
            "mean": round(statistics.mean(values), 2),
            "std": spread and round(spread, 2),
        }
    report({"images": plans[0].n_kept, "patch_keep": a.patch_keep, "accuracy_percent": rows}, a.out)


if __name__ == "__main__":
    main()
