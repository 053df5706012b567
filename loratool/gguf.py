"""GGUF files as containers: key-value pairs and tensors, read with every size checked, and written.

A file is: magic, version (uint32), counts of tensors and of pairs (uint64); the pairs (key, type, value); for each
tensor its name, axes (fastest first, so reversed), type and offset; then, aligned, the data. All little-endian.
Source: ggml's gguf.md, version 3; version 2 is laid out alike.
"""

from __future__ import annotations

import importlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loratool.errors import FormatError, LoratoolError
from loratool.files import FileBytes
from loratool.lazy import np
from loratool.tensors import DTYPES, Region, SafetensorsFile, Tensor, byte_count, write_data

MAGIC = b"GGUF"
INSTALL = "pip install 'loratool[gguf]'"

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_UINT32, _FLOAT32 = 4, 6
_ALIGNMENT = 32
_MOST_PAIRS, _MOST_TENSORS = 10_000, 200_000
_MOST_HEADER = 64 << 20  # bytes before the data
_MOST_STRINGS = 1 << 20  # strings in one array (a vocabulary)
_KEPT = 4096  # elements of an array beyond which its values are not kept

_TYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_NUMBERS = {name: number for number, name in _TYPES.items()}


class _Quantised(NamedTuple):
    """A block-quantised type: ``block`` values of a row in ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


_QUANTISED = {
    2: _Quantised("Q4_0", 32, 18),
    3: _Quantised("Q4_1", 32, 20),
    6: _Quantised("Q5_0", 32, 22),
    7: _Quantised("Q5_1", 32, 24),
    8: _Quantised("Q8_0", 32, 34),
}


def looks_gguf(path: Path) -> bool:
    """Whether the first bytes are GGUF's, and not the length of a safetensors header."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head.startswith(MAGIC) and head[8:] != b"{"


# ---------------------------------------------------------------- reading


def read_gguf(path: Path) -> SafetensorsFile:
    """Open a GGUF file: headers only. Pairs that are no strings stand in the metadata as JSON.

    Raises FormatError for all that is malformed, for big-endian files and for types that are not read.
    """
    source = FileBytes(path)
    cursor = _Cursor(source)
    if source.size < 24 or bytes(source.read(0, 4)) != MAGIC:
        raise FormatError("not a GGUF file", path)
    cursor.position = 4
    version, tensors, pairs = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise FormatError(f"GGUF version {version}" if version < 1 << 16 else "a big-endian GGUF file", path)
    if tensors > _MOST_TENSORS or pairs > _MOST_PAIRS:
        raise FormatError(f"{tensors:,} tensors and {pairs:,} pairs are over the limits", path)
    metadata: dict[str, str] = {}
    for _ in range(pairs):
        key = cursor.string()
        if key in metadata:
            raise FormatError("a key occurs twice", f"{path}: {key}")
        value = cursor.value(cursor.number("<I"))
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
    entries = [cursor.entry() for _ in range(tensors)]
    alignment = _alignment(metadata, path)
    start = -(-cursor.position // alignment) * alignment
    found: dict[str, Tensor] = {}
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.name in found:
            raise FormatError("a name occurs twice", f"{path}: {entry.name}")
        if entry.offset % alignment:
            raise FormatError(f"an offset that is no multiple of {alignment}", f"{path}: {entry.name}")
        found[entry.name] = _tensor(entry, source, start)
    return SafetensorsFile(path, found, metadata, start)


def _alignment(metadata: Mapping[str, str], path: Path) -> int:
    text = metadata.get("general.alignment", str(_ALIGNMENT))
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1 or value & (value - 1):
        raise FormatError(f"an alignment of {text[:20]}", path)
    return value


@dataclass(frozen=True)
class _Entry:
    """One tensor of the header: axes as numpy orders them."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """Reads the header value by value, never beyond its limit or the end of the file."""

    def __init__(self, source: FileBytes) -> None:
        self.source, self.position = source, 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises FormatError."""
        if self.position + count > min(self.source.size, _MOST_HEADER):
            raise FormatError("the header is cut off, or over its limit of size", self.source.path)
        self.position += count
        return bytes(self._window(self.position - count, count))

    def _window(self, start: int, count: int) -> memoryview:
        """Bytes of the header, from a block that is read ahead."""
        low, data = getattr(self, "_block", (0, b""))
        if not low <= start <= start + count <= low + len(data):
            size = min(max(count, 1 << 20), self.source.size - start)
            low, data = self._block = (start, bytes(self.source.read(start, size)))
        return memoryview(data)[start - low : start - low + count]

    def number(self, kind: str) -> int:
        """One number."""
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]  # type: ignore[no-any-return]

    def string(self) -> str:
        """A length and as many bytes of UTF-8."""
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise FormatError("a string that is no UTF-8", self.source.path) from None

    def value(self, kind: int) -> Any:
        """A value of one type; of long arrays only that they are."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise FormatError(f"a value of unknown type {kind}", self.source.path)
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[inner]))
            return np.frombuffer(data, _SCALARS[inner]).tolist() if count <= _KEPT else f"{count} values"
        if inner != _STRING or count > _MOST_STRINGS:
            raise FormatError(f"an array of {count:,} values of type {inner}", self.source.path)
        strings = [self.string() for _ in range(count)]
        return strings if count <= _KEPT else f"{count} strings"

    def entry(self) -> _Entry:
        """The description of one tensor."""
        name, axes = self.string(), self.number("<I")
        if axes > 16:
            raise FormatError(f"a tensor of {axes} axes", f"{self.source.path}: {name}")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        return _Entry(name, shape, self.number("<I"), self.number("<Q"))


def _tensor(entry: _Entry, source: FileBytes, start: int) -> Tensor:
    """A handle of one tensor, its bytes checked to lie in the file."""
    where = f"{source.path}: {entry.name}"
    quantised = _QUANTISED.get(entry.type)
    if quantised:
        if not entry.shape or entry.shape[-1] % quantised.block:
            raise FormatError(f"{quantised.name} values of shape {list(entry.shape)}", where)
        nbytes = math.prod(entry.shape) // quantised.block * quantised.nbytes
    elif entry.type in _TYPES:
        nbytes = byte_count(_TYPES[entry.type], entry.shape)
    else:
        raise FormatError(f"a tensor of GGML type {entry.type}, which is not read", where)
    if start + entry.offset + nbytes > source.size:
        raise FormatError("truncated: the data ends before this tensor does", where, "fetch or copy it again")
    region = Region(source, start + entry.offset, nbytes)
    if quantised is None:
        return Tensor.stored(_TYPES[entry.type], entry.shape, region)
    return _dequantised(entry, quantised, region, where)


def _dequantised(entry: _Entry, kind: _Quantised, region: Region, where: str) -> Tensor:
    """The float32 values of a block-quantised tensor."""
    row = region.nbytes // entry.shape[0]

    def load(first: int, last: int) -> np.ndarray:
        try:
            quants: Any = importlib.import_module("gguf.quants")
            types: Any = importlib.import_module("gguf.constants").GGMLQuantizationType
        except ImportError:
            raise LoratoolError(f"{kind.name} values need the package gguf", where, INSTALL) from None
        data = np.frombuffer(region.file.read(region.offset + first * row, (last - first) * row), np.uint8)
        values = quants.dequantize(data.reshape(-1, kind.nbytes), types[kind.name])
        return np.asarray(values, np.float32).reshape(last - first, *entry.shape[1:])

    return Tensor("F32", entry.shape, load)


# ---------------------------------------------------------------- writing


def write_gguf(
    path: Path, pairs: Mapping[str, str | int | float | Sequence[int]], tensors: Mapping[str, Tensor]
) -> int:
    """Write a GGUF file, version 3, streamed tensor by tensor in the order given; bytes written.

    Strings, unsigned 32-bit numbers, float32 numbers and arrays of unsigned 32-bit numbers are what ``pairs`` may be.
    Raises FormatError for a dtype that GGUF does not have.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs)))
    for key, value in pairs.items():
        head += _text(key) + _value(value)
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NUMBERS:
            raise FormatError(f"GGUF has no {DTYPES[tensor.dtype].name} tensors", name)
        axes = tensor.shape[::-1]
        number = _NUMBERS[tensor.dtype]
        head += _text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, number, offset)
        offset += _padded(tensor.nbytes)
    with open(path, "xb") as file:
        file.write(head + b"\0" * (_padded(len(head)) - len(head)))
        for tensor in tensors.values():
            write_data(file, tensor)
            file.write(b"\0" * (_padded(tensor.nbytes) - tensor.nbytes))
        return file.tell()


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float | Sequence[int]) -> bytes:
    """The type and the bytes of one value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack(f"<IIQ{len(value)}I", _ARRAY, _UINT32, len(value), *value)
