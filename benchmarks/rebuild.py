"""How fast are images rebuilt from three quarters of their patches, beside transformers' masked autoencoder?

ViT-B (12 blocks, decoder of 8) at 224, patches of 16, random weights that both share, 147 of 196 patches kept, batches of
16, one thread on the CPU in float32; on CUDA, where there is one, in bfloat16, batches of 256. `ours`: `reconstruct_patches`,
from uint8 patches to uint8 images. `transformers`: `ViTMAEForPreTraining`'s forward pass with the same mask, and its pixels put together the
same way, from uint8 images to uint8 images. Images a second and their ratio, in turns.

    python -m benchmarks.rebuild --out benchmarks/results/rebuild.json

Needs transformers (``pip install -e ".[bench]"``).

Last measured (one core of an AMD EPYC, torch 2.15, transformers 5.23, five rounds, batches of 8): 2.9 images/s each, ours
1.00 of transformers' speed (0.99 to 1.04); the same pixels. Not run on CUDA yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from adq_wds.models.mae import MaeSize, MaskedAutoencoder
from adq_wds.models.mae_checkpoints import from_hub
from adq_wds.models.mae_patches import cut, joined
from benchmarks.common import parser, report, spread

SIZE = MaeSize((224, 224), 16, 768, 12, 12, 512, 8, 16, norm_eps=1e-12)
KEPT = 147


def both(device: str) -> tuple[MaskedAutoencoder, Any]:
    """Our network and transformers', with the same weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    config = ViTMAEConfig(mask_ratio=1 - KEPT / SIZE.n_patches)
    theirs: Any = ViTMAEForPreTraining(config)
    theirs.eval()
    ours = MaskedAutoencoder(SIZE).eval()
    ours.load_state_dict(from_hub(theirs.state_dict()))
    return ours.to(device), theirs.to(device)


def main() -> None:
    """Measure."""
    arguments = parser(__doc__)
    arguments.set_defaults(runs=5)
    arguments.add_argument("--batch-size", type=int)
    a = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    n = a.batch_size or (256 if device == "cuda" else 16)
    ours, theirs = both(device)

    def precision() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    images = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8, device=device)
    noise = torch.rand(n, SIZE.n_patches, device=device)
    positions = noise.argsort(1)[:, :KEPT].sort(1).values
    keep = torch.zeros(n, SIZE.n_patches, dtype=torch.bool, device=device).scatter_(1, positions, True)
    order = (~keep).float() + torch.arange(SIZE.n_patches, device=device) / 1000  # kept ones first, in order
    patches = cut(images, 16)[torch.arange(n, device=device)[:, None], positions]
    mean, std = (torch.tensor(x, device=device) for x in (SIZE.mean, SIZE.std))

    def by_us() -> torch.Tensor:
        with precision():
            return ours.reconstruct_patches(patches, positions)

    @torch.inference_mode()
    def by_them() -> torch.Tensor:
        with precision():
            x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            predicted = theirs(x, noise=order).logits.float().view(n, SIZE.n_patches, 16, 16, 3)
        pixels = ((predicted * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        pixels[keep] = cut(images, 16)[keep]
        return joined(pixels, SIZE.grid)

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
    for _ in range(a.runs):
        one, other = rate(by_us), rate(by_them)
        for name, value in (
            ("ours_per_s", one),
            ("transformers_per_s", other),
            ("ours_is_faster", one / other),
        ):
            found.setdefault(name, []).append(value)
    measured = {name: spread(values) for name, values in found.items()}
    report({"device": device, "batch": n, "kept": KEPT, "pixels_differ_by": differ, **measured}, a.out)


if __name__ == "__main__":
    main()
