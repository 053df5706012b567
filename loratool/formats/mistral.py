"""`mistral`: the ``lora.safetensors`` of mistral-finetune, which mistral-inference loads.

Keys are ``layers.<n>.attention.wq.lora_A.weight`` [r,i] and ``.lora_B.weight`` [o,r] under Mistral's own module names,
rows of wq and wk in pairs, as Meta's rotary embedding turns them. The product is multiplied by a scaling that whoever
loads the file gives (2.0 unless told otherwise); mistral-finetune notes the one it trained with in ``params.json``.
All tensors have one dtype; the embedding and the output projection are never loaded.

Written: for the usual scaling of 2.0, all others folded into lora_B; in the dtype that most tensors have, and where
that rounds others, a loss names them; the scaling and the numbers of heads stand in
the metadata under ``loratool.mistral``. Source: mistralai/mistral-finetune, mistralai/mistral-inference 1.6.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss
from loratool.errors import FormatError
from loratool.files import read_json
from loratool.formats import llm
from loratool.formats.base import Evidence, Format, kept
from loratool.keys import Layout, require_pair
from loratool.lazy import np
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Update

LAYOUT = Layout(slots=(("down", ".lora_A.weight"), ("up", ".lora_B.weight")))
NAMES = llm.Templates(
    (
        ("model.layers.{}.self_attn.q_proj", "layers.{}.attention.wq"),
        ("model.layers.{}.self_attn.k_proj", "layers.{}.attention.wk"),
        ("model.layers.{}.self_attn.v_proj", "layers.{}.attention.wv"),
        ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.wo"),
        ("model.layers.{}.mlp.gate_proj", "layers.{}.feed_forward.w1"),
        ("model.layers.{}.mlp.down_proj", "layers.{}.feed_forward.w2"),
        ("model.layers.{}.mlp.up_proj", "layers.{}.feed_forward.w3"),
        ("model.layers.{}.block_sparse_moe.gate", "layers.{}.feed_forward.gate"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w1", "layers.{}.feed_forward.experts.{}.w1"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w2", "layers.{}.feed_forward.experts.{}.w2"),
        ("model.layers.{}.block_sparse_moe.experts.{}.w3", "layers.{}.feed_forward.experts.{}.w3"),
    )
)
NOTE = "loratool.mistral"  # metadata: the scaling and the heads, JSON
PARAMS = "params.json"
USUAL = 2.0  # the scaling of mistral-inference where it is given none
_KEY = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.(.+\.)?(w[123]|gate))\.lora_[AB]\.weight")
_HINT = f"give --base, the folder of the base model with its config.json, or keep {PARAMS} beside it"


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """mistral-finetune by its module names."""
    return "pairs under Mistral's module names" if any(map(_KEY.fullmatch, evidence.keys)) else None


def read(evidence: Evidence) -> Adapter:
    """Read a file of mistral-finetune. Raises FormatError for what is malformed."""
    file = evidence.file
    told = _told(evidence)
    config = llm.text_config(evidence.base_config) or told
    scaling = _scaling(told, evidence)
    grouped, rest = LAYOUT.group(file.tensors, where=file.path)
    for key in rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        where = f"{file.path}: {module}"
        name = NAMES.back(module)
        if name is None:
            raise FormatError("a module that is not Mistral's", where)
        require_pair(module, slots, where)
        update = llm.factor_pair(slots["down"], slots["up"], scaling, where=where)
        updates[name], spellings[name] = _halved(name, update, config, where), module
    metadata = llm.metadata(
        evidence,
        "mistral",
        strings={key: value for key, value in file.metadata.items() if key != NOTE},
        base_config=evidence.base_config or {"model_type": "mistral", **_heads(told)},
        warnings=() if scaling is not None else (f"no {PARAMS}: the file does not tell its scaling",),
        scaling_known=scaling is not None,
    )
    return Adapter(updates, {}, metadata, spellings)


def _told(evidence: Evidence) -> Mapping[str, Any]:
    """params.json beside the file, or what loratool noted in it; empty where there is neither."""
    path = evidence.beside(PARAMS)
    if path and NOTE not in evidence.file.metadata:
        found = read_json(path)
    else:
        try:
            found = json.loads(evidence.file.metadata.get(NOTE, "{}"))
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise FormatError("parameters that are no table", path or f"{evidence.weights}: {NOTE}")
    return found


def _scaling(told: Mapping[str, Any], evidence: Evidence) -> float | None:
    """What multiplies all products; None where nothing tells."""
    if evidence.scaling is not None:
        return evidence.scaling
    lora = told.get("lora")
    scaling = lora.get("scaling") if isinstance(lora, dict) else None
    if scaling is not None and (type(scaling) not in (int, float) or not math.isfinite(scaling)):
        raise FormatError(f"the scaling is {str(scaling)[:40]!r}, not a number", evidence.path)
    return None if scaling is None else float(scaling)


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of heads as Hugging Face calls them."""
    heads = llm.heads_of(config)
    return {"num_attention_heads": heads.queries, "num_key_value_heads": heads.keys} if heads else {}


def _halved(name: str, update: Update, config: Mapping[str, Any], where: str) -> Update:
    """The update with its rows in Hugging Face's order; unreadable where the heads are unknown."""
    leaf = name.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return update
    heads = llm.heads_of(config)
    if heads is None:
        what = f"the rows of {leaf} are in Meta's order, and the heads are unknown"
        return llm.unreadable(update, FormatError(what, where, _HINT))
    return llm.reordered(update, llm.halved(update.shape[0], heads.of(leaf) or 0))


# ---------------------------------------------------------------- writing


def _reason(name: str, update: Update) -> str | None:
    if why := llm.no_pair(name, update):
        return why
    return None if NAMES.there(name) else "mistral-inference loads no LoRA of this module"


def losses(adapter: Adapter) -> list[Loss]:
    """What Mistral's file cannot say. Raises FormatError where the heads of the base are unknown."""
    return [*llm.lost(adapter, _reason), *_rounded(adapter)]


def _rounded(adapter: Adapter) -> list[Loss]:
    """Modules whose factors the one dtype of a file does not hold."""
    factors = _factors(adapter)
    dtype = _dtype(factors)
    found = []
    for name, pair in factors.items():
        cut = [f"lora_{half}" for half, t in zip("AB", pair, strict=True) if not t.cast(dtype).same_values(t)]
        if cut:
            why = f"a file has one dtype, which rounds {' and '.join(cut)} to {dtype}"
            found.append(Loss(adapter.spelling(name), why))
    return found


def _factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A [r,i] and lora_B [o,r] of each module that can be said, for the usual scaling, rows in Mistral's order."""
    found = {}
    for name, update in llm.said(adapter, _reason).items():
        low = llm.low_rank(update)
        assert low is not None  # there was no reason not to say it
        down, up = llm.padded(low, low.rank, USUAL)
        order = _order(adapter, name, up.shape[0])
        found[name] = down, up if order is None else llm.taken(up, order)
    return found


def _dtype(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """What most tensors are stored as: mistral-inference wants all of them alike, and as its model is."""
    return str(llm.commonest((tensor.dtype for pair in factors.values() for tensor in pair), "F32"))


def _order(adapter: Adapter, name: str, rows: int) -> np.ndarray | None:
    """Which rows of Hugging Face's, in order, are Mistral's; None where they stay. Raises FormatError."""
    leaf = name.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return None
    heads = llm.heads_of(llm.base_config(adapter))
    if heads is None:
        raise FormatError(f"the rows of {leaf} go by heads, which are unknown", hint=_HINT)
    return llm.interleaved(rows, heads.of(leaf) or 0)


def write(adapter: Adapter, path: Path) -> None:
    """Write a file that mistral-inference loads with its usual scaling."""
    factors = _factors(adapter)
    dtype = _dtype(factors)
    tensors = {
        LAYOUT.key(f"{NAMES.there(name)}", slot): tensor.cast(dtype)
        for name, pair in factors.items()
        for slot, tensor in zip(("down", "up"), pair, strict=True)
    }
    heads = llm.heads_of(llm.base_config(adapter))
    note = {"lora": {"scaling": USUAL}, **({"n_heads": heads.queries, "n_kv_heads": heads.keys} if heads else {})}
    strings = kept(adapter.metadata.strings, tensors) | {NOTE: json.dumps(note)}
    write_safetensors(path, tensors, strings)


FORMAT = Format(
    name="mistral",
    title="mistral-finetune lora.safetensors",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
    notes=lambda adapter: [f"mistral-inference multiplies by {USUAL:g} unless told otherwise: keep that"],
)
