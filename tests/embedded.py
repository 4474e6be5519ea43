"""Shards, encoders and comparisons for tests of embedding."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import adq_wds as adq
from adq_wds.embedding import views
from adq_wds.models.thumbnail import Thumbnail
from adq_wds.samples.fields import IMAGE_FIELDS
from adq_wds.shards.names import expand_urls, shard_names
from adq_wds.tables.views import Views
from tests.conftest import write_tar

Fields = Mapping[str, bytes | None]


def png(image: int | Image.Image) -> bytes:
    """An image as a file; of a number, 8 × 8 pixels of noise of its own."""
    if isinstance(image, int):
        image = Image.fromarray(np.random.default_rng(image).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def shard_of(path: Path, samples: int | range, bad: Mapping[int, Fields] | None = None) -> Path:
    """Samples k0, k1, ... of noise, of class 0 and 1 in turn; `bad` replaces (or with None takes away) fields of some."""
    members = []
    for i in range(samples) if isinstance(samples, int) else samples:
        fields: dict[str, bytes | None] = {"png": png(i), "cls": b"%d" % (i % 2), **(bad or {}).get(i, {})}
        members += [(f"k{i}.{name}", data) for name, data in fields.items() if data is not None]
    return write_tar(path, members)


class Watching:
    """An encoder that notes what it is given; it answers with thumbnails, or what a function says."""

    name, revision, preprocessing_hash = "watching", "1", ""

    def __init__(self, answer: Callable[[Sequence[Image.Image]], Any] | None = None, **names: str) -> None:
        self.__dict__.update(names)
        self.answer = answer or Thumbnail()
        self.sizes: list[tuple[int, int]] = []
        self.calls: list[int] = []

    @property
    def n(self) -> int:
        """Images so far."""
        return len(self.sizes)

    def __call__(self, images: Sequence[Image.Image]) -> Any:
        self.sizes += [image.size for image in images]
        self.calls.append(len(images))
        return self.answer(images)


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder of features or views."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def unit(h: NDArray[Any]) -> NDArray[np.float16]:
    """Rows as features hold them."""
    wide = h.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)


def embed_views(features: adq.Features, shards: Any, encoder: Any, **options: Any) -> Views:
    """The views of some features, as `adq.embed_shards` makes them with ``views=``."""
    paths = expand_urls(shards)
    usual: dict[str, Any] = {"views": 20_000, "image": IMAGE_FIELDS, "batch_size": 64, "workers": 2}
    path_of = dict(zip(shard_names(paths), paths, strict=True))
    return views.embed_views(features, path_of, adq.encoder(encoder), **usual | options)
