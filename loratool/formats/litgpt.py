"""`litgpt`: the ``lit_model.pth.lora`` of Lightning's LitGPT, a pickle read with --allow-pickle.

A table ``model`` with bare keys ``<module>.lora_A`` [r,i] and ``.lora_B`` [o,r] under LitGPT's own names; of the fused
``attn.qkv`` lora_A [n*r,i] and lora_B [q + k + v rows,r] of the n projections that are adapted, all q, all k, all v.
``hyperparameters.yaml`` beside the file says lora_r, lora_alpha and which projections; ``model_config.yaml``, or the
base, the heads. Both files are read as flat ``name: value`` lines.

Written: the same file, with the hyper-parameters beside the model (LitGPT looks at ``model`` only); every layer has
the modules that some layer has, with zeros where there is no update. One rank and one scaling for all.
Source: Lightning-AI/litgpt 0.5.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
from loratool.update import Update, rows, stack

LAYOUT = Layout(slots=(("down", ".lora_A"), ("up", ".lora_B")))
HYPER, MODEL = "hyperparameters", "model_config.yaml"
QKV = "transformer.h.{}.attn.qkv"
_KEY = re.compile(r"transformer\.h\.\d+\.(attn\.(qkv|proj)|mlp\.(fc(_[12])?|proj|gate|experts\..+))\.lora_[AB]")
_HINT = f"give --base, the folder of the base model with its config.json, or keep {MODEL} beside the file"
_MOST = 1 << 20  # bytes of a configuration

Pairs = tuple[tuple[str, str], ...]
_LETTERS = "qkv"
_HEAD = ("lm_head", "lm_head")
_LLAMA: Pairs = (
    _HEAD,
    ("model.layers.{}.self_attn.o_proj", "transformer.h.{}.attn.proj"),
    ("model.layers.{}.mlp.gate_proj", "transformer.h.{}.mlp.fc_1"),
    ("model.layers.{}.mlp.up_proj", "transformer.h.{}.mlp.fc_2"),
    ("model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.proj"),
)
_MIXTRAL: Pairs = (
    *_LLAMA[:2],
    ("model.layers.{}.block_sparse_moe.gate", "transformer.h.{}.mlp.gate"),
    ("model.layers.{}.block_sparse_moe.experts.{}.w1", "transformer.h.{}.mlp.experts.{}.fc_1"),
    ("model.layers.{}.block_sparse_moe.experts.{}.w3", "transformer.h.{}.mlp.experts.{}.fc_2"),
    ("model.layers.{}.block_sparse_moe.experts.{}.w2", "transformer.h.{}.mlp.experts.{}.proj"),
)
_PHI: Pairs = (
    _HEAD,
    ("model.layers.{}.self_attn.dense", "transformer.h.{}.attn.proj"),
    ("model.layers.{}.mlp.fc1", "transformer.h.{}.mlp.fc"),
    ("model.layers.{}.mlp.fc2", "transformer.h.{}.mlp.proj"),
)


def _neox(prefix: str, attention: str, head: str) -> Pairs:
    return (
        (head, "lm_head"),
        (f"{prefix}.{{}}.{attention}.dense", "transformer.h.{}.attn.proj"),
        (f"{prefix}.{{}}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.fc"),
        (f"{prefix}.{{}}.mlp.dense_4h_to_h", "transformer.h.{}.mlp.proj"),
    )


@dataclass(frozen=True)
class _Family:
    """How one kind of model is called, and where its q, k and v lie: three modules, or one with grouped rows."""

    names: llm.Templates
    qkv: tuple[str, ...]

    @property
    def attention(self) -> llm.Templates:
        """The modules of q, k and v, and the part of attn.qkv that each is."""
        return llm.Templates(tuple((name, f"{QKV}.{_LETTERS[n]}") for n, name in enumerate(self.qkv)))

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one module, its rows grouped by head."""
        return len(self.qkv) == 1


_SPLIT = tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv")
_LLAMAS = _Family(llm.Templates(_LLAMA), _SPLIT)
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "olmo", "olmo2"), _LLAMAS),
    "mixtral": _Family(llm.Templates(_MIXTRAL), _SPLIT),
    "phi": _Family(llm.Templates(_PHI), _SPLIT),
    "gpt_neox": _Family(
        llm.Templates(_neox("gpt_neox.layers", "attention", "embed_out")),
        ("gpt_neox.layers.{}.attention.query_key_value",),
    ),
    "falcon": _Family(
        llm.Templates(_neox("transformer.h", "self_attention", "lm_head")),
        ("transformer.h.{}.self_attention.query_key_value",),
    ),
}
# LitGPT's classes of MLP, where model_config.yaml is all there is
_CLASSES = {"LLaMAMLP": "llama", "GemmaMLP": "llama", "LLaMAMoE": "mixtral"}


# ---------------------------------------------------------------- what is known besides the tensors


@dataclass(frozen=True)
class _Sizes:
    """Rows of q, and of k and v."""

    q: int
    kv: int

    @property
    def all(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.q, self.kv, self.kv

    @staticmethod
    def of(config: Mapping[str, Any]) -> _Sizes:
        """As a configuration tells. Raises FormatError where it does not."""
        queries = llm.size(config, "num_attention_heads", "n_head")
        hidden = llm.size(config, "hidden_size", "n_embd")
        if queries is None or hidden is None:
            raise FormatError("the rows of q, k and v in attn.qkv go by heads, which are unknown", hint=_HINT)
        head = llm.size(config, "head_dim", "head_size") or hidden // queries
        groups = llm.size(config, "num_key_value_heads", "n_query_groups", "num_kv_heads") or queries
        return _Sizes(queries * head, groups * head)


def _yaml(path: Path | None) -> dict[str, Any]:
    """The flat ``name: value`` lines of a YAML file: numbers, true and false, words; nested lines are not looked at."""
    if path is None or path.stat().st_size > _MOST:
        return {}
    found: dict[str, Any] = {}
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        name, colon, text = line.partition(":")
        if colon and name == name.strip() and name.isidentifier():
            value = text.split(" #")[0].strip().strip("'\"")
            try:
                found[name] = json.loads(value)
            except (ValueError, RecursionError):
                found[name] = value
    return found


def _family(config: Mapping[str, Any], keys: Iterable[str]) -> _Family:
    """The names of the base. Raises FormatError where nothing tells which they are."""
    kind = config.get("model_type") or _CLASSES.get(str(config.get("mlp_class_name")))
    if kind is None and any(".mlp.fc_1." in key for key in keys):
        kind = "llama"
    if kind not in _FAMILIES:
        what = f"LitGPT's names of {kind} models are not known here" if kind else "the base's architecture is unknown"
        raise FormatError(what, hint="" if kind else _HINT)
    return _FAMILIES[str(kind)]


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """LitGPT by its module names."""
    return "pairs under LitGPT's module names" if any(map(_KEY.fullmatch, evidence.keys)) else None


@dataclass(frozen=True)
class _Told:
    """What stands beside the tensors: hyper-parameters, and the base's configuration in anybody's words."""

    hyper: Mapping[str, Any]
    config: Mapping[str, Any]
    family: _Family
    scaling: Any


def read(evidence: Evidence) -> Adapter:
    """Read a file of LitGPT. Raises FormatError for what is malformed."""
    file = evidence.file
    hyper = _hyper(evidence)
    config = llm.text_config(evidence.base_config) or _noted(evidence) or _yaml(evidence.beside(MODEL))
    scaling = llm.told_scaling({"r": hyper.get("lora_r"), "lora_alpha": hyper.get("lora_alpha")}, evidence)
    told = _Told(hyper, config, _family(config, evidence.keys), scaling)
    grouped, rest = LAYOUT.group(file.tensors, where=file.path)
    for key in rest:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for module, slots in grouped.items():
        where = f"{file.path}: {module}"
        require_pair(module, slots, where)
        for name, update in _updates(module, slots, told, where).items():
            updates[name], spellings[name] = update, module
    known = all(update.alpha is not None for update in updates.values())
    metadata = llm.metadata(
        evidence,
        "litgpt",
        strings={},
        base_config=evidence.base_config or _noted(evidence),
        warnings=() if known else (f"no lora_r and lora_alpha in {HYPER}.yaml: the file does not tell its scaling",),
        scaling_known=known,
    )
    return Adapter(updates, {}, metadata, spellings)


def _hyper(evidence: Evidence) -> Mapping[str, Any]:
    """The hyper-parameters beside the model in the file, or in the folder."""
    text = evidence.file.metadata.get(HYPER)
    found = json.loads(text) if text else _yaml(evidence.beside(f"{HYPER}.yaml"))
    return found if isinstance(found, dict) else {}


def _noted(evidence: Evidence) -> dict[str, Any]:
    """What loratool noted of the base."""
    found = json.loads(evidence.file.metadata.get("base", "{}"))
    return found if isinstance(found, dict) else {}


def _updates(module: str, slots: Mapping[str, Tensor], told: _Told, where: str) -> dict[str, Update]:
    """The update of one module; of attn.qkv those of its parts, or of the whole that they are."""
    down, up = slots["down"], slots["up"]
    if module.endswith(".attn.qkv"):
        layer = next(part for part in module.split(".") if part.isdecimal())
        return _qkv(layer, down, up, told, where)
    name = told.family.names.back(module)
    if name is None:
        raise FormatError("a module that is not LitGPT's", where)
    rank = down.shape[0] if down.shape else 0
    return {name: llm.factor_pair(down, up, told.scaling(rank, where), where=where)}


def _qkv(layer: str, down: Tensor, up: Tensor, told: _Told, where: str) -> dict[str, Update]:
    """The updates of q, k and v, or of the module that holds all three."""
    if len(down.shape) != 2 or len(up.shape) != 2 or 0 in (*down.shape, *up.shape):
        raise FormatError(f"factors of shapes {list(down.shape)} and {list(up.shape)} are no pair of matrices", where)
    heights = _Sizes.of(told.config).all
    rank = up.shape[1]
    enabled = _enabled(down, up, heights, told.hyper, where)
    scaling = told.scaling(rank, where)
    parts: list[Update | None] = []
    row = group = 0
    for height, on in zip(heights, enabled, strict=True):
        pair = (down.slice(group * rank, (group + 1) * rank), up.slice(row, row + height)) if on else None
        parts.append(llm.factor_pair(*pair, scaling, where=where) if pair else None)
        row, group = (row + height, group + 1) if on else (row, group)
    names = [name.format(layer) for name in told.family.qkv]
    if not told.family.fused:
        return {name: part for name, part in zip(names, parts, strict=True) if part is not None}
    whole = stack(parts, heights)
    assert whole is not None  # LoRAs stack
    return {names[0]: llm.reordered(whole, np.argsort(_grouped(told.config, sum(heights))))}


def _grouped(config: Mapping[str, Any], count: int) -> np.ndarray:
    """Which rows of Hugging Face's query_key_value, in order, are all q, all k, all v."""
    queries, hidden = llm.size(config, "num_attention_heads", "n_head"), llm.size(config, "hidden_size", "n_embd")
    return llm.ungrouped(count, queries or 0, hidden or 0)


def _enabled(
    down: Tensor, up: Tensor, heights: tuple[int, int, int], hyper: Mapping[str, Any], where: str
) -> tuple[bool, ...]:
    """Which of q, k and v are adapted. Raises FormatError where it is told nowhere, or not so."""
    count, odd = divmod(down.shape[0], up.shape[1])
    told = tuple(hyper.get(f"lora_{part}") is True for part in ("query", "key", "value"))
    if not any(told) and count == len(heights):
        told = (True, True, True)
    if not any(told):
        raise FormatError(
            f"{count} of q, k and v are adapted, and nothing tells which", where, f"keep {HYPER}.yaml beside the file"
        )
    needed = sum(height for height, on in zip(heights, told, strict=True) if on)
    if odd or sum(told) != count or needed != up.shape[0]:
        what = f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of q, k, v with {list(heights)} rows"
        raise FormatError(what, where, f"is this the base, and {HYPER}.yaml its own?")
    return told


# ---------------------------------------------------------------- writing


def _base(adapter: Adapter) -> tuple[Mapping[str, Any], _Family]:
    config = llm.base_config(adapter)
    return config, _family(config, ())


def _reason(family: _Family) -> llm.Reason:
    attention = family.attention

    def reason(name: str, update: Update) -> str | None:
        if why := llm.no_pair(name, update):
            return why
        return None if family.names.there(name) or attention.there(name) else "LitGPT trains no such module"

    return reason


def losses(adapter: Adapter) -> list[Loss]:
    """What LitGPT cannot say. Raises FormatError where the base is unknown, or without heads or layers."""
    config, family = _base(adapter)
    _Sizes.of(config)
    _layers(config)
    if any(".mlp." in (family.names.there(name) or "") for name in adapter.updates):
        _mlp(config, family)
    return llm.lost(adapter, _reason(family))


def _layers(config: Mapping[str, Any]) -> int:
    layers = llm.size(config, "num_hidden_layers", "n_layer")
    if layers is None:
        raise FormatError("LitGPT wants a LoRA in every layer, and their number is unknown", hint=_HINT)
    return layers


def notes(adapter: Adapter) -> list[str]:
    """What hyperparameters.yaml must say."""
    written = _written(adapter)[1]
    words = ", ".join(f"{name} {json.dumps(value)}" for name, value in written.items())
    return [f"LitGPT reads {HYPER}.yaml beside the file, which must say: {words}"]


def write(adapter: Adapter, path: Path) -> None:
    """Write a file that LitGPT merges."""
    config = llm.base_config(adapter)
    known = ("model_type", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "hidden_size")
    base = {field: config[field] for field in (*known, "num_hidden_layers") if field in config}
    tensors, hyper = _written(adapter)
    write_pickle(path, tensors, {HYPER: hyper, "base": base})


def _written(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the hyper-parameters that go with them."""
    config, family = _base(adapter)
    layers = _layers(config)
    updates = llm.said(adapter, _reason(family))
    uniform = llm.Uniform.of(updates.values())
    pairs = {name: uniform.pair(update) for name, update in updates.items()}
    plain = {found: pair for name, pair in pairs.items() if (found := family.names.there(name))}
    projections = [_projections(n, updates, uniform, config, family) for n in range(layers)]
    fused, flags = _fused(projections, _Sizes.of(config))
    tensors = {**fused, **_filled(plain, layers, config, family)}
    heads = {"projection": ".attn.proj", "mlp": ".mlp.", "head": "lm_head"}
    alpha = int(uniform.alpha) if uniform.alpha.is_integer() else uniform.alpha
    hyper: dict[str, Any] = {"lora_r": uniform.rank, "lora_alpha": alpha}
    hyper |= {f"lora_{part}": on for part, on in zip(("query", "key", "value"), flags, strict=True)}
    hyper |= {f"lora_{word}": any(mark in key for key in tensors) for word, mark in heads.items()}
    return tensors, hyper


Pair = tuple[Tensor, Tensor]


def _filled(pairs: Mapping[str, Pair], layers: int, config: Mapping[str, Any], family: _Family) -> dict[str, Tensor]:
    """The tensors of these modules and, with zeros, of all that LitGPT makes along with them."""
    wanted = dict(pairs)
    shapes: dict[str, tuple[int, int]] = {}
    for module, (down, up) in pairs.items():
        if ".attn.proj" in module:
            shapes[_template(module)] = up.shape[0], down.shape[1]
    if any(".mlp." in module for module in pairs):
        shapes.update(_mlp(config, family))
    for down, up in list(pairs.values())[:1]:  # of whose dtype and rank the zeros are
        for n in range(layers):
            for template, (o, i) in shapes.items():
                empty = llm.zeros(down.dtype, down.shape[0], i), llm.zeros(up.dtype, o, up.shape[1])
                wanted.setdefault(template.format(n), empty)
    return {LAYOUT.key(m, slot): pair[at] for m, pair in wanted.items() for at, slot in enumerate(("down", "up"))}


def _template(module: str) -> str:
    """A module's name with ``{}`` for its layer."""
    parts = module.split(".")
    return ".".join([*parts[:2], "{}", *parts[3:]])


def _mlp(config: Mapping[str, Any], family: _Family) -> dict[str, tuple[int, int]]:
    """The shapes [o,i] of the modules of one MLP: LitGPT has one switch for them all."""
    hidden, inner = llm.size(config, "hidden_size", "n_embd"), llm.size(config, "intermediate_size", "ffn_hidden_size")
    if hidden is None or inner is None:
        raise FormatError("LitGPT wants a LoRA on all of an MLP, and its size is unknown", hint=_HINT)
    experts = llm.size(config, "num_local_experts") or 0
    shapes = {"proj": (hidden, inner), "gate": (experts, hidden)}
    found: dict[str, tuple[int, int]] = {}
    for _, template in family.names.pairs:
        if ".mlp." in template:
            numbers = range(experts) if template.count("{}") == 2 else (0,)
            for number in numbers:
                found[template.replace("experts.{}", f"experts.{number}")] = shapes.get(
                    template.rpartition(".")[2], (inner, hidden)
                )
    return found


def _projections(
    layer: int, updates: Mapping[str, Update], uniform: llm.Uniform, config: Mapping[str, Any], family: _Family
) -> list[Pair | None]:
    """The pairs of q, k and v of one layer."""
    attention = family.attention
    found = {other: update for name, update in updates.items() if (other := attention.there(name))}
    parts = [found.get(f"{QKV.format(layer)}.{letter}") for letter in _LETTERS[: len(family.qkv)]]
    if family.fused:
        sizes = _Sizes.of(config).all
        edges = tuple(accumulate(sizes, initial=0))
        whole = parts[0] and llm.reordered(llm.simple(parts[0]), _grouped(config, sum(sizes)))
        parts = [whole and rows(whole, start, stop) for start, stop in pairwise(edges)]
    return [None if part is None else uniform.pair(part) for part in parts]


def _fused(layers: list[list[Pair | None]], sizes: _Sizes) -> tuple[dict[str, Tensor], list[bool]]:
    """lora_A [n*r,i] and lora_B [rows,r] of attn.qkv of all layers, and which parts they have: those that some layer
    has, with zeros where one has none."""
    flags = [any(layer[n] for layer in layers) for n in range(3)]
    some = next((pair for layer in layers for pair in layer if pair), None)
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        if some is None:
            break
        down, up = some
        empty = [(llm.zeros(down.dtype, *down.shape), llm.zeros(up.dtype, height, up.shape[1])) for height in sizes.all]
        pairs = [pair or none for pair, none, on in zip(layer, empty, flags, strict=True) if on]
        tensors[LAYOUT.key(QKV.format(number), "down")] = Tensor.joined([down for down, _ in pairs])
        tensors[LAYOUT.key(QKV.format(number), "up")] = Tensor.joined([up for _, up in pairs])
    return tensors, flags


FORMAT = Format(
    name="litgpt",
    title="LitGPT lit_model.pth.lora",
    kinds=("lora",),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
    notes=notes,
)
