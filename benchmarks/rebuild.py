"""How fast are images rebuilt from three quarters of their patches, beside transformers' masked autoencoder?

ViT-B or ViT-L (decoder of 8 blocks) at 224, patches of 16, random weights that both share, 147 of 196 patches kept: on the
CPU one thread, float32, batches of 16; on CUDA, where there is one, bfloat16, batches of 256. `ours`: `reconstruct_patches`,
from uint8 patches to uint8 images. `transformers`: `ViTMAEForPreTraining`'s forward pass with the same mask, and its pixels
put together the same way, from uint8 images to uint8 images. Images a second and their ratio, in turns; and the share of
the machine's rate for a large matrix product, measured in the same turns, that our network's products alone come to.

    python -m benchmarks.rebuild --net base --batch-size 8 --runs 5 --out benchmarks/results/rebuild.json

Needs transformers (``pip install -e ".[bench]"``). On CUDA: `--net large`, and `--compile default` or `--compile
reduce-overhead` for our network.

Last measured (one core of an AMD EPYC, torch 2.15, transformers 5.23, five rounds): ViT-B, batches of 8: 3.0 images/s, 1.01
of transformers' speed (1.00 to 1.01), 0.95 of the rate of a matrix product; ViT-L, batches of 4 (results/rebuild_large.json):
1.07 images/s, 1.00 of transformers' speed (0.98 to 1.03), 0.93 of the rate of a matrix product. The same pixels. Not run on
CUDA yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from adq_wds.mae.checkpoints import from_hub
from adq_wds.mae.network import MaeSize, MaskedAutoencoder
from adq_wds.mae.patches import cut, joined
from benchmarks.common import parser, report, spread

SIZES = {
    "base": MaeSize((224, 224), 16, 768, 12, 12, 512, 8, 16, norm_eps=1e-12),
    "large": MaeSize((224, 224), 16, 1024, 24, 16, 512, 8, 16, norm_eps=1e-12),
}
KEPT = 147
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed


def operations(size: MaeSize) -> int:
    """Multiplications and additions of the matrix products for one image."""

    def blocks(depth: int, tokens: int, width: int) -> int:
        return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)

    values, D, E, L = size.patch**2 * 3, size.width, size.decoder_width, size.n_patches
    ends = 2 * KEPT * values * D + 2 * (KEPT + 1) * D * E + 2 * L * E * values
    return ends + blocks(size.depth, KEPT + 1, D) + blocks(size.decoder_depth, L + 1, E)


def both(name: str, device: str) -> tuple[MaskedAutoencoder, Any]:
    """Our network and transformers', with the same weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    size = SIZES[name]
    config = ViTMAEConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        mask_ratio=1 - KEPT / size.n_patches,
    )
    theirs: Any = ViTMAEForPreTraining(config)
    theirs.eval()
    ours = MaskedAutoencoder(size).eval()
    ours.load_state_dict(from_hub(theirs.state_dict()))
    return ours.to(device), theirs.to(device)


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=5)
    arguments.add_argument("--batch-size", type=int)
    arguments.add_argument("--net", choices=sorted(SIZES), default="base")
    arguments.add_argument("--compile", metavar="MODE", help="let torch compile our network")
    a = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    n = a.batch_size or (256 if device == "cuda" else 16)
    size = SIZES[a.net]
    ours, theirs = both(a.net, device)
    if a.compile:
        ours.compile(mode=a.compile)

    def precision() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    images = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8, device=device)
    noise = torch.rand(n, size.n_patches, device=device)
    positions = noise.argsort(1)[:, :KEPT].sort(1).values
    keep = torch.zeros(n, size.n_patches, dtype=torch.bool, device=device).scatter_(1, positions, True)
    order = (~keep).float() + torch.arange(size.n_patches, device=device) / 1000  # kept ones first, in order
    patches = cut(images, 16)[torch.arange(n, device=device)[:, None], positions]
    mean, std = (torch.tensor(x, device=device) for x in (size.mean, size.std))

    def by_us() -> torch.Tensor:
        with precision():
            return ours.reconstruct_patches(patches, positions)

    @torch.inference_mode()
    def by_them() -> torch.Tensor:
        with precision():
            x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            predicted = theirs(x, noise=order).logits.float().view(n, size.n_patches, 16, 16, 3)
        pixels = ((predicted * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        pixels[keep] = cut(images, 16)[keep]
        return joined(pixels, size.grid)

    side = SIDE[device]
    matrix = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )

    def product() -> torch.Tensor:
        return matrix @ matrix

    def rate(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return n / (time.perf_counter() - start)

    differ = (by_us().int() - by_them().int()).abs().max().item()
    if differ > (1 if device == "cpu" else 8):
        raise SystemExit(f"not the same images: pixels differ by {differ}")
    found: dict[str, list[float]] = {}
    rate(product)  # the networks have run once
    for _ in range(a.runs):
        one, other, peak = rate(by_us), rate(by_them), rate(product) / n * 2 * side**3
        for name, value in (
            ("ours_per_s", one),
            ("transformers_per_s", other),
            ("ours_is_faster", one / other),
            ("product_tflop_per_s", peak / 1e12),
            ("ours_share_of_product", one * operations(size) / peak),
        ):
            found.setdefault(name, []).append(value)
    measured = {name: spread(values) for name, values in found.items()}
    report(
        {
            "device": device,
            "net": a.net,
            "compile": a.compile,
            "batch": n,
            "kept": KEPT,
            "pixels_differ_by": differ,
            **measured,
        },
        a.out,
    )


if __name__ == "__main__":
    main()
