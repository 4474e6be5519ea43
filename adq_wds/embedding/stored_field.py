"""How are embeddings used that lie in the shards themselves? Each sample brings its own, as an npy field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adq_wds.errors import SampleError, shorten
from adq_wds.samples.fields import Sample, place_error
from adq_wds.samples.npy import MAX_HEADER_BYTES, NpyError, read_header

PREFIX = "field:"


@dataclass(frozen=True)
class FieldEmbeddings:
    """Embeddings in a field of every sample, such as ``emb.npy``; made by `open_embeddings`.

    The field is an npy file of one vector, (D,) or (1, D) of float16, float32 or float64, as `np.save` and WebDataset's
    `TarWriter` write it. The revision holds the field's name alone: the checksums of the shards' samples, which are
    in every features file, vouch for the bytes.

    Raises:
        ValueError: not the name of an npy field.
    """

    field: str
    preprocessing_hash: str = ""
    n_classes: None = None

    def __post_init__(self) -> None:
        parts = self.field.split(".")
        plain = all(part.replace("-", "").replace("_", "").isalnum() for part in parts)
        if not plain or self.field != self.field.lower() or parts[-1] != "npy":
            raise ValueError(
                f"embeddings {PREFIX + self.field!r}: expected {PREFIX} and the name of one field, in lower case, that "
                "ends in npy, such as 'field:emb.npy'"
            )

    @property
    def name(self) -> str:
        """As it was asked for: ``field:`` and the field's name."""
        return PREFIX + self.field

    @property
    def revision(self) -> str:
        """Which field."""
        return f"field={self.field}"

    def row(self, sample: Sample) -> NDArray[np.float32]:
        """The embedding of a sample.

        Args:
            sample: with the field's bytes.

        Returns:
            (D,) float32, D >= 1. Not checked for NaN; float64 beyond float32 is infinite.

        Raises:
            SampleError: no such field, not an npy file of one vector of floats, or fewer or more bytes than it
                declares; names shard, key and field.

        >>> import io
        >>> file = io.BytesIO()
        >>> np.save(file, np.array([0.5, 2.0]))
        >>> FieldEmbeddings("emb.npy").row({"__key__": "a", "emb.npy": file.getvalue()})
        array([0.5, 2. ], dtype=float32)
        """
        data = sample.get(self.field)
        try:
            if data is None:
                raise SampleError(f"no such field; {_has(sample)}; leave the sample out, or take an encoder")
            if not isinstance(data, bytes):
                kind = type(data).__name__
                raise SampleError(
                    f"holds {kind}, expected the bytes of a file; put this stage before .decode()"
                )
            return _vector(data)
        except SampleError as error:
            raise place_error(error, sample, self.field) from error.__cause__


def _vector(data: bytes) -> NDArray[np.float32]:
    """The one vector in an npy file; its header is held against the bytes that are there before it is believed."""
    try:
        header = read_header(data[:MAX_HEADER_BYTES], len(data))
    except NpyError as error:
        raise SampleError(str(error)) from error
    shape = header.shape
    fits = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)
    if not header.is_floats or not fits or shape[-1] < 1 or header.fortran_order:
        order = ", Fortran order" if header.fortran_order else ""
        raise SampleError(
            f"{str(header.dtype)[:80]} of shape {shorten(shape)}{order}; expected one vector, (D,) or (1, D), of "
            "float16, float32 or float64"
        )
    if header.declared_bytes != len(data) - header.start:
        raise SampleError(
            f"declares {header.declared_bytes} bytes of numbers, shape {shape}, and holds {len(data) - header.start}"
        )
    # float64 beyond float32 becomes Inf, which is refused where h is stored
    with np.errstate(over="ignore"):
        return np.frombuffer(data, header.dtype, offset=header.start).astype(np.float32)


def _has(sample: Sample) -> str:
    names = [shorten(name, 40) for name in sorted(sample) if not name.startswith("__")]
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"the sample has {', '.join(names[:10]) or 'no field'}{rest}"
