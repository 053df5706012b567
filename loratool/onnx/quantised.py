"""The weights that nodes stand for, quantised ones too, in torch's orientation: for updates that need the base.

DequantizeLinear: ``(q - zero point) x scale``, for the whole tensor, along an axis, or in blocks. MatMulNBits:
[out,in] in blocks along the inputs, codes packed from the low bits up, the zero point in the middle unless given.
Sources: the ONNX operator specification; onnxruntime's contrib operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from loratool.errors import MatchError
from loratool.lazy import np
from loratool.model import Model
from loratool.onnx.graph import Graph, Node, Use
from loratool.onnx.operands import Operand
from loratool.onnx.values import COLUMNS, leading, torch_matrices

_ALIKE, _OTHER = 0.9, 0.7  # cosines: int4 codes keep 0.99 of a weight, two weights have next to none in common


def dequantised(graph: Graph, operand: Operand) -> np.ndarray:
    """The weight of an operand as torch has it, float32: [out,in], OIHW, [entries,dim]; a vector.

    Raises MatchError for a way of quantising that is not known here.
    """
    try:
        return _blocks(graph, operand) if operand.use.node.op == "MatMulNBits" else _steps(graph, operand)
    except (ValueError, IndexError, TypeError, ZeroDivisionError):  # shapes or attributes that do not chain
        raise MatchError("a quantised weight that is not understood", operand.weight.value.name) from None


def _steps(graph: Graph, operand: Operand) -> np.ndarray:
    """The weight behind DequantizeLinear, Transpose and Cast."""
    node = operand.use.node
    steps = [step.op for step in operand.chain]
    if operand.quantised and "DequantizeLinear" not in steps:
        raise MatchError(f"this update needs the base weight, which {node.op} hides", operand.weight.value.name)
    values = operand.weight.tensor.array()
    for step in operand.chain:
        if step.op == "DequantizeLinear":
            values = _linear(graph, step, values)
        elif step.op == "Transpose":
            values = values.transpose(step.attribute("perm", list(range(values.ndim))[::-1]))
    values = values.astype(np.float32)
    turned = (operand.layout == "transposed") ^ (steps.count("Transpose") % 2 == 1)
    if operand.layout == "nhwc":
        return np.moveaxis(values, -1, 1)
    return values.T if turned and values.ndim == 2 else values


def _linear(graph: Graph, node: Node, codes: np.ndarray) -> np.ndarray:
    """What a DequantizeLinear makes of ``codes``."""
    scale, zero = _stored(graph, node, 1), _stored(graph, node, 2)
    if scale is None:
        raise MatchError("the scales of a quantised weight are computed", node.proto.name)
    axis, block = node.attribute("axis", 1) % max(codes.ndim, 1), node.attribute("block_size", 0)

    def spread(values: np.ndarray) -> np.ndarray:
        if block:
            return np.repeat(values, block, axis)[tuple(slice(n) for n in codes.shape)]
        return values.reshape([-1 if n == axis else 1 for n in range(codes.ndim)]) if values.size > 1 else values

    wide = codes.astype(np.float32)
    wide = wide if zero is None else wide - spread(zero.astype(np.float32))
    return np.asarray(wide * spread(scale.astype(np.float32)))


def _stored(graph: Graph, node: Node, slot: int) -> np.ndarray | None:
    """The stored values of an input; None for an omitted one."""
    traced = graph.trace(Use(node, slot))
    return None if traced is None else traced[0].tensor.array()


def _blocks(graph: Graph, operand: Operand) -> np.ndarray:
    """The weight [out,in] of a MatMulNBits."""
    node, name = operand.use.node, operand.weight.value.name
    bits, block = node.attribute("bits", 4), node.attribute("block_size", 0)
    out, inner = operand.shape
    scales, zeros = _stored(graph, node, 2), _stored(graph, node, 3)
    count = -(-inner // block) if block > 0 else 0
    given = [slot for slot in (4,) if len(node.proto.input) > slot and node.proto.input[slot]]
    if bits not in (2, 4, 8) or scales is None or scales.size != out * count or given or not count:
        raise MatchError("a MatMulNBits whose blocks are not understood", name)
    codes = _unpacked(operand.weight.tensor.array().reshape(out * count, -1), bits)[:, :block]
    if codes.shape != (out * count, block):
        raise MatchError("a MatMulNBits whose blocks are not understood", name)
    middle = np.full((out, count), 1 << (bits - 1), np.float32)
    if zeros is not None:
        packed = zeros.dtype == np.uint8
        middle = (_unpacked(zeros.reshape(out, -1), bits)[:, :count] if packed else zeros.reshape(out, count)).astype(
            np.float32
        )
    wide = (codes - middle.reshape(-1, 1)) * scales.astype(np.float32).reshape(-1, 1)
    return np.ascontiguousarray(wide.reshape(out, count * block)[:, :inner])


# ---------------------------------------------------------------- told by their values


def recognise(graph: Graph, found: Iterable[Operand], base: Model) -> Iterator[tuple[Operand, str]]:
    """The modules of a checkpoint that quantised weights without a name are: those whose rows point the same way.

    Scales drop out, row by row; a weight that two modules resemble is left alone.
    """
    tables: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
    for operand in found:
        held = _directions(graph, operand) if operand.quantised and not operand.refused else None
        if held is None:
            continue
        if operand.shape not in tables:
            matrices = ((name, tensor) for name, tensor in torch_matrices(base) if tensor.shape == operand.shape)
            tables[operand.shape] = [(n.removesuffix(".weight"), _unit(leading(t))) for n, t in matrices]
        likeness = sorted(
            ((float((held * known).sum(1).mean()), n) for n, known in tables[operand.shape]), reverse=True
        )
        if likeness and likeness[0][0] > _ALIKE and (len(likeness) == 1 or likeness[1][0] < _OTHER):
            yield operand, likeness[0][1]


def _directions(graph: Graph, operand: Operand) -> np.ndarray | None:
    """The first values of each output row, scaled to length 1; None for what is not understood."""
    try:
        values = _codes(graph, operand) if operand.use.node.op == "MatMulInteger" else dequantised(graph, operand)
    except MatchError:
        return None
    return _unit(values.reshape(len(values), -1)[:, :COLUMNS]) if values.shape == operand.shape else None


def _codes(graph: Graph, operand: Operand) -> np.ndarray:
    """The weight of a MatMulInteger without its scales, [out,in]."""
    zero = _stored(graph, operand.use.node, 3)
    return np.asarray((operand.weight.tensor.float() - (0 if zero is None else zero.astype(np.float32))).T)


def _unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))


def _unpacked(bytes_: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, m x 8/bits] of bytes [n, m], the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (bytes_[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*bytes_.shape[:-1], math.prod(codes.shape[-2:])).astype(np.float32)
