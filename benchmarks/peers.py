"""How fast is the stream beside litdata, mosaicml-streaming and webdataset, whole and with a subset?

Epochs of the ten CIFAR-10 training shards in the same run, shuffled, one library after the other in each round: raw
(samples with their files as bytes, in one process) and decoded (batches of 256 arrays and labels, 0 and 2 workers that
live on), of all samples, a fifth and a tenth. Ours and webdataset read the tars; litdata and mosaicml-streaming their
own formats, written before from the same bytes, 5,000 samples to a file. `adq` decodes by `adq.Decode`; the peers, and
`adq_pillow`, by one function that calls `Image.open` and `convert`. Every data set and its workers are made, and an
epoch is read, before the clock starts; `open_s` is what making them up to the first item takes. Files are in the page
cache, and ours compares a checksum of every sample, which no peer does; headers it need not read, as the plan lists members.

A subset is a list of samples in ours (a plan) and in webdataset (`select_files`, which reads all bytes); litdata's
`subsample` takes a fraction: whole chunks of the shuffled list of chunks, and a part of one more; mosaicml-streaming's
`choose` takes a number: so many drawn at random from all, about as many of each shard, others in every epoch.

    pip install "adq-wds[bench]"
    python -m benchmarks.peers --data DATA --out benchmarks/results/peers.json

Last measured when shards were mapped into memory; they are read by offset now, and raw rows are to be measured anew (two cores of an AMD EPYC shared with other work, Python 3.11, numpy 2.4.6, litdata 0.2.76, mosaicml-streaming
0.13.0, which asks for numpy below 2.2 but ran, webdataset 1.0.2; medians of five epochs; how many times as fast as each
peer ours is): raw, litdata 1.07 (0.82 to 1.24) on all samples, 0.64 on a fifth and 0.55 on a tenth; mosaicml-streaming 15,
10 and 6.9; webdataset 17, 49 and 66. Decoded without workers, all samples: litdata 1.35, mosaicml-streaming 3.5, webdataset
2.4; a fifth 1.3, 3.4 and 5.3; a tenth 1.3, 2.9 and 8.6. With two workers: 1.4, 2.6 and 2.2; 1.3, 1.7 and 3.4; 1.3, 1.7
and 6.1. What wins there is the decoder: with the peers' Pillow call (`adq_pillow`) ours has 1.01 and 1.03 of litdata's
speed on all samples, without and with workers, and 0.87 to 1.09 on the subsets. On disk: tars 128 MB and a plan of 0.4
MB; litdata 47 MB after 4 s of writing, mosaicml-streaming 47 MB after 3 s (a tar pads every file to 512 bytes and has as
much in front of it).
"""

from __future__ import annotations

import gc
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import streaming
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from benchmarks.common import data_folder, parser, report, spread

BATCH = 256
PER_FILE = 5000  # as in the tars
SHARES = {"full": 1, "fifth": 5, "tenth": 10}  # every n-th sample


@dataclass(frozen=True)
class Setting:
    """What an epoch is."""

    every: int
    workers: int | None  # None: raw

    @property
    def name(self) -> str:
        """In the result."""
        share = next(name for name, every in SHARES.items() if every == self.every)
        return f"{share}_raw" if self.workers is None else f"{share}_decoded_{self.workers}_workers"


@dataclass(frozen=True)
class Stores:
    """Where each library finds the same samples."""

    tars: list[str]
    plans: dict[int, Path]
    keys: dict[int, frozenset[str]]
    litdata: str
    mosaic: str


def decoded(samples: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 32, 32, 3) uint8 and (B,) int64: a batch of any library's samples."""
    images, labels = [], []
    for sample in samples:
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            images.append(np.asarray(image.convert("RGB")))
        labels.append(int(sample["cls"]))
    return stacked(images, labels)


def stacked(images: list[NDArray[np.uint8]], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of what is decoded."""
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def from_pipes(samples: list[tuple[NDArray[np.uint8], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of what `adq.Decode` gives."""
    images, labels = zip(*samples, strict=True)
    return stacked(list(images), list(labels))


def open_adq(stores: Stores, setting: Setting, *, pillow: bool = False) -> Iterable[Any]:
    """The plan's samples, from the tars."""
    plan = stores.plans[setting.every]
    if setting.workers is None:
        return adq.ShardDataset(stores.tars, plan=plan, shuffle=True)
    if pillow:
        ours = adq.ShardDataset(stores.tars, plan=plan, shuffle=True, batch_size=BATCH, collate=decoded)
    else:
        ours = adq.ShardDataset(
            stores.tars,
            plan=plan,
            shuffle=True,
            batch_size=BATCH,
            pipes=[adq.Decode(image="jpg", to="numpy")],
            fields=("image", "label"),
            collate=from_pipes,
        )
    return adq.Loader(ours, num_workers=setting.workers, persistent_workers=setting.workers > 0)


def open_adq_pillow(stores: Stores, setting: Setting) -> Iterable[Any]:
    """As `open_adq`, decoded as the peers do."""
    return open_adq(stores, setting, pillow=True)


def open_webdataset(stores: Stores, setting: Setting) -> Iterable[Any]:
    """All tars, whole; members of other samples are skipped. Buffer of 1,000 as its manual has it."""
    chosen = None if setting.every == 1 else partial(is_member_of, stores.keys[setting.every])
    stream = wds.WebDataset(stores.tars, shardshuffle=len(stores.tars), select_files=chosen).shuffle(1000)
    if setting.workers is not None:
        stream = wds.WebLoader(
            stream.batched(BATCH, collation_fn=decoded),
            batch_size=None,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
        )
    found: Iterable[Any] = stream
    return found


def is_member_of(keys: frozenset[str], name: str) -> bool:
    """Whether a tar member is of one of these samples."""
    return name.rpartition(".")[0] in keys


def open_litdata(stores: Stores, setting: Setting) -> Iterable[Any]:
    """Its own chunks."""
    stream: Iterable[Any] = litdata.StreamingDataset(
        stores.litdata, shuffle=True, drop_last=False, subsample=1 / setting.every
    )
    return _in_loader(litdata.StreamingDataLoader, stream, setting)


def open_mosaic(stores: Stores, setting: Setting) -> Iterable[Any]:
    """Its own shards."""
    n = len(stores.keys[1]) // setting.every
    part = streaming.Stream(local=stores.mosaic, **({} if setting.every == 1 else {"choose": n}))
    stream: Iterable[Any] = streaming.StreamingDataset(streams=[part], shuffle=True, batch_size=BATCH)
    return _in_loader(streaming.StreamingDataLoader, stream, setting)


def _in_loader(
    loader: Callable[..., Iterable[Any]], stream: Iterable[Any], setting: Setting
) -> Iterable[Any]:
    """The stream itself, where it is raw."""
    n = setting.workers
    if n is None:
        return stream
    return loader(stream, batch_size=BATCH, num_workers=n, collate_fn=decoded, persistent_workers=n > 0)


OPENERS: dict[str, Callable[[Stores, Setting], Iterable[Any]]] = {
    "adq": open_adq,
    "adq_pillow": open_adq_pillow,
    "litdata": open_litdata,
    "mosaic": open_mosaic,
    "webdataset": open_webdataset,
}


def as_read(tar: str) -> Iterator[dict[str, Any]]:
    """A shard's samples for the peers' writers: the same bytes, the label as an integer."""
    for sample in wds.WebDataset([tar], shardshuffle=False):
        yield {"jpg": sample["jpg"], "cls": int(sample["cls"])}


def write_litdata(tars: list[str], folder: str) -> None:
    """One chunk a shard."""
    litdata.optimize(
        fn=as_read,
        inputs=tars,
        output_dir=folder,
        chunk_size=PER_FILE,
        num_workers=1,
        start_method="fork",  # else it makes "spawn" the whole program's
        verbose=False,
    )


def write_mosaic(tars: list[str], folder: str) -> None:
    """Shards of as many bytes as the tars."""
    size = max(os.path.getsize(tar) for tar in tars)
    with streaming.MDSWriter(out=folder, columns={"jpg": "bytes", "cls": "int"}, size_limit=size) as out:
        for tar in tars:
            for sample in as_read(tar):
                out.write(sample)


def n_samples(item: Any) -> int:
    """In a sample, or in a batch."""
    return 1 if isinstance(item, dict) else len(item[1])


def epoch(stream: Iterable[Any]) -> tuple[int, float]:
    """Samples, and seconds."""
    start, n = time.perf_counter(), 0
    for item in stream:
        n += n_samples(item)
    return n, time.perf_counter() - start


def measure(stores: Stores, setting: Setting, runs: int) -> dict[str, Any]:
    """Epochs of all libraries, round by round: samples a second, and how many times as fast ours is."""
    names = [name for name in OPENERS if not (setting.workers is None and name == "adq_pillow")]
    streams: dict[str, Iterable[Any]] = {}
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        start = time.perf_counter()
        streams[name] = OPENERS[name](stores, setting)
        items = iter(streams[name])
        n = n_samples(next(items))
        result[name]["open_s"] = float(f"{time.perf_counter() - start:.3g}")
        n += sum(map(n_samples, items))
        if abs(n - len(stores.keys[1]) / setting.every) > 1:
            raise SystemExit(f"{setting.name}: {name} gave {n} samples")
    speed: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            gc.collect()
            n, taken = epoch(streams[name])
            speed[name].append(n / taken)
    for name in names:
        result[name]["per_s"] = spread(speed[name])
        result[name]["ours_is_faster"] = spread(
            [a / b for a, b in zip(speed["adq"], speed[name], strict=True)]
        )
    return result


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=5)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument("--only", default="", help="settings whose name holds this")
    a = arguments.parse_args()
    torch.set_num_threads(1)
    tars = sorted(str(path) for path in data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    found: dict[str, Any] = {"versions": {name: version(name) for name in ("litdata", "mosaicml-streaming")}}
    with tempfile.TemporaryDirectory() as folder:
        whole = adq.Plan.from_keys(tars, None)
        names = [(shard.name, key) for shard in whole for key in shard.spans.keys]
        plans, keys = {}, {}
        for share, every in SHARES.items():
            plans[every] = Path(folder) / f"{share}.parquet"
            keys[every] = frozenset(key for _, key in names[::every])
            adq.Plan.from_keys(tars, names[::every]).save(plans[every])
        stores = Stores(tars, plans, keys, str(Path(folder) / "litdata"), str(Path(folder) / "mosaic"))
        found["tars"] = {"bytes": sum(os.path.getsize(tar) for tar in tars)}
        found["tars"]["plan_bytes"] = plans[1].stat().st_size
        for name, write, target in (
            ("litdata", write_litdata, stores.litdata),
            ("mosaic", write_mosaic, stores.mosaic),
        ):
            start = time.perf_counter()
            write(tars, target)
            taken = float(f"{time.perf_counter() - start:.3g}")
            size = sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())
            found[name] = {"bytes": size, "convert_s": taken}
        for workers in (None, 0, 2):
            for every in SHARES.values():
                setting = Setting(every, workers)
                if a.only in setting.name:
                    found[setting.name] = measure(stores, setting, a.runs)
                    gc.collect()
    report(found, a.out)


if __name__ == "__main__":
    main()
