"""Read the kept samples of a plan through Hugging Face `datasets`, streamed from the same local shards.

    pip install datasets
    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/huggingface_datasets.py "train-{000000..000009}.tar" run/plan.parquet

The one line that `adq_wds` adds is `.filter(keeps, ...)`, before images are decoded. `datasets` has parsed the fields
by then, so `verify=False`: keys are held against the plan, bytes are not (`adq verify` does that). What its own reader
of tars loses, it does not tell: the example counts.
"""

from __future__ import annotations

import argparse
import io
import os

from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import adq_wds as adq
from adq_wds.shards.names import expand_urls

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the shards are here


def main() -> None:
    """Stream one epoch in batches, and count."""
    import datasets  # reads HF_HUB_OFFLINE when it is imported

    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="WebDataset pattern")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--image", default="jpg", help="field with the image")
    a = arguments.parse_args()

    plan = adq.load_plan(a.plan)
    subsample = adq.Subsample(plan, verify=False)

    def keeps(key: str, url: str) -> bool:
        return bool(subsample.apply([{"__key__": key, "__url__": url}]))

    to_tensor = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])

    def pixels(row: dict[str, dict[str, bytes]]) -> dict[str, object]:
        return {"pixels": to_tensor(Image.open(io.BytesIO(row[a.image]["bytes"])).convert("RGB"))}

    files = expand_urls(a.shards)
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    stream = stream.cast_column(a.image, datasets.Image(decode=False))
    stream = stream.filter(keeps, input_columns=["__key__", "__url__"])  # the one line
    stream = stream.shuffle(seed=0, buffer_size=1000).map(pixels, remove_columns=[a.image])
    seen = sum(len(batch["pixels"]) for batch in DataLoader(stream, batch_size=64, num_workers=2))
    print(f"{seen:,} of the {len(plan):,} kept samples, out of {plan.n_samples:,}")


if __name__ == "__main__":
    main()
