"""Streams of WebDataset, and what the tests of pipes ask of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds


def raw(urls: str | list[str], **options: Any) -> Any:
    """WebDataset's own stream."""
    return wds.WebDataset(urls, shardshuffle=False, **options)


def ids(samples: Any) -> list[tuple[str, str]]:
    """(file name, key) of each sample."""
    return [(Path(sample["__url__"]).name, sample["__key__"]) for sample in samples]


def npy(array: Any) -> bytes:
    """The bytes of an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
