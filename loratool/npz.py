"""numpy's npz archives, read without ever unpickling: a zip of `.npy` members, each checked before a value is read.

Source: the zip application note, numpy's NEP 1 (`.npy` format); MLX writes bfloat16 as the void type ``V2``.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from loratool.errors import FormatError
from loratool.lazy import np
from loratool.tensors import DTYPES, SafetensorsFile, Tensor, numpy_dtype

_MOST = 100_000  # members of one archive
_RATIO = 1100  # of what a member unpacks to and its bytes in the archive: more than deflate can reach
_HEADER = 10_000  # bytes of one member's header
_SPELLINGS = {d.numpy: d.name for d in DTYPES.values() if d.numpy}
# RuntimeError: zipfile's for a member that is encrypted, or compressed in a way that it does not know
_FAULTS = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError)


def looks_npz(path: Path) -> bool:
    """Whether a file is a zip archive of `.npy` members only (PyTorch's pickles are zip archives too)."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _FAULTS:
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> SafetensorsFile:
    """Open an npz archive: headers only, no object arrays, no member that unpacks to more than it can hold.

    Raises FormatError for all that is malformed or hostile.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > _MOST:
                raise FormatError(f"{len(members):,} members are over the limit of {_MOST:,}", path)
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in tensors:
                    raise FormatError("a name occurs twice", f"{path}: {name}")
                tensors[name] = _member(archive, member, path)
    except _FAULTS as error:
        raise FormatError(f"not a readable npz archive: {error}", path) from None
    return SafetensorsFile(path, tensors, {}, 0)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    """A handle of one array, its header checked against the size of its member."""
    where = f"{path}: {member.filename}"
    if member.flag_bits & 1:
        raise FormatError("an encrypted member", where)
    if member.file_size > _RATIO * max(member.compress_size, 1):
        raise FormatError(f"{member.compress_size:,} bytes claim to unpack to {member.file_size:,}", where)
    with archive.open(member) as file:
        shape, fortran, dtype = _header(file, where)
        start = file.tell()
    name = "BF16" if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None else _SPELLINGS.get(dtype.name)
    if name is None or dtype.hasobject:
        raise FormatError(f"values of dtype {dtype.str}, which is no tensor's", where)
    if start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise FormatError(f"{member.file_size - start:,} bytes do not hold {dtype.str} {list(shape)}", where)

    def load(first: int, last: int) -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as again, again.open(member) as file:
                file.seek(start)
                values = np.frombuffer(file.read(), dtype)
        except _FAULTS as error:
            raise FormatError(f"a damaged member: {error}", where) from None
        if values.size != math.prod(shape):
            raise FormatError("a member that ends early", where)
        values = values.view(numpy_dtype("BF16")) if name == "BF16" else values.astype(dtype.newbyteorder("="))
        return values.reshape(shape or (1,), order="F" if fortran else "C")[first:last]

    return Tensor(name, shape, load)


def _header(file: BinaryIO | Any, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) at the head of a member."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise FormatError(f"npy version {version}", where)
        shape, fortran, dtype = readers[version](file, max_header_size=_HEADER)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"a malformed header: {first[:100]}", where) from None
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or len(shape) > 16:
        raise FormatError(f"shape {str(shape)[:60]} is no shape", where)
    return shape, fortran, dtype
