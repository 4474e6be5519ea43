"""Sets that people have, made from a clean one: wrong labels, long tails, copies, and all three.

Each set is written as WebDataset shards, as a user's would lie on disk, with a `truth.json` beside them that only an
evaluation may read: the true label of each key, and whose copy it is.

    python -m benchmarks.sets --data DATA --out SETS [--sets noise20 tail50 …] [--seed 0]

- `clean`: the images as they are.
- `noise20`, `noise40`: this share of all labels is wrong, each drawn from the other classes alike (symmetric).
- `noise-pairs`: two fifths of truck, bird and deer are called automobile, airplane and horse, and of cat and dog each
  the other (asymmetric; Patrini et al. 2017, arXiv 1609.03683).
- `tail50`, `tail100`: class c keeps n·r^(-c/(C-1)) images, so the first has r times as many as the last (Cui et al. 2019,
  arXiv 1901.05555).
- `copies`: 44 % of the images, 4,000 in 22,000 of them stored eight times: as many samples as before.
- `all-three`: `noise20`, then `tail50`, then a tenth of the rest stored eight times.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adq_wds.core.rng import generator
from adq_wds.files import make_folder, write_text
from adq_wds.remote.open_shard import open_shard
from adq_wds.shards.names import shard_names
from adq_wds.shards.samples_in_tar import iter_spans, read_sample
from benchmarks.common import data_folder

PAIRS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}  # CIFAR-10: truck→automobile, bird→airplane, deer→horse, cat↔dog
TIMES = 8  # how often a copied image is stored
PER_SHARD = 5000


@dataclass(frozen=True)
class Image:
    """One stored sample: its key, the image's bytes, the label it carries, the true one, and whose copy it is."""

    key: str
    jpg: bytes
    label: int
    true: int
    copy_of: str | None = None


def wrong_labels(images: Sequence[Image], share: float, rng: np.random.Generator) -> list[Image]:
    """Exactly round(share · N) samples get a label drawn from the other classes."""
    n_classes = 1 + max(image.label for image in images)
    chosen = rng.permutation(len(images))[: round(share * len(images))]
    shift = np.zeros(len(images), dtype=int)
    shift[chosen] = rng.integers(1, n_classes, len(chosen))
    return [
        replace(image, label=(image.label + int(by)) % n_classes)
        for image, by in zip(images, shift, strict=True)
    ]


def paired_labels(images: Sequence[Image], share: float, rng: np.random.Generator) -> list[Image]:
    """Of each class in `PAIRS` this share gets the label of its counterpart."""
    out = list(images)
    for label, other in PAIRS.items():
        rows = [i for i, image in enumerate(images) if image.label == label]
        for i in rng.permutation(rows)[: round(share * len(rows))]:
            out[i] = replace(out[i], label=other)
    return out


def long_tail(images: Sequence[Image], ratio: float, rng: np.random.Generator) -> list[Image]:
    """Class c (by the label carried) keeps n·ratio^(-c/(C-1)) of its images, n those of the smallest class."""
    labels = np.array([image.label for image in images])
    counts = np.bincount(labels)
    keep = np.zeros(len(images), dtype=bool)
    for c in range(len(counts)):
        n = round(counts.min() * ratio ** (-c / (len(counts) - 1)))
        keep[rng.permutation(np.flatnonzero(labels == c))[:n]] = True
    return [image for image, kept in zip(images, keep, strict=True) if kept]


def copies(images: Sequence[Image], n: int, rng: np.random.Generator) -> list[Image]:
    """`n` of the images are stored `TIMES` times; all are put into a new order."""
    chosen = set(rng.permutation(len(images))[:n].tolist())
    out = list(images)
    for i in sorted(chosen):
        image = images[i]
        out += [replace(image, key=f"{image.key}_{k}", copy_of=image.key) for k in range(1, TIMES)]
    return [out[i] for i in rng.permutation(len(out))]


def _copies(images: Sequence[Image], rng: np.random.Generator) -> list[Image]:
    some = [images[i] for i in np.sort(rng.permutation(len(images))[: round(0.44 * len(images))])]
    return copies(some, round(len(some) * 4 / 22), rng)


def _all_three(images: Sequence[Image], rng: np.random.Generator) -> list[Image]:
    rest = long_tail(wrong_labels(images, 0.2, rng), 50, rng)
    return copies(rest, round(0.1 * len(rest)), rng)


SETS: dict[str, Callable[[Sequence[Image], np.random.Generator], list[Image]]] = {
    "clean": lambda images, rng: list(images),
    "noise20": lambda images, rng: wrong_labels(images, 0.2, rng),
    "noise40": lambda images, rng: wrong_labels(images, 0.4, rng),
    "noise-pairs": lambda images, rng: paired_labels(images, 0.4, rng),
    "tail50": lambda images, rng: long_tail(images, 50, rng),
    "tail100": lambda images, rng: long_tail(images, 100, rng),
    "copies": _copies,
    "all-three": _all_three,
}


def read_source(shards: Sequence[Path]) -> list[Image]:
    """The images of some shards (fields jpg and cls), shards by name, samples in tar order."""
    names = shard_names([str(path) for path in shards])
    images = []
    for name, path in sorted(zip(names, shards, strict=True)):
        with open_shard(path) as buffer:
            for span in iter_spans(buffer, shard=name):
                sample = read_sample(buffer, span, url=str(path))
                label = int(sample["cls"])
                images.append(Image(span.key, sample["jpg"], label, label))
    return images


def write_set(images: Sequence[Image], folder: Path, *, per_shard: int = PER_SHARD) -> list[Path]:
    """Write shards and `truth.json`; the same images give the same bytes."""
    make_folder(folder)
    paths = []
    for first in range(0, len(images), per_shard):
        path = folder / f"train-{first // per_shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in images[first : first + per_shard]:
                for field, data in (("jpg", image.jpg), ("cls", str(image.label).encode())):
                    member = tarfile.TarInfo(f"{image.key}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        paths.append(path)
    truth = {image.key: [image.true, image.copy_of] for image in images}
    write_text(folder / "truth.json", json.dumps(truth))  # last: a folder without it is not complete
    return paths


def make_set(name: str, source: Sequence[Path], out: Path, *, seed: int = 0) -> list[Path]:
    """The shards of a set in `out/<name>-<seed>/`, made unless they are there."""
    folder = out / f"{name}-{seed}"
    if not (folder / "truth.json").exists():
        write_set(SETS[name](read_source(source), generator(seed, 0, "", name, purpose="set")), folder)
    return sorted(folder.glob("train-*.tar"))


def main() -> None:
    """Write sets and say how large they are."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--data", default=os.environ.get("ADQ_DATA"), help="folder that holds cifar10/")
    made.add_argument("--out", required=True, help="folder for the sets, one folder each")
    made.add_argument("--sets", choices=list(SETS), nargs="+", default=list(SETS), metavar="SET")
    made.add_argument("--seed", type=int, default=0)
    a = made.parse_args()
    source = sorted(data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    for name in a.sets:
        paths = make_set(name, source, Path(a.out), seed=a.seed)
        truth = json.loads((paths[0].parent / "truth.json").read_text(encoding="utf-8"))
        print(f"{name}: {len(truth):,} samples in {len(paths)} shards, {paths[0].parent}")


if __name__ == "__main__":
    main()
