"""Adapters as optional inputs of a graph, switched on run by run (onnxruntime's LoraAdapter).

Every place that any adapter changes gets a side branch whose A and B are inputs with a default: zeros of rank 1, which
add nothing (rank 0 would do for products, but leaves a convolution's result unwritten). The rank is a free dimension,
one symbol a module. Each adapter becomes one file beside the graph, its strength and scaling multiplied in; a run
switches on one of them, for several do not add up. Fused projections share one pair, block by block, so that any
adapter of the union fits. Sources: onnxruntime's RunOptions.add_active_adapter; see also `loratool.onnx.container`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import Loss
from loratool.errors import FormatError, LossError, MatchError, some
from loratool.lazy import np
from loratool.onnx import require_onnx
from loratool.onnx.branch import (
    Branch,
    Spot,
    attach,
    computed_in,
    difference,
    factors,
    joined,
    narrowed,
    oriented,
    spots,
)
from loratool.onnx.container import Container
from loratool.onnx.fold import Change, Edit
from loratool.onnx.graph import NUMBERS, Graph, Value
from loratool.tensors import Tensor, numpy_dtype

_OLDEST_IR = 4  # before that, every initializer is an input


@dataclass(frozen=True)
class _Input:
    """One optional input: its name, type and shape (a symbol for the rank)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def default(self) -> Tensor:
        """Zeros of rank 1."""
        shape = tuple(1 if isinstance(size, str) else size for size in self.shape)
        return Tensor.of(np.zeros(shape, numpy_dtype(self.dtype)))

    @property
    def message(self) -> Any:
        """Its ValueInfo."""
        return require_onnx().helper.make_tensor_value_info(self.name, NUMBERS[self.dtype], list(self.shape))


def inputs(graph: Graph, changes: Sequence[Change]) -> Edit:
    """``graph`` with an optional pair of inputs for each place that an adapter changes.

    Raises LossError for updates that are no product of two factors, MatchError where a branch cannot be.
    """
    _check(changes)
    edit = Edit.of(graph)
    edit.model.ir_version = max(edit.model.ir_version, _OLDEST_IR)
    made: dict[str, Branch] = {}
    for spot in spots(changes):
        names = _names(spot)
        if names[0] not in made:
            for entry in _entries(graph, spot):
                if edit.add(entry.name, entry.default) != entry.name:
                    raise MatchError("the graph has a value of that name already", entry.name)
                edit.model.graph.input.append(entry.message)
            made[names[0]] = Branch(matrix=names[0]) if spot.vector else Branch((names[0], names[1]))
        attach(edit, spot, made[names[0]])
    edit.finish()
    return edit


def _names(spot: Spot) -> tuple[str, ...]:
    """The names of a spot's inputs, PEFT's words behind the module."""
    if spot.vector:
        return (f"{spot.module}.delta",)
    if spot.operand.table:
        return (f"{spot.module}.lora_embedding_A", f"{spot.module}.lora_embedding_B")
    return (f"{spot.module}.lora_A.weight", f"{spot.module}.lora_B.weight")


def _entries(graph: Graph, spot: Spot) -> list[_Input]:
    """The optional inputs of a spot."""
    dtype, names = computed_in(graph, spot.operand), _names(spot)
    if spot.vector:
        return [_Input(names[0], dtype, spot.operand.weight.shape)]
    (out, given, *kernel), rank = spot.operand.shape, f"{spot.module}.rank"
    if spot.kind == "conv":
        shapes: tuple[tuple[int | str, ...], ...] = ((rank, given, *kernel), (out, rank, *(1 for _ in kernel)))
    else:
        first, last = (out, given) if spot.operand.table else (given, out)
        shapes = ((first, rank), (rank, last))
    return [_Input(name, dtype, shape) for name, shape in zip(names, shapes, strict=True)]


def _check(changes: Sequence[Change]) -> None:
    """Raise LossError for what two factors cannot say."""
    losses = []
    for spot in spots(changes):
        for change in spot.changes:
            if not spot.vector and factors(change, spot, always=True) is None:
                reason = f"{change.site.update.kind} is no product of two factors"
                losses.append(str(Loss(change.site.spelling, reason)))
    if losses:
        raise LossError("inputs cannot say everything the adapter holds", some(losses), "--mode fold can", losses)


def adapter_file(graph: Graph, changes: Sequence[Change], adapter: int, version: int = 0) -> Container:
    """What the file of one adapter (counted from 0) holds: values for the inputs of the places that it changes.

    ``version`` is the `model_version` of the base graph, which `check_adapter` looks at; onnxruntime does not.
    """
    tensors: dict[str, Tensor] = {}
    for spot in spots(changes):
        own = [change for change in spot.changes if change.adapter == adapter]
        names, dtype = _names(spot), computed_in(graph, spot.operand)
        if spot.vector and own:
            tensors[names[0]] = difference(graph, spot, own).cast(dtype)
        elif own:
            pairs = [pair for change in own if (pair := factors(change, spot, always=True)) is not None]
            both = oriented(spot, joined(pairs))
            tensors.update({name: narrowed(v, dtype, spot) for name, v in zip(names, both, strict=True)})
    return Container(tensors, adapter + 1, version)


def model_version(hashes: Mapping[str, str]) -> int:
    """A number for the base graph, from the hashes of an export's inputs (``base/...`` -> sha256)."""
    base = "".join(found for name, found in sorted(hashes.items()) if name.startswith("base/"))
    return int(hashlib.sha256(base.encode()).hexdigest()[:8], 16) & 0x7FFFFFFF


def check_adapter(graph: Graph, held: Container) -> None:
    """Raise FormatError or MatchError for an adapter file that is not for this graph, made by `inputs`.

    onnxruntime itself would run a file of another base without a word, and fails late over names, types and halves.
    """
    given = {entry.name: entry for entry in graph.model.graph.input if Value(0, entry.name) in graph.weights}
    try:
        hashes = json.loads(graph.metadata.get("loratool.inputs", "{}"))
    except ValueError:
        hashes = {}
    if isinstance(hashes, dict) and hashes and held.model_version != model_version(hashes):
        raise MatchError("the adapter file was made for another base graph", graph.path)
    for name, tensor in held.tensors.items():
        entry = given.get(name)
        if entry is None:
            raise MatchError("the graph has no such optional input", name)
        kind = entry.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        if NUMBERS[tensor.dtype] != kind.elem_type:
            raise MatchError(f"the adapter file is in {tensor.dtype}, the graph is not", name)
        fits = len(sizes) == len(tensor.shape) and all(
            size in (None, n) for size, n in zip(sizes, tensor.shape, strict=True)
        )
        if not fits:
            raise MatchError(f"{list(tensor.shape)} does not fit the graph's input", name)
    for name in held.tensors:
        other = _other_half(name)
        if other is not None and other not in held.tensors:
            raise FormatError("half of a pair is missing", other)


def _other_half(name: str) -> str | None:
    """The name of the factor that belongs to this one."""
    for one, other in (("_A", "_B"), ("_B", "_A")):
        for ending in ("lora{}.weight", "lora_embedding{}"):
            if name.endswith(ending.format(one)):
                return name.removesuffix(ending.format(one)) + ending.format(other)
    return None


def adapter_paths(out: Path, adapters: Sequence[Path | None]) -> list[Path]:
    """The files beside ``out``, one for each adapter: OUT's name, then the adapter's (or its number)."""
    found: list[Path] = []
    for number, adapter in enumerate(adapters, 1):
        name = "" if adapter is None else adapter.name if adapter.is_dir() else adapter.stem
        path = out.with_name(f"{out.stem}.{name or number}.onnx_adapter")
        found.append(out.with_name(f"{out.stem}.{name}-{number}.onnx_adapter") if path in found else path)
    return found


__all__ = [
    "adapter_file",
    "adapter_paths",
    "check_adapter",
    "inputs",
    "model_version",
]
