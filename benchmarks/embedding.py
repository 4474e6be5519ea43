"""What does embedding cost beyond its parts, and what does each step of the cheap encoder take?

Photographs through timm's resnet18 at 224: the whole job (scan, decode, texture, network, writing) against decoding
alone plus the network alone, each with both cores. CIFAR-10 through `thumbnail`: µs a sample for the header scan with
checksums, decoding, texture, the encoder, and the whole job. Weights are random: they do not change the time.

    python -m benchmarks.embedding --data DATA --out benchmarks/results/embedding.json

Last measured (two cores of an AMD EPYC, Python 3.11, numpy 2.4, torch 2.15): 600 photographs take 7.7 s, 0.97 times (0.95 to 0.99) the sum of decoding
alone (0.34 s) and the network alone (7.6 s): decoding hides behind the network. CIFAR-10 with `thumbnail` takes 106 us a
sample for the whole job; of that scan and checksum 7.4, decoding 41, texture 9.3, encoder 6.7 when run alone. The rest is
threads that wait for each other (Pillow holds the interpreter for most of a 32x32 JPEG), labels, hashing and writing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import adq_wds as adq
from adq_wds.embedding.batch import texture_of
from adq_wds.engines.threads import cores
from adq_wds.models.network_encoder import NetworkEncoder
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.models.timm_encoder import timm_encoder
from adq_wds.remote.open_shard import open_shard
from adq_wds.samples.whole_image import whole_image
from adq_wds.shards.samples_in_tar import iter_spans, read_sample
from adq_wds.tables.spans import scan_spans
from benchmarks.common import data_folder, parser, report, spread

BATCH = 64


def samples_of(path: Path) -> list[dict[str, Any]]:
    """All samples of a shard, as bytes."""
    with open_shard(path) as buffer:
        return [read_sample(buffer, span, url=str(path)) for span in iter_spans(buffer, shard=path.name)]


def in_threads(work: Callable[[list[Any]], Any], items: list[Any]) -> list[Any]:
    """`work` on batches, in as many threads as cores, one intra-op thread each: as the job runs them."""
    with ThreadPoolExecutor(cores(), initializer=lambda: torch.set_num_threads(1)) as pool:
        return list(pool.map(work, [items[i : i + BATCH] for i in range(0, len(items), BATCH)]))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def one_round(many: list[Path], samples: list[dict[str, Any]], encoder: NetworkEncoder) -> tuple[float, ...]:
    """Seconds of the whole job, of decoding alone, and of the network alone in two ways."""
    decode, batches = timed(lambda: in_threads(lambda part: [whole_image(s)[1] for s in part], samples))
    images = [image for batch in batches for image in batch]
    network, _ = timed(lambda: in_threads(encoder, images))
    torch.set_num_threads(cores())
    all_cores, _ = timed(lambda: [encoder(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
    with tempfile.TemporaryDirectory() as out:
        whole, _ = timed(lambda: adq.embed_shards(many, encoder, out, progress=False))
    return whole, decode, network, all_cores


def photographs(shards: list[Path], runs: int, repeat: int) -> dict[str, Any]:
    """The whole job against its parts; rounds alternate, so noise falls on both."""
    encoder = timm_encoder("resnet18", pretrained=False)
    with tempfile.TemporaryDirectory() as scratch:
        many = []
        for i in range(repeat):
            for shard in shards:
                many.append(Path(scratch) / f"{i}-{shard.name}")
                shutil.copy(shard, many[-1])
        samples = [sample for shard in many for sample in samples_of(shard)]
        one_round(many[:1], samples[:BATCH], encoder)  # warm up
        rounds = [one_round(many, samples, encoder) for _ in range(runs)]
    return {
        "samples": len(samples),
        "whole_s": spread([r[0] for r in rounds]),
        "decode_alone_s": spread([r[1] for r in rounds]),
        "network_alone_s": spread([r[2] for r in rounds]),
        "network_alone_batch_by_batch_on_all_cores_s": spread([r[3] for r in rounds]),
        "whole_over_decode_plus_network": spread([r[0] / (r[1] + min(r[2], r[3])) for r in rounds]),
    }


def thumbnails(shards: list[Path], runs: int) -> dict[str, Any]:
    """µs a sample of each step alone (one thread), and of the whole job."""
    steps: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as out:
            scan, _ = timed(lambda: [scan_spans(shard, shard=shard.name) for shard in shards])
            samples = [sample for shard in shards for sample in samples_of(shard)]
            decode, images = timed(lambda: [whole_image(sample)[1] for sample in samples])
            batches: list[list[Image.Image]] = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
            level, _ = timed(lambda: [texture_of(batch) for batch in batches])
            encode, _ = timed(lambda: [Thumbnail()(batch) for batch in batches])
            whole, _ = timed(lambda: adq.embed_shards(shards, "thumbnail", out, progress=False))
        for name, value in (
            ("scan_and_crc32", scan),
            ("decode", decode),
            ("texture", level),
            ("encode", encode),
            ("whole_job", whole),
        ):
            steps.setdefault(name, []).append(value / len(samples) * 1e6)
    return {"samples": len(samples), **{f"{name}_us": spread(values) for name, values in steps.items()}}


def main() -> None:
    """Measure both."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", default=os.environ.get("ADQ_DATA"))
    arguments.add_argument(
        "--repeat", type=int, default=3, help="copies of the photographs, for a longer run"
    )
    a = arguments.parse_args()
    photos = sorted(data_folder("imagenet-sample", a.data).glob("*.tar"))
    small = sorted(data_folder("cifar10", a.data).glob("*train*.tar"))[:2]
    report(
        {"photographs": photographs(photos, a.runs, a.repeat), "cifar10": thumbnails(small, a.runs)}, a.out
    )


if __name__ == "__main__":
    main()
