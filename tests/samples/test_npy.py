"""Are vectors read as NumPy reads them, and is every other file refused before anything of its size is allocated?"""

import io
import struct
from typing import Any

import numpy as np
import pytest

from adq_wds.samples.npy import MAX_HEADER_BYTES, NpyError, read_vector


def npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version, allow_pickle=False)
    return file.getvalue()


def declaring(text: str, data: bytes = bytes(8)) -> bytes:
    """A file with this header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode("latin1") + data


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1,), (1, 1)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_vector_is_what_numpy_reads(dtype: str, shape: Any, version: tuple[int, int]) -> None:
    data = npy(np.arange(np.prod(shape)).reshape(shape).astype(dtype), version)
    vector = read_vector(data)
    assert (vector.dtype, vector.shape) == (np.dtype(dtype), (shape[-1],))
    assert vector.tolist() == np.load(io.BytesIO(data)).ravel().tolist()


F4 = npy(np.zeros(2, np.float32))
REFUSED = {
    "no npy": (b"no numbers here", "not an npy file of version 1 or 2"),
    "empty": (b"", "not an npy file of version 1 or 2"),
    "version 3": (npy(np.zeros(2, np.float32), (3, 0)), "not an npy file of version 1 or 2"),
    "a header longer than the file": (F4[:20], "declares a header of 128 bytes in a file of 20"),
    "a header longer than NumPy's": (declaring("{" * MAX_HEADER_BYTES), "declares a header of 10010 bytes"),
    "a header of another language": (declaring("{'descr': __import__('os')}"), "damaged npy header"),
    "a header of brackets": (declaring("(" * 9000), "damaged npy header"),
    "integers": (npy(np.zeros(2, np.int64)), "int64 of shape .* expected one vector"),
    "float128": (
        declaring("{'descr': '<f16', 'fortran_order': False, 'shape': (1,)}\n", bytes(16)),
        "expected one vec",
    ),
    "objects": (declaring("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"), "object of shape"),
    "a matrix": (npy(np.zeros((2, 2), np.float32)), r"float32 of shape .*2.*2.*expected one vector"),
    "no number": (npy(np.zeros(0, np.float32)), "expected one vector"),
    "a negative length": (
        declaring("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}\n"),
        "expected one vec",
    ),
    "a scalar": (npy(np.float32(1)), "expected one vector"),
    "Fortran order": (npy(np.asfortranarray(np.zeros((2, 2), np.float32))), "Fortran order"),
    "a number too few": (F4[:-4], "declares 8 bytes of numbers, shape .*, and holds 4; write it again"),
    "a byte too many": (F4 + b"x", "declares 8 bytes of numbers, shape .*, and holds 9"),
    "numbers for a petabyte": (
        declaring("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1125899906842624)}\n"),
        "declares 9007199254740992 bytes of numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_file_is_refused_by_its_header(name: str) -> None:
    data, text = REFUSED[name]
    with pytest.raises(NpyError, match=text):
        read_vector(data)
