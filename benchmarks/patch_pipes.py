"""What do the patch pipes cost a stream, and what do `adq write --patch-keep` and its importances make of photographs?

Images a processor second of each stage alone, one thread, taken in turn: photographs at 224 with patches of 16, and CIFAR-10's
images with patches of 4; as a share of decoding the same images whole by `Decode`. Then new shards of the photographs: bytes
on disk, container included, as a share of the same images written whole at the same size and quality.

    ADQ_DATA=DIR python -m benchmarks.patch_pipes --out benchmarks/results/patch_pipes.json

DIR holds imagenet-sample/ and cifar10/ shards.

Last measured (one of two cores of an AMD EPYC shared with other programs, Python 3.11, Pillow 13.0, 200 photographs and
2,000 images of 32 x 32; medians of seven): photographs are dropped at 13,700 a second by chance, 2,570 by texture, 1,660 by
gradcam++ of the built-in classifier, stored at 2,770, and decoded to patches at 5,410, in 0.89 of the time of the whole image
(0.84 to 0.94; `Decode` copies them out of the strip); to a whole image with filled holes in 0.97. At 32 x 32: 37,900, 12,400
and 2,280, where decoding takes as long as the drop by chance; gradcam++ is the classifier's forward pass, 14 times the
decoding. New shards of photographs, a quarter dropped: 0.781 of the bytes of whole images by chance, 0.811 by gradcam++,
0.872 by texture; half dropped: 0.559, 0.595, 0.678. What matters costs more.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import adq_wds as adq
from adq_wds.pipes.resize import centre_square
from adq_wds.samples.patch_file import encode_whole
from adq_wds.writing.write_shards import write_kept
from benchmarks.common import data_folder, parser, report, spread

IMPORTANCES = ("random", "texture", "gradcam++")
Samples = list[dict[str, Any]]


def decoded(folder: Path, pattern: str, limit: int, size: int | None) -> Samples:
    """Samples with a PIL image, at its size."""
    paths = sorted(map(str, folder.glob(pattern)))
    samples = list(islice(adq.ShardDataset(paths, pipes=[adq.Decode()]), limit))
    if size is not None:
        samples = [{**sample, "image": centre_square(sample["image"], size)} for sample in samples]
    return samples


def stages(samples: Samples, patch: int) -> dict[str, tuple[adq.Pipe, Samples]]:
    """Each stage, and what it is given."""
    names = {name: adq.DropPatches(adq.importance(name, patch=patch), keep=0.75) for name in IMPORTANCES}
    found: dict[str, tuple[adq.Pipe, Samples]] = {
        f"drop, {name}": (pipe, samples) for name, pipe in names.items()
    }
    whole = [{**s, "jpg": encode_whole(np.asarray(s["image"]))} for s in samples]
    for sample in whole:
        del sample["image"]
    found["decode whole"] = (adq.Decode(label=None, to="numpy"), whole)
    if patch % 16 == 0:
        kept = names["random"].apply(samples)
        encode = adq.EncodePatches()
        stored = encode.apply(kept)
        found["encode"] = (encode, kept)
        found["decode to patches"] = (adq.Decode(label=None, to="patches"), stored)
        found["decode to numpy, holes filled"] = (adq.Decode(label=None, to="numpy"), stored)
    return found


def rates(work: dict[str, tuple[adq.Pipe, Samples]], runs: int) -> dict[str, Any]:
    """Images a processor second, and time as a share of decoding whole images, each run's own."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs + 1):  # the first warms up
        for name, (pipe, samples) in work.items():
            chunks = [samples[i : i + pipe.chunk] for i in range(0, len(samples), pipe.chunk)]

            gc.collect()
            start = time.process_time()
            for chunk in chunks:
                pipe.apply(chunk)
            taken[name].append(time.process_time() - start)
    n = len(next(iter(work.values()))[1])
    base = taken["decode whole"][1:]
    return {
        name: {
            "per_s": spread([n / t for t in times[1:]]),
            "by_decode": spread([t / b for t, b in zip(times[1:], base, strict=True)]),
        }
        for name, times in taken.items()
    }


def written(folder: Path) -> dict[str, Any]:
    """Shares of the bytes of whole images, for each importance and keep ratio."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as out:
        for name in IMPORTANCES:
            for keep in (0.75, 0.5):
                target = f"{out}/{name}-{keep}/%06d.tar"
                made = write_kept(folder, None, target, patch_keep=keep, importance=name, progress=False)
                assert made.parts is not None
                total = {
                    way: sum(part[way] for part in made.parts.values())
                    for way in ("before", "whole", "after")
                }
                images = made.parts["images"]
                found[f"{name}, keep {keep}"] = {
                    "bytes": total,
                    "images_of_whole": round(images["after"] / images["whole"], 3),
                    "of_whole": round(total["after"] / total["whole"], 3),
                    "of_before": round(total["after"] / total["before"], 3),
                }
    return found


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=7)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    import torch

    torch.set_num_threads(1)
    photographs, cifar10 = data_folder("imagenet-sample", a.data), data_folder("cifar10", a.data)
    result = {
        "photographs at 224, patches of 16": rates(
            stages(decoded(photographs, "*.tar", 200, 224), 16), a.runs
        ),
        "cifar10, patches of 4": rates(stages(decoded(cifar10, "*test*.tar", 2000, None), 4), a.runs),
        "written": written(photographs),
    }
    report(result, a.out)


if __name__ == "__main__":
    main()
