"""Read the shards that `adq write` made as timm's train.py does: by the `_info.json` beside them.

    adq write "train-{000000..000009}.tar" --plan run/plan.parquet -o small/%06d.tar
    python examples/timm_loader.py small/

The training script of timm's repository takes them as they are:

    python train.py --dataset wds/ --data-dir small/ --train-split train --val-split train --model resnet18 --num-classes 10

(This validates on what it trains on; point it at a folder whose `_info.json` lists a split of other images as well.)
timm reads whole shards and gives them to workers and ranks shard by shard, so let there be a few for each.
"""

from __future__ import annotations

import argparse

from timm.data import create_dataset, create_loader  # type: ignore[attr-defined, unused-ignore]


def main() -> None:
    """Read an epoch, as train.py and as validate.py would."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("folder", help="folder with shards and _info.json")
    arguments.add_argument("--split", default="train")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--side", type=int, default=32)
    a = arguments.parse_args()

    for training in (True, False):
        dataset = create_dataset(
            "wds/",
            root=a.folder,
            split=a.split,
            is_training=training,
            batch_size=a.batch_size,
        )
        loader = create_loader(
            dataset,
            input_size=(3, a.side, a.side),
            batch_size=a.batch_size,
            is_training=training,
            num_workers=a.workers,
            use_prefetcher=False,
            persistent_workers=a.workers > 0,
        )
        labels = [int(label) for _images, batch in loader for label in batch]
        counts = {label: labels.count(label) for label in sorted(set(labels))}
        kind = "training" if training else "validation"
        print(f"{kind}: {len(labels)} samples in {len(loader)} batches, by label {counts}")


if __name__ == "__main__":
    main()
