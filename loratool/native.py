"""The compiled inner loops of native.c, where this installation has them: numpy does the same work without.

Arrays of stored values are C-contiguous; factors may have any strides. Nothing here holds Python's lock.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_ssize_t, c_void_p
from functools import cache
from pathlib import Path

from loratool.lazy import np

LIBRARY = Path(__file__).with_name("_native.so")
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
_PANEL = 2048  # columns of ``down`` that are put in order at a time
_PACKED = 1 << 16  # elements of it at a time: they stay in the second cache


class _Matrix(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("row", c_ssize_t), ("column", c_ssize_t))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled loops; None where they are not there or this processor cannot run them."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    block = (c_int, c_void_p, c_void_p)
    library.merge.argtypes = (
        *block,
        *2 * (c_size_t,),
        *2 * (POINTER(_Matrix),),
        c_size_t,
        c_void_p,
        c_size_t,
        POINTER(c_int64),
    )
    library.merge.restype = c_int64
    library.widen.argtypes = library.narrow.argtypes = (*block, c_size_t)
    library.widen.restype = None
    return library if library.supported() else None


def available() -> bool:
    """Whether the compiled loops can be used here."""
    return _library() is not None


def handles(dtype: np.dtype) -> bool:
    """Whether the loops know this dtype: float32, bfloat16 and float16."""
    return dtype.name in _KINDS


def panel(rank: int, columns: int) -> int:
    """How many columns are put in order at a time, a multiple of 16; ``rank`` times that is the room it needs."""
    return max(16, min(_PANEL, _PACKED // max(rank, 1), columns + 15) // 16 * 16)


def merge(
    stored: np.ndarray, up: np.ndarray, down: np.ndarray, out: np.ndarray, room: np.ndarray, count_zeros: bool
) -> tuple[int, int]:
    """out = round(stored [rows,columns] + up [rows,r] @ down [r,columns]); both of one dtype, the factors float32.

    ``room`` holds r * panel(r, columns) float32. Gives how many values kept their bits, -1 where one is not finite (and
    ``out`` is then undefined); and how many elements of the product are zero, 0 where they are not counted.
    """
    library = _library()
    assert library is not None
    rows, columns = stored.shape
    rank, zeros = up.shape[1], c_int64()
    block = (_KINDS[stored.dtype.name], stored.ctypes.data, out.ctypes.data, rows, columns)
    factors = (byref(_matrix(up)), byref(_matrix(down)), rank, room.ctypes.data, panel(rank, columns))
    kept = int(library.merge(*block, *factors, byref(zeros) if count_zeros else None))
    return kept, zeros.value


def widen(stored: np.ndarray, out: np.ndarray) -> None:
    """out = stored, in float32; of bfloat16 or float16."""
    library = _library()
    assert library is not None
    library.widen(_KINDS[stored.dtype.name], stored.ctypes.data, out.ctypes.data, stored.size)


def narrow(values: np.ndarray, out: np.ndarray) -> bool:
    """out = round(values), of float32; False where one is not finite, and ``out`` is then undefined."""
    library = _library()
    assert library is not None
    return bool(library.narrow(_KINDS[out.dtype.name], values.ctypes.data, out.ctypes.data, out.size))


def _matrix(values: np.ndarray) -> _Matrix:
    """A float32 matrix as native.c takes it."""
    row, column = (stride // values.itemsize for stride in values.strides)
    return _Matrix(values.ctypes.data, row, column)
