"""Train with Lightning, which saves where our loader stands in its checkpoints; run again, it goes on there.

    adq run "train-{000000..000009}.tar" --keep 0.2 -o run/
    python examples/lightning_fit.py "train-{000000..000009}.tar" run/plan.parquet --checkpoints ck/

Lightning stores `adq.Loader`'s state by itself, also in mid-epoch, and hands it back with `ckpt_path`. Of a loader without
a length (a pipe may drop samples) it reads one batch ahead, which a resume would miss: let the plan do the dropping.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import adq_wds as adq


def scaled(sample: dict[str, Any]) -> dict[str, Any]:
    """Runs in the workers, so it has a name that they can import."""
    return {**sample, "image": sample["image"].float() / 255}


class Net(lightning.LightningModule):
    """A linear classifier and its data."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__()
        self.a = a
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(a.classes))

    def train_dataloader(self) -> adq.Loader:
        """Called in every process, after the ranks are known."""
        dataset = adq.ShardDataset(
            self.a.shards,
            plan=self.a.plan,
            shuffle=True,
            batch_size=self.a.batch_size,
            pipes=[adq.Decode(to="torch"), adq.Map(scaled)],
            fields=("__key__", "image", "label"),
        )
        return adq.Loader(dataset, num_workers=self.a.workers, persistent_workers=self.a.workers > 0)

    def training_step(self, batch: tuple[list[str], torch.Tensor, torch.Tensor], i: int) -> torch.Tensor:
        """The loss of a batch."""
        keys, images, labels = batch
        print(f"epoch {self.current_epoch}, batch {i}:", *keys)
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    """Fit, or go on."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("shards", help="tar files: a pattern in quotes, or a folder")
    arguments.add_argument("plan", help="plan.parquet")
    arguments.add_argument("--classes", type=int, default=10)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--max-steps", type=int, default=-1, help="stop early, as if interrupted")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    a = arguments.parse_args()

    save = ModelCheckpoint(a.checkpoints, every_n_train_steps=5, save_last=True)
    trainer = lightning.Trainer(max_epochs=a.epochs, max_steps=a.max_steps, callbacks=[save], logger=False)
    last = a.checkpoints / "last.ckpt"
    trainer.fit(Net(a), ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main()
