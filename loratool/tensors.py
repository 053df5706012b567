"""Tensors as bytes: dtypes, lazy handles, and safetensors files read and written.

Nothing here imports torch. A `Tensor` is a handle: it knows its dtype and shape and loads rows when asked, so an
adapter of any size is described in a few kilobytes and a model larger than memory can be walked.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import xxhash

from loratool.errors import FormatError, LoratoolError, UsageError
from loratool.files import CHUNK, FileBytes, cannot_write, reject_foreign
from loratool.lazy import np

CONTENT_HASH = "loratool.content_hash"  # metadata: set by `write_safetensors`
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
Array = Any  # numpy.ndarray, or torch.Tensor on an accelerator: the algebra uses what both share


@dataclass(frozen=True)
class DType:
    """One element type: the safetensors spelling, its width, and its names elsewhere."""

    name: str
    bits: int
    numpy: str
    torch: str
    floating: bool = False


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        d.name: d
        for d in (
            DType("F64", 64, "float64", "float64", True),
            DType("F32", 32, "float32", "float32", True),
            DType("F16", 16, "float16", "float16", True),
            DType("BF16", 16, "bfloat16", "bfloat16", True),
            DType("F8_E4M3", 8, "float8_e4m3fn", "float8_e4m3fn", True),
            DType("F8_E5M2", 8, "float8_e5m2", "float8_e5m2", True),
            DType("F8_E8M0", 8, "float8_e8m0fnu", "float8_e8m0fnu", True),
            DType("F4", 4, "", "float4_e2m1fn_x2", True),
            DType("C64", 64, "complex64", "complex64"),
            DType("I64", 64, "int64", "int64"),
            DType("I32", 32, "int32", "int32"),
            DType("I16", 16, "int16", "int16"),
            DType("I8", 8, "int8", "int8"),
            DType("U64", 64, "uint64", "uint64"),
            DType("U32", 32, "uint32", "uint32"),
            DType("U16", 16, "uint16", "uint16"),
            DType("U8", 8, "uint8", "uint8"),
            DType("BOOL", 8, "bool", "bool"),
        )
    }
)
_BY_NUMPY = {d.numpy: d.name for d in DTYPES.values() if d.numpy}
_SPOKEN: Mapping[str, str | None] = {"keep": None, "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights and factors may be stored in and computed from


_SCALARS: Mapping[str, str] = {  # how `struct` reads one value; bfloat16 is the upper half of a float32
    **{"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"},
    **{"I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"},
}


def parse_dtype(name: str) -> str | None:
    """The safetensors name of a dtype of the command line; None for ``keep``. Raises UsageError."""
    if name not in _SPOKEN:
        raise UsageError("unknown dtype", repr(name), f"one of {', '.join(_SPOKEN)}")
    return _SPOKEN[name]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors dtype name. Raises FormatError where numpy has none."""
    dtype = DTYPES[name]
    if not dtype.numpy:
        raise FormatError(f"values of dtype {name} cannot be read", hint="only copying is supported")
    return np.dtype(dtype.numpy)


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor (sub-byte types are packed)."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


@dataclass(frozen=True)
class Region:
    """Where a tensor's bytes lie in a file."""

    file: FileBytes
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """A lazy handle of one tensor.

    ``load(start, stop)`` gives rows ``[start, stop)`` of the first axis as a numpy array in the stored dtype
    (a scalar counts as one row). ``region`` is set where the stored bytes lie in a file just as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[int, int], np.ndarray] = field(repr=False, compare=False)
    region: Region | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(values: Any, dtype: str | None = None) -> Tensor:
        """A handle of an array in memory, stored as ``dtype`` (default: the array's own)."""
        array = np.asarray(values)
        if dtype is not None:
            array = array.astype(numpy_dtype(dtype))
        name = _BY_NUMPY.get(array.dtype.name)
        if name is None:
            raise FormatError(f"dtype {array.dtype} has no safetensors spelling")
        rows = array if array.ndim else array.reshape(1)
        return Tensor(name, array.shape, lambda start, stop: rows[start:stop])

    @staticmethod
    def stored(dtype: str, shape: tuple[int, ...], region: Region) -> Tensor:
        """A handle of a tensor in a file."""
        count = shape[0] if shape else 1
        row = region.nbytes // count if count else 0

        def load(start: int, stop: int) -> np.ndarray:
            data = region.file.read(region.offset + start * row, (stop - start) * row)
            return np.frombuffer(data, numpy_dtype(dtype)).reshape(stop - start, *shape[1:])

        return Tensor(dtype, shape, load, region)

    @property
    def rows(self) -> int:
        """Length of the first axis (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return byte_count(self.dtype, self.shape)

    def array(self) -> np.ndarray:
        """The whole tensor in its stored dtype."""
        return self.load(0, self.rows).reshape(self.shape)

    def item(self) -> float:
        """The value of a tensor of one element, whatever its dtype or shape."""
        if self.size != 1:
            raise FormatError(f"one value expected, found shape {list(self.shape)}")
        if self.region is not None and self.dtype in _SCALARS:  # alphas: what headers are read for needs no numpy
            data = bytes(self.region.file.read(self.region.offset, self.region.nbytes))
            return float(struct.unpack(_SCALARS[self.dtype], b"\0\0" + data if self.dtype == "BF16" else data)[0])
        return float(self.array().reshape(-1)[0])

    def float(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``[start, stop)`` in float32 (float64 where stored so)."""
        values = self.load(start, self.rows if stop is None else stop)
        return values if values.dtype == np.float64 else values.astype(np.float32)

    @property
    def T(self) -> Tensor:
        """The transposed matrix [o,i] -> [i,o]."""
        rows, columns = self.shape
        return Tensor(
            self.dtype,
            (columns, rows),
            lambda start, stop: np.ascontiguousarray(self.array()[:, start:stop].T),
        )

    def slice(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis."""
        return Tensor(self.dtype, (stop - start, *self.shape[1:]), lambda a, b: self.load(start + a, start + b))

    @staticmethod
    def joined(tensors: Sequence[Tensor]) -> Tensor:
        """Tensors one below the other along the first axis; stored in float32 where their dtypes differ.

        Raises FormatError when their other axes differ.
        """
        first = tensors[0]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            raise FormatError(f"shapes {[list(tensor.shape) for tensor in tensors]} cannot be stacked")
        if len({tensor.dtype for tensor in tensors}) > 1:
            return Tensor.joined([tensor.cast("F32") for tensor in tensors])
        edges = list(accumulate((tensor.shape[0] for tensor in tensors), initial=0))

        def load(start: int, stop: int) -> np.ndarray:
            spans = ((t, max(start - e, 0), min(stop - e, t.shape[0])) for t, e in zip(tensors, edges, strict=False))
            found = [tensor.load(low, high) for tensor, low, high in spans if low < high]
            return np.concatenate(found) if found else first.load(0, 0)

        return Tensor(first.dtype, (edges[-1], *first.shape[1:]), load)

    def reshape(self, *shape: int) -> Tensor:
        """The same values under another shape of as many elements."""
        if math.prod(shape) != self.size:
            raise FormatError(f"cannot view shape {list(self.shape)} as {list(shape)}")
        if shape == self.shape:
            return self
        whole = lambda start, stop: self.array().reshape(shape)[start:stop]  # noqa: E731
        return Tensor(self.dtype, shape, whole, self.region)

    def cast(self, dtype: str) -> Tensor:
        """The same values stored as ``dtype``, rounded once to nearest even."""
        if dtype == self.dtype:
            return self
        to = numpy_dtype(dtype)

        def load(start: int, stop: int) -> np.ndarray:
            values = self.load(start, stop)
            with np.errstate(over="ignore"):
                return (to_odd(values) if values.dtype == np.float64 and to.itemsize < 4 else values).astype(to)

        return Tensor(dtype, self.shape, load)

    def same_bytes(self, other: Tensor) -> bool:
        """Whether dtype, shape and every stored byte agree."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(self.load(a, b).tobytes() == other.load(a, b).tobytes() for a, b in blocks(self))

    def same_values(self, other: Tensor) -> bool:
        """Whether shape and every value agree, whatever they are stored as."""
        if self.shape != other.shape:
            return False
        return all(np.array_equal(self.float(a, b), other.float(a, b)) for a, b in blocks(self))


def peak(values: np.ndarray) -> float:
    """The largest absolute value of floats of 16 bits or more, 0 without any; NaN where there is one, infinity next.

    Without their signs the bits of floats are ordered as what they stand for, NaN last: no value is converted.
    """
    if not values.size:
        return 0.0
    size = values.dtype.itemsize
    bits = np.dtype(f"u{size}").type
    return float((values.view(bits) & bits((1 << 8 * size - 1) - 1)).max().view(values.dtype))


def to_odd(values: np.ndarray) -> np.ndarray:
    """float64 values in float32, rounded to odd: rounding those to 16 bits is as rounding once (Boldo, Melquiond 2008).

    Neither numpy's bfloat16 nor torch rounds float64 to 16 bits directly; both stop over at float32.
    """
    near = values.astype(np.float32)
    bits = near.view(np.int32)
    bits -= np.abs(near) > np.abs(values)  # towards zero
    bits |= (near != values) | np.isnan(values)
    return near


BLOCK = 1 << 20  # elements of one row block: 4 MiB in float32, few enough to stay in the last cache


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of one block of a tensor: a matter of its shape alone, so that results and hashes are reproducible."""
    rows = shape[0] if shape else 1
    return max(1, min(rows, BLOCK // max(1, math.prod(shape[1:]))))


def blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The row blocks [start, stop) of a tensor that has elements."""
    step = block_rows(tensor.shape)
    for start in range(0, tensor.rows if tensor.size else 0, step):
        yield start, min(start + step, tensor.rows)


def block_digest(values: np.ndarray) -> bytes:
    """The xxh3-128 digest of a block's stored bytes."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def digest(tensor: Tensor) -> bytes:
    """The digests of a tensor's row blocks, one after the other."""
    return b"".join(block_digest(tensor.load(start, stop)) for start, stop in blocks(tensor))


def content_hash(entries: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """A hash of names, dtypes, shapes and values that does not depend on how files hold them.

    ``entries`` are (name, dtype, shape, digest). sha256 over one line for each, sorted by name. It tells whether two
    outputs hold the same tensors; it is no defence against forgery, for which the sha256 of files are.
    """
    lines = sorted(f"{name}\0{dtype}\0{list(shape)}\0{found.hex()}\n" for name, dtype, shape, found in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened safetensors file: its tensors by name, in the order of their bytes, and its metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int


def read_safetensors(path: Path) -> SafetensorsFile:
    """Open a safetensors file: header only, fully checked.

    Raises FormatError for anything the format forbids: foreign, truncated or oversized files, unknown dtypes,
    sizes that disagree with shapes, holes, overlaps, duplicate names. Source: safetensors format specification.
    """
    source = FileBytes(path)
    try:
        header, start = _header(source)
    except OSError as error:
        raise LoratoolError(f"cannot read: {error.strerror}", path) from None
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("metadata is not a table of strings", path)
    tensors = {name: _entry(name, entry, source, start) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda kv: (_region(kv[1]).offset, kv[1].nbytes)))
    _check_layout(ordered, source, start)
    return SafetensorsFile(path, ordered, metadata, start)


def _header(source: FileBytes) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the data behind it."""
    path, size = source.path, source.size
    head = bytes(source.read(0, min(size, 64)))
    reject_foreign(head, path)
    length = int.from_bytes(head[:8], "little")
    if size < 10 or head[8:9] != b"{":
        raise FormatError("not a safetensors file", path)
    if length > MAX_HEADER:
        raise FormatError(f"header of {length:,} bytes is over the limit of {MAX_HEADER:,}", path)
    if 8 + length > size:
        raise FormatError("truncated: the file ends inside its header", path, "fetch or copy it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        header = json.loads(source.read(8, length).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"malformed safetensors header: {error}", path) from None
    if not isinstance(header, dict):
        raise FormatError("malformed safetensors header: not a table", path)
    return header, 8 + length


def _entry(name: str, entry: Any, source: FileBytes, start: int) -> Tensor:
    """One tensor of the header, checked."""
    where = f"{source.path}: {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError("malformed safetensors entry", where) from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"unknown dtype {dtype!r}", where)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)) or len(shape) > 16:
        raise FormatError("malformed safetensors entry: shape or offsets are no sizes", where)
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits % 8 or end - begin != bits // 8:
        raise FormatError(f"{end - begin:,} bytes do not hold {dtype} {list(shape)}", where)
    return Tensor.stored(dtype, shape, Region(source, start + begin, end - begin))


def _region(tensor: Tensor) -> Region:
    assert tensor.region is not None
    return tensor.region


def _check_layout(tensors: Mapping[str, Tensor], source: FileBytes, start: int) -> None:
    """Tensors must follow each other without hole or overlap up to the end of the file."""
    position = start
    for name, tensor in tensors.items():
        if _region(tensor).offset != position:
            raise FormatError("tensors overlap or leave a hole", f"{source.path}: {name}")
        position += tensor.nbytes
    if position > source.size:
        missing = position - source.size
        raise FormatError(f"truncated: {missing:,} bytes are missing", source.path, "fetch or copy it again")
    if position < source.size:
        raise FormatError(f"{source.size - position:,} bytes follow the last tensor", source.path)


def header_bytes(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file (length, JSON, padding to 8 bytes) for tensors laid out in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        end = position + byte_count(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise LoratoolError(f"the header would be {len(text):,} bytes, over the limit of {MAX_HEADER:,}")
    return len(text).to_bytes(8, "little") + text


def canonical_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order in which the safetensors library writes: widest dtype first, then by name."""
    rank = {name: i for i, name in enumerate(_ALIGNMENT)}
    return dict(sorted(tensors.items(), key=lambda kv: (rank[kv[1].dtype], kv[0])))


# safetensors sorts by its own enum of dtypes, descending; equal widths keep the enum's order
_ALIGNMENT = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL"),
)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file, streamed tensor by tensor in the canonical order; bytes written.

    The same tensors and metadata give the same bytes as the safetensors library. An empty ``CONTENT_HASH`` in the
    metadata is filled in.
    """
    ordered = canonical_order(tensors)
    if metadata.get(CONTENT_HASH) == "":
        found = content_hash((n, t.dtype, t.shape, digest(t)) for n, t in ordered.items())
        metadata = {**metadata, CONTENT_HASH: found}
    head = header_bytes(((n, t.dtype, t.shape) for n, t in ordered.items()), metadata)
    try:
        with open(path, "xb") as file:
            file.write(head)
            for tensor in ordered.values():
                write_data(file, tensor)
            return file.tell()
    except OSError as error:
        raise cannot_write(error, path) from None


def write_data(file: BinaryIO, tensor: Tensor) -> None:
    """Append a tensor's bytes, a few MiB of rows at a time."""
    if tensor.size == 0:
        return
    if tensor.region is not None:
        for begin in range(0, tensor.nbytes, CHUNK):
            count = min(CHUNK, tensor.nbytes - begin)
            file.write(tensor.region.file.read(tensor.region.offset + begin, count))
        return
    step = max(1, CHUNK * tensor.rows // max(tensor.nbytes, 1))
    for start in range(0, tensor.rows, step):
        rows = tensor.load(start, min(start + step, tensor.rows))
        file.write(np.ascontiguousarray(rows).tobytes())
