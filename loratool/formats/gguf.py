"""`gguf`: a LoRA adapter of llama.cpp, one GGUF file.

Keys are ``<tensor of the base>.lora_a`` [r,i] and ``.lora_b`` [o,r], in numpy's order of axes; of a stack of experts
[E,r,i] and [E,o,r]; of the token embedding ``lora_a`` [entries,r], transposed, and ``lora_b`` [dim,r]. The scaling is
``adapter.lora.alpha`` divided by each tensor's own rank, or 1 where alpha is 0 or absent: one alpha for all. Names are
llama.cpp's (``blk.0.attn_q.weight``), by ``general.architecture``; output rows are ordered as its converter orders
those of the base, so only ``lora_b`` is, and numbers of heads are needed to tell how.

Written: the alpha that most modules have, other scalings folded into ``lora_b``; what of the base's configuration is
needed to read the file back stands in ``loratool.base``. Convolutions, magnitudes, norms and whole tensors cannot be
said. Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss
from loratool.architectures.llama_cpp import LLAMA_CPP, LlamaCpp
from loratool.errors import FormatError
from loratool.formats import llm
from loratool.formats.base import Evidence, Format
from loratool.gguf import write_gguf
from loratool.keys import Layout, require_pair
from loratool.lazy import np
from loratool.tensors import CONTENT_HASH, SafetensorsFile, Tensor, content_hash, digest
from loratool.update import Update

LAYOUT = Layout(slots=(("down", ".lora_a"), ("up", ".lora_b")))
BASE = "loratool.base"  # what of the base's configuration is needed to read the file back, JSON
_ARCHITECTURE, _TYPE = "general.architecture", "general.type"
_ADAPTER, _ALPHA = "adapter.type", "adapter.lora.alpha"
_TOKENS = "adapter.alora.invocation_tokens"
_FIELDS = ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_size", "tie_word_embeddings")
_KEPT = ("general.name", "general.description", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_GUESSED = 1024
_EXPERTS: llm.ExpertLeaves = {
    **{("mlp.experts", leaf): ("mlp.experts", leaf) for leaf in ("gate_proj", "up_proj", "down_proj")},
    **{("block_sparse_moe.experts", leaf): ("block_sparse_moe.experts", leaf) for leaf in ("w1", "w2", "w3")},
}
_HINT = "give --base, the folder of the base model with its config.json"


@dataclass(frozen=True)
class _Dialect:
    """An architecture of llama.cpp, and what is known of the base."""

    known: LlamaCpp
    config: Mapping[str, Any]

    @cached_property
    def names(self) -> llm.Templates:
        """Hugging Face's names and llama.cpp's."""
        return llm.Templates(self.known.pairs)

    def order(self, module: str, rows: int) -> np.ndarray | None:
        """Which rows of Hugging Face's, in order, are llama.cpp's; None where they stay.

        Raises FormatError where the numbers of heads are not known or do not fit.
        """
        leaf = module.rpartition(".")[2]
        if self.known.rows == "rotary" and leaf in ("q_proj", "k_proj"):
            heads = llm.heads_of(self.config)
            count = heads.of(leaf) if heads else None
            return llm.interleaved(rows, self._told(count, leaf))
        if self.known.rows == "grouped" and leaf == "query_key_value":
            queries = llm.size(self.config, "num_attention_heads", "n_head")
            hidden = llm.size(self.config, "hidden_size", "n_embed")
            return llm.ungrouped(rows, self._told(queries, leaf), self._told(hidden, leaf))
        return None

    def _told(self, number: int | None, leaf: str) -> int:
        if number is None:
            raise FormatError(f"the rows of {leaf} are in llama.cpp's order, and the heads are unknown", hint=_HINT)
        return number


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """GGUF by its architecture, which no safetensors file names."""
    return "a GGUF file" if _ARCHITECTURE in evidence.file.metadata else None


def read(evidence: Evidence) -> Adapter:
    """Read a GGUF adapter. Raises FormatError for models, other kinds of adapters, and what is malformed."""
    file = evidence.file
    pairs = file.metadata
    _check(pairs, file.path)
    config = llm.text_config(evidence.base_config) or _own_config(pairs, file.path)
    dialect = _Dialect(_architecture(pairs[_ARCHITECTURE], config, file), config)
    alpha = _alpha(pairs, evidence)
    grouped, rest = LAYOUT.group(file.tensors, where=file.path)
    for key in rest:
        raise FormatError("a tensor that is no factor (llama.cpp skips norms)", f"{file.path}: {key}")
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for key, slots in grouped.items():
        for name, update in _updates(key, slots, alpha, dialect, f"{file.path}: {key}").items():
            if name in updates:
                raise FormatError("two tensors of one module", f"{file.path}: {key} and {spellings[name]}")
            updates[name], spellings[name] = update, key
    strings = {key: pairs[key] for key in pairs if key in _KEPT or (key.startswith("loratool.") and key != BASE)}
    kind = next(kind for kind, known in LLAMA_CPP.items() if known is dialect.known)
    metadata = llm.metadata(evidence, "gguf", strings=strings, architecture=kind, base_config=config)
    return Adapter(updates, {}, metadata, spellings)


def _check(pairs: Mapping[str, str], path: Path) -> None:
    """Refuse by name what is no LoRA adapter."""
    kind = pairs.get(_TYPE, "model")
    if kind != "adapter":
        raise FormatError(f"a GGUF {kind[:40]}, not an adapter", path, "base models in GGUF are not read")
    if pairs.get(_ADAPTER) != "lora":
        raise FormatError(f"an adapter of type {pairs.get(_ADAPTER, 'unknown')[:40]}", path)
    if _TOKENS in pairs:
        raise FormatError("activated LoRA depends on the tokens: it is no fixed change of weights", path)


def _own_config(pairs: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What loratool noted of the base; empty for files of others."""
    try:
        found = json.loads(pairs.get(BASE, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found.keys() <= set(_FIELDS):
        raise FormatError(f"{BASE} is no table of what is known of the base", path)
    return found


def _architecture(name: str, config: Mapping[str, Any], file: SafetensorsFile) -> LlamaCpp:
    """llama.cpp's architecture of this name: the base's own model type, else one that has all these tensors."""
    known = LLAMA_CPP.get(str(config.get("model_type")))
    if known and known.name == name:
        return known
    alike = [known for known in LLAMA_CPP.values() if known.name == name]
    if not alike:
        raise FormatError(f"an adapter for llama.cpp's architecture {name[:40]}, which is not known here", file.path)
    modules = {found[0].removesuffix(".weight") for key in file.tensors if (found := LAYOUT.split(key))}
    return next((known for known in alike if all(map(llm.Templates(known.pairs).back, modules))), alike[0])


def _alpha(pairs: Mapping[str, str], evidence: Evidence) -> float:
    """The alpha of all modules, 0 for a scaling of 1."""
    try:
        alpha = float(pairs.get(_ALPHA, "0"))
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise FormatError(f"{_ALPHA} is {pairs[_ALPHA][:40]!r}, not a number", evidence.path)
    return alpha


def _updates(key: str, slots: Mapping[str, Tensor], alpha: float, dialect: _Dialect, where: str) -> dict[str, Update]:
    """The updates of one tensor of the base: of a module, or of each expert of a stack."""
    require_pair(key, slots, where)
    name = dialect.names.back(key.removesuffix(".weight")) if key.endswith(".weight") else None
    if name is None:
        raise FormatError(f"{dialect.known.name} has no tensor of this name", where)
    down, up = slots["down"], slots["up"]
    rank = up.shape[-1] if up.shape else 0
    scaling = alpha / rank if alpha and rank else None
    if llm.is_embedding(name):
        return {name: llm.factor_pair(llm.transposed(up, where), down, scaling, None, "embedding", where)}
    if len(up.shape) == 3:
        head, _, leaf = name.rpartition(".")
        pairs = llm.unstacked(down, up, where)
        return {f"{head}.{n}.{leaf}": llm.factor_pair(*pair, scaling, where=where) for n, pair in enumerate(pairs)}
    update = llm.factor_pair(down, up, scaling, where=where)
    try:
        order = dialect.order(name, update.shape[0])
    except FormatError as error:
        return {name: llm.unreadable(update, FormatError(error.what, where, error.hint))}
    return {name: update if order is None else llm.reordered(update, np.argsort(order))}


# ---------------------------------------------------------------- writing


def _dialect(adapter: Adapter) -> _Dialect:
    """The architecture of an adapter's base. Raises FormatError where nothing tells it, or llama.cpp has none."""
    config = llm.base_config(adapter)
    outer = adapter.metadata.base_config.get("model_type")
    types = [str(value) for value in (outer, config.get("model_type")) if value]
    if not types:
        raise FormatError("the base's architecture is unknown, and names in GGUF go by it", hint=_HINT)
    known = next((LLAMA_CPP[name] for name in types if name in LLAMA_CPP), None)
    if known is None:
        raise FormatError(f"llama.cpp's names of {types[0]} models are not known here")
    return _Dialect(known, config)


def losses(adapter: Adapter) -> list[Loss]:
    """What a GGUF adapter cannot say. Raises FormatError where the base's architecture or heads are unknown."""
    dialect = _dialect(adapter)
    reason = _reason(dialect)
    for name, update in llm.said(adapter, reason).items():
        dialect.order(name, update.shape[0])
    return [*llm.lost(adapter, reason), *llm.rounded(adapter, reason)]


def _reason(dialect: _Dialect) -> llm.Reason:
    tied = llm.is_tied(dialect.config, dialect.known.tied)

    def reason(name: str, update: Update) -> str | None:
        if why := llm.no_pair(name, update):
            return why
        stack = next(iter(llm.gathered({name: update}, _EXPERTS)), name)
        found = dialect.names.there(stack)
        if found is None:
            return f"llama.cpp has no tensor of {dialect.known.name} for it"
        if found == "output" and tied:
            return "the output projection is tied to the embedding: llama.cpp has no tensor for it"
        return None

    return reason


def write(adapter: Adapter, path: Path) -> None:
    """Write a GGUF adapter."""
    dialect = _dialect(adapter)
    updates = llm.said(adapter, _reason(dialect))
    alpha = _common_alpha(updates)
    tensors: dict[str, Tensor] = {}
    for name, update in sorted(updates.items(), key=lambda item: llm.natural(item[0])):
        if not llm.in_stack(name, _EXPERTS):
            tensors.update(_tensors(name, update, alpha, dialect))
    for stack, experts in llm.gathered(updates, _EXPERTS).items():
        tensors.update(_stacks(stack, experts, alpha, dialect))
    write_gguf(path, _pairs(adapter, alpha, tensors, dialect), tensors)


def _common_alpha(updates: Mapping[str, Update]) -> float:
    """The alpha that most have, as float32 holds it; 0, a scaling of 1, where float32 cannot."""
    alphas = (low.scaling * low.rank for update in updates.values() if (low := llm.low_rank(update)))
    with np.errstate(over="ignore"):
        alpha = float(np.float32(llm.commonest((alpha for alpha in alphas if alpha), 0.0)))
    return alpha if math.isfinite(alpha) else 0.0


def _unit(alpha: float, rank: int, scaling: float) -> float:
    """What llama.cpp multiplies by; the scaling itself where only float32's rounding of alpha tells them apart."""
    if alpha and float(np.float32(scaling * rank)) == alpha:
        return scaling
    return alpha / rank if alpha else 1.0


def _tensors(name: str, update: Update, alpha: float, dialect: _Dialect) -> dict[str, Tensor]:
    """The two tensors of one module."""
    low = llm.low_rank(update)
    assert low is not None  # losses() said so
    down, up = llm.padded(low, low.rank, _unit(alpha, low.rank, low.scaling))
    if llm.is_embedding(name):
        down, up = up, down.T
    else:
        order = dialect.order(name, up.shape[0])
        up = up if order is None else llm.taken(up, order)
    key = f"{dialect.names.there(name)}.weight"
    return {LAYOUT.key(key, "down"): llm.narrowed(down), LAYOUT.key(key, "up"): llm.narrowed(up)}


def _stacks(stack: str, experts: Mapping[int, Update], alpha: float, dialect: _Dialect) -> dict[str, Tensor]:
    """The two tensors of a stack of experts, at the largest rank among them."""
    lows = [low for update in experts.values() if (low := llm.low_rank(update))]
    rank = max(low.rank for low in lows)
    unit = _unit(alpha, rank, llm.commonest(low.scaling for low in lows))
    down, up = llm.stacked(experts, llm.expert_count(dialect.config, experts, stack), rank, unit)
    key = f"{dialect.names.there(stack)}.weight"
    return {LAYOUT.key(key, "down"): llm.narrowed(down), LAYOUT.key(key, "up"): llm.narrowed(up)}


def _pairs(adapter: Adapter, alpha: float, tensors: Mapping[str, Tensor], dialect: _Dialect) -> dict[str, Any]:
    """The key-value pairs, as llama.cpp's converter writes them, and provenance."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    strings = adapter.metadata.strings
    own = {key: value for key, value in strings.items() if key.startswith("loratool.") or key in _KEPT}
    if own.get(CONTENT_HASH) == "":
        own[CONTENT_HASH] = content_hash((n, t.dtype, t.shape, digest(t)) for n, t in tensors.items())
    known = {field: dialect.config[field] for field in _FIELDS if field in dialect.config}
    return {
        _ARCHITECTURE: dialect.known.name,
        _TYPE: "adapter",
        _ADAPTER: "lora",
        _ALPHA: alpha,
        "general.file_type": _FILE_TYPES.get(dtypes.pop(), _GUESSED) if len(dtypes) == 1 else _GUESSED,
        **own,
        BASE: json.dumps(known, sort_keys=True),
    }


FORMAT = Format(
    name="gguf",
    title="llama.cpp GGUF adapter",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
