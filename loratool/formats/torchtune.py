"""`torchtune`: the adapter that torchtune's recipes save, ``adapter_model.pt`` (older ones: ``adapter_0.pt``).

A state dict, read with --allow-pickle. Keys are ``<module>.lora_a.weight`` [r,i] and ``.lora_b.weight`` [o,r], of DoRA
also ``.magnitude`` [o], under torchtune's own module names. The scaling, alpha / rank, stands in the recipe and in
``adapter_config.json`` beside it. Rows of q and k are in pairs, as Meta's rotary embedding turns them, in models that
torchtune converts so (Llama, Mistral, Gemma); Qwen's are in halves like Hugging Face's. So the base must be known.

Written: one rank and one scaling for all, which is all that a recipe knows. Source: pytorch/torchtune 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError
from loratool.formats import llm
from loratool.formats.base import Evidence, Format
from loratool.keys import Layout, require_pair
from loratool.lazy import np
from loratool.pickles import write_pickle
from loratool.tensors import Tensor
from loratool.update import DoRA, Update

LAYOUT = Layout(slots=(("down", ".lora_a.weight"), ("up", ".lora_b.weight"), ("magnitude", ".magnitude")))
NAMES = llm.Templates(
    (
        ("lm_head", "output"),
        ("model.layers.{}.self_attn.q_proj", "layers.{}.attn.q_proj"),
        ("model.layers.{}.self_attn.k_proj", "layers.{}.attn.k_proj"),
        ("model.layers.{}.self_attn.v_proj", "layers.{}.attn.v_proj"),
        ("model.layers.{}.self_attn.o_proj", "layers.{}.attn.output_proj"),
        ("model.layers.{}.mlp.gate_proj", "layers.{}.mlp.w1"),
        ("model.layers.{}.mlp.down_proj", "layers.{}.mlp.w2"),
        ("model.layers.{}.mlp.up_proj", "layers.{}.mlp.w3"),
    )
)
_PAIRS = frozenset(("llama", "mistral", "gemma", "gemma2"))  # model types whose q and k torchtune reorders
_HALVES = frozenset(("qwen2", "qwen3"))  # and those where it does not
_HINT = "give --base, the folder of the base model with its config.json"


def _order(config: Mapping[str, Any], module: str, rows: int) -> np.ndarray | None:
    """Which rows of Hugging Face's, in order, are torchtune's; None where they stay. Raises FormatError."""
    leaf = module.rpartition(".")[2]
    kind = config.get("model_type")
    if leaf not in ("q_proj", "k_proj") or kind in _HALVES:
        return None
    heads = llm.heads_of(config)
    if kind is None or heads is None:
        raise FormatError(f"the order of the rows of {leaf} goes by the base, which is unknown", hint=_HINT)
    if kind not in _PAIRS:
        raise FormatError(f"torchtune's order of the rows of {leaf} is not known for models of type {kind}")
    count = heads.of(leaf)
    assert count is not None
    return llm.interleaved(rows, count)


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """torchtune by its suffixes."""
    found = any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in evidence.keys)
    return "keys end in .lora_a.weight and .lora_b.weight" if found else None


def read(evidence: Evidence) -> Adapter:
    """Read an adapter of torchtune. Raises FormatError for what is malformed."""
    file, beside = evidence.file, llm.config_beside(evidence)
    config = llm.text_config(evidence.base_config)
    scaling = llm.told_scaling(beside, evidence)
    grouped, rest = LAYOUT.group(file.tensors, where=file.path)
    for key in rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        where = f"{file.path}: {module}"
        name = NAMES.back(module)
        if name is None:
            raise FormatError("a module that is not torchtune's", where)
        updates[name], spellings[name] = _update(name, slots, scaling, config, where), module
    known = all(update.alpha is not None for update in updates.values())
    base = beside.get("base_model_name_or_path")
    metadata = llm.metadata(
        evidence,
        "torchtune",
        base_model=base if isinstance(base, str) and base else None,
        warnings=() if known else ("no r and lora_alpha in adapter_config.json: the file does not tell its scaling",),
        scaling_known=known,
    )
    return Adapter(updates, {}, metadata, spellings)


def _update(name: str, slots: Mapping[str, Tensor], scaling: Any, config: Mapping[str, Any], where: str) -> Update:
    """The update of one module, its rows in Hugging Face's order; unreadable where that is unknown."""
    require_pair(name, slots, where)
    down, up = slots["down"], slots["up"]
    rank = down.shape[0] if down.shape else 0
    update = llm.factor_pair(down, up, scaling(rank, where), slots.get("magnitude"), where=where)
    try:
        order = _order(config, name, update.shape[0])
    except FormatError as error:
        return llm.unreadable(update, FormatError(error.what, where, error.hint))
    return update if order is None else llm.reordered(update, np.argsort(order))


# ---------------------------------------------------------------- writing


def _reason(adapter: Adapter) -> llm.Reason:
    some_dora = any(isinstance(update, DoRA) for update in adapter.updates.values())
    tied = llm.is_tied(llm.base_config(adapter))

    def reason(name: str, update: Update) -> str | None:
        if why := llm.no_pair(name, update, dora=True):
            return why
        if tied and NAMES.there(name) == "output":
            return "an output projection that is tied to the embedding, which torchtune does not train"
        if NAMES.there(name) is None:
            return "torchtune trains no such module"
        return "a LoRA beside DoRA modules; use_dora holds for all" if some_dora != isinstance(update, DoRA) else None

    return reason


def losses(adapter: Adapter) -> list[Loss]:
    """What torchtune cannot say. Raises FormatError where the order of rows goes by a base that is unknown."""
    reason, config = _reason(adapter), llm.base_config(adapter)
    for name, update in llm.said(adapter, reason).items():
        _order(config, name, update.shape[0])
    return llm.lost(adapter, reason)


def notes(adapter: Adapter) -> list[str]:
    """What the recipe must be told."""
    uniform = llm.Uniform.of(llm.said(adapter, _reason(adapter)).values())
    return [f"torchtune is told by its recipe: lora_rank {uniform.rank}, lora_alpha {uniform.alpha:g}"]


def write(adapter: Adapter, path: Path) -> None:
    """Write a state dict that torchtune loads."""
    updates, config = llm.said(adapter, _reason(adapter)), llm.base_config(adapter)
    uniform = llm.Uniform.of(updates.values())
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        order = _order(config, name, update.shape[0])
        turned = update if order is None else llm.reordered(llm.simple(update), order)
        down, up = uniform.pair(turned)
        slots = {"down": down, "up": up}
        if isinstance(turned, DoRA):
            slots["magnitude"] = turned.magnitude.reshape(turned.magnitude.size)
        module = NAMES.there(name)
        tensors.update({f"{module}{LAYOUT.suffixes[slot]}": tensor for slot, tensor in slots.items()})
    write_pickle(path, tensors)


FORMAT = Format(
    name="torchtune",
    title="torchtune adapter_model.pt",
    kinds=("lora", "dora"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
    notes=notes,
)
