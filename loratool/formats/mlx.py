"""`mlx`: a folder of Apple's mlx-lm, ``adapters.safetensors`` and ``adapter_config.json``.

Keys are ``<module>.lora_a`` [i,r] and ``.lora_b`` [r,o], each transposed; of an Embedding ``lora_a``
[entries,r] and ``lora_b`` [r,dim]; of a stack of experts (``switch_mlp``) [E,r,i] and [E,o,r], not transposed; of DoRA
also ``.m``, one norm a row of the weight. ``lora_parameters.scale`` multiplies the product as it is: it is not divided
by the rank, and an ``alpha`` beside it means nothing. Where the output projection is tied to the embedding, a LoRA of
the embedding is one of both. ``num_layers`` counts from the last layer; ``keys`` are module
names, within a layer or whole. With ``fine_tune_type`` full the tensors are whole weights. Older trainers left an
``adapters.npz`` without a configuration, older versions of mlx-vlm ``.A`` and ``.B`` beside a rank and an alpha that
some multiplied by and others divided: nothing tells these scalings.

Written: one scale and one rank for all, which is all that mlx-lm knows; other scalings are folded into ``lora_b``,
smaller ranks filled with zeros. Source: ml-explore/mlx-lm 0.32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError
from loratool.files import read_json
from loratool.formats import llm
from loratool.formats.base import CONFIG, Evidence, Format, kept
from loratool.keys import Layout, require_pair
from loratool.tensors import Tensor, write_safetensors
from loratool.update import DoRA, Layer, LowRank, Update

LAYOUT = Layout(slots=(("down", ".lora_a"), ("up", ".lora_b"), ("magnitude", ".m")))
VLM = Layout(slots=(("down", ".A"), ("up", ".B")))  # of older mlx-vlm, whose configuration has rank and alpha
WEIGHTS = "adapters.safetensors"
HEAD = "lm_head"

# mlx-lm's own names of models whose classes differ from transformers'
NAMES = llm.Templates(
    (
        ("transformer.wte", "model.wte"),
        ("transformer.wpe", "model.wpe"),
        ("transformer.h.{}.attn.c_attn", "model.h.{}.attn.c_attn"),
        ("transformer.h.{}.attn.c_proj", "model.h.{}.attn.c_proj"),
        ("transformer.h.{}.mlp.c_fc", "model.h.{}.mlp.c_fc"),
        ("transformer.h.{}.mlp.c_proj", "model.h.{}.mlp.c_proj"),
        ("gpt_neox.embed_in", "model.embed_in"),
        ("embed_out", "model.embed_out"),
        ("gpt_neox.layers.{}.attention.query_key_value", "model.h.{}.attention.query_key_value"),
        ("gpt_neox.layers.{}.attention.dense", "model.h.{}.attention.dense"),
        ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "model.h.{}.mlp.dense_h_to_4h"),
        ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "model.h.{}.mlp.dense_4h_to_h"),
    )
)
_LEAVES = ("gate_proj", "up_proj", "down_proj")
# where experts lie: one by one in Hugging Face's names -> in a stack in mlx-lm's
EXPERTS: llm.ExpertLeaves = {
    **{("mlp.experts", leaf): ("mlp.switch_mlp", leaf) for leaf in _LEAVES},
    ("block_sparse_moe.experts", "w1"): ("block_sparse_moe.switch_mlp", "gate_proj"),
    ("block_sparse_moe.experts", "w2"): ("block_sparse_moe.switch_mlp", "down_proj"),
    ("block_sparse_moe.experts", "w3"): ("block_sparse_moe.switch_mlp", "up_proj"),
    **{("feed_forward.experts", leaf): ("feed_forward.experts", leaf) for leaf in _LEAVES},  # llama4
}
_GPT_OSS: llm.ExpertLeaves = {("mlp.experts", leaf): ("mlp.experts", leaf) for leaf in _LEAVES}
_STACKS = {stack: one for table in (EXPERTS, _GPT_OSS) for one, stack in table.items()}
_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)$")
_SNAPSHOT = re.compile(r"\d+_adapters\.(safetensors|npz)")


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """mlx-lm by its suffixes, or by a configuration that says that all was trained."""
    if any(key.endswith((".lora_a", ".lora_b")) for key in evidence.keys):
        return "keys end in .lora_a and .lora_b"
    if _is_vlm(evidence):
        return "keys end in .A and .B beside a rank and an alpha (mlx-vlm)"
    return "adapter_config.json names a fine_tune_type" if "fine_tune_type" in evidence.config else None


def _is_vlm(evidence: Evidence) -> bool:
    """Whether this is of mlx-vlm before it had mlx-lm's layers."""
    told = {"rank", "alpha"} <= evidence.config.keys() and "peft_type" not in evidence.config
    return told and bool(evidence.keys) and all(key.endswith((".A", ".B")) for key in evidence.keys)


def read(evidence: Evidence) -> Adapter:
    """Read a folder or file of mlx-lm. Raises FormatError for what is malformed."""
    file, config = evidence.file, _config(evidence)
    grouped, rest = (VLM if _is_vlm(evidence) else LAYOUT).group(file.tensors, where=file.path)
    if rest and (grouped or config.get("fine_tune_type") != "full"):
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {next(iter(rest))}")
    scale, warnings = _scale(config, evidence)
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        for name, update in _updates(module, slots, scale, f"{file.path}: {module}").items():
            if name in updates:
                raise FormatError("two modules of one name", f"{file.path}: {module} and {spellings[name]}")
            updates[name], spellings[name] = update, module
    updates, spellings = _both_ends(updates, spellings, llm.text_config(evidence.base_config))
    if config.get("fine_tune_type") == "dora" and not all(isinstance(u, DoRA) for u in updates.values()):
        raise FormatError("fine_tune_type is dora but magnitudes are missing", file.path, "the file is incomplete")
    carried = {_whole(key): tensor for key, tensor in rest.items()}
    base = config.get("model")
    metadata = llm.metadata(
        evidence,
        "mlx",
        config=config,
        base_model=base if isinstance(base, str) and base else None,
        warnings=warnings if updates else (),
        scaling_known=scale is not None or not updates,
    )
    return Adapter(updates, carried, metadata, spellings | {_whole(key): key for key in rest})


def _both_ends(
    updates: Mapping[str, Update], spellings: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[dict[str, Update], dict[str, str]]:
    """The updates with that of a tied embedding also as that of the output projection."""
    found, spelled = dict(updates), dict(spellings)
    for name, update in updates.items():
        if llm.is_tied(config) and name.endswith(("embed_tokens", "wte")):
            found[HEAD], spelled[HEAD] = _layered(update, "plain"), spellings[name]
    return found, spelled


def _layered(update: Update, layer: Layer) -> Update:
    assert isinstance(update, (LowRank, DoRA))  # what this file makes
    return update.oriented(layer)


def _config(evidence: Evidence) -> Mapping[str, Any]:
    """The configuration; also that of a snapshot, which stands beside the last one."""
    if not evidence.config and _SNAPSHOT.fullmatch(evidence.weights.name) and (path := evidence.beside(CONFIG)):
        found = read_json(path)
        if not isinstance(found, dict):
            raise FormatError("the configuration is not a JSON object", path)
        return found
    return evidence.config


def _scale(config: Mapping[str, Any], evidence: Evidence) -> tuple[float | None, tuple[str, ...]]:
    """What multiplies all products, or None; and a word on what is odd about it."""
    if evidence.scaling is not None:
        return evidence.scaling, ()
    told = config.get("lora_parameters")
    parameters = told if isinstance(told, dict) else {}
    if "scale" in parameters:
        scale = parameters["scale"]
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise FormatError(f"lora_parameters.scale is {str(scale)[:40]!r}, not a number", evidence.path)
        return float(scale), ()
    if not config:
        return None, (f"no {CONFIG}: the file does not tell its scaling",)
    return None, (
        f"{CONFIG} has no lora_parameters.scale: the file does not tell its scaling "
        "(mlx-vlm used to multiply by alpha itself, and now by alpha / rank)",
    )


def _updates(module: str, slots: Mapping[str, Tensor], scale: float | None, where: str) -> dict[str, Update]:
    """The update of a module, or those of each expert of a stack."""
    require_pair(module, slots, where)
    down, up, magnitude = slots["down"], slots["up"], slots.get("magnitude")
    if len(up.shape) == 3:
        if magnitude is not None:
            raise FormatError("a DoRA of a stack of experts", where)
        if len(down.shape) == 2 and down.shape[0] % up.shape[0] == 0:  # [E*r,i], as older versions wrote it
            down = down.reshape(up.shape[0], down.shape[0] // up.shape[0], down.shape[1])
        names = _expert_names(module, where)
        return {
            names.format(number): llm.factor_pair(*pair, scale, where=where)
            for number, pair in enumerate(llm.unstacked(down, up, where))
        }
    if llm.is_embedding(module):
        return {_name(module): llm.factor_pair(up, down, scale, magnitude, "embedding", where)}
    pair = llm.transposed(down, where), llm.transposed(up, where)
    return {_name(module): llm.factor_pair(*pair, scale, magnitude, where=where)}


def _expert_names(module: str, where: str) -> str:
    """The names of each expert of a stack, with ``{}`` for the number."""
    head, _, leaf = module.rpartition(".")
    before, _, last = head.rpartition(".")
    outer, _, inner = before.rpartition(".")
    found = _STACKS.get((f"{inner}.{last}", leaf))
    if found is None:
        raise FormatError("a stack of experts of a kind that is not known", where)
    return f"{outer}.{found[0]}.{{}}.{found[1]}"


def _name(module: str) -> str:
    return NAMES.back(module) or module


def _whole(key: str) -> str:
    """The parameter that a whole tensor is."""
    module, _, leaf = key.rpartition(".")
    return f"{_name(module)}.{leaf}" if module else leaf


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What mlx-lm cannot say."""
    reason = _reason(adapter)
    return [*llm.lost(adapter, reason), *llm.rounded(adapter, reason)]


def _reason(adapter: Adapter) -> llm.Reason:
    some_dora = any(isinstance(update, DoRA) for update in adapter.updates.values())
    alone = _one_end(adapter) if llm.is_tied(llm.base_config(adapter)) else None

    def reason(name: str, update: Update) -> str | None:
        if why := llm.no_pair(name, update, dora=True):
            return why
        if alone and (name == HEAD or llm.is_embedding(name)):
            return alone
        if isinstance(update, DoRA):
            return "a DoRA of an expert" if llm.in_stack(name, EXPERTS) else None
        return "a LoRA beside DoRA modules; fine_tune_type holds for all" if some_dora else None

    return reason


def _one_end(adapter: Adapter) -> str | None:
    """Why a tied pair cannot be said: mlx-lm has one module for both; None where both have the same LoRA."""
    ends = [u for n, u in adapter.updates.items() if n == HEAD or n.endswith(("embed_tokens", "wte"))]
    same = len(ends) == 2 and all(isinstance(end, type(ends[0])) and end.scaling == ends[0].scaling for end in ends[1:])
    if same:
        one, other = (end.slots for end in ends)
        same = one.keys() == other.keys() and all(tensor.same_values(other[slot]) for slot, tensor in one.items())
    return None if same else "the embedding and the output projection are tied: to mlx-lm they are one module"


@dataclass(frozen=True)
class _Plan:
    """What holds for a whole folder."""

    rank: int
    scale: float
    experts: llm.ExpertLeaves


def write(adapter: Adapter, path: Path) -> None:
    """Write a folder that mlx-lm loads."""
    config = llm.base_config(adapter)
    updates = llm.said(adapter, _reason(adapter))
    if llm.is_tied(config):
        updates.pop(HEAD, None)  # the embedding's is the same
    lows = [low for update in updates.values() if (low := llm.low_rank(update))]
    plan = _Plan(
        rank=max((low.rank for low in lows), default=8),
        scale=llm.commonest((low.scaling for low in lows if low.scaling), 0.0),
        experts=_GPT_OSS if config.get("model_type") == "gpt_oss" else EXPERTS,
    )
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        if not llm.in_stack(name, plan.experts):
            module = NAMES.there(name) or name
            slots = _slots(update, plan)
            tensors.update({LAYOUT.key(module, slot): llm.narrowed(tensor) for slot, tensor in slots.items()})
    for module, experts in llm.gathered(updates, plan.experts).items():
        count = llm.expert_count(config, experts, module)
        down, up = llm.stacked(experts, count, plan.rank, plan.scale)
        tensors[LAYOUT.key(module, "down")] = llm.narrowed(down)
        tensors[LAYOUT.key(module, "up")] = llm.narrowed(up)
    path.mkdir()
    modules = sorted({found[0] for key in tensors if (found := LAYOUT.split(key))})
    strings = {key: value for key, value in kept(adapter.metadata.strings, tensors).items() if key != "format"}
    write_safetensors(path / WEIGHTS, tensors, strings)
    words = _configuration(adapter, modules, plan, any(isinstance(u, DoRA) for u in updates.values()))
    (path / CONFIG).write_text(json.dumps(words, indent=4, sort_keys=True, ensure_ascii=False))


def _slots(update: Update, plan: _Plan) -> dict[str, Tensor]:
    """The tensors of one module."""
    low = llm.low_rank(update)
    assert low is not None  # losses() said so
    down, up = llm.padded(low, plan.rank, plan.scale)
    slots = {"down": up, "up": down} if low.layer == "embedding" else {"down": down.T, "up": up.T}
    if isinstance(update, DoRA):
        slots["magnitude"] = update.magnitude.reshape(update.magnitude.size)
    return slots


def _configuration(adapter: Adapter, modules: Iterable[str], plan: _Plan, dora: bool) -> dict[str, Any]:
    """adapter_config.json: names within a layer where the number of layers is known, else whole names."""
    source = dict(adapter.metadata.config) if adapter.metadata.format == "mlx" else {}
    told = source.get("lora_parameters")
    parameters = dict(told) if isinstance(told, dict) else {"dropout": 0.0}
    layers = llm.size(llm.base_config(adapter), "num_hidden_layers", "n_layer")
    keys, count = _keys(modules, layers, source.get("num_layers"))
    return {
        "model": adapter.metadata.base_model,
        **source,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": count,
        "lora_parameters": {"dropout": 0.0, **parameters, "rank": plan.rank, "scale": plan.scale, "keys": keys},
    }


def _keys(modules: Iterable[str], layers: int | None, told: Any) -> tuple[list[str], int]:
    """``keys`` and ``num_layers``: by the base's layers, or as the source told; -1 stands beside whole names."""
    names = list(modules)
    found = {name: hit for name in names if (hit := _LAYER.match(name))}
    known = layers is not None or (type(told) is int and told > 0)
    if not known or not found:
        return names, -1
    within = {hit[2] for hit in found.values()} | {name for name in names if name not in found}
    first = min(int(hit[1]) for hit in found.values())
    return sorted(within), told if layers is None else layers - first


FORMAT = Format(
    name="mlx",
    title="Apple mlx-lm folder (adapters.safetensors), also its npz",
    kinds=("lora", "dora"),
    container="folder",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
