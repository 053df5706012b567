"""Side branches: an adapter beside the weights it would change, which stay as they are.

A product becomes ``y + (x @ A) @ B`` with A [in,r], B [r,out]; a table ``y + A[ids] @ B`` with A [entries,r]; a
convolution ``y + Conv(Conv(x, A), B)`` with A [r,in,*k] and B [out,r,*1]. A change without factors is one matrix.
Where a node does more than that (Attention, a normalised embedding), and for vectors, the change is added to the
weight on its way to the node. Nodes, initializers and values of the base keep their names; what follows a node does
not notice. Layouts of fused operators: onnxruntime's contrib operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.errors import MatchError, NumericError
from loratool.lazy import np
from loratool.onnx import require_onnx
from loratool.onnx.fold import Change, Edit
from loratool.onnx.graph import TYPES, Graph, Node, Use, Value
from loratool.onnx.operands import Operand, path_module, scope_module
from loratool.onnx.quantised import dequantised
from loratool.tensors import Tensor
from loratool.update import Additive, Prepared, Update

Pair = tuple[np.ndarray, np.ndarray]  # up [o,r], down [r,i*k]; strength and scaling folded into up

# operators by where their branch goes: y + branch, behind the Cast and Mul of an integer product, into the third
# or fourth input (these have an activation inside); all others: onto the weight itself
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul")
_INTEGER = ("MatMulInteger", "ConvInteger")
_TABLES = ("Gather", "GatherBlockQuantized")
_CONVS = ("Conv", "FusedConv", "ConvInteger")
_INTO = {"FusedGemm": 2, "FusedConv": 3}
_SCALES = {"MatMulNBits": 2, "GatherBlockQuantized": 2}  # the input that has the type of what is computed
_CONV_WORDS = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


@dataclass(frozen=True, eq=False)
class Spot:
    """One input of one node that takes a changed weight, and everything that changes it there."""

    operand: Operand
    changes: tuple[Change, ...]

    @property
    def node(self) -> Node:
        """The node."""
        return self.operand.use.node

    @property
    def vector(self) -> bool:
        """Whether what changes is a vector: a bias, the gain of a normalisation."""
        return len(self.operand.weight.shape) < 2

    @property
    def kind(self) -> str:
        """How a branch is attached: product, table, conv; onto the weight: weight."""
        op = self.node.op
        if self.vector or self.operand.use.slot != (0 if op in _TABLES else 1):
            return "weight"
        if op in _CONVS:
            return "conv"
        if op in _TABLES:
            return "table"
        return "product" if op in (*_PRODUCTS, *_INTEGER, *_INTO, "MatMulIntegerToFloat") else "weight"

    @property
    def module(self) -> str:
        """What new values are called after: the module by the graph's own word, else by the adapter's."""
        told = scope_module(self.node) or path_module(self.node.proto.name)
        modules = {change.site.module for change in self.changes}
        whole = len(modules) == 1 and all(change.site.rows is None for change in self.changes)
        if self.vector or (whole and not told):
            return min(modules)
        return told or self.operand.weight.value.name


def spots(changes: Iterable[Change]) -> tuple[Spot, ...]:
    """Changes by the inputs that are to see them, in the order of the graph."""
    found: dict[tuple[int, int], tuple[Operand, list[Change]]] = {}
    for change in changes:
        for operand in change.site.operands:
            found.setdefault((id(operand.use.node), operand.use.slot), (operand, []))[1].append(change)
    order = lambda spot: (spot.node.scope, spot.node.position, spot.operand.use.slot)  # noqa: E731
    return tuple(sorted((Spot(operand, tuple(own)) for operand, own in found.values()), key=order))


def branch(graph: Graph, changes: Sequence[Change], dense: bool = False) -> Edit:
    """``graph`` with constant side branches; weights, quantised ones too, stay as they are.

    ``dense``: each change as one matrix, worked out by its own algebra, for those who want to check the factors.
    Raises MatchError for a place where a branch cannot be (an integer operator whose result is rounded at once),
    NumericError where a factor does not fit the graph's precision.
    """
    edit = Edit.of(graph)
    made: dict[tuple[Any, ...], Branch] = {}
    for spot in spots(change for change in changes if change.strength):
        key = (*map(id, spot.changes), spot.kind)  # nodes of one module share their constants
        if key not in made:
            made[key] = _constants(edit, spot, dense)
        attach(edit, spot, made[key])
    edit.finish()
    return edit


@dataclass(frozen=True)
class Branch:
    """The values of a branch, by name: a pair of factors, or one matrix in torch's orientation; or both."""

    pair: tuple[str, str] | None = None
    matrix: str | None = None


def _constants(edit: Edit, spot: Spot, dense: bool) -> Branch:
    """New initializers for the changes at one spot."""
    dtype = computed_in(edit.graph, spot.operand)
    pairs, rest = [], []
    for change in spot.changes:
        found = None if spot.vector or dense else factors(change, spot)
        if found is None:
            rest.append(change)
        else:
            pairs.append(found)
    pair = matrix = None
    if pairs:
        a, b = oriented(spot, joined(pairs))
        pair = (
            edit.add(f"{spot.module}.lora_A.weight", narrowed(a, dtype, spot)),
            edit.add(f"{spot.module}.lora_B.weight", narrowed(b, dtype, spot)),
        )
    if rest:
        matrix = edit.add(f"{spot.module}.delta", difference(edit.graph, spot, rest).cast(dtype))
    return Branch(pair, matrix)


def computed_in(graph: Graph, operand: Operand) -> str:
    """The dtype in which a node takes its weight."""
    node, dtype = operand.use.node, operand.weight.tensor.dtype
    scales = graph.trace(Use(node, _SCALES[node.op])) if node.op in _SCALES else None
    if scales is not None:
        return scales[0].tensor.dtype
    for step in operand.chain:
        if step.op == "Cast":
            dtype = TYPES.get(step.attribute("to", 1), dtype)
        elif step.op == "DequantizeLinear":
            traced = graph.trace(Use(step, 1))
            dtype = traced[0].tensor.dtype if traced else "F32"
    return dtype if dtype in ("F64", "F32", "F16", "BF16") else "F32"


def narrowed(values: np.ndarray, dtype: str, spot: Spot) -> Tensor:
    """A factor as the graph stores it. Raises NumericError where it overflows."""
    found = Tensor.of(np.ascontiguousarray(values)).cast(dtype)
    if not np.isfinite(found.float()).all():
        raise NumericError(f"a factor is not finite in {dtype}", spot.changes[0].site.spelling)
    return Tensor.of(found.array())


# ---------------------------------------------------------------- values


def factors(change: Change, spot: Spot, always: bool = False) -> Pair | None:
    """An exact pair for the whole weight of a spot (zero rows where the change is of others).

    None where there is none, where one matrix is smaller (unless ``always``), and for grouped convolutions.
    """
    update, site = change.site.update, change.site
    prepared = update.prepare(Tensor.float, change.strength)
    found = prepared.factors
    if found is None and isinstance(update, Additive):
        exact = update.factors()
        found = None if exact is None else (exact[0] * change.strength, exact[1])
    if found is None or spot.node.attribute("group", 1) != 1:
        return None
    up, down = (np.asarray(values) for values in found)
    out = spot.operand.shape[0]
    if not always and down.shape[0] * (out + down.shape[1]) > out * down.shape[1]:
        return None
    if site.rows is not None:
        whole = np.zeros((out, up.shape[1]), up.dtype)
        whole[site.rows] = up
        up = whole
    return up, down


def joined(pairs: Sequence[Pair]) -> Pair:
    """One pair whose delta is the sum: ranks side by side."""
    ups, downs = zip(*pairs, strict=True)
    return np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)


def oriented(spot: Spot, pair: Pair) -> Pair:
    """A and B as the branch of this spot takes them."""
    up, down = pair
    if spot.kind == "conv":
        kernel = spot.operand.shape[2:]
        return down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *(1 for _ in kernel))
    return (up, down) if spot.operand.table else (down.T, up.T)


def difference(graph: Graph, spot: Spot, changes: Sequence[Change]) -> Tensor:
    """The sum of changes [out,in,*k] of a spot's weight (or of a vector), worked out row block by row block."""
    shape = spot.operand.shape if not spot.vector else spot.operand.weight.shape
    needs_base = any(change.site.update.needs_base for change in changes)
    parts: list[_Rows] = []

    def load(start: int, stop: int) -> np.ndarray:
        if not parts:  # loaded once, when they are needed
            base = dequantised(graph, spot.operand) if needs_base else None
            parts[:] = [_Rows.of(change, shape, base) for change in changes]
        return sum(part.rows(start, stop) for part in parts).reshape(stop - start, *shape[1:])  # type: ignore[union-attr]

    return Tensor("F32", shape, load)


@dataclass(frozen=True, eq=False)
class _Rows:
    """One change of a weight [out, -1], row block by row block."""

    prepared: Prepared
    columns: int
    source: np.ndarray  # [out]: the row of the update that a row of the weight is, -1 for none
    base: Callable[[int, int], np.ndarray | None]

    @staticmethod
    def of(change: Change, shape: tuple[int, ...], base: np.ndarray | None) -> _Rows:
        update: Update = change.site.update
        rows = np.arange(shape[0]) if change.site.rows is None else change.site.rows
        source = np.full(shape[0], -1)
        source[rows] = np.arange(len(rows))
        flat = None if base is None else base.reshape(shape[0], -1)[rows]
        prepared = update.prepare(Tensor.float, change.strength)
        if prepared.scan is not None and flat is not None:
            prepared.scan([(0, len(flat), flat)])
        columns = int(np.prod(shape[1:], dtype=int))
        return _Rows(prepared, columns, source, lambda start, stop: None if flat is None else flat[start:stop])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the change, [stop - start, columns] float32."""
        wanted = self.source[start:stop]
        found = np.zeros((stop - start, self.columns), np.float32)
        own = wanted[wanted >= 0]
        if len(own):
            low, high = int(own.min()), int(own.max()) + 1
            reach = getattr(self.prepared, "reach", None)
            known = self.base(*(reach(low, high) if reach else (low, high)))
            values = np.asarray(self.prepared.delta(low, high, known)).reshape(high - low, -1)
            found[wanted >= 0] = values[own - low]
        return found


# ---------------------------------------------------------------- nodes


def attach(edit: Edit, spot: Spot, branch: Branch) -> None:
    """Put the nodes of a branch into the graph. Raises MatchError where that cannot be."""
    builder = _Builder(edit, spot)
    if spot.kind == "weight":
        builder.onto_weight(branch)
        return
    given, last = _ends(edit.graph, spot)
    total = builder.sum(list(builder.values(branch, given)))
    slot = _INTO.get(spot.node.op)
    if slot is None:
        builder.behind(last, total)
    else:
        builder.into(slot, total)


def _ends(graph: Graph, spot: Spot) -> tuple[str, Node]:
    """What a branch begins with, and the node whose result it is added to."""
    node = spot.node
    given = str(node.proto.input[1 if spot.kind == "table" else 0])
    if node.op not in (*_INTEGER, "MatMulIntegerToFloat"):
        return given, node
    source = graph.source(Use(node, 0))
    quantiser = graph.producers.get(source) if source is not None else None
    last: Node | None = node
    if node.op in _INTEGER:  # int32 -> Cast -> times both scales
        for op in ("Cast", "Mul"):
            uses = graph.uses.get(Value(last.scope, last.proto.output[0]), ()) if last is not None else ()
            last = uses[0].node if len(uses) == 1 and uses[0].node.op == op else None
    if quantiser is None or quantiser.op != "DynamicQuantizeLinear" or last is None:
        raise MatchError("no place for a branch: an integer operator in unknown company", _where(spot))
    return str(quantiser.proto.input[0]), last


def _where(spot: Spot) -> str:
    return f"{spot.changes[0].site.spelling} -> {spot.operand.weight.value.name}"


class _Builder:
    """The new nodes of one spot."""

    def __init__(self, edit: Edit, spot: Spot) -> None:
        self.edit, self.spot, self.nodes = edit, spot, []  # type: ignore[var-annotated]
        self.prefix = f"/{spot.module.replace('.', '/')}/lora"

    def node(self, op: str, *given: str, like: Node | None = None, **attributes: Any) -> str:
        """A new node with one output; the name of this."""
        name = self.edit.fresh(f"{self.prefix}/{op}")
        result = self.edit.fresh(f"{name}/output_0")
        made = require_onnx().helper.make_node(op, list(given), [result], name, **attributes)
        if like is not None:
            made.attribute.extend(a for a in like.proto.attribute if a.name in _CONV_WORDS)
        self.nodes.append(made)
        return result

    def values(self, branch: Branch, given: str) -> Iterator[str]:
        """What the parts of a branch give for the input ``given``."""
        make = {"product": self._product, "table": self._table, "conv": self._conv}[self.spot.kind]
        yield from make(branch, given)

    def _product(self, branch: Branch, given: str) -> Iterator[str]:
        if branch.pair is not None:
            yield self.node("MatMul", self.node("MatMul", given, branch.pair[0]), branch.pair[1])
        if branch.matrix is not None:
            yield self.node("MatMul", given, self.node("Transpose", branch.matrix, perm=[1, 0]))

    def _table(self, branch: Branch, ids: str) -> Iterator[str]:
        if branch.pair is not None:
            yield self.node("MatMul", self.node("Gather", branch.pair[0], ids), branch.pair[1])
        if branch.matrix is not None:
            yield self.node("Gather", branch.matrix, ids)

    def _conv(self, branch: Branch, given: str) -> Iterator[str]:
        if branch.pair is not None:
            yield self.node("Conv", self.node("Conv", given, branch.pair[0], like=self.spot.node), branch.pair[1])
        if branch.matrix is not None:
            group = self.spot.node.attribute("group", 1)
            yield self.node("Conv", given, branch.matrix, like=self.spot.node, group=group)

    def sum(self, values: Sequence[str]) -> str:
        """The sum of values."""
        total, *rest = values
        for value in rest:
            total = self.node("Add", total, value)
        return total

    def behind(self, last: Node, value: str) -> None:
        """Add to the result of a node, under this result's own name."""
        proto = self.edit.node(last)
        result = proto.output[0]
        proto.output[0] = self.edit.fresh(f"{result}/base")
        self._named_add(proto.output[0], value, result)
        self.edit.insert(last, self.nodes, after=True)

    def _named_add(self, one: str, other: str, result: str) -> None:
        name = self.edit.fresh(f"{self.prefix}/Add")
        self.nodes.append(require_onnx().helper.make_node("Add", [one, other], [result], name))

    def into(self, slot: int, value: str) -> None:
        """Add to an input that the node itself adds before its activation."""
        proto = self.edit.node(self.spot.node)
        if self.spot.node.attribute("beta", 1.0) != 1.0:
            raise MatchError("no place for a branch: the node scales what it adds", _where(self.spot))
        proto.input.extend([""] * (slot + 1 - len(proto.input)))
        held = proto.input[slot]
        proto.input[slot] = self.node("Add", value, held) if held else value
        self.edit.insert(self.spot.node, self.nodes)

    def onto_weight(self, branch: Branch) -> None:
        """Add to the weight itself, on its way to the node."""
        spot, use = self.spot, self.spot.operand.use
        if spot.operand.quantised:
            hint = "quantise the float graph with DequantizeLinear nodes (QDQ), or fold into it before"
            raise MatchError(f"no place for a branch: {spot.node.op} rounds its result at once", _where(spot), hint)
        if spot.node.op.startswith("Nhwc"):
            raise MatchError(f"no place for a branch at {spot.node.op}", _where(spot), "fold it: --mode fold")
        flipped = not spot.vector and not spot.operand.table and bool(spot.node.attribute("transB", 0))
        found = []
        if branch.pair is not None:  # [in,out], or [entries,dim]
            product = self.node("MatMul", *branch.pair)
            found.append(self.node("Transpose", product, perm=[1, 0]) if flipped else product)
        if branch.matrix is not None:
            turn = not (flipped or spot.vector or spot.operand.table)
            found.append(self.node("Transpose", branch.matrix, perm=[1, 0]) if turn else branch.matrix)
        proto = self.edit.node(spot.node)
        self.edit.rewire(use, self.node("Add", proto.input[use.slot], self.sum(found)))
        self.edit.insert(spot.node, self.nodes)
