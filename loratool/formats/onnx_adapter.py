"""`onnx-adapter`: a file of onnxruntime's LoraAdapter (``.onnx_adapter``), values for optional inputs of an ONNX graph.

Keys are ``<module>.lora_A.weight`` [i,r] and ``.lora_B.weight`` [r,o], each transposed; of a convolution [r,i,*k] and
[o,r,*1]; of a table ``.lora_embedding_A`` [entries,r] and ``.lora_embedding_B`` [r,dim]; ``<parameter>.delta`` is added
to a vector (a bias). The scaling is multiplied into B. Modules are called what the graph calls them: one that the
graph fuses (``qkv_proj``) is one here. The container is a flatbuffer, see `loratool.onnx.container`.

Written: the same, module by module, as the adapter names them; `export-onnx --mode inputs` writes what fits a graph.
Sources: onnxruntime 1.20 on (AdapterFormat); microsoft/Olive and onnxruntime-genai for the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratool.adapter import Adapter, Loss, is_bias
from loratool.errors import FormatError
from loratool.formats import llm
from loratool.formats.base import Evidence, Format
from loratool.keys import Layout, require_pair
from loratool.onnx.container import Container, looks_container, write_container
from loratool.tensors import FLOATS, Tensor
from loratool.update import Dense, LowRank, Update

LAYOUT = Layout(
    slots=(("down", ".lora_A.weight"), ("up", ".lora_B.weight"), ("delta", ".delta")),
    aliases=(("down", ".lora_A.MatMul.weight"), ("up", ".lora_B.MatMul.weight")),  # onnxruntime-genai's builder
)
TABLE = Layout(slots=(("up", ".lora_embedding_A"), ("down", ".lora_embedding_B")))


def sniff(evidence: Evidence) -> str | None:
    """By the container's own tag."""
    return "a flatbuffer tagged TORT" if looks_container(evidence.weights) else None


def read(evidence: Evidence) -> Adapter:
    """Read an adapter file. Raises FormatError for what is malformed or unknown."""
    file = evidence.file
    tables, others = TABLE.group(file.tensors, where=file.path)
    grouped, rest = LAYOUT.group(others, where=file.path)
    if rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {next(iter(rest))}")
    updates: dict[str, Update] = {}
    for module, slots in (*grouped.items(), *tables.items()):
        where, table = f"{file.path}: {module}", slots is tables.get(module)
        if module in updates:
            raise FormatError("one module is a table and a product", where)
        if any(tensor.dtype not in FLOATS for tensor in slots.values()):
            raise FormatError("a factor is no floating number", where)
        updates[module] = _vector(slots, where) if "delta" in slots else _pair(module, slots, table, where)
    return Adapter(updates, {}, llm.metadata(evidence, "onnx-adapter"))


def _vector(slots: Mapping[str, Tensor], where: str) -> Update:
    if len(slots) > 1 or len(slots["delta"].shape) != 1:
        raise FormatError("what is added to a vector is one vector", where)
    return Dense(slots["delta"], kind="bias")


def _pair(module: str, slots: Mapping[str, Tensor], table: bool, where: str) -> Update:
    require_pair(module, slots, where)
    down, up = slots["down"], slots["up"]
    if table:
        return llm.factor_pair(down, up, None, layer="embedding", where=where)
    if len(down.shape) > 2:
        try:
            return LowRank(down, up)
        except FormatError as error:
            raise FormatError(error.what, where, error.hint) from None
    return llm.factor_pair(llm.transposed(down, where), llm.transposed(up, where), None, where=where)


# ---------------------------------------------------------------- writing


def _reason(name: str, update: Update) -> str | None:
    """Why the format has no words for an update."""
    if is_bias(name):
        return None if isinstance(update, Dense) and len(update.shape) == 1 else "a bias that is no sum"
    reason = llm.no_pair(name, update)
    return None if reason == "a convolution" else reason


def losses(adapter: Adapter) -> list[Loss]:
    """Everything but low-rank updates and biases."""
    return llm.lost(adapter, _reason)


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter file: what it can say."""
    from loratool.onnx.resolve import logical

    tensors: dict[str, Tensor] = {}
    for name, update in llm.said(adapter, _reason).items():
        if isinstance(update, Dense):
            tensors[LAYOUT.key(name, "delta")] = llm.multiplied(update.value, update.scaling, 1.0)
            continue
        low = llm.low_rank(logical(update, name))
        assert low is not None  # the losses said so
        tensors.update(_tensors(name, low))
    write_container(path, Container(tensors))


def _tensors(module: str, low: LowRank) -> dict[str, Tensor]:
    """The two tensors of a module."""
    if low.layer == "embedding":  # the scaling goes into B, which is this one's down
        down = llm.multiplied(low.down, low.scaling, 1.0)
        return {TABLE.key(module, "up"): low.up, TABLE.key(module, "down"): down}
    up = llm.multiplied(low.up, low.scaling, 1.0)
    if len(low.down.shape) > 2:
        return {LAYOUT.key(module, "down"): low.down, LAYOUT.key(module, "up"): _kernel(up, low)}
    return {LAYOUT.key(module, "down"): low.down.T, LAYOUT.key(module, "up"): up.reshape(*up.shape[:2]).T}


def _kernel(up: Tensor, low: LowRank) -> Tensor:
    """up [o,r,*1] with as many axes as down."""
    return up.reshape(*up.shape[:2], *(1 for _ in low.down.shape[2:]))


FORMAT = Format(
    name="onnx-adapter",
    title="adapter file of onnxruntime: values for optional inputs of an ONNX graph",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
