"""Random inputs for a graph: shapes that fit each other, ids within the vocabulary, masks of ones, an empty past.

What an input is for is told by what its values index (a Gather's table), by its name and by its type. Shapes that
cannot be told are tried: `feeds` gives several plans, the likeliest first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import LoratoolError
from loratool.lazy import np
from loratool.onnx.graph import TYPES, Graph, Use, Value
from loratool.tensors import DTYPES, numpy_dtype

_MOST = 1 << 24  # elements of one input
_SAME = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # what leaves ids what they are
_TABLES = {  # operator -> (input with ids, input with the table), ...
    "Gather": ((1, 0),),
    "GatherBlockQuantized": ((1, 0),),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),
    "QEmbedLayerNormalization": ((0, 2), (1, 4)),
}
_FIRST = ("Conv", "MatMul", "Gemm")  # what tells the size of an axis of its input by its weight
_PASTS = {  # operator -> (input with the past keys, attribute with the number of heads of its result)
    "GroupQueryAttention": (3, "num_heads"),
    "MultiHeadAttention": (6, "num_heads"),
    "Attention": (4, "q_num_heads"),
}
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """Sizes of free dimensions; one symbol always means one size."""

    batch: int
    length: int
    side: int
    past: int = 0
    known: dict[str, int] = field(default_factory=dict)

    def size(self, name: str, axis: int, symbol: str) -> int:
        """The size of a free dimension of the input ``name``."""
        if "+" in symbol:
            return sum(self.size(name, axis, part.strip()) for part in symbol.split("+"))
        if symbol.isdigit():
            return min(int(symbol), _MOST)
        if not symbol:
            return self._guess(name, axis, "")
        return self.known.setdefault(symbol, self._guess(name, axis, symbol.lower()))

    def _guess(self, name: str, axis: int, symbol: str) -> int:
        for words, size in (
            ("batch", self.batch),
            ("total", self.past + self.length),
            ("past", self.past),
            ("height|width|side|size", self.side),
            ("seq|len|time|frame", self.length),
        ):
            if re.search(words, symbol):
                return size
        if axis == 0:
            return self.batch
        return self.past if name.startswith("past") else self.length


# batch, length, side: common sizes first, then those of CLIP's text and Whisper's audio
PLANS = ((2, 6, 16), (1, 8, 64), (2, 16, 8), (1, 77, 64), (1, 3000, 64))


def feeds(graph: Graph, seeds: int) -> Iterator[list[Feed]]:
    """For each plan, ``seeds`` random feeds. Raises LoratoolError for an input that no values can be made for."""
    limits, known = vocabulary(graph), {**channel_sizes(graph), **head_sizes(graph)}
    given = {weight.name for weight in graph.weights if weight.scope == 0}
    required = [entry for entry in graph.model.graph.input if entry.name not in given]
    for sizes in PLANS:
        yield [
            _feed(required, Plan(*sizes, known=dict(known)), limits, np.random.default_rng(seed))
            for seed in range(seeds)
        ]
        if not any(_is_free(entry) for entry in required):
            return


def head_sizes(graph: Graph) -> dict[str, int]:
    """Free dimensions of a past whose size the attention gives away: that of one head."""
    widths = {entry.name: _last(entry) for entry in graph.model.graph.value_info}
    inputs = {entry.name: entry for entry in graph.model.graph.input}
    found: dict[str, int] = {}
    for node in graph.nodes:
        slot, word = _PASTS.get(node.op, (0, ""))
        names, heads = node.proto.input, node.attribute(word, 0) if word else 0
        past = inputs.get(names[slot]) if 0 < slot < len(names) else None
        width = widths.get(node.proto.output[0])
        if past is not None and width is not None and heads and width.dim_value % heads == 0:
            last = _last(past)
            if last is not None and last.dim_param:
                found[last.dim_param] = width.dim_value // heads
    return found


def _last(entry: Any) -> Any:
    """The last dimension of a value; None where it has none."""
    dims = entry.type.tensor_type.shape.dim
    return dims[-1] if dims else None


def _is_free(entry: Any) -> bool:
    return any(not dim.HasField("dim_value") for dim in entry.type.tensor_type.shape.dim)


def _feed(required: list[Any], plan: Plan, limits: Mapping[str, int], random: np.random.Generator) -> Feed:
    return {entry.name: _values(entry, plan, limits.get(entry.name), random) for entry in required}


def _values(entry: Any, plan: Plan, limit: int | None, random: np.random.Generator) -> np.ndarray:
    kind = entry.type.tensor_type
    dtype = TYPES.get(kind.elem_type, "")
    if not entry.type.HasField("tensor_type") or not dtype or not DTYPES[dtype].numpy:
        raise LoratoolError("no random values can be made for an input of this type", entry.name)
    shape = [
        min(dim.dim_value, _MOST) if dim.HasField("dim_value") else plan.size(entry.name, axis, dim.dim_param)
        for axis, dim in enumerate(kind.shape.dim)
    ]
    if math.prod(shape) > _MOST:
        raise LoratoolError(f"an input of shape {shape} is too large to try", entry.name)
    values = _meant(entry.name, tuple(shape), plan)
    if values is None and DTYPES[dtype].floating:
        values = random.standard_normal(shape)
    if values is None:
        values = np.zeros(shape) if dtype == "BOOL" else random.integers(0, max(1, limit or 2), shape)
    return np.asarray(values).astype(numpy_dtype(dtype))


Meaning = Callable[[tuple[int, ...], Plan], np.ndarray]
_MEANINGS: tuple[tuple[str, Meaning], ...] = (  # the first whose words are in the name
    ("mask", lambda shape, plan: np.ones(shape)),
    (
        "position",
        lambda shape, plan: np.broadcast_to(np.arange(shape[-1] if shape else 1), shape or (1,)).reshape(shape),
    ),
    ("token_type|segment|logits_to_keep|use_cache", lambda shape, plan: np.zeros(shape)),
    ("seqlens", lambda shape, plan: np.full(shape, plan.past + plan.length - 1)),
    ("total_seq", lambda shape, plan: np.full(shape, plan.past + plan.length)),
    ("time_?step|sigma", lambda shape, plan: np.full(shape, 10)),
)


def _meant(name: str, shape: tuple[int, ...], plan: Plan) -> np.ndarray | None:
    """Values that an input's name asks for."""
    return next((make(shape, plan) for words, make in _MEANINGS if re.search(words, name)), None)


def vocabulary(graph: Graph) -> dict[str, int]:
    """For each input whose values are looked up: the rows of the smallest table."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        for ids, table in _TABLES.get(node.op, ()):
            traced = graph.trace(Use(node, table))
            name = _origin(graph, graph.source(Use(node, ids)))
            if traced is not None and name is not None and len(traced[0].shape) > 1:
                rows = traced[0].shape[0]
                found[name] = min(rows, found.get(name, rows))
    return found


def channel_sizes(graph: Graph) -> dict[str, int]:
    """Free dimensions of inputs whose size the first weight behind them gives away: channels, features."""
    inputs = {entry.name: entry for entry in graph.model.graph.input}
    found: dict[str, int] = {}
    for node in graph.nodes:
        traced = graph.trace(Use(node, 1)) if node.op in _FIRST else None
        name = _origin(graph, graph.source(Use(node, 0)), ("Cast", "Identity")) if traced is not None else None
        if traced is None or name not in inputs or len(traced[0].shape) < 2:
            continue
        dims = inputs[name].type.tensor_type.shape.dim
        axis = 1 if node.op == "Conv" else len(dims) - 1
        size = traced[0].shape[1] * node.attribute("group", 1) if node.op == "Conv" else traced[0].shape[-2]
        if 0 < axis < len(dims) and dims[axis].dim_param and not traced[1] and not node.attribute("transB", 0):
            found[dims[axis].dim_param] = size
    return found


def _origin(graph: Graph, value: Value | None, through: tuple[str, ...] = _SAME) -> str | None:
    """The input that a value comes from unchanged (but for its shape), or nothing."""
    for _ in range(16):
        node = graph.producers.get(value) if value is not None else None
        if node is None:
            break
        if node.op not in through:
            return None
        value = graph.source(Use(node, 0))
    return value.name if value is not None and value.scope == 0 and value not in graph.weights else None
