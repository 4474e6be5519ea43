"""How do I add a score of my own? A class with a name and one method; here, how colourful an image is.

    python examples/own_score.py "train-{000000..000009}.tar" --keep 0.2

embeds the shards with the score beside the texture, lets it decide with texture and diversity, and prints the bins. To
give it to others by name (``adq run --scores texture diversity colourfulness``), let a package declare it:

    [project.entry-points."adq_wds.scores"]
    colourfulness = "my_package.scores:Colourfulness"
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq


class Colourfulness(adq.Score):
    """Spread of the two colour differences red − green and yellow − blue, as Hasler and Süsstrunk (2003) have it."""

    name = "colourfulness"

    def per_sample(self, image: Image.Image, h: NDArray[np.float32]) -> float:
        """`image` is upright and RGB; `h`, its embedding, is not needed here."""
        red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float64), -1, 0)  # (H, W) each
        differences = red - green, 0.5 * (red + green) - blue
        spread = np.hypot(*(d.std() for d in differences))
        return float(spread + 0.3 * np.hypot(*(d.mean() for d in differences)))


def main() -> None:
    """Features, plan, bins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "shards", nargs="+", help="tar shards: a pattern in quotes, a folder, or several paths"
    )
    parser.add_argument("--keep", type=float, default=0.2, help="ratio of samples kept")
    parser.add_argument("--encoder", default="builtin", help="see `adq embed --help`")
    parser.add_argument("--out", default="features", help="folder for the features")
    arguments = parser.parse_args()

    score = Colourfulness()
    features = adq.embed_shards(arguments.shards, arguments.encoder, arguments.out, scores=[score])
    plan = adq.build_plan(features, keep=arguments.keep, scores=["texture", "diversity", score])
    print(plan)
    for k, bin in enumerate(plan.header["bins"]):
        print(
            f"bin {k}: colourfulness {bin[score.name]:.1f}, texture {bin['texture']:.3f}, kept {bin['kept']:,}"
        )


if __name__ == "__main__":
    main()
