"""Turns batches of columns, as Ray Data gives them, into samples and back."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from adq_wds.samples.fields import Sample

Batch = dict[str, NDArray[Any]]
"""Columns by field: arrays of B values, ``__key__`` and ``__url__`` among them."""


def is_batch(value: object) -> TypeGuard[Batch]:
    """Whether this is a batch of samples, and not one sample."""
    return isinstance(value, dict) and isinstance(
        value.get("__key__", next(iter(value.values()), None)), np.ndarray
    )


def samples_of(batch: Batch) -> list[Sample]:
    """The samples of a batch; a field that a sample does not have is None or NaN there, and is left out.

    Tuples in fields of ours, which Arrow turns into lists, are tuples again.

    >>> samples_of({"__key__": np.array(["a", "b"]), "txt": np.array([b"x", None], dtype=object)})
    [{'__key__': 'a', 'txt': b'x'}, {'__key__': 'b'}]
    """
    columns = {name: values.tolist() if values.ndim == 1 else list(values) for name, values in batch.items()}
    for name in columns:
        if name.startswith("__adq_"):
            columns[name] = [tuple(v) if isinstance(v, list | np.ndarray) else v for v in columns[name]]
    rows = zip(*columns.values(), strict=True)
    return [
        {name: value for name, value in zip(columns, row, strict=True) if not _is_missing(value)}
        for row in rows
    ]


def batch_of(samples: list[Sample]) -> Batch:
    """The inverse: columns of objects; arrays of one shape and type are stacked.

    >>> batch_of([{"__key__": "a", "txt": b"x"}, {"__key__": "b"}])["txt"]
    array([b'x', None], dtype=object)
    """
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _column([sample.get(name) for sample in samples]) for name in names}


def _column(values: list[Any]) -> NDArray[Any]:
    if (
        all(isinstance(value, np.ndarray) for value in values)
        and len({(v.shape, v.dtype) for v in values}) == 1
    ):
        return np.stack(values)
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):  # at once, a list of tensors would be taken for one array
        column[i] = value
    return column


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
