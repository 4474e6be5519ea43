"""How fast is the source, and does it read kept bytes only?

`ShardDataset` on the ten CIFAR-10 training shards in one process, shuffled, beside WebDataset in the same run: a full
raw epoch in samples a second, opening the plan and verifying all headers included; 10 % kept, likewise, in seconds and
bytes (WebDataset selects by `select_files`); decoded, 20 % kept against the full epoch, and against Pillow alone on the
same bytes in memory; and what taking the crc32 of all payloads costs of the decoded stream (the last two in processor
seconds). Files are in the page cache, but for `cold`: bytes that the kernel fetched for 10 % after being told to forget
the shards, as a share of the files (0 where another process has them mapped: then it forgets nothing).

    python -m benchmarks.source --data DATA --out benchmarks/results/source.json

Last measured when shards were mapped into memory; they are read by offset now, and raw rows are to be measured anew (two cores of an AMD EPYC, Python 3.11, numpy 2.4; medians of five rounds): raw 263,000 samples/s, 10 ×
WebDataset; 10 % kept 29 × faster than WebDataset (26 to 30), 12.8 of 128.5 MB read, 0.24 of the files fetched when cold
(pages of 4 kB, samples of 2.5); decoded, 20 % kept takes 0.22 of the full epoch; Pillow alone takes 1.16 times as long as
the stream, which decodes plain JPEGs more directly; checksums 0.9 % of it (0.8 to 0.9).
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import webdataset as wds
from PIL import Image

import adq_wds as adq
from benchmarks.common import data_folder, parser, report, seconds, spread


def count(stream: Iterable[Any]) -> int:
    """Use a stream up."""
    return sum(1 for _ in stream)


def every_nth(plan: adq.Plan, n: int, path: Path) -> Path:
    """A plan that keeps every n-th sample of another."""
    names = [(shard.name, key) for shard in plan for key in shard.spans.keys]
    adq.Plan.from_keys(SHARDS, names[::n]).save(path)
    return path


def by_select_files(path: Path) -> int:
    """WebDataset's way to a subset: the members' names are looked up, all bytes are read."""
    wanted = set(adq.load_plan(path).keys())
    return count(
        wds.WebDataset(
            SHARDS, shardshuffle=False, select_files=lambda name: name.rpartition(".")[0] in wanted
        )
    )


def pillow(images: list[bytes]) -> int:
    """Decode, and nothing else."""
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")
    return len(images)


def checksums(samples: list[list[bytes]], times: int) -> int:
    """Take the crc32 of each sample's payloads, and nothing else."""
    for _ in range(times):
        for payloads in samples:
            found = 0
            for data in payloads:
                found = crc32(data, found)
    return len(samples)


def fetched(work: Callable[[], Any]) -> int:
    """Bytes that the kernel fetched from storage for this process during `work`, after forgetting the shards."""
    for path in SHARDS:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    before = _read_bytes()
    work()
    return _read_bytes() - before


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=5)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    a = arguments.parse_args()
    SHARDS[:] = sorted(str(path) for path in data_folder("cifar10", a.data).glob("cifar10-train-*.tar"))
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], int]) -> float:
        n = [0]
        (taken,) = seconds(lambda: n.__setitem__(0, work()), 1)
        found.setdefault(f"{name}_s", []).append(taken)
        found.setdefault(f"{name}_per_s", []).append(n[0] / taken)
        return taken

    def worked(work: Callable[[], int]) -> float:
        """Processor seconds: two ways of the same work, compared on a machine that does other things too."""
        start = time.process_time()
        work()
        return time.process_time() - start

    def ratio(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        whole = adq.Plan.from_keys(SHARDS, None)
        whole.save(Path(folder) / "all.parquet")
        everything = Path(folder) / "all.parquet"
        tenth = every_nth(whole, 10, Path(folder) / "tenth.parquet")
        fifth = every_nth(whole, 5, Path(folder) / "fifth.parquet")

        def stream(plan: Path, *pipes: adq.Pipe, **options: Any) -> adq.ShardDataset:
            return adq.ShardDataset(SHARDS, plan=plan, shuffle=True, pipes=pipes, **options)

        decode = adq.Decode(image="jpg;png", to="pil")
        payloads = [[data for name, data in s.items() if name[:2] != "__"] for s in stream(fifth)]
        images = [sample.get("jpg") or sample["png"] for sample in stream(fifth)]
        count(stream(everything))  # caches warm
        for _ in range(a.runs):
            timed("raw_full", lambda: count(stream(everything)))
            timed("raw_full_webdataset", lambda: count(wds.WebDataset(SHARDS, shardshuffle=False)))
            ours = timed("raw_tenth", lambda: count(stream(tenth)))
            ratio(
                "tenth_webdataset_by_ours",
                timed("raw_tenth_webdataset", lambda: by_select_files(tenth)) / ours,
            )
            full = timed("decoded_full", lambda: count(stream(everything, decode)))
            fifth_s = timed("decoded_fifth", lambda: count(stream(fifth, decode)))
            ratio("fifth_by_full_decoded", fifth_s / full)
            checked = worked(lambda: count(stream(fifth, decode)))
            ratio("pillow_by_stream_decoded", worked(lambda: pillow(images)) / checked)
            ratio("checksums_share_decoded", worked(lambda: checksums(payloads, 20)) / 20 / checked)
        size = sum(os.path.getsize(path) for path in SHARDS)
        plan = adq.load_plan(tenth)
        bytes_read = sum(int(shard.spans.n_bytes[shard.kept].sum()) for shard in plan)
        cold = fetched(lambda: count(stream(tenth))) / size
    report(
        {
            "samples": whole.n_samples,
            "bytes": size,
            "bytes_read_tenth": bytes_read,
            "cold_tenth_fetched_share": round(cold, 3),
            **{name: spread(values) for name, values in found.items()},
        },
        a.out,
    )


SHARDS: list[str] = []

if __name__ == "__main__":
    main()
