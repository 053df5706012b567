"""onnxruntime's adapter file (``.onnx_adapter``): named tensors that a run may be given in place of optional inputs.

A flatbuffer of the schema (identifier TORT, at byte 4)

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8]; }
    table Adapter { format_version: int; adapter_version: int; model_version: int; parameters: [Parameter]; }

with ONNX' numbers for data types and format version 1. What is written has one table layout for both kinds of table,
children behind their parents, and values at multiples of 64. Sources: onnxruntime/lora (adapter_schema.fbs); the
flatbuffers specification ("internals").
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import FormatError, LoratoolError
from loratool.files import CHUNK, FileBytes, cannot_write
from loratool.lazy import np
from loratool.tensors import Region, SafetensorsFile, Tensor, byte_count

TAG = b"TORT"
FORMAT_VERSION = 1
_LIMIT = (1 << 31) - 1  # offsets are 32 bits wide, and half of them signed
_ALIGNMENT = 64
_VTABLE, _TABLE = 12, 20  # bytes: two sizes and four fields; four fields and the way back to the vtable
_MOST = 1 << 20  # parameters, and bytes of one name


@dataclass(frozen=True)
class Container:
    """What an adapter file holds."""

    tensors: Mapping[str, Tensor]
    adapter_version: int = 0
    model_version: int = 0


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Place:
    """Where the parts of one parameter begin."""

    table: int
    name: int
    dims: int
    values: int


def write_container(path: Path, held: Container) -> int:
    """Write an adapter file, streamed; bytes written. The same tensors give the same bytes, in whatever order.

    Raises LoratoolError (I/O; more than 2 GiB, which the format cannot hold).
    """
    from loratool.onnx.graph import NUMBERS

    names = sorted(held.tensors)
    places, end = _layout(names, held)
    if end > _LIMIT:
        raise LoratoolError(f"an adapter file of {end:,} bytes is over the format's limit of 2 GiB", path)
    root, vector = 8 + _VTABLE, 8 + _VTABLE + _TABLE
    try:
        with open(path, "xb") as file:
            file.write(struct.pack("<I4s6H", root, TAG, _VTABLE, _TABLE, 4, 8, 12, 16))
            versions = (FORMAT_VERSION, held.adapter_version, held.model_version)
            file.write(struct.pack("<iiiiI", root - 8, *versions, vector - (root + 16)))
            file.write(struct.pack("<I", len(names)))
            for n, place in enumerate(places):
                file.write(struct.pack("<I", place.table - (vector + 4 + 4 * n)))
            for name, place in zip(names, places, strict=True):
                tensor, at = held.tensors[name], place.table
                _pad(file, at)
                offsets = (place.name - (at + 4), place.dims - (at + 8))
                file.write(struct.pack("<iII", at - 8, *offsets))
                file.write(struct.pack("<iI", NUMBERS[tensor.dtype], place.values - (at + 16)))
                text = name.encode()
                file.write(struct.pack("<I", len(text)) + text + b"\0")
                _pad(file, place.dims)
                file.write(struct.pack(f"<I{len(tensor.shape)}q", len(tensor.shape), *tensor.shape))
                _pad(file, place.values)
                file.write(struct.pack("<I", tensor.nbytes))
                _write_values(file, tensor)
            return file.tell()
    except OSError as error:
        raise cannot_write(error, path) from None


def _layout(names: list[str], held: Container) -> tuple[list[_Place], int]:
    """Where everything goes, and where it ends."""
    position = 8 + _VTABLE + _TABLE + 4 + 4 * len(names)
    places = []
    for name in names:
        tensor = held.tensors[name]
        table = _aligned(position, 4)
        text = table + _TABLE
        dims = _aligned(text + 4 + len(name.encode()) + 1 + 4, 8) - 4  # the numbers at 8, their count before
        values = _aligned(dims + 4 + 8 * len(tensor.shape) + 4, _ALIGNMENT) - 4
        places.append(_Place(table, text, dims, values))
        position = values + 4 + tensor.nbytes
    return places, position


def _aligned(position: int, unit: int) -> int:
    return -(-position // unit) * unit


def _pad(file: object, position: int) -> None:
    file.write(bytes(position - file.tell()))  # type: ignore[attr-defined]


def _write_values(file: object, tensor: Tensor) -> None:
    step = max(1, CHUNK * tensor.rows // max(tensor.nbytes, 1))
    for start in range(0, tensor.rows if tensor.size else 0, step):
        rows = tensor.load(start, min(start + step, tensor.rows))
        file.write(np.ascontiguousarray(rows).tobytes())  # type: ignore[attr-defined]


# ---------------------------------------------------------------- reading


def is_container(head: bytes) -> bool:
    """Whether a file that begins so is one."""
    return head[4:8] == TAG


def looks_container(path: Path) -> bool:
    """Whether a file is one, by its first bytes."""
    with open(path, "rb") as file:
        return is_container(file.read(8))


def open_container(path: Path) -> SafetensorsFile:
    """An adapter file as formats see files: its tensors and its versions. Raises what `read_container` raises."""
    held = read_container(path)
    versions = {"adapter_version": str(held.adapter_version), "model_version": str(held.model_version)}
    return SafetensorsFile(path, held.tensors, versions, 0)


def read_container(path: Path) -> Container:
    """Open an adapter file: its tables only, fully checked. Raises FormatError, LoratoolError (I/O)."""
    try:
        return _Reader(FileBytes(path)).container()
    except struct.error:
        raise FormatError("malformed adapter file", path) from None
    except OSError as error:
        raise LoratoolError(f"cannot read: {error.strerror}", path) from None


class _Reader:
    """Follows offsets within a file, never out of it."""

    def __init__(self, file: FileBytes) -> None:
        self.file = file

    def bytes(self, at: int, count: int) -> bytes:
        if at < 0 or count < 0 or at + count > self.file.size:
            raise FormatError("malformed adapter file: an offset points out of it", self.file.path)
        return bytes(self.file.read(at, count))

    def number(self, at: int, kind: str = "I") -> int:
        return int(struct.unpack(f"<{kind}", self.bytes(at, struct.calcsize(f"<{kind}")))[0])

    def field(self, table: int, slot: int) -> int | None:
        """Where a field of a table lies; None where it is left out."""
        vtable = table - self.number(table, "i")
        if 4 + 2 * slot + 2 > self.number(vtable, "H"):
            return None
        offset = self.number(vtable + 4 + 2 * slot, "H")
        return table + offset if offset else None

    def scalar(self, table: int, slot: int) -> int:
        at = self.field(table, slot)
        return 0 if at is None else self.number(at, "i")

    def vector(self, table: int, slot: int) -> tuple[int, int]:
        """Where the elements of a vector begin, and their count."""
        at = self.field(table, slot)
        if at is None:
            return 0, 0
        start = at + self.number(at)
        return start + 4, self.number(start)

    def container(self) -> Container:
        if self.file.size < 8 + _VTABLE or not is_container(self.bytes(0, 8)):
            raise FormatError("not an adapter file of onnxruntime", self.file.path)
        root = self.number(0)
        version = self.scalar(root, 0)
        if version != FORMAT_VERSION:
            raise FormatError(f"format version {version} is not known", self.file.path)
        start, count = self.vector(root, 3)
        if count > min(_MOST, self.file.size // 4):
            raise FormatError("malformed adapter file: too many parameters", self.file.path)
        tensors: dict[str, Tensor] = {}
        for n in range(count):
            at = start + 4 * n
            name, tensor = self.parameter(at + self.number(at))
            if name in tensors:
                raise FormatError("a name occurs twice", f"{self.file.path}: {name}")
            tensors[name] = tensor
        return Container(dict(sorted(tensors.items())), self.scalar(root, 1), self.scalar(root, 2))

    def parameter(self, table: int) -> tuple[str, Tensor]:
        """One tensor, checked."""
        from loratool.onnx.graph import TYPES

        at, length = self.vector(table, 0)
        if not 0 < length <= _MOST:
            raise FormatError("malformed adapter file: a parameter without a name", self.file.path)
        try:
            name = self.bytes(at, length).decode()
        except UnicodeDecodeError:
            raise FormatError("malformed adapter file: a name is no text", self.file.path) from None
        where = f"{self.file.path}: {name[:200]}"
        dtype = TYPES.get(self.scalar(table, 2), "")
        at, rank = self.vector(table, 1)
        if not dtype or rank > 16:
            raise FormatError("malformed parameter: its type or shape", where)
        shape = struct.unpack(f"<{rank}q", self.bytes(at, 8 * rank)) if rank else ()
        start, nbytes = self.vector(table, 3)
        if not all(0 <= n < 1 << 48 for n in shape) or byte_count(dtype, shape) != nbytes:
            raise FormatError(f"{nbytes:,} bytes do not hold {dtype} {list(shape)}", where)
        if start + nbytes > self.file.size:
            raise FormatError("truncated: values end behind the file", where, "fetch or copy it again")
        return name, Tensor.stored(dtype, shape, Region(self.file, start, nbytes))
