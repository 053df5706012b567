"""The wire format of an .onnx file: a model without the values of its initializers, and back.

A model is one protobuf message of at most 2 GiB, most of which are values. Reading skims over these and keeps where
they lie; writing puts holes where they go. So an inline model is streamed as external data are. Source: the protobuf
encoding specification; onnx.proto (field numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from loratool.errors import FormatError, LoratoolError
from loratool.files import reject_foreign

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
LIMIT = (1 << 31) - 1  # bytes of one protobuf message
FIELDS = 1 << 22  # parts of one message: nodes, initializers
SMALL = 1024  # bytes: smaller values stay in the message, where shapes and axes are looked at
_FIXED = {1: 8, 5: 4}  # wire types of fixed width
_BYTES = 2


@dataclass(frozen=True)
class Skimmed:
    """A model without values: its message, and for each initializer (offset, bytes) in the file, or None."""

    message: bytes
    holes: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Hole:
    """Where the values of one initializer belong in a message."""

    name: str
    nbytes: int


@dataclass
class _Skimmer:
    file: BinaryIO
    path: Path
    holes: list[tuple[int, int] | None] = field(default_factory=list)

    def message(self, end: int, way: tuple[int, ...]) -> bytes:
        """The message from here to ``end`` without what ``way`` leads to."""
        kept: list[bytes] = []
        seen, fields, begin = False, 0, self.file.tell()
        while (start := self.file.tell()) < end:
            number, wire = divmod(self.varint(end), 8)
            stop = self.end_of(wire, end)
            here, fields = self.file.tell(), fields + 1
            if fields > FIELDS:
                raise FormatError(f"malformed ONNX model: more than {FIELDS:,} parts", self.path)
            self.file.seek(stop)
            if not way or number != way[0] or wire != _BYTES:
                continue
            if seen and number != INITIALIZER:
                raise FormatError("malformed ONNX model: a field occurs twice", self.path)
            seen = True
            if len(way) > 1:
                kept += [self.bytes(begin, start), *self.inner(number, here, stop, way[1:])]
            elif stop - here >= SMALL:
                self.holes[-1] = (here, stop - here)
                kept.append(self.bytes(begin, start))
            else:
                continue
            self.file.seek(stop)
            begin = stop
        return b"".join((*kept, self.bytes(begin, end)))

    def inner(self, number: int, start: int, stop: int, way: tuple[int, ...]) -> tuple[bytes, bytes]:
        """A message inside another, with its head."""
        if number == INITIALIZER:
            self.holes.append(None)
        self.file.seek(start)
        message = self.message(stop, way)
        return tag(number) + varint(len(message)), message

    def bytes(self, start: int, stop: int) -> bytes:
        """What the file holds from ``start`` to ``stop``."""
        self.file.seek(start)
        return self.file.read(stop - start)

    def end_of(self, wire: int, end: int) -> int:
        """Where the value that begins here ends."""
        if wire == 0:
            self.varint(end)
            return self.file.tell()
        if wire != _BYTES and wire not in _FIXED:
            raise FormatError("not an ONNX model: no protobuf message", self.path)
        count = self.varint(end) if wire == _BYTES else _FIXED[wire]
        stop = self.file.tell() + count
        if stop > end:
            raise FormatError("truncated or malformed ONNX model", self.path, "fetch or copy it again")
        return stop

    def varint(self, end: int) -> int:
        """The number that is encoded here."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.file.read(1)
            if not byte or self.file.tell() > end:
                break
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        raise FormatError("truncated or malformed ONNX model", self.path, "fetch or copy it again")


def skim(path: Path) -> Skimmed:
    """Read a model without the values of its initializers.

    Raises FormatError for what is no protobuf message or larger than one can be, LoratoolError for I/O.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            reject_foreign(file.read(64), path)
            if size > LIMIT:
                raise FormatError(f"an ONNX model of {size:,} bytes is over protobuf's limit of 2 GiB", path)
            file.seek(0)
            skimmer = _Skimmer(file, path)
            message = skimmer.message(size, (GRAPH, INITIALIZER, RAW_DATA))
    except OSError as error:
        raise LoratoolError(f"cannot read: {error.strerror}", path) from None
    return Skimmed(message, tuple(skimmer.holes))


def unskim(model: Any, hole: Callable[[str], Hole | None]) -> Sequence[bytes | Hole]:
    """The pieces of a model's file: bytes, and holes for the values of those initializers that have one."""
    return list(_joined(_pieces(model, hole)))


def length(pieces: Sequence[bytes | Hole]) -> int:
    """Bytes of the file that ``pieces`` make up."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.nbytes for piece in pieces)


def _pieces(model: Any, hole: Callable[[str], Hole | None]) -> Iterator[bytes | Hole]:
    graph = _graph(model, hole)
    bare = type(model)()
    bare.CopyFrom(model)
    bare.ClearField("graph")
    yield bare.SerializeToString(deterministic=True)
    yield tag(GRAPH) + varint(length(graph))
    yield from graph


def _graph(model: Any, hole: Callable[[str], Hole | None]) -> list[bytes | Hole]:
    bare = type(model.graph)()
    bare.CopyFrom(model.graph)
    bare.ClearField("initializer")
    pieces: list[bytes | Hole] = [bare.SerializeToString(deterministic=True)]
    for proto in model.graph.initializer:
        message, values = proto.SerializeToString(deterministic=True), hole(proto.name)
        inner: list[bytes | Hole] = [message]
        if values is not None:
            inner = [message + tag(RAW_DATA) + varint(values.nbytes), values]
        pieces += [tag(INITIALIZER) + varint(length(inner)), *inner]
    return pieces


def _joined(pieces: Iterator[bytes | Hole]) -> Iterator[bytes | Hole]:
    """The same pieces, neighbouring bytes in one."""
    run: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            run.append(piece)
            continue
        yield b"".join(run)
        run = []
        yield piece
    yield b"".join(run)


def tag(number: int) -> bytes:
    """The head of a field whose value is a run of bytes."""
    return varint(number << 3 | _BYTES)


def varint(value: int) -> bytes:
    """A number as protobuf encodes it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
