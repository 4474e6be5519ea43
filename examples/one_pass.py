"""How do I keep a part of shards that no fit has seen, in one pass? Fit a codebook on some shards, stream the others.

    python examples/one_pass.py "train-{000000..000001}.tar" "train-{000002..000009}.tar" --keep 0.2

embeds the first shards and fits a codebook on them; then reads the others once, through WebDataset, and keeps from
every class and bin what the codebook's rates say: no plan of them is ever made.
"""

from __future__ import annotations

import argparse
from collections import Counter

import webdataset as wds

import adq_wds as adq


def main() -> None:
    """Fit, stream, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fit", help="shards to learn from: a WebDataset pattern")
    parser.add_argument("stream", help="shards to keep a part of")
    parser.add_argument("--keep", type=float, default=0.2, help="ratio of samples kept")
    parser.add_argument("--encoder", default="builtin", help="see `adq embed --help`")
    parser.add_argument("--pilot", type=int, help="samples of each class that the codebook is fitted on")
    parser.add_argument(
        "--min-pilot", type=int, default=500, help="classes with fewer go by one rule over all"
    )
    parser.add_argument("--epoch", type=int, default=0, help="another epoch draws other samples")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="features", help="folder for the features of the first shards")
    a = parser.parse_args()

    encoder = adq.encoder(a.encoder)
    features = adq.embed_shards(a.fit, encoder, a.out)
    codebook = adq.fit_codebook(features, pilot=a.pilot, min_pilot=a.min_pilot, out="codebook.safetensors")
    print(codebook)

    dataset = (
        wds.WebDataset(a.stream, shardshuffle=False, empty_check=False)
        .compose(
            adq.Embed(encoder),
            adq.AssignBins(codebook),
            adq.Subsample(
                codebook, keep=a.keep, epoch=a.epoch, keep_fields=True
            ),  # the bin, to count it below
        )
        .decode("pil", partial=True)  # partial: the embedding is an array already
        .to_tuple("jpg;png;webp", "cls", "bin.cls")
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=a.workers)

    bins: Counter[int] = Counter()
    for _image, _label, bin in loader:  # train here
        bins[bin] += 1
    print(f"kept {bins.total():,} samples")
    for k in range(codebook.n_bins):
        print(f"bin {k}: {bins[k]:,}")


if __name__ == "__main__":
    main()
