"""Draws parents and their variants as one SVG: for each class one variant that the cosine filter keeps, one it drops."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

import adq_wds as adq
from benchmarks.proof_figure import STYLE

CELL, STEP, LEFT, HEIGHT = 48, 60, 76, 148  # of an image, a class, the names, a part
PARTS = ("kept", "dropped")


def picture(seed_folder: Path) -> str:
    """The bank and the variants of `benchmarks.dda digits` in a seed's folder; each shown one has its part's median cosine."""
    bank = {str(s["__key__"]): s for s in adq.ShardDataset(str(seed_folder / "bank" / "*.tar"))}
    shards = str(seed_folder / "variants" / "variant-0" / "*.tar")
    half = adq.select_samples(shards, by="json:cos", keep=0.5)
    kept = {row["key"] for row in half.table().to_pylist() if row["kept"]}
    of_class: dict[tuple[int, str], list[tuple[float, str, bytes]]] = {}
    for sample in adq.ShardDataset(shards):
        key, cos = str(sample["__key__"]), float(json.loads(sample["json"])["cos"])
        part = PARTS[key not in kept]
        of_class.setdefault((int(sample["cls"]), part), []).append((cos, key, sample["png"]))
    marks = []
    for (label, part), variants in sorted(of_class.items()):
        cos, key, png = sorted(variants)[len(variants) // 2]
        x, y = LEFT + label * STEP, 24 + HEIGHT * PARTS.index(part)
        marks += [_image(bank[key]["png"], x, y), _image(png, x, y + CELL + 6)]
        marks.append(f'<text class="middle" x="{x + CELL / 2:g}" y="{y + 2 * CELL + 22}">{cos:.2f}</text>')
    for i, part in enumerate(PARTS):
        y = 24 + HEIGHT * i
        for name, down in (("parent", CELL / 2), ("variant", 1.5 * CELL + 6), ("cosine", 2 * CELL + 18)):
            marks.append(f'<text class="end" x="{LEFT - 8}" y="{y + down + 4:g}">{name}</text>')
        marks.append(f'<text class="title" x="{LEFT}" y="{y - 8}">{part}</text>')
    width, height = LEFT + 10 * STEP, 24 + 2 * HEIGHT - 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Parents and variants of each class, with their cosines"><style>{STYLE}\n'
        f"image {{ image-rendering: pixelated }}</style>\n"
        f'<rect class="paper" width="{width}" height="{height}"/>\n' + "\n".join(marks) + "\n</svg>\n"
    )


def _image(png: bytes, x: int, y: int) -> str:
    """As the teacher sees it: the mean of the channels."""
    grey, out = np.asarray(Image.open(io.BytesIO(png))).mean(2).round().astype(np.uint8), io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return f'<image x="{x}" y="{y}" width="{CELL}" height="{CELL}" href="data:image/png;base64,{data}"/>'
