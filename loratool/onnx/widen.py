"""bfloat16 graphs in float32, to be run where bfloat16 cannot be (onnxruntime on the processor)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratool.lazy import np
from loratool.onnx import require_onnx
from loratool.onnx.container import Container, read_container, write_container
from loratool.onnx.fold import Edit, Values, write_graph
from loratool.onnx.graph import NUMBERS, Value, read_graph, tensors_of

_NARROW, _WIDE = NUMBERS["BF16"], NUMBERS["F32"]
_TYPE_WORDS = ("to", "dtype", "output_dtype", "saturate_dtype")  # attributes that name an element type


def widen(path: Path, out: Path) -> Path:
    """Write the graph at ``path`` with every bfloat16 as float32, values streamed; where it is."""
    edit = Edit.of(read_graph(path))
    held = {id(tensor): tensor for tensor in edit.model.graph.initializer}  # kept: an id is one as long as its owner is
    for tensor in tensors_of(edit.model):
        if tensor.data_type != _NARROW:
            continue
        if id(tensor) in held:
            weight = edit.graph.weights[Value(0, tensor.name)]
            edit.values[tensor.name] = Values(weight.tensor.cast("F32"))
            tensor.data_type = _WIDE
        else:
            values = require_onnx().numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(require_onnx().numpy_helper.from_array(values, tensor.name))
    for graph in _graphs(edit.model):
        for entry in (*graph.input, *graph.output, *graph.value_info):
            if entry.type.tensor_type.elem_type == _NARROW:
                entry.type.tensor_type.elem_type = _WIDE
    for node in _nodes(edit.model):
        for attribute in node.attribute:
            if attribute.name in _TYPE_WORDS and attribute.i == _NARROW:
                attribute.i = _WIDE
    write_graph(edit, out, inputs={}, metadata={})
    return out


def widen_adapter(path: Path, out: Path) -> Path:
    """Write an adapter file with every bfloat16 as float32; where it is."""
    held = read_container(path)
    wide = {name: t.cast("F32") if t.dtype == "BF16" else t for name, t in held.tensors.items()}
    write_container(out, Container(wide, held.adapter_version, held.model_version))
    return out


def _graphs(model: Any) -> Iterator[Any]:
    """The graph and its subgraphs."""
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node
