"""An ONNX graph without its weights: nodes, names and lazy values, read from hostile files.

`read_graph` parses the message only; every initializer, wherever it lies (in the message, in an external file, in a
subgraph, in a Constant node) becomes a lazy `Tensor`. Names follow ONNX' scoping: a subgraph sees those around it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from loratool.errors import FormatError
from loratool.files import FileBytes, existing, inside
from loratool.lazy import np
from loratool.onnx import require_onnx
from loratool.onnx.wire import skim
from loratool.tensors import DTYPES, Region, Tensor

# TensorProto.data_type -> the safetensors spelling; of types without one, the bits of an element
TYPES: Mapping[int, str] = MappingProxyType(
    {1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32"}
    | {13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2", 24: "F8_E8M0"}
)
NUMBERS: Mapping[str, int] = MappingProxyType({name: number for number, name in TYPES.items()})
_BITS = {15: 128, 18: 8, 20: 8, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}
_STRING = 8
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_SCOPES = "pkg.torch.onnx.name_scopes"
THROUGH = ("Identity", "Cast", "Transpose", "DequantizeLinear")  # what may stand between a weight and its consumer
_DEEPEST = 16  # nodes between a weight and its consumer, and subgraphs inside each other
EXTERNAL = 1  # TensorProto.data_location


class Value(NamedTuple):
    """A named value: the scope that defines it (0: the main graph), and its name."""

    scope: int
    name: str


@dataclass(frozen=True, eq=False)
class Node:
    """One node: its message in ``Graph.model``, and its place: the ``position``-th of its scope."""

    proto: Any
    scope: int
    position: int

    @property
    def op(self) -> str:
        """The operator's name, without its domain."""
        return str(self.proto.op_type)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value: number, bytes or list; ``default`` where it is not given."""
        for found in self.proto.attribute:
            if found.name == name:
                return {1: found.f, 2: found.i, 3: found.s, 6: list(found.floats), 7: list(found.ints)}.get(found.type)
        return default

    @cached_property
    def scopes(self) -> tuple[str, ...]:
        """The module paths that torch's dynamo exporter noted, outermost first; empty where there are none."""
        for entry in self.proto.metadata_props:
            if entry.key == _SCOPES and len(entry.value) < 1 << 16:
                try:
                    found = ast.literal_eval(entry.value)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    return ()
                return tuple(map(str, found)) if isinstance(found, (list, tuple)) else ()
        return ()


class Use(NamedTuple):
    """One place where a value is used: the input number ``slot`` of a node."""

    node: Node
    slot: int


@dataclass(frozen=True, eq=False)
class Weight:
    """Stored values: an initializer of a graph or subgraph, or what a Constant node holds.

    ``tensor`` has the stored shape; of types that safetensors cannot spell (int4, ...) it holds the packed bytes.
    ``external`` and ``hole`` tell where values lie outside the message; ``constant`` is the Constant node.
    """

    value: Value
    proto: Any
    tensor: Tensor
    external: bool = False
    hole: bool = False
    constant: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.proto.dims)

    @property
    def floating(self) -> bool:
        """Whether values can be changed in place: 16 to 64 bit floats."""
        return self.tensor.dtype in ("F64", "F32", "F16", "BF16") and self.tensor.shape == self.shape


@dataclass(frozen=True, eq=False)
class Scope:
    """One graph: the main one, or a subgraph of a node in ``parent``."""

    proto: Any
    parent: int | None
    defined: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Graph:
    """A model without its weights. ``model`` is the message, not to be changed (`fold.Edit` has a copy to change)."""

    path: Path
    model: Any
    scopes: tuple[Scope, ...]
    nodes: tuple[Node, ...]
    weights: Mapping[Value, Weight]
    files: tuple[Path, ...] = ()
    """The model's file and its external data."""
    producers: Mapping[Value, Node] = field(default_factory=dict)
    uses: Mapping[Value, tuple[Use, ...]] = field(default_factory=dict)
    outputs: frozenset[Value] = frozenset()

    def value(self, scope: int, name: str) -> Value | None:
        """What ``name`` means in a scope: defined there, or around it; None for a name that nobody defines."""
        here: int | None = scope
        while here is not None:
            if name in self.scopes[here].defined:
                return Value(here, name)
            here = self.scopes[here].parent
        return None

    def source(self, use: Use) -> Value | None:
        """The value that an input of a node means; None for an omitted one."""
        names = use.node.proto.input
        return self.value(use.node.scope, names[use.slot]) if use.slot < len(names) and names[use.slot] else None

    def trace(self, use: Use) -> tuple[Weight, tuple[Node, ...]] | None:
        """The weight behind an input and the nodes in between (Transpose, Cast, ...), weight first; or None."""
        chain: list[Node] = []
        value = self.source(use)
        while value is not None and value not in self.weights and len(chain) < _DEEPEST:
            node = self.producers.get(value)
            if node is None or node.op not in THROUGH:
                return None
            chain.insert(0, node)
            value = self.source(Use(node, 0))
        weight = self.weights.get(value) if value is not None else None
        return None if weight is None else (weight, tuple(chain))

    def ends(self, value: Value) -> tuple[Use, ...]:
        """Where a weight is really used: the inputs behind Identity, Cast, Transpose and DequantizeLinear.

        A node of which it (or what comes of it) is a graph output counts as well.
        """
        found: list[Use] = []
        waiting, seen = [value], {value}
        while waiting:
            here = waiting.pop()
            for use in self.uses.get(here, ()):
                through = Value(use.node.scope, use.node.proto.output[0]) if _passes(use) else None
                if through is None or through in self.outputs:
                    found.append(use)
                if through is not None and through not in seen:
                    seen.add(through)
                    waiting.append(through)
        return tuple(found)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The model's own metadata."""
        return {entry.key: entry.value for entry in self.model.metadata_props}


def _passes(use: Use) -> bool:
    return use.slot == 0 and use.node.op in THROUGH and len(use.node.proto.output) == 1


def read_graph(path: str | Path, allow_links: bool = False) -> Graph:
    """Read a model's graph; values stay where they are.

    Raises LoratoolError (no such path, the package onnx is missing), FormatError (no ONNX model, damaged, external
    data that lie outside the folder, past the end of their file, or do not fit their shape).
    """
    onnx = require_onnx()
    found = existing(path, "model")
    if found.is_dir():
        raise FormatError("this is a folder, not an ONNX model", found)
    skimmed = skim(found)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(skimmed.message)
    except Exception as error:  # google.protobuf's DecodeError, of whichever of its implementations
        raise FormatError(f"not an ONNX model: {error}", found) from None
    if not model.HasField("graph") or not model.opset_import:
        raise FormatError("not an ONNX model: no graph, or no operator set", found)
    return _Reader(found, model, skimmed.holes, allow_links).graph()


class _Reader:
    """Collects what a graph holds, scope by scope."""

    def __init__(self, path: Path, model: Any, holes: Sequence[tuple[int, int] | None], allow_links: bool) -> None:
        self.path, self.model, self.allow_links = path, model, allow_links
        self.file = FileBytes(path)
        self.externals: dict[str, FileBytes] = {}
        self.initializers = list(model.graph.initializer)  # kept: protobuf makes another object at each look
        self.holes = {id(proto): hole for proto, hole in zip(self.initializers, holes, strict=True)}
        self.scopes: list[Scope] = []
        self.nodes: list[Node] = []
        self.weights: dict[Value, Weight] = {}
        self.producers: dict[Value, Node] = {}

    def graph(self) -> Graph:
        for entry in (self.model, *self.model.metadata_props):
            self._check_text(entry)
        self._scope(self.model.graph, None, 0)
        self._check_others()
        graph = Graph(self.path, self.model, tuple(self.scopes), tuple(self.nodes), self.weights)
        uses: dict[Value, list[Use]] = {}
        for node in self.nodes:
            for index in range(len(node.proto.input)):
                value = graph.source(Use(node, index))
                if value is not None:
                    uses.setdefault(value, []).append(Use(node, index))
        outputs = (graph.value(n, out.name) for n, scope in enumerate(self.scopes) for out in scope.proto.output)
        files = (self.path, *(file.path for file in self.externals.values()))
        return Graph(
            self.path,
            self.model,
            tuple(self.scopes),
            tuple(self.nodes),
            MappingProxyType(self.weights),
            tuple(dict.fromkeys(files)),
            MappingProxyType(self.producers),
            MappingProxyType({value: tuple(found) for value, found in uses.items()}),
            frozenset(value for value in outputs if value is not None),
        )

    def _scope(self, proto: Any, parent: int | None, depth: int) -> None:
        """One graph and, inside its nodes, its subgraphs."""
        if depth > _DEEPEST:
            raise FormatError("subgraphs inside each other are too deep", self.path)
        number = len(self.scopes)
        ends = (*proto.input, *proto.output)
        dims = (dim for entry in ends for dim in entry.type.tensor_type.shape.dim)
        for entry in (*proto.initializer, *ends, *dims, *proto.metadata_props):
            self._check_text(entry)
        for node in proto.node:
            self._check_text(node)
            for part in (*node.attribute, *node.metadata_props):
                self._check_text(part)
        initializers = [tensor.name for tensor in proto.initializer]
        made = [name for node in proto.node for name in node.output if name]
        sparse = [tensor.values.name for tensor in proto.sparse_initializer]
        for kind, names in (("initializers", initializers), ("values", made)):
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise FormatError(f"two {kind} of one name", f"{self.path}: {twice}")
        defined = frozenset((*initializers, *made, *sparse, *(entry.name for entry in proto.input)))
        self.scopes.append(Scope(proto, parent, defined))
        for tensor in proto.initializer:
            self._weight(tensor, Value(number, tensor.name), None)
        for position, message in enumerate(proto.node):
            node = Node(message, number, position)
            self.nodes.append(node)
            self.producers.update({Value(number, name): node for name in message.output if name})
            for attribute in message.attribute:
                if message.op_type == "Constant" and attribute.name == "value" and len(message.output) == 1:
                    self._weight(attribute.t, Value(number, message.output[0]), node)
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self._scope(inner, number, depth + 1)

    def _check_text(self, message: Any) -> None:
        """Raise FormatError for text that is not UTF-8: protobuf hands it out as bytes."""
        for about, value in message.ListFields():
            if about.type == about.TYPE_STRING and not all(isinstance(v, str) for v in _listed(value)):
                raise FormatError(f"the {about.name} is not UTF-8", self.path)

    def _weight(self, proto: Any, value: Value, constant: Node | None) -> None:
        where = f"{self.path}: {value.name}"
        tensor = self._tensor(proto, where)
        if tensor is not None:
            external, hole = proto.data_location == EXTERNAL, self.holes.get(id(proto)) is not None
            self.weights[value] = Weight(value, proto, tensor, external, hole, constant)

    def _tensor(self, proto: Any, where: str) -> Tensor | None:
        """The values of one message; None for what stays in the message (strings, packed integers)."""
        dims = tuple(proto.dims)
        if len(dims) > 16 or not all(0 <= n < 1 << 48 for n in dims) or math.prod(dims) >= 1 << 48:
            raise FormatError(f"the shape {list(dims)[:16]} is no shape", where)
        if proto.HasField("segment"):
            raise FormatError("a tensor in segments is not supported", where)
        dtype = TYPES.get(proto.data_type, "")
        if not dtype and proto.data_type not in (*_BITS, _STRING):
            raise FormatError(f"unknown data type {proto.data_type}", where)
        bits = DTYPES[dtype].bits if dtype else _BITS.get(proto.data_type, 0)
        shape, nbytes = dims, (math.prod(dims) * bits + 7) // 8
        if not dtype:
            dtype, shape = "U8", (nbytes,)
        region = self._region(proto, nbytes, where)
        if region is not None:
            return Tensor.stored(dtype, shape, region)
        return _held(proto, dtype, shape, nbytes, where)

    def _region(self, proto: Any, nbytes: int, where: str) -> Region | None:
        """Where the values lie outside the message: in the skimmed file or an external one."""
        typed = [name for name in (*_TYPED, "raw_data") if getattr(proto, name)]
        hole = self.holes.get(id(proto))
        if proto.data_location not in (0, EXTERNAL) or len(typed) + (hole is not None) > 1:
            raise FormatError("values in several places", where)
        if proto.data_location == EXTERNAL:
            if typed or hole or proto.data_type == _STRING:
                raise FormatError("values in several places", where)
            return self._external(proto, nbytes, where)
        if hole is None:
            return None
        if hole[1] != nbytes:
            raise FormatError(f"{hole[1]:,} bytes do not hold {list(proto.dims)}", where)
        return Region(self.file, hole[0], nbytes)

    def _external(self, proto: Any, nbytes: int, where: str) -> Region:
        for entry in proto.external_data:
            self._check_text(entry)
        entries = {entry.key: entry.value for entry in proto.external_data}
        if len(entries) != len(proto.external_data) or "location" not in entries:
            raise FormatError("malformed external data: one location is needed", where)
        offset, length = _number(entries.get("offset", "0"), where), _number(entries.get("length", str(nbytes)), where)
        if length != nbytes:
            raise FormatError(f"external data of {length:,} bytes do not hold {list(proto.dims)}", where)
        file = self._file(entries["location"], where)
        if offset + length > file.size:
            raise FormatError(
                f"external data end at {offset + length:,}, past the end of the file at {file.size:,}",
                f"{where} in {file.path}",
                "fetch or copy it again",
            )
        return Region(file, offset, nbytes)

    def _file(self, location: str, where: str) -> FileBytes:
        """An external file: a regular one inside the model's folder."""
        if location not in self.externals:
            path = inside(self.path.parent, location, self.allow_links)
            if not path.exists():
                raise FormatError(f"the external data {location!r} are missing", where, "fetch or copy the model again")
            if not path.is_file():
                raise FormatError(f"the external data {location!r} are no regular file", where)
            self.externals[location] = FileBytes(path)
        return self.externals[location]

    def _check_others(self) -> None:
        """External data of tensors that are no weights (attributes, sparse ones, functions) are refused by name."""
        known = {id(weight.proto) for weight in self.weights.values()}
        for tensor in tensors_of(self.model):
            if tensor.data_location == EXTERNAL and id(tensor) not in known:
                raise FormatError("external data of a tensor that is no initializer", f"{self.path}: {tensor.name}")


def _listed(value: Any) -> Iterable[Any]:
    """A field's values, be it repeated or not."""
    return (value,) if isinstance(value, (str, bytes)) else value


def _held(proto: Any, dtype: str, shape: tuple[int, ...], nbytes: int, where: str) -> Tensor | None:
    """Values in the message itself, checked against the shape."""
    if proto.data_type == _STRING or (dtype == "U8" and proto.data_type in _BITS and not proto.raw_data):
        return None
    if proto.raw_data:
        if len(proto.raw_data) != nbytes:
            raise FormatError(f"{len(proto.raw_data):,} bytes do not hold {list(proto.dims)}", where)
    else:
        count = max(len(getattr(proto, name)) for name in _TYPED)
        if count != math.prod(shape) * (2 if dtype == "C64" else 1):
            raise FormatError(f"{count:,} values do not fill {list(proto.dims)}", where)

    def load(start: int, stop: int) -> np.ndarray:
        if proto.raw_data:
            values = Tensor.stored(dtype, shape, _memory(proto.raw_data)).array()
        else:
            values = np.asarray(require_onnx().numpy_helper.to_array(proto))
        return values.reshape(shape or (1,))[start:stop]

    return Tensor(dtype, shape, load)


class _Memory:
    """Bytes in memory, read as those of a file are."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, nbytes: int) -> bytearray:
        return bytearray(self.data[offset : offset + nbytes])


def _memory(data: bytes) -> Region:
    return Region(_Memory(data), 0, len(data))  # type: ignore[arg-type]


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FormatError(f"malformed external data: {text[:20]!r} is no size", where)
    return int(text)


def tensors_of(model: Any) -> Iterator[Any]:
    """Every tensor message of a model: initializers, Constants, attributes, in subgraphs and functions too."""
    waiting = [model.graph, *model.functions]
    waiting += [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    while waiting:
        here = waiting.pop()
        if hasattr(here, "initializer"):
            yield from here.initializer
            yield from (part for sparse in here.sparse_initializer for part in (sparse.values, sparse.indices))
        for attribute in (attribute for node in here.node for attribute in node.attribute):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse_ones = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for sparse in (*sparse_ones, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def tensor_message(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """An initializer's message without values. Raises KeyError for a dtype that ONNX cannot spell."""
    proto = require_onnx().TensorProto(name=name, data_type=NUMBERS[dtype])
    proto.dims.extend(shape)
    return proto
