"""Reading a PEFT folder or file: its LoRAs, and what travels along."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Metadata, is_bias
from loratool.errors import FormatError
from loratool.files import inside
from loratool.formats.base import CONFIG, Evidence
from loratool.formats.peft.config import (
    DOUBLES_OUT_PROJ,
    Scales,
    expert_order,
    mutating,
    names,
    refuse,
    saved_whole,
    strangers,
    token_indices,
)
from loratool.formats.peft.keys import LAYOUT, PREFIX, normalise, unnested
from loratool.formats.peft.places import Place, places
from loratool.formats.peft.types import row_named
from loratool.formats.peft.variants import plain_factors
from loratool.keys import require_pair
from loratool.tensors import FLOATS, Tensor
from loratool.update import Dense, DoRA, LowRank, Sum, Update

if TYPE_CHECKING:
    from loratool.formats.peft.rows import Row
    from loratool.kinds.tokens import Tokens

_TRAINING_ONLY = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
_SAVED = re.compile(r"\.modules_to_save\.(?:(weight|bias)$|[^.]+\.)")  # the adapter's name is left out by some saves
_TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "spiece.model",
    ]
)


def read(evidence: Evidence) -> Adapter:
    """Read a PEFT folder or file. Raises FormatError for what is malformed or refused by name."""
    refuse(evidence.config, evidence.path)
    if (row := row_named(str(evidence.config.get("peft_type", "")).upper())) is not None:
        return _read_tuner(evidence, row)
    adapter = _read_lora(evidence)
    init = mutating(evidence.config)
    if init is None:
        return adapter
    initial = _initial_adapter(evidence)
    if initial is None or init.lower() == "loftq":
        raise FormatError(
            f"init_lora_weights {init!r} changed the base, so this is no delta of the plain base",
            evidence.path,
            "merge it into the quantised base that it began with, init_lora_weights true in its configuration"
            if init.lower() == "loftq"
            else "put the initial adapter beside it, into a folder *_init; or save it with PEFT's "
            "path_initial_model_for_weight_conversion, which gives a plain LoRA",
        )
    return _less(adapter, initial)


def _read_lora(evidence: Evidence) -> Adapter:
    """The LoRA that a file and its configuration tell, whatever its base was."""
    config, file = evidence.config, evidence.file
    grouped, rest = LAYOUT.group(file.tensors, normalise, file.path)
    scales = Scales(config, evidence)
    updates: dict[str, Update] = {}
    spellings: dict[str, str] = {}
    found = places(grouped, config, file.path)
    for module, place in found.items():
        for name, update in _updates(place, grouped[module], scales, config, file.path).items():
            if name in updates:
                raise FormatError(f"two updates of {name}", f"{file.path}: {module}")
            updates[name] = update
        spellings[place.target] = PREFIX + (module if place.target == unnested(module) else place.target)
    whole = {key: tensor for key, tensor in rest.items() if not _TRAINING_ONLY.search(key)}
    carried = _carried(whole, spellings, evidence)
    metadata = _metadata(evidence, scales, updates)
    notes = _notes(config, found.values(), len(rest) - len(whole))
    return Adapter(updates, carried, replace(metadata, warnings=(*metadata.warnings, *notes)), spellings)


def _notes(config: Mapping[str, Any], found: Iterable[Place], dropped: int) -> list[str]:
    """What the user is told of a LoRA: unknown fields, the number of tensors that were dropped, what counts twice."""
    notes = []
    if unknown := strangers(config):
        notes.append(f"fields of the configuration that are not known here: {', '.join(unknown)}")
    if dropped:
        notes.append(f"{dropped} tensors that only training uses (VeLoRA, MonteCLoRA) are left out")
    if any(place.times != 1.0 for place in found):
        notes.append(
            "the update of each MultiheadAttention's out_proj counts twice, as in PEFT up to "
            f"{'.'.join(map(str, DOUBLES_OUT_PROJ))}; a later peft_version in adapter_config.json makes it count once"
        )
    return notes


def _carried(rest: Mapping[str, Tensor], spellings: dict[str, str], evidence: Evidence) -> dict[str, Tensor]:
    """The whole tensors by parameter; their ``spellings`` are noted. Raises FormatError for what means nothing."""
    carried: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        name = _carried_name(normalise(key), evidence.config, evidence.weights)
        if name is not None:
            if name in carried and not carried[name].same_bytes(
                tensor
            ):  # PEFT saves a resized one that it trains twice
                raise FormatError(f"two tensors for {name}", f"{evidence.weights}: {key} and {spellings[name]}")
            carried[name] = tensor
            spellings[name] = key
    return carried


def _read_tuner(evidence: Evidence, row: Row) -> Adapter:
    """An adapter of another type than LORA."""
    from loratool.formats.peft import tuners

    updates, rest, spellings = tuners.read(evidence, row)
    carried = _carried(rest, spellings, evidence)
    return Adapter(updates, carried, _metadata(evidence, None, updates), spellings)


def _initial_adapter(evidence: Evidence) -> Adapter | None:
    """The adapter as it was before training, where the folder holds it in a folder ``*_init``."""
    if not evidence.path.is_dir():
        return None
    found = sorted(p.name for p in evidence.path.iterdir() if p.name.endswith("_init") and (p / CONFIG).is_file())
    if len(found) > 1:
        raise FormatError(f"several initial adapters: {', '.join(found)}", evidence.path)
    if not found:
        return None
    inner = Evidence(inside(evidence.path, found[0], evidence.allow_links), evidence.allow_pickle, evidence.allow_links)
    refuse(inner.config, inner.path)
    return _read_lora(inner)


def _less(adapter: Adapter, initial: Adapter) -> Adapter:
    """What training changed: the base lost the initial factors, s x (B A - B0 A0) is the delta of the plain base."""
    updates: dict[str, Update] = {}
    for name, update in adapter.updates.items():
        first = initial.updates.get(name)
        if is_bias(name) and first is None:
            updates[name] = update
            continue
        if not isinstance(update, LowRank) or not isinstance(first, LowRank) or first.shape != update.shape:
            raise FormatError("the initial adapter has no LoRA of this shape", f"{initial.metadata.path}: {name}")
        updates[name] = Sum((update, first.scaled(-1.0)))
    if missing := sorted(initial.updates.keys() - updates.keys()):
        raise FormatError("the initial adapter has a module that the trained one lacks", f"{missing[0]}")
    weights = (*adapter.metadata.weights, *initial.metadata.weights)
    return replace(adapter, updates=updates).with_metadata(weights=weights)


def _updates(
    place: Place, slots: Mapping[str, Tensor], scales: Scales, config: Mapping[str, Any], where: Path
) -> dict[str, Update]:
    """The update of one module and, with lora_bias, that of its bias."""
    try:
        if "tokens" in slots:
            return {place.target: _tokens(place, slots, config, where)}
        update = _update(place, slots, scales, config, where)
    except FormatError as error:
        raise FormatError(error.what, error.where or f"{where}: {place.target}", error.hint) from None
    found: dict[str, Update] = {place.target: update}
    if "bias" in slots:
        if place.stacked or place.target != place.rule:
            raise FormatError("a lora_B.bias of a parameter, which PEFT does not use", f"{where}: {place.target}")
        found[f"{place.target}.bias"] = Dense(slots["bias"], update.scaling, "bias")
    return found


def _tokens(place: Place, slots: Mapping[str, Tensor], config: Mapping[str, Any], where: Path) -> Tokens:
    """Rows of an embedding that replace the base's."""
    from loratool.kinds.tokens import Tokens

    if len(slots) > 1:
        raise FormatError("trainable tokens of a module that has a LoRA as well")
    if slots["tokens"].dtype not in FLOATS:
        raise FormatError(f"tokens is stored as {slots['tokens'].dtype}")
    return Tokens.at(token_indices(place.target, config, where), slots["tokens"])


def _update(
    place: Place, slots: Mapping[str, Tensor], scales: Scales, config: Mapping[str, Any], where: Path
) -> Update:
    """The update of one weight. Raises FormatError without a place where the slots do not fit each other."""
    pair = _pair(place.target, slots, where)
    _check_stored(slots, pair)
    embedding = "embedding_down" in slots
    down, up, gain = (*pair, 1.0) if embedding or place.stacked else plain_factors(config, place.rule, *pair)
    _check_groups(down, up)
    if place.stacked and (count := scales.experts_of(place.rule, down.shape[0])) > 1:
        from loratool.kinds.experts import Experts

        alpha = scales.alpha_of(place.rule, down.shape[0] // count)
        _without("a parameter", slots, "magnitude", "diagonal")
        return Experts(down, up, count, alpha, scales.rank_stabilised, expert_order(config))
    low = LowRank(down, up, alpha=scales.alpha_of(place.rule, down.shape[0]), rank_stabilised=scales.rank_stabilised)
    if embedding:  # PEFT holds A [r,entries], B [dim,r]; the base's orientation is [entries,dim]
        low = replace(low, down=pair[1].T, up=pair[0].T, layer="embedding")
    elif scales.transposed and len(down.shape) == 2 and not place.stacked:
        low = low.oriented("transposed")
    gain *= place.times
    return _completed(low if gain == 1.0 else low.scaled(gain), place, slots, config)


def _completed(low: LowRank, place: Place, slots: Mapping[str, Tensor], config: Mapping[str, Any]) -> Update:
    """A LoRA with what stands beside its factors: KaSA's diagonal, or DoRA's magnitude."""
    if "diagonal" in slots:
        from loratool.kinds.truncated import Truncated

        _without("a KaSA module", slots, "magnitude")
        return Truncated(low, slots["diagonal"])
    if config.get("kasa_config") is not None and not place.stacked:
        raise FormatError("kasa_config is set but lora_diag is missing", hint="the file is incomplete")
    axis = 1 if low.layer == "embedding" else 0
    return DoRA(low, slots["magnitude"], axis=axis) if "magnitude" in slots else low


def _check_stored(slots: Mapping[str, Tensor], pair: tuple[Tensor, Tensor]) -> None:
    """Raise FormatError for tensors of a dtype that nothing is computed from, and for factors that were flattened."""
    for slot, tensor in slots.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}")
    shortest = min((tensor.shape for tensor in pair), key=len)
    if len(shortest) < 2:
        raise FormatError(f"a factor of shape {list(shortest)}: a partial save (ZeRO-3, FSDP)", hint="save it gathered")


def _check_groups(down: Tensor, up: Tensor) -> None:
    """Raise FormatError for the factors of a grouped convolution."""
    if len(down.shape) > 2 and len(up.shape) == len(down.shape) and up.shape[1] < down.shape[0]:
        raise FormatError(
            f"factors of shapes {list(down.shape)} and {list(up.shape)}: a grouped convolution, whose weight no "
            "product of them fits (PEFT cannot merge it either)"
        )


def _without(what: str, slots: Mapping[str, Tensor], *others: str) -> None:
    """Raise FormatError for tensors that PEFT never puts together."""
    for other in others:
        if other in slots:
            raise FormatError(f"{what} with a {other}")


def _pair(module: str, slots: Mapping[str, Tensor], where: Path) -> tuple[Tensor, Tensor]:
    """(A, B) of a module, Linear or Embedding."""
    kind = "embedding_" if any(slot.startswith("embedding_") for slot in slots) else ""
    if kind and not slots.keys().isdisjoint(("down", "up")):
        raise FormatError("a module with the factors of a Linear and of an Embedding", f"{where}: {module}")
    require_pair(module, {slot.removeprefix(kind) for slot in slots}, where)
    return slots[kind + "down"], slots[kind + "up"]


def _carried_name(key: str, config: Mapping[str, Any], where: Path) -> str | None:
    """The parameter that a whole tensor stands for; None for copies that are dropped."""
    key = _SAVED.sub(lambda found: f".{found[1] or ''}", key)
    if ".original_module." in key:
        return None
    key = unnested(key.replace(".token_adapter.base_layer.", "."))
    if re.search(r"\.(lora_|token_adapter\.|trainable_tokens_|vera_|hada_|lokr_|oft_|boft_|ia3_)", key):
        raise FormatError("a tensor of a kind that is not supported yet", f"{where}: {key}")
    bias = config.get("bias") in ("all", "lora_only") and "bias" in key.rpartition(".")[2]
    if key.endswith((".weight", ".bias")) or bias or saved_whole(key, names(config, "modules_to_save", where)):
        return key
    raise FormatError("a tensor whose meaning is unknown", f"{where}: {key}")


def _metadata(evidence: Evidence, scales: Scales | None, updates: Mapping[str, Update]) -> Metadata:
    """``scales`` is None where the scaling does not come from LoRA's configuration."""
    config = evidence.config
    warnings = list(scales.warnings) if scales else []
    if scales and not scales.known:
        warnings.append("no adapter_config.json: the file does not tell its scaling")
    if config.get("use_dora") and any(u.kind == "lora" for u in updates.values()):
        raise FormatError("use_dora is set but magnitudes are missing", evidence.path, "the file is incomplete")
    folder = evidence.path if evidence.path.is_dir() else None
    extras = sorted(p for p in folder.iterdir() if p.name in _TOKENIZER_FILES) if folder else []
    base = config.get("base_model_name_or_path")
    return Metadata(
        format="peft",
        path=evidence.path,
        weights=(evidence.weights,),
        strings=evidence.file.metadata,
        config=config,
        extras=tuple(extras),
        base_model=base if isinstance(base, str) and base else None,
        warnings=tuple(warnings),
        scaling_known=scales is None or scales.known,
    )
