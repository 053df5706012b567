"""`loralib`: a state dict of Microsoft's loralib (``lora_state_dict``), a pickle read with --allow-pickle.

Keys are bare: ``<module>.lora_A`` [r,i] and ``.lora_B`` [o,r], of an Embedding [r,entries] and [dim,r], and with biases
trained also ``<module>.bias``. Nothing tells the scaling, lora_alpha / r: --scaling is needed. A `MergedLinear` (c_attn
of GPT-2) holds n of three projections: lora_A [n*r,i], lora_B [n*d,r], group by group; which of the three is in no file
(n = 3: all; n = 2: q and v, as in all that Microsoft published). A `Conv2d` holds lora_A [r*k,i*k], lora_B [o*k,r*k],
whose product is the weight's values in order; only the base's shape tells it from a Linear.

Written: what is read, one rank and one scaling for all. Source: microsoft/LoRA 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from loratool.adapter import Adapter, Loss, is_bias
from loratool.errors import FormatError
from loratool.formats import llm
from loratool.formats.base import Evidence, Format
from loratool.keys import Layout, require_pair
from loratool.lazy import np
from loratool.npz import looks_npz
from loratool.pickles import looks_pickled, write_pickle
from loratool.tensors import FLOATS, Tensor
from loratool.update import LowRank, Update

LAYOUT = Layout(slots=(("down", ".lora_A"), ("up", ".lora_B")))
_PROJECTIONS = 3  # of a MergedLinear
_MERGED = frozenset(("c_attn", "qkv", "qkv_proj", "in_proj", "query_key_value", "Wqkv"))
_ENABLED = {2: (True, False, True), 3: (True, True, True)}  # by the number of groups in the file


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """loralib: bare pairs in a pickle; in a safetensors file they are anybody's."""
    pickled = looks_pickled(evidence.weights) and not looks_npz(evidence.weights)
    found = pickled and any(key.endswith((".lora_A", ".lora_B")) for key in evidence.keys)
    return "a pickle with bare .lora_A and .lora_B" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read a state dict of loralib. Raises FormatError for what is malformed, and for whole checkpoints."""
    file = evidence.file
    grouped, rest = LAYOUT.group(file.tensors, where=file.path)
    for key in rest:
        if not is_bias(key):
            raise FormatError(
                "whole weights beside the factors: whether these are merged into them is told nowhere",
                f"{file.path}: {key}",
                "save lora.lora_state_dict(model) only",
            )
    updates: dict[str, Update] = {}
    assumed: list[str] = []
    for module, slots in grouped.items():
        where = f"{file.path}: {module}"
        require_pair(module, slots, where)
        down, up = slots["down"], slots["up"]
        if any(tensor.dtype not in FLOATS or len(tensor.shape) != 2 or not tensor.size for tensor in (down, up)):
            raise FormatError(f"factors {down.dtype} {list(down.shape)}, {up.dtype} {list(up.shape)}", where)
        groups = down.shape[0] // up.shape[1]
        if groups == 2:
            assumed.append(module)
        updates[module] = _update(module, down, up, evidence, where)
    warnings = [f"{module} adapts two of its three projections: taken to be q and v" for module in assumed]
    if evidence.scaling is None:
        warnings.append("loralib's files do not tell their scaling")
    metadata = llm.metadata(evidence, "loralib", warnings=tuple(warnings), scaling_known=evidence.scaling is not None)
    return Adapter(updates, rest, metadata)


def _update(module: str, down: Tensor, up: Tensor, evidence: Evidence, where: str) -> Update:
    """The update of one module."""
    scaling, known = evidence.scaling, _shape(module, evidence)
    if llm.is_embedding(module):
        return llm.factor_pair(up.T, down.T, scaling, layer="embedding", where=where)
    if known is not None and len(known) > 2:
        return _convolution(down, up, known, scaling, where)
    groups, odd = divmod(down.shape[0], up.shape[1])
    if odd or groups < 1:
        raise FormatError(f"rank mismatch: lora_A {list(down.shape)}, lora_B {list(up.shape)}", where)
    if groups == 1:
        return llm.factor_pair(down, up, scaling, where=where)
    if groups not in _ENABLED or up.shape[0] % groups:
        raise FormatError(f"a MergedLinear of {groups} groups and {up.shape[0]} rows", where)
    whole = _spread(up, groups)
    return llm.factor_pair(down, whole, scaling, where=where)


def _shape(module: str, evidence: Evidence) -> tuple[int, ...] | None:
    """The shape of the base's weight of a module, where the base is known and has it by that very name."""
    name = f"{module}.weight"
    return evidence.base.shape(name) if evidence.base and name in evidence.base.parameters else None


def _spread(up: Tensor, groups: int) -> Tensor:
    """lora_B [n*d,r] as the up factor [3*d,n*r] of the whole: each group in its own columns, zeros elsewhere."""
    rows, rank = up.shape[0] // groups, up.shape[1]

    def load(start: int, stop: int) -> np.ndarray:
        values = up.array()
        whole = np.zeros((_PROJECTIONS * rows, groups * rank), values.dtype)
        places = [n for n, enabled in enumerate(_ENABLED[groups]) if enabled]
        for group, place in enumerate(places):
            part = values[group * rows : (group + 1) * rows]
            whole[place * rows : (place + 1) * rows, group * rank : (group + 1) * rank] = part
        return whole[start:stop]

    return Tensor(up.dtype, (_PROJECTIONS * rows, groups * rank), load)


def _convolution(down: Tensor, up: Tensor, shape: tuple[int, ...], scaling: float | None, where: str) -> LowRank:
    """The LoRA of a Conv2d [o,i,k,k]: a row of its weight is k rows of the product, one after the other."""
    out, inner, *kernel = shape
    k = kernel[0]
    if kernel != [k, k] or down.shape[1] != inner * k or up.shape[0] != out * k or down.shape[0] != up.shape[1]:
        raise FormatError(f"factors {list(down.shape)}, {list(up.shape)} of a weight {list(shape)}", where)
    rank = down.shape[0]

    def blocks(start: int, stop: int) -> np.ndarray:
        values = down.array()  # [r*k,i*k], as the k blocks of [k*r*k,k*i*k]
        whole = np.zeros((k * rank, k * values.shape[1]), values.dtype)
        for block in range(k):
            whole[block * rank : (block + 1) * rank, block * values.shape[1] : (block + 1) * values.shape[1]] = values
        return whole.reshape(k * rank, inner, k, k)[start:stop]

    wide = Tensor(down.dtype, (k * rank, inner, k, k), blocks)
    alpha = None if scaling is None else scaling * k * rank
    return LowRank(wide, up.reshape(out, k * rank, 1, 1), alpha=alpha)


# ---------------------------------------------------------------- writing


def _reason(name: str, update: Update) -> str | None:
    return llm.no_pair(name, update)


def losses(adapter: Adapter) -> list[Loss]:
    """What loralib cannot say: all but LoRAs and biases trained whole."""
    return [loss for loss in llm.lost(adapter, _reason) if loss.name not in _biases(adapter)]


def _biases(adapter: Adapter) -> set[str]:
    return {adapter.spelling(name) for name in adapter.carried if is_bias(name)}


def notes(adapter: Adapter) -> list[str]:
    """What the code that loads the file must be told."""
    uniform = _uniform(_parts(adapter))
    return [f"loralib is told by its code: r={uniform.rank}, lora_alpha={uniform.alpha:g}"]


def _parts(adapter: Adapter) -> dict[str, tuple[LowRank, int]]:
    """The LoRA of each module, and how many groups it has."""
    lows = {name: llm.low_rank(update) for name, update in llm.said(adapter, _reason).items()}
    return {name: (low, _groups(name, low)) for name, low in lows.items() if low}


def _uniform(parts: Mapping[str, tuple[LowRank, int]]) -> llm.Uniform:
    """One rank and one scaling for all; the rank of a group where there are several."""
    scaling = llm.commonest((low.scaling for low, _ in parts.values() if low.scaling), 0.0)
    return llm.Uniform(max((low.rank // groups for low, groups in parts.values()), default=8), scaling)


def _groups(name: str, low: LowRank) -> int:
    """How many groups of a MergedLinear make exactly this LoRA; 1 where none do."""
    out, rank = low.up.shape[:2]
    if name.rpartition(".")[2] not in _MERGED or out % _PROJECTIONS:
        return 1
    for groups in _ENABLED:
        if rank % groups == 0:
            kept = _gathered(low.up, groups)
            if math.prod(kept.shape) and low.up.same_values(_spread(kept, groups)):
                return groups
    return 1


def _gathered(up: Tensor, groups: int) -> Tensor:
    """lora_B [n*d,r] of the up factor [3*d,n*r] of a whole: the blocks that are not zero."""
    rows, rank = up.shape[0] // _PROJECTIONS, up.shape[1] // groups
    places = [n for n, enabled in enumerate(_ENABLED[groups]) if enabled]

    def load(start: int, stop: int) -> np.ndarray:
        values = up.array()
        blocks = [
            values[place * rows : (place + 1) * rows, group * rank : (group + 1) * rank]
            for group, place in enumerate(places)
        ]
        return np.concatenate(blocks)[start:stop]

    return Tensor(up.dtype, (groups * rows, rank), load)


def write(adapter: Adapter, path: Path) -> None:
    """Write a state dict that loralib loads."""
    parts = _parts(adapter)
    uniform = _uniform(parts)
    tensors: dict[str, Tensor] = {}
    for name, (low, groups) in parts.items():
        down, up = _factors(low, groups, uniform)
        pair = (up.T, down.T) if low.layer == "embedding" else (down, up)
        tensors[LAYOUT.key(name, "down")], tensors[LAYOUT.key(name, "up")] = pair
    tensors.update({name: tensor for name, tensor in adapter.carried.items() if is_bias(name)})
    write_pickle(path, tensors)


def _factors(low: LowRank, groups: int, uniform: llm.Uniform) -> tuple[Tensor, Tensor]:
    """lora_A [n*r,i] and lora_B [n*d,r] of a module."""
    if groups == 1:
        return llm.padded(low, uniform.rank, uniform.scaling)
    rank, up = low.rank // groups, _gathered(low.up, groups)
    kept = [LowRank(low.down.slice(g * rank, (g + 1) * rank), up, alpha=low.scaling * rank) for g in range(groups)]
    pairs = [llm.padded(part, uniform.rank, uniform.scaling) for part in kept]
    return Tensor.joined([down for down, _ in pairs]), pairs[0][1]


FORMAT = Format(
    name="loralib",
    title="Microsoft loralib state dict",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
    notes=notes,
)
