"""`diffusers`: one safetensors file with PEFT-style keys behind the name of the pipeline component.

Keys are ``<component>.<module>.lora_A.weight`` (down [r,i,*k]) and ``.lora_B.weight`` (up [o,r,*1]), with
``.lora_B.bias`` and, for DoRA, ``.lora_magnitude_vector.weight`` ([o], of a convolution [1,o,1,1]). Components
are ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2`` and so on. The scaling is in the metadata
``lora_adapter_metadata``, one JSON object of ``<component>.<field of PEFT's LoraConfig>``; without it, it is 1.

Also read: ``.alpha`` tensors (they win), kohya's suffixes, an adapter's name in the key, prefixes that stand
twice, and the LDM module names that OneTrainer wrote behind ``unet.``. Written: the factors as they are, and the
alphas in the metadata, never folded. Source: huggingface/diffusers 0.42.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.architectures import Architecture, identify, unflatten
from loratool.errors import FormatError, LoratoolError, NumericError
from loratool.formats import peft, raw
from loratool.formats.base import Evidence, Format, kept
from loratool.keys import Layout
from loratool.tensors import Tensor, write_safetensors
from loratool.update import DoRA, LowRank, Update, as_low_rank

LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("bias", ".lora_B.bias"),
        ("magnitude", ".lora_magnitude_vector.weight"),  # without .weight, text encoders would not load it
    ),
    aliases=(
        ("down", ".lora_A"),
        ("up", ".lora_B"),
        ("magnitude", ".lora_magnitude_vector"),
        ("down", ".lora_down.weight"),
        ("up", ".lora_up.weight"),
        ("dora_scale", ".dora_scale"),
        ("alpha", ".alpha"),
    ),
)
TABLE = "lora_adapter_metadata"
EMBEDDINGS = "bundle_emb."  # textual inversions that travel along

_COMPONENT = re.compile(r"^(unet|transformer(_\d)?|text_encoder(_\d)?)\.")
_RENAMED = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # OneTrainer's names of the components
_HEADS = {  # the first segment of a module in a bare model -> the component that has it
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("conv_in", "conv_norm_out", "conv_out", "time_embedding", "add_embedding"), "unet"),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), "transformer"),
    "text_model": "text_encoder",
}
# language models whose own first segment is `transformer`: GPT-2, Falcon, Bloom, MPT, DBRX, ChatGLM, XLNet
_LANGUAGE_MODEL = re.compile(
    r"^transformer\.(h|layer|encoder|wte|wpe|ln_f|word_embeddings|embedding|output_layer)\b"
    r"|^transformer\.blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn\.|norm_attn_norm\.)"
)


# ---------------------------------------------------------------- names


def located(name: str) -> str | None:
    """The reference name of a module: behind its pipeline component. None where nothing tells which one that is."""
    if _LANGUAGE_MODEL.match(name):
        return None
    if not _COMPONENT.match(name):
        component = _HEADS.get(name.partition(".")[0])
        if component is None:
            return None
        name = f"{component}.{name}"
    return reference(name)


def component_of(name: str) -> str:
    """The pipeline component of a name that has one."""
    return name.partition(".")[0]


def by_component(names: Iterable[str]) -> dict[str, list[str]]:
    """Names grouped by their pipeline component."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(component_of(name), []).append(name)
    return groups


def normalise(key: str) -> str:
    """A key whose prefixes stand once, without the names of PEFT's wrapper and of the adapter."""
    head, _, body = peft.normalise(key).partition(".")
    component = _RENAMED.get(head, head)
    body = peft.normalise(body)
    while body.startswith(f"{component}."):
        body = peft.normalise(body.removeprefix(f"{component}."))
    return f"{component}.{body}"


def reference(name: str, known: Architecture | None = None) -> str:
    """A dotted name as the reference spells it, where it is recognised: LDM names, a lacking ``text_model``."""
    return (known.from_kohya(name) if known else unflatten(name)) or name


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """PEFT-style keys behind a component, unless it is a language model that has such names itself."""
    if raw.MODULES in evidence.file.metadata:
        return None
    keys = [key for key in map(normalise, evidence.keys) if _COMPONENT.match(key) and LAYOUT.split(key)]
    if not keys or (TABLE not in evidence.file.metadata and any(map(_LANGUAGE_MODEL.match, keys))):
        return None
    return f"PEFT-style keys behind a pipeline component ({component_of(keys[0])}.)"


def read(evidence: Evidence) -> Adapter:
    """Read a diffusers file. Raises FormatError for what is malformed or refused by name."""
    file = evidence.file
    carried = {key: tensor for key, tensor in file.tensors.items() if key.startswith(EMBEDDINGS)}
    grouped, rest = LAYOUT.group({k: t for k, t in file.tensors.items() if k not in carried}, normalise)
    for key in [*rest, *(module for module in grouped if not _COMPONENT.match(module))]:
        raise FormatError("a tensor whose meaning is unknown", f"{file.path}: {key}")
    tables = read_tables(file.metadata, file.path)
    warnings: list[str] = []
    built: dict[str, dict[str, Update]] = {}
    for component, modules in by_component(grouped).items():
        scales = _Scales(tables.get(component, {}), evidence)
        built.update({module: _build(module, grouped[module], scales) for module in modules})
        warnings += scales.scales.warnings
        if scales.table.get("use_dora") and not any(isinstance(built[m].get(m), DoRA) for m in modules):
            warnings.append(f"the metadata says DoRA, but {component} has no magnitudes: it is read as plain LoRA")
    known = identify(shapes(built))
    updates, spellings = collect(built, {m: reference(m, known) for m in built}, ".lora_B.bias", file.path)
    metadata = Metadata(
        format="diffusers",
        path=evidence.path,
        weights=(evidence.weights,),
        strings=file.metadata,
        architecture=known.name if known else None,
        warnings=(*warnings, *remarks(built)),
    )
    return Adapter(updates, carried, metadata, spellings)


def read_tables(strings: Mapping[str, str], where: Path) -> dict[str, dict[str, Any]]:
    """The LoRA configuration of each component, as the metadata tells it. Raises FormatError."""
    try:
        table = json.loads(strings.get(TABLE, "{}"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise FormatError(f"the metadata {TABLE} is no JSON table", where)
    found: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


class _Scales:
    """What the table of one component says of its modules."""

    def __init__(self, table: Mapping[str, Any], evidence: Evidence) -> None:
        peft.refuse(table, evidence.path)
        self.table, self.evidence = table, evidence
        self.scales = peft.Scales(table, evidence)
        self._named = _namer(table)

    def alpha_of(self, module: str, down: Tensor) -> tuple[float | None, bool]:
        """(alpha, rank-stabilised) of a module. Raises FormatError when the ranks disagree."""
        rank = down.shape[0] if down.shape else 0
        try:
            return self.scales.alpha_of(self._named(module), rank), self.scales.rank_stabilised
        except FormatError as error:
            raise FormatError(error.what, module, f"correct {TABLE}, or give --scaling") from None


def _namer(table: Mapping[str, Any]) -> Callable[[str], str]:
    """What turns a name into the module that the patterns of a table mean.

    transformers 5 keeps CLIP without ``text_model``, files have it: patterns may have either.
    """
    patterns = [key for field in ("rank_pattern", "alpha_pattern") for key in table.get(field) or ()]
    spelled_out = any("text_model" in key for key in patterns)
    return lambda name: name.partition(".")[2].removeprefix("" if spelled_out else "text_model.")


def _build(module: str, slots: Mapping[str, Tensor], scales: _Scales) -> dict[str, Update]:
    """The updates of one module."""
    where = f"{scales.evidence.path}: {module}"
    if is_empty(slots):
        return {}
    if {"magnitude", "dora_scale"} <= set(slots):
        raise FormatError("both lora_magnitude_vector and dora_scale", where)
    found = {"magnitude" if slot == "dora_scale" else slot: tensor for slot, tensor in slots.items()}
    extra: dict[str, Any] = {"axis": 0}  # PEFT's magnitudes are of outputs, whatever their shape
    if "dora_scale" in slots:
        extra["axis"] = raw.magnitude_axis(slots["dora_scale"])
    try:
        if "alpha" not in slots and "down" in slots:
            alpha, extra["rank_stabilised"] = scales.alpha_of(module, slots["down"])
            found |= {} if alpha is None else {"alpha": Tensor.of(np.float64(alpha))}
        return raw.build(module, found, extra, scales.evidence)
    except FormatError as error:
        raise FormatError(error.what, where, error.hint) from None


# ---------------------------------------------------------------- reading, shared with kohya


def is_empty(slots: Mapping[str, Tensor]) -> bool:
    """Whether a module has rank 0: it changes nothing (some tools that reduce ranks leave such)."""
    return {"down", "up"} <= set(slots) and slots["down"].shape[:1] == (0,) and slots["up"].shape[1:2] == (0,)


def shapes(built: Mapping[str, Mapping[str, Update]]) -> dict[str, tuple[int, ...]]:
    """The shape of each module's update; () where only its bias has one."""
    return {module: found[module].shape if module in found else () for module, found in built.items()}


def collect(
    built: Mapping[str, Mapping[str, Update]], names: Mapping[str, str], bias: str, where: Path
) -> tuple[dict[str, Update], dict[str, str]]:
    """Updates by target, and the spellings of targets, from those by the source's modules.

    Modules that ``names`` gives one target are summed. ``bias`` ends the source's name of a bias delta.
    Raises FormatError where updates do not add up, NumericError for an alpha that is no finite number.
    """
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    for source, found in built.items():
        for name, update in found.items():
            target = names[source] + name.removeprefix(source)
            spelling = source + bias if is_bias(name) else source
            if update.alpha is not None and not math.isfinite(update.alpha):
                raise NumericError(f"alpha is {update.alpha}", f"{where}: {source}")
            if target in updates:
                try:
                    update = raw.join(updates[target], update)
                except LoratoolError as error:
                    raise FormatError(error.what, f"{where}: {spellings[target]} and {spelling}") from None
                spelling = f"{spellings[target]} + {spelling}"
            updates[target], spellings[target] = update, spelling
    return updates, spellings


def remarks(built: Mapping[str, Mapping[str, Update]]) -> list[str]:
    """Warnings of modules without alpha and of modules of rank 0."""
    lows = [update for found in built.values() for update in found.values() if update.rank is not None]
    missing, empty = sum(low.alpha is None for low in lows), sum(not found for found in built.values())
    warnings = [f"alpha is missing for {missing} of {len(lows)} modules: their scaling is 1"] if missing else []
    return warnings + ([f"{empty} modules of rank 0 change nothing and are left out"] if empty else [])


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What diffusers' loaders do not take."""
    return _sayable(adapter)[1]


def _sayable(adapter: Adapter) -> tuple[dict[str, str], list[Loss]]:
    """The name behind its component of each target that can be said, and the rest."""
    names: dict[str, str] = {}
    lost: list[Loss] = []
    modules = adapter.modules()
    dora = {component_of(located(name) or "") for name, update in modules.items() if isinstance(update, DoRA)}
    for target in sorted(adapter.updates, key=is_bias):  # a bias follows its module
        name, update = located(target), adapter.updates[target]
        if name is None:
            reason: str | None = "no pipeline component is known for this name"
        elif name in names.values():
            reason = "another module has this very name"
        elif is_bias(target):
            reason = None if target.removesuffix(".bias") in names else "a bias delta without a LoRA on its module"
        else:
            reason = _loss(update, component_of(name) in dora)
        if name is not None and reason is None:
            names[target] = name
        else:
            lost.append(Loss(adapter.spelling(target), str(reason)))
    whole = [Loss(adapter.spelling(name), "a whole tensor; only LoRA is loaded") for name in adapter.carried]
    return names, lost + whole


def _loss(update: Update, beside_dora: bool) -> str | None:
    """Why the update of a weight cannot be said."""
    if isinstance(update, DoRA):
        if update.axis == 1:
            return "a DoRA magnitude for each input; only outputs are known"
        return None if update.layer == "plain" else f"a LoRA of a layer that is stored as {update.layer}"
    low = as_low_rank(update)
    if low is None:
        return f"an update of kind {update.kind} has no plain LoRA form"
    if low.layer != "plain":
        return f"a LoRA of a layer that is stored as {low.layer}"
    return "a LoRA beside DoRA modules; in one component all are DoRA or none" if beside_dora else None


def write(adapter: Adapter, path: Path) -> None:
    """Write a diffusers file."""
    names, _ = _sayable(adapter)
    updates = {name: adapter.updates[target] for target, name in names.items()}
    biases = {name: update for name, update in updates.items() if is_bias(name)}
    modules = {name: update for name, update in updates.items() if name not in biases}
    tensors: dict[str, Tensor] = {}
    tables: dict[str, dict[str, Any]] = {}
    source = read_tables(adapter.metadata.strings, path)
    told = bool(source)
    for component, members in by_component(modules).items():
        lows = {name: peft.plain_low_rank(modules[name]) for name in members}
        told = told or any(low.alpha is not None for low in lows.values())
        lows = _alike(lows)
        own = {name: update for name, update in biases.items() if component_of(name) == component}
        for name, low in lows.items():
            slots = peft.stored_slots(low, modules[name], own, name)
            tensors.update({LAYOUT.key(name, slot): tensor for slot, tensor in slots.items()})
        dora = any(isinstance(modules[name], DoRA) for name in members)
        tables[component] = _table(source.get(component, {}), lows, dora, bool(own))
    strings = kept(adapter.metadata.strings, tensors)
    strings.setdefault("format", "pt")
    if told and tables != source:  # else the source's own text says it
        flat = {f"{component}.{key}": value for component, table in tables.items() for key, value in table.items()}
        strings[TABLE] = json.dumps(flat, indent=2, sort_keys=True)
    write_safetensors(path, tensors, strings)


def _alike(lows: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The LoRAs of one component with a common rule of scaling: PEFT has one switch for all."""
    if len({low.rank_stabilised for low in lows.values()}) == 1:
        return dict(lows)
    return {n: replace(low, alpha=low.scaling * low.rank, rank_stabilised=False) for n, low in lows.items()}


def _table(source: Mapping[str, Any], lows: Mapping[str, LowRank], dora: bool, bias: bool) -> dict[str, Any]:
    """The LoRA configuration of one component; the source's own where it still says the same."""
    flags = {
        "use_rslora": any(low.rank_stabilised for low in lows.values()),
        "use_dora": dora,
        "lora_bias": bias,
    }
    named = _namer(source)
    ranks = {named(name): low.rank for name, low in lows.items()}
    alphas = {named(name): peft.number(_alpha(low)) for name, low in lows.items()}
    same = all(bool(source.get(flag)) == value for flag, value in flags.items())
    if same and peft.still_says(source, ranks, alphas, flags["use_rslora"]):
        return dict(source)
    r, rank_pattern = peft.patterned(ranks, 8)
    lora_alpha, alpha_pattern = peft.patterned(alphas, 8)
    return {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": lora_alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks),
        **flags,
    }


def _alpha(low: LowRank) -> float:
    return low.scaling * low.rank if low.alpha is None else low.alpha


FORMAT = Format(
    name="diffusers",
    title="diffusers file with PEFT-style keys",
    kinds=("lora", "dora"),
    container="file",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
