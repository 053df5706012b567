"""`tinker`: an adapter that Thinking Machines' Tinker trained, where it is not PEFT's: experts, the output projection.

Keys are PEFT's (``base_model.model.<module>.lora_A.weight``), with these modules of its own: ``....experts.w1``, a
stack down [E,r,i], up [E,o,r] (w1 gate, w2 down, w3 up), where a first axis of 1 stands for all experts and an empty
tensor for a projection that the model lacks; ``model.unembed_tokens``, the output projection, of a tied model the
embedding; ``in_proj_q``, ``_k``, ``_v``, rows of one ``in_proj_qkv``; ``attn`` for ``self_attn`` (gpt-oss). The scaling
is ``lora_alpha / r`` of adapter_config.json, without exceptions. What has none of these is an ordinary PEFT adapter.

Written: one file with experts in stacks, one rank and one scaling for all; r and lora_alpha stand in the metadata
under ``loratool.tinker``. Source: thinking-machines-lab/tinker-cookbook 0.6.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError
from loratool.formats import llm, peft
from loratool.formats.base import Evidence, Format, kept
from loratool.keys import Layout, require_pair
from loratool.tensors import Tensor, write_safetensors
from loratool.update import LowRank, Update, stack

LAYOUT = Layout(slots=(("down", ".lora_A.weight"), ("up", ".lora_B.weight")))
NOTE = "loratool.tinker"  # metadata: r and lora_alpha, JSON
HEAD = "model.unembed_tokens"
_OWN = re.compile(r"\.experts\.w[123]\.lora_[AB]\.weight$|\.unembed_tokens\.lora_|\.in_proj_[qkv]\.lora_")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_NEMOTRON = {"w1": "up_proj", "w2": "down_proj"}  # has no gate
_ATTENTION = re.compile(r"^(.*layers\.\d+)\.attn\.")
_PARTS = ("in_proj_q", "in_proj_k", "in_proj_v")


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """Tinker by the names that PEFT's adapters do not have."""
    if NOTE in evidence.file.metadata or any(map(_OWN.search, evidence.keys)):
        return "experts in stacks w1 to w3, or unembed_tokens, or in_proj_q"
    return None


def read(evidence: Evidence) -> Adapter:
    """Read an adapter of Tinker. Raises FormatError for what is malformed."""
    file, config = evidence.file, _config(evidence)
    peft.refuse(config, evidence.path)
    for field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(field):
            raise FormatError(f"{field} in an adapter of Tinker, which knows alpha / r only", evidence.path)
    scaling = llm.told_scaling(config, evidence)
    grouped, rest = LAYOUT.group(file.tensors, peft.normalise, file.path)
    for key in rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        where = f"{file.path}: {module}"
        require_pair(module, slots, where)
        for name, update in _updates(module, slots, scaling, evidence, where).items():
            if name in updates:
                raise FormatError("two modules of one name", f"{where} and {spellings[name]}")
            updates[name], spellings[name] = update, module
    updates = _fused(updates, spellings, file.path)
    known = all(update.alpha is not None for update in updates.values())
    base = config.get("base_model_name_or_path")
    metadata = llm.metadata(
        evidence,
        "tinker",
        strings={key: value for key, value in file.metadata.items() if key != NOTE},
        base_model=base if isinstance(base, str) and base else None,
        warnings=() if known else ("no r and lora_alpha in adapter_config.json: the file does not tell its scaling",),
        scaling_known=known,
    )
    return Adapter(updates, {}, metadata, {name: spellings[name] for name in updates})


def _config(evidence: Evidence) -> Mapping[str, Any]:
    """adapter_config.json beside the file, or what loratool noted in it."""
    if NOTE not in evidence.file.metadata:
        return llm.config_beside(evidence)
    try:
        found = json.loads(evidence.file.metadata[NOTE])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError("a note that is no table", f"{evidence.weights}: {NOTE}")
    return found


def _updates(
    module: str, slots: Mapping[str, Tensor], scaling: Any, evidence: Evidence, where: str
) -> dict[str, Update]:
    """The update of one module, or those of each expert of a stack; none of a projection that is not there."""
    down, up = slots["down"], slots["up"]
    before, _, leaf = module.rpartition(".")
    if before.endswith(".experts") and leaf in _LEAVES:
        if down.size == 0 and up.size == 0:
            return {}
        leaves = _NEMOTRON if evidence.base_config.get("model_type") == "nemotron_h" else _LEAVES
        if leaf not in leaves:
            raise FormatError("an expert without a gate has one", where)
        by = scaling(down.shape[-2] if len(down.shape) == 3 else 0, where)
        pairs = llm.unstacked(down, up, where)
        return {f"{before}.{n}.{leaves[leaf]}": llm.factor_pair(*pair, by, where=where) for n, pair in enumerate(pairs)}
    by = scaling(down.shape[0] if down.shape else 0, where)
    if module == HEAD:
        tied = bool(evidence.modules) and not any(name.rpartition(".")[2] == "lm_head" for name in evidence.modules)
        name = "model.embed_tokens" if tied else "lm_head"
        return {name: llm.factor_pair(down, up, by, layer="embedding" if tied else "plain", where=where)}
    return {_ATTENTION.sub(r"\1.self_attn.", module): llm.factor_pair(down, up, by, where=where)}


def _fused(updates: Mapping[str, Update], spellings: dict[str, str], path: Path) -> dict[str, Update]:
    """The updates with in_proj_q, _k and _v as rows of one in_proj_qkv."""
    found: dict[str, Update] = {}
    for name, update in updates.items():
        before, _, leaf = name.rpartition(".")
        if leaf not in _PARTS:
            found[name] = update
        elif f"{before}.in_proj_qkv" not in found:
            parts = [updates.get(f"{before}.{part}") for part in _PARTS]
            heights = [part.shape[0] for part in parts if part is not None]
            whole = stack(parts, heights) if len(heights) == len(_PARTS) else None
            if whole is None:
                raise FormatError("rows of in_proj_qkv without the others: their places are unknown", f"{path}: {name}")
            found[f"{before}.in_proj_qkv"] = whole
            spellings[f"{before}.in_proj_qkv"] = spellings[f"{before}.in_proj_q"].replace("in_proj_q", "in_proj_qkv")
    return found


# ---------------------------------------------------------------- writing

_STACKS: llm.ExpertLeaves = {("mlp.experts", leaf): ("mlp.experts", w) for w, leaf in _LEAVES.items()}


def _reason(name: str, update: Update) -> str | None:
    if why := llm.no_pair(name, update):
        return why
    low = llm.low_rank(update)
    return "an embedding" if isinstance(low, LowRank) and low.layer == "embedding" else None


def losses(adapter: Adapter) -> list[Loss]:
    """What Tinker's adapters cannot say."""
    return [*llm.lost(adapter, _reason), *llm.rounded(adapter, _reason)]


def notes(adapter: Adapter) -> list[str]:
    """What belongs in the configuration beside the file."""
    uniform = llm.Uniform.of(llm.said(adapter, _reason).values())
    return [f"adapter_config.json beside the file must say r {uniform.rank}, lora_alpha {uniform.alpha:g}"]


def write(adapter: Adapter, path: Path) -> None:
    """Write the tensors of an adapter of Tinker."""
    updates = llm.said(adapter, _reason)
    uniform = llm.Uniform.of(updates.values())
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, update in updates.items():
        if not llm.in_stack(name, _STACKS):
            pairs[HEAD if name == "lm_head" else name] = uniform.pair(update)
    config = llm.base_config(adapter)
    for module, experts in llm.gathered(updates, _STACKS).items():
        count = llm.expert_count(config, experts, module)
        pairs[module] = llm.stacked(experts, count, uniform.rank, uniform.scaling)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in pairs.items():
        tensors[peft.PREFIX + LAYOUT.key(module, "down")] = llm.narrowed(down)
        tensors[peft.PREFIX + LAYOUT.key(module, "up")] = llm.narrowed(up)
    note = {"r": uniform.rank, "lora_alpha": uniform.alpha}
    write_safetensors(path, tensors, kept(adapter.metadata.strings, tensors) | {NOTE: json.dumps(note)})


FORMAT = Format(
    name="tinker",
    title="Thinking Machines' Tinker adapter_model.safetensors",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
    notes=notes,
)
