"""Weights as the nodes of a graph take them: which input is one, in which layout, and of which module.

The operator decides the layout; a name or a shape never does. The module comes from the node that takes the weight:
dynamo's scopes, TorchScript's node path, then weaker signs. Source: torch.onnx, onnxruntime (contrib operators,
quantizer, transformer optimizer), onnxruntime-genai, optimum; ONNX operator specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loratool.onnx.graph import Graph, Node, Use, Value, Weight

Layout = Literal["plain", "transposed", "nhwc"]
"""How a tensor holds a module's weight: as torch does ([out,in], OIHW, [entries,dim]), transposed, or O,h,w,I."""

# operators by what their weight is; of these, those whose weight is quantised
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "GemmFastGelu", "FusedMatMulActivation", "Attention")
_INTEGER_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention")
_LINEAR_PRODUCTS = ("QLinearMatMul", "QGemm")
_PACKED = ("MatMulNBits", "MatMulBnb4")  # [out,in], in blocks
_CONVS = ("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvTranspose")
_SLOTS = {
    **dict.fromkeys((*_PRODUCTS, *_INTEGER_PRODUCTS, *_PACKED, *_CONVS, "ConvInteger"), (1,)),
    **dict.fromkeys((*_LINEAR_PRODUCTS, "QLinearConv"), (3,)),
    **dict.fromkeys(("Gather", "GatherBlockQuantized"), (0,)),
    **dict.fromkeys(("EmbedLayerNormalization", "QEmbedLayerNormalization"), (2, 3, 4)),
}
_TRANSPOSED = frozenset((*_PRODUCTS, *_INTEGER_PRODUCTS, *_LINEAR_PRODUCTS))  # [in,out], unless transB
_QUANTISED = frozenset((*_INTEGER_PRODUCTS, *_LINEAR_PRODUCTS, *_PACKED, "ConvInteger", "QLinearConv")) | {
    "GatherBlockQuantized",
    "QEmbedLayerNormalization",
}
_TABLES = frozenset(("Gather", "GatherBlockQuantized", "EmbedLayerNormalization", "QEmbedLayerNormalization"))
_BIASES = {**dict.fromkeys(("Gemm", "FusedGemm", "Conv", "FusedConv", "NhwcConv", "GemmFastGelu", "Attention"), 2)}
_BLOCKED = "com.microsoft.nchwc"

SOURCES = ("scopes", "path", "bias", "name")  # who tells the module, the best first
_FUSION = "/MatMulAddFusion"  # what onnxruntime appends to the path of a product that took its bias in
_PARAMETER = re.compile(r"(\.MatMul)?\.(weight|qweight)(_Q4|_Q8|_quantized|_merged_\d+|_transposed)?$")


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight as one node takes it; ``chain`` are the nodes in between (Transpose, Cast, ...), weight first.

    ``layout`` is that of the stored tensor. ``gain`` multiplies it (Gemm's alpha). ``quantised`` names how it is
    quantised, ``refused`` why it cannot be changed; both are empty for an ordinary weight. ``table``: a Gather's.
    """

    use: Use
    weight: Weight
    chain: tuple[Node, ...] = ()
    layout: Layout = "plain"
    table: bool = False
    gain: float = 1.0
    quantised: str = ""
    refused: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's weight, as torch has it; of packed integers as the node tells it."""
        node, stored = self.use.node, self.weight.shape
        if node.op in _PACKED:
            return (node.attribute("N", 0), node.attribute("K", 0))
        if self.layout == "transposed":
            return stored[::-1]
        return (stored[0], stored[-1], *stored[1:-1]) if self.layout == "nhwc" else stored


def operands(graph: Graph) -> Iterator[Operand]:
    """Every weight of a matrix product, a convolution or a table, as its node takes it."""
    for node in graph.nodes:
        for slot in _SLOTS.get(node.op, ()):
            use = Use(node, slot)
            traced = graph.trace(use)
            if traced is not None and len(traced[0].shape) >= 2:
                yield _operand(use, *traced)
        if node.op in ("MatMul", "FusedMatMul"):
            traced = graph.trace(Use(node, 0))
            if traced is not None and len(traced[0].shape) == 2 and graph.trace(Use(node, 1)) is None:
                yield Operand(Use(node, 0), *traced, refused="the weight is the first factor of a product")


def _operand(use: Use, weight: Weight, chain: tuple[Node, ...]) -> Operand:
    node, rank = use.node, len(weight.shape)
    transposes = [step for step in chain if step.op == "Transpose"]
    flipped = bool(node.attribute("transB", 0)) ^ bool(len(transposes) % 2)
    layout: Layout = "plain"
    if node.op in _TRANSPOSED:
        layout = "plain" if flipped else "transposed"
    elif node.op in _TABLES:
        layout = "transposed" if flipped else "plain"
    elif node.op.startswith("Nhwc"):
        layout = "nhwc"
    quantised = node.op if node.op in _QUANTISED else ""
    if any(step.op == "DequantizeLinear" for step in chain):
        quantised = "DequantizeLinear"
    gain = float(node.attribute("alpha", 1.0)) if node.op in ("Gemm", "FusedGemm", "FusedMatMul") else 1.0
    return Operand(
        use,
        weight,
        chain,
        layout,
        node.op in _TABLES,
        gain,
        quantised,
        _refused(node, rank, transposes, weight, quantised),
    )


def _refused(node: Node, rank: int, transposes: list[Node], weight: Weight, quantised: str) -> str:
    """Why the weight of a node cannot be changed; empty where it can."""
    if node.proto.domain == _BLOCKED:
        return "its weight is reordered for one processor (NCHWc): optimise the graph at level extended or below"
    if node.op == "ConvTranspose":
        return "transposed convolutions are not supported"
    if node.op in _CONVS:
        return "its weight is transposed by a node" if transposes else ""
    if node.op in (*_PACKED, "GatherBlockQuantized"):
        return ""
    if rank != 2:
        return f"its weight has {rank} axes"
    if node.op in _TABLES and node.attribute("axis", 0):
        return "its table is gathered along another axis"
    if any(step.attribute("perm", [1, 0]) != [1, 0] for step in transposes):
        return "its weight is transposed by a node in an unknown way"
    if any(node.attribute(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return "its product is transposed"
    return "" if quantised or weight.floating else f"its weight is stored as {weight.tensor.dtype}"


# ---------------------------------------------------------------- names


def modules(graph: Graph) -> tuple[str, ...]:
    """The modules that the graph's weights are said to be."""
    told = (module_names(graph, operand) for operand in operands(graph))
    return tuple(dict.fromkeys(next(iter(names.values())) for names in told if names))


def module_names(graph: Graph, operand: Operand) -> dict[str, str]:
    """The module of a weight, by each source that tells one; the best first."""
    node = operand.use.node
    found = {"scopes": scope_module(node), "path": path_module(node.proto.name)}
    if not any(found.values()):
        found["bias"] = _bias_module(graph, operand)
        found["name"] = name_module(operand.weight.value.name)
    return {source: found[source] for source in SOURCES if found.get(source)}


def scope_module(node: Node) -> str:
    """The module in whose forward pass dynamo saw this node."""
    return _unwrapped(node.scopes[-2]) if len(node.scopes) > 1 else ""


def path_module(name: str) -> str:
    """The module in a node's path as TorchScript's exporter and the genai builder write it: ``/a/b.0/MatMul``."""
    name = name.removeprefix("fused ")
    if name.startswith("Nhwc"):
        name = name.partition("-")[2]
    parts = name.removesuffix(_FUSION).split("/")
    if len(parts) < 3 or parts[0]:
        return ""
    return _unwrapped(".".join(part for part in parts[1:-1] if part))


def name_module(name: str) -> str:
    """The module whose parameter an initializer is named after."""
    cut = _PARAMETER.search(name)
    return _unwrapped(name[: cut.start()]) if cut else ""


def _unwrapped(module: str) -> str:
    """A module path without PEFT's wrapper."""
    return ".".join(part for part in module.split(".") if part != "base_layer")


def bias_of(graph: Graph, operand: Operand) -> Use | None:
    """The input that adds a module's bias: of the node itself, or of the Add behind a product."""
    node = operand.use.node
    slot = _BIASES.get(node.op)
    if slot is not None:
        traced = graph.trace(Use(node, slot)) if len(node.proto.input) > slot else None
        return Use(node, slot) if traced else None
    for use in graph.uses.get(Value(node.scope, _float_result(graph, node).proto.output[0]), ()):
        if use.node.op == "Add":
            other = Use(use.node, 1 - use.slot)
            traced = graph.trace(other)
            if traced is not None and len(traced[0].shape) == 1:
                return other
    return None


def _float_result(graph: Graph, node: Node) -> Node:
    """The node whose result is a product's in floats: behind integers come a Cast and a Mul by the scales."""
    last = node
    for op in ("Cast", "Mul") if node.op in ("MatMulInteger", "ConvInteger") else ():
        uses = graph.uses.get(Value(last.scope, last.proto.output[0]), ())
        if len(uses) != 1 or uses[0].node.op != op:
            return node
        last = uses[0].node
    return last


def _bias_module(graph: Graph, operand: Operand) -> str:
    """The module that its bias is named after; a bias that several share tells nothing."""
    bias = bias_of(graph, operand)
    traced = graph.trace(bias) if bias is not None else None
    if traced is None or len(graph.ends(traced[0].value)) > 1 or not traced[0].value.name.endswith(".bias"):
        return ""
    return _unwrapped(traced[0].value.name.removesuffix(".bias"))
