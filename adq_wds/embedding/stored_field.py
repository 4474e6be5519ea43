"""Reads the embedding in an npy field of each sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.embedding.source import StoredEmbeddings
from adq_wds.errors import SampleError, shorten
from adq_wds.samples.fields import Sample, place_error
from adq_wds.samples.npy import FIELD_PREFIX, NpyError, read_vector


@dataclass(frozen=True)
class FieldEmbeddings(StoredEmbeddings):
    """Embeddings in a field of every sample, such as ``emb.npy``.

    The field is an npy file of one vector, (D,) or (1, D) of float16, float32 or float64, as `np.save` and WebDataset's
    `TarWriter` write it. The revision holds the field's name alone, since the samples' checksums in every features
    file cover the bytes.

    Raises:
        ValueError: not the name of an npy field.

    >>> import io
    >>> file = io.BytesIO()
    >>> np.save(file, np.array([0.5, 2.0]))
    >>> FieldEmbeddings("emb.npy").row({"__key__": "a", "emb.npy": file.getvalue()}, shard="a.tar", position=0)
    array([0.5, 2. ], dtype=float32)
    """

    field: str

    def __post_init__(self) -> None:
        parts = self.field.split(".")
        plain = all(part.replace("-", "").replace("_", "").isalnum() for part in parts)
        if not plain or self.field != self.field.lower() or parts[-1] != "npy":
            raise ValueError(
                f"embeddings {FIELD_PREFIX + self.field!r}: expected {FIELD_PREFIX} and the name of one field, in lower case, "
                "that ends in npy, such as 'field:emb.npy'"
            )
        object.__setattr__(self, "name", FIELD_PREFIX + self.field)
        object.__setattr__(self, "revision", f"field={self.field}")

    def row(self, sample: Sample, *, shard: str, position: int) -> NDArray[np.float32]:
        """The vector in a sample's field; see `StoredEmbeddings.row`."""
        data = sample.get(self.field)
        try:
            if data is None:
                raise SampleError(
                    f"no such field; {_fields_of(sample)}; leave the sample out, or take an encoder"
                )
            if not isinstance(data, bytes):
                kind = type(data).__name__
                raise SampleError(
                    f"holds {kind}, expected the bytes of a file; put this stage before .decode()"
                )
            return _vector(data)
        except SampleError as error:
            raise place_error(error, sample, self.field) from error.__cause__


def _vector(data: bytes) -> NDArray[np.float32]:
    """The one vector in an npy file."""
    try:
        vector = read_vector(data)
    except NpyError as error:
        raise SampleError(str(error)) from error
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def _fields_of(sample: Sample) -> str:
    names = [shorten(name, 40) for name in sorted(sample) if not name.startswith("__")]
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"the sample has {', '.join(names[:10]) or 'no field'}{rest}"
