"""Keep a fifth of an instruction-tuning set: unlabelled text in tar shards, by embeddings of its own.

    python examples/instruction_tuning.py                          # on a small set that it makes itself
    python examples/instruction_tuning.py "text-{000..099}.tar"    # a json field with "instruction" in each sample

The embeddings are hashed character n-grams, which need no model; any text encoder may take the place of `embed`.
"""

import argparse
import io
import json
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import adq_wds as adq

WIDTH = 256


def embed(texts: list[str]) -> NDArray[np.float32]:
    """(n, 256) float32: how often each hashed trigram of characters stands in a text."""
    h = np.zeros((len(texts), WIDTH), np.float32)
    for row, text in zip(h, texts, strict=True):
        for i in range(len(text) - 2):
            row[zlib.crc32(text[i : i + 3].lower().encode()) % WIDTH] += 1
    return np.log1p(h)  # so that frequent trigrams do not decide alone


def make_shards(folder: Path) -> str:
    """Two shards of 150 instructions; gives their pattern."""
    verbs, things = (
        ("Translate", "Summarise", "Explain", "Sort", "Rhyme"),
        ("a poem", "this list", "the news"),
    )
    for shard in range(2):
        with tarfile.open(folder / f"text-{shard}.tar", "w") as tar:
            for i in range(150):
                text = f"{verbs[i % 5]} {things[i % 3]} in {i + 2} words"
                data = json.dumps({"instruction": text}).encode()
                member = tarfile.TarInfo(f"{shard}-{i:04d}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder / "text-{0..1}.tar")


def main() -> None:
    """Embed, plan, and read the kept samples as a trainer would."""
    parser = argparse.ArgumentParser(description="Keep a fifth of an instruction-tuning set.")
    parser.add_argument("shards", nargs="?", help="pattern of the shards; a small set is made unless given")
    given = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as scratch:
        shards = given or make_shards(Path(scratch))
        samples = list(adq.ShardDataset(shards, shuffle=False))
        keys = [(Path(sample["__url__"]).name, sample["__key__"]) for sample in samples]
        rows = embed([json.loads(sample["json"])["instruction"] for sample in samples])
        features = adq.Features.from_arrays(shards, keys, rows, out=Path(scratch) / "features")
        plan = adq.build_plan(features, keep=0.2)
        print(plan)
        for sample in list(adq.ShardDataset(shards, plan=plan, seed=0))[:3]:
            print(sample["__key__"], json.loads(sample["json"])["instruction"])


if __name__ == "__main__":
    main()
