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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss, is_bias
from loratool.architectures import Architecture, telling
from loratool.formats import dialects
from loratool.formats.base import Evidence, Format, kept
from loratool.formats.dialects import (
    TABLE,
    by_component,
    component_of,
    has_component,
    is_language_model,
    is_slot,
    located,
    namer,
    normalise,
    read_tables,
    referenced,
)
from loratool.keys import Layout
from loratool.tensors import Tensor, write_safetensors
from loratool.update import DoRA, LowRank, Update

LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("bias", ".lora_B.bias"),
        ("magnitude", ".lora_magnitude_vector.weight"),  # without .weight, text encoders would not load it
    ),
)
_COMPONENTS = ("text_encoder", "text_encoder_2")
_LOADED = {  # the text encoders whose adapters a family's pipelines load: CLIP, never T5
    "sd1": _COMPONENTS[:1],
    "sd2": _COMPONENTS[:1],
    "sdxl": _COMPONENTS,
    "sd3": _COMPONENTS,
    "flux": _COMPONENTS[:1],
}


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """PEFT-style keys behind a component, unless it is a language model that has such names itself."""
    keys = [key for key in map(normalise, evidence.keys) if has_component(key) and is_slot(key)]
    if not keys or (TABLE not in evidence.file.metadata and any(map(is_language_model, keys))):
        return None
    return f"PEFT-style keys behind a pipeline component ({component_of(keys[0])}.)"


def read(evidence: Evidence) -> Adapter:
    """Read a diffusers file. Raises FormatError for what is malformed or refused by name."""
    return dialects.read(evidence, "diffusers")


# ---------------------------------------------------------------- writing


def losses(adapter: Adapter) -> list[Loss]:
    """What diffusers' loaders do not take."""
    return _sayable(*referenced(adapter))[1]


def _sayable(adapter: Adapter, known: Architecture | None) -> tuple[dict[str, str], list[Loss]]:
    """The name behind its component of each target that can be said, and the rest."""
    loaded = _LOADED.get(known.name, ()) if known else _COMPONENTS
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
        elif component_of(name).startswith("text_encoder") and component_of(name) not in loaded:
            reason = "a text encoder whose adapters the pipeline does not load"
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
    from loratool.formats.said import plain_low_rank

    if isinstance(update, DoRA):
        if update.axis == 1:
            return "a DoRA magnitude for each input; only outputs are known"
        if update.layer != "plain":
            return f"a LoRA of a layer that is stored as {update.layer}"
        return None if plain_low_rank(update.direction) else "a DoRA whose direction has no plain LoRA form"
    low = plain_low_rank(update)
    if low is None:
        return f"an update of kind {update.kind} has no plain LoRA form"
    if low.layer != "plain":
        return f"a LoRA of a layer that is stored as {low.layer}"
    return "a LoRA beside DoRA modules; in one component all are DoRA or none" if beside_dora else None


def write(adapter: Adapter, path: Path) -> None:
    """Write a diffusers file."""
    from loratool.formats.peft.writing import stored_slots

    adapter, known = referenced(adapter)
    names, _ = _sayable(adapter, known)
    updates = {name: adapter.updates[target] for target, name in names.items()}
    biases = {name: update for name, update in updates.items() if is_bias(name)}
    modules = {name: update for name, update in updates.items() if name not in biases}
    tensors: dict[str, Tensor] = {}
    tables: dict[str, dict[str, Any]] = {}
    source = read_tables(adapter.metadata.strings, path)
    told = bool(source)
    for component, members in by_component(modules).items():
        lows = {name: _plain(modules[name]) for name in members}
        told = told or any(low.alpha is not None for low in lows.values())
        lows = _alike(lows)
        own = {name: update for name, update in biases.items() if component_of(name) == component}
        for name, low in lows.items():
            slots = stored_slots(low, modules[name], own, name)
            tensors.update({LAYOUT.key(name, slot): tensor for slot, tensor in slots.items()})
        dora = any(isinstance(modules[name], DoRA) for name in members)
        tables[component] = _table(source.get(component, {}), lows, dora, bool(own))
    strings = kept(adapter.metadata.strings, tensors)
    strings |= telling(strings, known)
    strings.setdefault("format", "pt")
    if told and tables != source:  # else the source's own text says it
        flat = {f"{component}.{key}": value for component, table in tables.items() for key, value in table.items()}
        strings[TABLE] = json.dumps(flat, indent=2, sort_keys=True)
    write_safetensors(path, tensors, strings)


def _plain(update: Update) -> LowRank:
    """The LoRA of an update that has one: its direction where it is a DoRA."""
    from loratool.formats.said import plain_low_rank

    low = plain_low_rank(update.direction if isinstance(update, DoRA) else update)
    assert low is not None  # losses() said so
    return low


def _alike(lows: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The LoRAs of one component with a common rule of scaling: PEFT has one switch for all."""
    if len({low.rank_stabilised for low in lows.values()}) == 1:
        return dict(lows)
    return {n: replace(low, alpha=low.scaling * low.rank, rank_stabilised=False) for n, low in lows.items()}


def _table(source: Mapping[str, Any], lows: Mapping[str, LowRank], dora: bool, bias: bool) -> dict[str, Any]:
    """The LoRA configuration of one component; the source's own where it still says the same."""
    from loratool.formats.peft.writing_config import number, patterned, still_says

    flags = {
        "use_rslora": any(low.rank_stabilised for low in lows.values()),
        "use_dora": dora,
        "lora_bias": bias,
    }
    named = namer(source)
    ranks = {named(name): low.rank for name, low in lows.items()}
    alphas = {named(name): number(_alpha(low)) for name, low in lows.items()}
    same = all(bool(source.get(flag)) == value for flag, value in flags.items())
    if same and still_says(source, ranks, alphas, flags["use_rslora"]):
        return dict(source)
    r, rank_pattern = patterned(ranks, 8)
    lora_alpha, alpha_pattern = patterned(alphas, 8)
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
