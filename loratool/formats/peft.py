"""`peft`: a folder of Hugging Face PEFT, ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are ``base_model.model.<module>.lora_A.weight`` (down [r,i,*k]) and ``.lora_B.weight`` (up [o,r,*1]), for an
Embedding ``.lora_embedding_A`` [r,entries] and ``.lora_embedding_B`` [dim,r], for DoRA ``.lora_magnitude_vector``, and
plain parameter names for what was trained whole. The scaling is in the configuration only: ``lora_alpha / r``, or
``/ sqrt(r)`` with ``use_rslora``, with exceptions by module in ``rank_pattern`` and ``alpha_pattern``, whose keys are
regular expressions ``(.*\\.)?KEY$``: the first that fits wins. Raw dumps of other trainers keep the adapter's name in
the keys, wrap modules once more or leave the prefix out; they are read alike.

Parameters that are no module's ``weight`` (``target_parameters``: stacks of experts [E,o,i]) are wrapped by wrapping
their module, the first registered innermost, behind most ``.base_layer``; the keys do not name them. A torch
MultiheadAttention holds the pair of ``in_proj_weight`` itself and that of its output below ``.base_layer.out_proj``;
PEFT up to 0.21.2 counts the latter twice, and so does this reader for what such a version wrote. Rows of an embedding
(``trainable_token_indices``) are in ``.token_adapter.trainable_tokens_delta``. QALoRA and BD-LoRA hold factors in a
form of their own and are read as the plain LoRA that they are; KaSA has a ``.lora_diag``. What began as PiSSA, OLoRA,
CorDA or LoRA-GA is no delta of the plain base: it is read where a folder ``*_init`` beside it holds the adapter before
training, whose factors are subtracted. Source: huggingface/peft 0.21.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss, Metadata, is_bias
from loratool.architectures import architecture
from loratool.architectures.llm import EMBEDDING_LEAVES, experts_transposed
from loratool.errors import FormatError
from loratool.files import inside
from loratool.formats import peft_tuners
from loratool.formats.base import CONFIG, IMAGE_FORMATS, Evidence, Format
from loratool.formats.peft_config import (
    DOUBLES_OUT_PROJ,
    REWRITTEN,
    Patterns,
    Scales,
    expert_order,
    in_order,
    listed,
    mutating,
    names,
    out_proj_times,
    parameters_of,
    refuse_fields,
    saved_whole,
    strangers,
    token_indices,
    version,
)
from loratool.formats.peft_variants import plain_factors
from loratool.keys import Layout, require_pair
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.kinds.truncated import Truncated
from loratool.lazy import np
from loratool.tensors import FLOATS, Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Sum, Update, as_low_rank

PREFIX = "base_model.model."
LAYOUT = Layout(
    slots=(
        ("down", ".lora_A.weight"),
        ("up", ".lora_B.weight"),
        ("bias", ".lora_B.bias"),
        ("embedding_down", ".lora_embedding_A"),
        ("embedding_up", ".lora_embedding_B"),
        ("magnitude", ".lora_magnitude_vector"),
        ("diagonal", ".lora_diag"),
        ("tokens", ".token_adapter.trainable_tokens_delta"),
    ),
    aliases=(("down", ".lora_A"), ("up", ".lora_B"), ("magnitude", ".lora_magnitude_vector.weight")),
)
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"(\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector|diag)|token_adapter\.trainable_tokens_delta))"
    r"\.(?!weight$|bias$)[^.]+(?=(\.weight|\.bias)?$)"
)
_TRAINING_ONLY = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
_SAVED = re.compile(r"\.modules_to_save\.(?:(weight|bias)$|[^.]+\.)")  # the adapter's name is left out by some saves
_OUT_PROJ = ".base_layer.out_proj"  # of a MultiheadAttention, which PEFT wraps with it

# other tuners of PEFT, and whether their update is a fixed change of weights
_NOT_A_WEIGHT_CHANGE = frozenset(
    [
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
        "XLORA",
        "POLY",
        "LILY",
    ]
)
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


# ---------------------------------------------------------------- reading


def sniff(evidence: Evidence) -> str | None:
    """PEFT by its configuration, or by the prefix that only PEFT's own saves have."""
    if "peft_type" in evidence.config:
        return "adapter_config.json names a peft_type"
    if any(_unwrapped(key).startswith(PREFIX) for key in evidence.keys):
        return f"keys begin with {PREFIX}"
    return None


def read(evidence: Evidence) -> Adapter:
    """Read a PEFT folder or file. Raises FormatError for what is malformed or refused by name."""
    refuse(evidence.config, evidence.path)
    if (row := peft_tuners.row_named(evidence.config)) is not None:
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
        spellings[place.target] = PREFIX + (module if place.target == _unnested(module) else place.target)
    dropped = [key for key in rest if _TRAINING_ONLY.search(key)]
    carried = _carried({key: rest[key] for key in rest if key not in dropped}, spellings, evidence)
    notes = list(strangers(config))
    notes = [f"fields of the configuration that are not known here: {', '.join(notes)}"] if notes else []
    if dropped:
        notes.append(f"{len(dropped)} tensors that only training uses (VeLoRA, MonteCLoRA) are left out")
    if any(place.times != 1.0 for place in found.values()):
        notes.append(
            "the update of each MultiheadAttention's out_proj counts twice, as in PEFT up to "
            f"{'.'.join(map(str, DOUBLES_OUT_PROJ))}; a later peft_version in adapter_config.json makes it count once"
        )
    metadata = _metadata(evidence, scales, updates)
    metadata = replace(metadata, warnings=(*metadata.warnings, *notes))
    return Adapter(updates, carried, metadata, spellings)


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


def _read_tuner(evidence: Evidence, row: peft_tuners.Row) -> Adapter:
    """An adapter of another type than LORA."""
    updates, rest, spellings = peft_tuners.read(evidence, row, normalise)
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


@dataclass(frozen=True)
class Place:
    """What the factors under one module of a file change: the target, the name that PEFT's patterns see, how often."""

    target: str
    rule: str
    stacked: bool = False
    times: float = 1.0


_NESTED = re.compile(r"\.base_layer(?=\.|$)")


def _unnested(module: str) -> str:
    """A module's path without the wrappers around it."""
    return _NESTED.sub("", module)


def places(grouped: Iterable[str], config: Mapping[str, Any], where: Path) -> dict[str, Place]:
    """The place of each module of a file. PEFT wraps a parameter by wrapping its module, several by nesting.

    Raises FormatError where a nesting means nothing, or the configuration does not name the parameters.
    """
    names(config, "target_parameters", where)
    by_module: dict[str, list[str]] = {}
    for module in grouped:
        by_module.setdefault(_unnested(module), []).append(module)
    held = {module for modules in by_module.values() for module in modules}
    attentions = {m.removesuffix(_OUT_PROJ) for m in held if m.endswith(_OUT_PROJ)} & by_module.keys()
    found: dict[str, Place] = {}
    for module, wrappers in by_module.items():
        owner = wrappers[0].removesuffix(_OUT_PROJ)
        if module in attentions:
            found[_only(wrappers, where)] = Place(f"{module}.in_proj_weight", module)
        elif owner != wrappers[0] and owner in attentions:
            found[_only(wrappers, where)] = Place(module, owner, times=out_proj_times(config))
        elif parameters := parameters_of(module, config, where):
            found.update(_parameter_places(module, wrappers, parameters, where))
        elif len(wrappers) == 1 and not wrappers[0].endswith(".base_layer"):
            found[wrappers[0]] = Place(module, module)
        else:
            raise FormatError(
                "nested wrappers of parameters that the configuration does not name",
                f"{where}: {module}",
                "name them in target_parameters of adapter_config.json",
            )
    return found


def _only(wrappers: Sequence[str], where: Path) -> str:
    if len(wrappers) > 1:
        raise FormatError("a MultiheadAttention that is wrapped twice", f"{where}: {wrappers[1]}")
    return wrappers[0]


def _parameter_places(module: str, wrappers: Sequence[str], parameters: Sequence[str], where: Path) -> dict[str, Place]:
    """The first registered parameter lies innermost, behind most ``.base_layer`` (llm.md 1.9)."""
    inside_out = sorted(wrappers, key=lambda wrapper: -len(wrapper))
    if len(inside_out) != len(parameters) or (len(parameters) > 1 and in_order(parameters) is None):
        raise FormatError(
            f"{len(inside_out)} wrapped parameters, and target_parameters names {', '.join(parameters)}: "
            "which is which is unknown",
            f"{where}: {module}",
        )
    found = {}
    for wrapper, parameter in zip(inside_out, parameters, strict=True):
        name = f"{module}.{parameter}"
        found[wrapper] = Place(module if parameter == "weight" else name, name, stacked=True)
    return found


def normalise(key: str) -> str:
    """A key without the wrappers of training frameworks, PEFT's prefix and the adapter's name."""
    key = _unwrapped(key)
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return without_adapter_name(key)


def without_adapter_name(key: str) -> str:
    """A key without the adapter's name before or in the place of its suffix."""
    return _ADAPTER_NAME.sub(r"\1", key)


def _unwrapped(key: str) -> str:
    """A key without the wrappers of torch.compile, FSDP and DDP."""
    return _WRAPPERS.sub("", key).removeprefix("module.")


def refuse(config: Mapping[str, Any], where: Path) -> None:
    """Raise FormatError, naming the kind, for what is no fixed change of weights."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind in _NOT_A_WEIGHT_CHANGE:
        raise FormatError(f"{kind} is not a fixed change of weights", where, "it cannot be merged or converted")
    if kind in peft_tuners.REFUSED:
        raise FormatError(f"the PEFT type {kind} cannot be read: {peft_tuners.REFUSED[kind]}", where)
    if kind != "LORA" and peft_tuners.row_named(config) is None:
        raise FormatError(f"the PEFT type {kind} is not known", where)
    refuse_fields(config, where)


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
    for slot, tensor in slots.items():
        if tensor.dtype not in FLOATS:
            raise FormatError(f"{slot} is stored as {tensor.dtype}")
    fits = min((t for t in pair), key=lambda t: len(t.shape)).shape
    if len(fits) < 2:
        raise FormatError(f"a factor of shape {list(fits)}: a partial save (ZeRO-3, FSDP)", hint="save it gathered")
    embedding = "embedding_down" in slots
    down, up, gain = (*pair, 1.0) if embedding or place.stacked else plain_factors(config, place.rule, *pair)
    gain *= place.times
    if len(down.shape) > 2 and len(up.shape) == len(down.shape) and up.shape[1] < down.shape[0]:
        raise FormatError(
            f"factors of shapes {list(down.shape)} and {list(up.shape)}: a grouped convolution, whose weight no "
            "product of them fits (PEFT cannot merge it either)"
        )
    if place.stacked and (experts := scales.experts_of(place.rule, down.shape[0])) > 1:
        alpha = scales.alpha_of(place.rule, down.shape[0] // experts)
        _without("a parameter", slots, "magnitude", "diagonal")
        return Experts(down, up, experts, alpha, scales.rank_stabilised, expert_order(config))
    low = LowRank(down, up, alpha=scales.alpha_of(place.rule, down.shape[0]), rank_stabilised=scales.rank_stabilised)
    if embedding:  # PEFT holds A [r,entries], B [dim,r]; the base's orientation is [entries,dim]
        low = replace(low, down=pair[1].T, up=pair[0].T, layer="embedding")
    elif scales.transposed and len(down.shape) == 2 and not place.stacked:
        low = low.oriented("transposed")
    low = low if gain == 1.0 else low.scaled(gain)
    if "diagonal" in slots:
        _without("a KaSA module", slots, "magnitude")
        return Truncated(low, slots["diagonal"])
    if config.get("kasa_config") is not None and not place.stacked:
        raise FormatError("kasa_config is set but lora_diag is missing", hint="the file is incomplete")
    return DoRA(low, slots["magnitude"], axis=1 if embedding else 0) if "magnitude" in slots else low


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
    key = _NESTED.sub("", key.replace(".token_adapter.base_layer.", "."))
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
    if config.get("use_dora") and any(isinstance(u, (LowRank, Experts)) for u in updates.values()):
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


# ---------------------------------------------------------------- writing

_BARE = "a bare parameter, which PEFT does not save"


def losses(adapter: Adapter) -> list[Loss]:
    """What PEFT cannot say: of an adapter of one of its other tuners nothing, else what its LoRA cannot."""
    if peft_tuners.row_of(adapter) is not None:
        bare = (name for name in adapter.carried if not _can_carry(name, adapter, adapter.updates))
        return [Loss(adapter.spelling(name), _BARE) for name in bare]
    modules = adapter.modules()
    reasons = {name: _loss(name, update, adapter) for name, update in adapter.updates.items()}
    kept = {name for name, reason in reasons.items() if reason is None}
    shared = {module for module, members in _by_parameter(adapter, kept).items() if in_order(members) is None}
    found = []
    for name, reason in reasons.items():
        if reason is None and is_bias(name) and name.removesuffix(".bias") not in modules:
            reason = "a bias delta without a LoRA on its module"
        if reason is None and name.rpartition(".")[0] in shared and isinstance(modules.get(name), Experts):
            reason = "one of several parameters of a module whose order PEFT's reader must know"
        if reason:
            found.append(Loss(adapter.spelling(name), reason))
    bare = (name for name in adapter.carried if not _can_carry(name, adapter, kept))
    return found + [Loss(adapter.spelling(name), _BARE) for name in bare]


def _loss(name: str, update: Update, adapter: Adapter) -> str | None:
    """Why PEFT's LoRA cannot say one update."""
    modules = adapter.modules()
    kinds = {type(other) for other in modules.values()}
    parameters = Experts in kinds or any(map(_is_in_proj, modules))
    if is_bias(name):
        if parameters:
            return "a bias delta beside the LoRA of parameters; PEFT's lora_bias excludes them"
        return None if isinstance(update, Dense) else "a bias update that is not a plain delta"
    if isinstance(update, DoRA):
        by_input = update.axis == 1 and update.layer != "embedding"
        return "a DoRA magnitude for each input; PEFT knows only outputs" if by_input else None
    if isinstance(update, Tokens):
        return None
    if isinstance(update, Experts) and "." not in name:
        return "a parameter of the model itself, which PEFT cannot wrap"
    if isinstance(update, Experts) and name.rpartition(".")[0] in modules:
        return "a parameter of a module that has an update of its own"
    if not isinstance(update, (Experts, Truncated)) and as_low_rank(update) is None:
        return f"an update of kind {update.kind} has no plain LoRA form"
    if DoRA in kinds:
        return "a LoRA beside DoRA modules; PEFT's use_dora holds for all"
    if Truncated in kinds and not isinstance(update, Truncated):
        return "a LoRA beside KaSA modules; PEFT's kasa_config holds for all"
    return None


def _is_in_proj(name: str) -> bool:
    """Whether a target is the input projection of a torch MultiheadAttention."""
    return name.endswith(".in_proj_weight")


def _is_parameter(name: str, update: Update, adapter: Adapter) -> bool:
    """Whether PEFT reaches a target as a parameter of its module: what is stacked, and what its file said so."""
    told = adapter.metadata.config.get("target_parameters")
    return isinstance(update, Experts) or (isinstance(told, list) and "." in name and listed(name, map(str, told)))


def _by_parameter(adapter: Adapter, kept: Container[str]) -> dict[str, list[str]]:
    """Modules whose parameters have updates -> the names of these parameters."""
    found: dict[str, list[str]] = {}
    for name, update in adapter.modules().items():
        if name in kept and _is_parameter(name, update, adapter):
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, []).append(parameter)
    return found


def _can_carry(name: str, adapter: Adapter, kept: Iterable[str]) -> bool:
    """Whether a whole tensor can be saved: weights and biases can; others where their module has no LoRA inside."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return True
    return bool(module) and not any(target == module or target.startswith(f"{module}.") for target in kept)


@dataclass(frozen=True)
class Wrapped:
    """One pair as PEFT holds it: the module in its keys, the name that its patterns see, and the rank and alpha."""

    key: str
    rule: str
    pair: LowRank | Experts
    update: Update
    parameter: bool = False


def write(adapter: Adapter, path: Path) -> None:
    """Write a PEFT folder: tensors, configuration, and the tokenizer files that travelled along."""
    kept = _kept(adapter)
    row = peft_tuners.row_of(kept)
    tensors, config = _written(kept) if row is None else _written_tuner(kept, row)
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", tensors, {"format": "pt", **adapter.metadata.strings})
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))
    for extra in adapter.metadata.extras:
        (path / extra.name).write_bytes(extra.read_bytes())


def _kept(adapter: Adapter) -> Adapter:
    """What PEFT can say, by names without the pipeline component: PEFT wraps one model, whose own names have none."""
    lost = {loss.name for loss in losses(adapter)}
    cut = _component(adapter)
    return replace(
        adapter,
        updates={n.removeprefix(cut): u for n, u in adapter.updates.items() if adapter.spelling(n) not in lost},
        carried={n.removeprefix(cut): t for n, t in adapter.carried.items() if adapter.spelling(n) not in lost},
        spellings={},
    )


def _written_tuner(adapter: Adapter, row: peft_tuners.Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key and the configuration of another type than LORA."""
    tensors, config = peft_tuners.written(adapter, row)
    inside = {module: f"{module}.base_layer" for module in adapter.modules()}
    return tensors | _carried_keys(adapter, inside), config


def _written(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key and the configuration of a LoRA."""
    biases = {n: u for n, u in adapter.updates.items() if is_bias(n)}
    wrapped = _alike(_wrapped(adapter))
    inside = _inside(adapter, wrapped)
    tensors: dict[str, Tensor] = {}
    for name, one in wrapped.items():
        for slot, tensor in stored_slots(one.pair, one.update, biases, name).items():
            tensors[PREFIX + LAYOUT.key(one.key, slot)] = tensor
    for name, update in adapter.updates.items():
        if isinstance(update, Tokens):
            tensors[PREFIX + LAYOUT.key(_held(name, inside), "tokens")] = update.value
    pairs = {one.rule: one.pair for one in wrapped.values()}
    parameters = [one.rule for one in wrapped.values() if one.parameter]
    return tensors | _carried_keys(adapter, inside), configuration(adapter, pairs, bool(biases), parameters)


def _carried_keys(adapter: Adapter, inside: Mapping[str, str]) -> dict[str, Tensor]:
    """The whole tensors by key: below ``base_layer`` where their module is wrapped."""
    found: dict[str, Tensor] = {}
    for name, tensor in adapter.carried.items():
        module, _, leaf = name.rpartition(".")
        held = inside.get(module) or _held(module, inside)
        found[PREFIX + (f"{held}.{leaf}" if module else leaf)] = tensor
    return found


def _component(adapter: Adapter) -> str:
    """The pipeline component to leave out of the names: PEFT wraps one model, whose own names have none."""
    heads = {name.split(".", 1)[0] for name in (*adapter.updates, *adapter.carried)}
    image = adapter.metadata.format in IMAGE_FORMATS or architecture(adapter.metadata.architecture or "")
    return f"{heads.pop()}." if len(heads) == 1 and image else ""


def _wrapped(adapter: Adapter) -> dict[str, Wrapped]:
    """Every update with factors as PEFT holds it."""
    modules = {n: u for n, u in adapter.modules().items() if not isinstance(u, Tokens)}
    nested = {m: in_order(ps) or sorted(ps) for m, ps in _by_parameter(adapter, modules).items()}
    nesting = {m: m + len(parameters) * ".base_layer" for m, parameters in nested.items()}
    found: dict[str, Wrapped] = {}
    for name, update in modules.items():
        module, _, parameter = name.rpartition(".")
        pair = _packed(update, adapter) if isinstance(update, Experts) else _layered(name, plain_low_rank(update))
        if module in nested and parameter in nested[module]:
            outside = len(nested[module]) - 1 - nested[module].index(parameter)  # wrappers around this one
            found[name] = Wrapped(module + outside * ".base_layer", name, pair, update, True)
        elif _is_in_proj(name):
            found.update(_attention(module, modules, out_proj_times(adapter.metadata.config)))
        elif name not in found:
            found[name] = Wrapped(_held(name, nesting), name, pair, update)
    return found


def _packed(stack: Experts, adapter: Adapter) -> Experts:
    """A stack as PEFT sees its axes: the first is the input's in models known to be transposed, else the last.

    Where the base is not known its own word is kept.
    """
    flagged = experts_transposed(adapter.metadata.base_config)
    known = flagged is not None and stack.order in ("plain", "transposed")
    return stack.flipped() if known and flagged is not (stack.order == "transposed") else stack


def _attention(module: str, modules: Mapping[str, Update], times: float) -> dict[str, Wrapped]:
    """Both projections of a MultiheadAttention, which PEFT gives one rank and one alpha."""
    inner = plain_low_rank(modules[f"{module}.in_proj_weight"])
    given = modules.get(f"{module}.out_proj")
    width = inner.down.shape[1]
    nothing = LowRank(Tensor.of(np.zeros((1, width), np.float32)), Tensor.of(np.zeros((width, 1), np.float32)))
    outer = (plain_low_rank(given) if given else nothing).scaled(1 / times)
    pairs = (inner, outer)
    if len({(low.rank, low.scaling, low.rank_stabilised) for low in pairs}) > 1:
        rank = max(low.rank for low in pairs)
        pairs = (_padded(inner, rank), _padded(outer, rank))
    keys = {f"{module}.in_proj_weight": module, f"{module}.out_proj": module + _OUT_PROJ}
    return {name: Wrapped(key, module, low, low) for (name, key), low in zip(keys.items(), pairs, strict=True)}


def _padded(low: LowRank, rank: int) -> LowRank:
    """The same delta at a higher rank, with its scaling folded in and alpha = rank."""
    up, down = low.factors()
    more = rank - low.rank
    return LowRank(
        Tensor.of(np.pad(down, ((0, more), (0, 0)))), Tensor.of(np.pad(up, ((0, 0), (0, more)))), alpha=float(rank)
    )


def _alike(wrapped: dict[str, Wrapped]) -> dict[str, Wrapped]:
    """use_rslora holds for a whole file: where it is mixed, the scalings are told by alphas."""
    if len({one.pair.rank_stabilised for one in wrapped.values()}) < 2:
        return wrapped

    def plain(pair: LowRank | Experts) -> LowRank | Experts:
        return replace(pair, alpha=pair.scaling * (pair.rank or 1), rank_stabilised=False)

    return {name: replace(one, pair=plain(one.pair)) for name, one in wrapped.items()}


def _inside(adapter: Adapter, wrapped: Mapping[str, Wrapped]) -> dict[str, str]:
    """Wrapped modules -> where in the file their own parameters are."""
    found: dict[str, str] = {}
    for name, one in wrapped.items():
        module = one.rule if _is_in_proj(name) else name.rpartition(".")[0] if one.parameter else name
        deepest = f"{one.key}.base_layer"
        found[module] = max(found.get(module, ""), deepest, key=len)
    tokens = (name for name, update in adapter.updates.items() if isinstance(update, Tokens))
    return found | {name: f"{name}.token_adapter.base_layer" for name in tokens}


def _held(module: str, inside: Mapping[str, str]) -> str:
    """A module's path in the file: below ``base_layer`` where a module around it is wrapped."""
    parts = module.split(".")
    for n in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:n])
        if around in inside:
            return ".".join((inside[around], *parts[n:]))
    return module


def plain_low_rank(update: Update) -> LowRank:
    """The LoRA of an update that has one: its direction where it is a DoRA or a KaSA."""
    low = as_low_rank(update.direction if isinstance(update, (DoRA, Truncated)) else update)
    assert low is not None  # losses() said so
    return low


def _layered(name: str, low: LowRank) -> LowRank:
    """An Embedding's LoRA as such, also from a format that does not tell it from a Linear's."""
    known = low.layer == "plain" and len(low.shape) == 2 and name.rpartition(".")[2] in EMBEDDING_LEAVES
    return low.oriented("embedding") if known else low


def stored_slots(pair: LowRank | Experts, update: Update, biases: Mapping[str, Update], name: str) -> dict[str, Tensor]:
    """The stored tensors of one module, by PEFT's slots."""
    if isinstance(pair, Experts):
        return {"down": pair.down, "up": pair.up}
    if pair.layer == "embedding":
        slots = {"embedding_down": pair.up.T, "embedding_up": pair.down.T}
    else:
        kernel = pair.down.shape[2:]
        slots = {"down": pair.down, "up": pair.up.reshape(*pair.up.shape[:2], *(1 for _ in kernel))}
    if isinstance(update, DoRA):
        shape: tuple[int, ...] = (update.magnitude.size,)
        if len(pair.down.shape) > 2:  # convolutions keep theirs as [1,o,1,1]
            shape = (1, *shape, *(1 for _ in pair.down.shape[2:]))
        slots["magnitude"] = update.magnitude.reshape(*shape)
    if isinstance(update, Truncated):
        slots["diagonal"] = update.diagonal
    if biases:
        slots["bias"] = _bias(biases.get(f"{name}.bias"), pair)
    return slots


def _bias(delta: Update | None, low: LowRank) -> Tensor:
    """lora_B.bias, which PEFT multiplies by the scaling; zeros where this module has none."""
    if not isinstance(delta, Dense):
        return Tensor.of(np.zeros(low.up.shape[0], np.float32))
    if delta.scaling == low.scaling:
        return delta.value
    return Tensor.of(delta.value.float() * np.float32(delta.scaling / low.scaling))


def configuration(
    adapter: Adapter,
    pairs: Mapping[str, LowRank | Experts],
    lora_bias: bool,
    parameters: Collection[str] = (),
) -> dict[str, Any]:
    """adapter_config.json for pairs by module (or, if among ``parameters``, by parameter).

    The source's own where it still says the same.
    """
    lora = str(adapter.metadata.config.get("peft_type", "")).upper() == "LORA"  # another tuner's says nothing of a LoRA
    source = dict(adapter.metadata.config) if lora else {}
    ranks = {rule: pair.rank or 1 for rule, pair in pairs.items()}
    alphas = {rule: number(pair.explicit_alpha) for rule, pair in pairs.items()}
    rank_stabilised = any(pair.rank_stabilised for pair in pairs.values())
    kinds = {type(u) for u in adapter.modules().values()}
    modules = sorted(set(pairs) - set(parameters))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.metadata.base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": _bias_kind(adapter, pairs),
        "modules_to_save": _modules_to_save(adapter, pairs),
        "target_modules": modules,
        **source,
        **{field: plain for field, plain in REWRITTEN.items() if field in source},
        **_parameter_fields(source, sorted(parameters)),
        **_token_fields(adapter, source),
        **_saved_field(adapter, source, pairs),
        "fan_in_fan_out": any(isinstance(p, LowRank) and p.layer == "transposed" for p in pairs.values()),
        "use_rslora": rank_stabilised,
        "use_dora": DoRA in kinds,
        "lora_bias": lora_bias,
    }
    if Truncated in kinds:
        config["kasa_config"] = source.get("kasa_config") or {}
    config.update(_version_field(pairs, any(map(_is_in_proj, adapter.updates)), source))
    if mutating(source):
        config["init_lora_weights"] = True
    if not still_says(source, ranks, alphas, rank_stabilised) or _moved(source, parameters):
        config["r"], config["rank_pattern"] = patterned(ranks, 8)
        config["lora_alpha"], config["alpha_pattern"] = patterned(alphas, 8)
        config.update(target_modules=modules, init_lora_weights=True)
    return config


def _version_field(
    pairs: Mapping[str, LowRank | Experts], attention: bool, source: Mapping[str, Any]
) -> dict[str, Any]:
    """peft_version, where what is written means what it means in one only: it is told which that is."""
    orders = {pair.order for pair in pairs.values() if isinstance(pair, Experts)} - {"shape"}
    said = expert_order(source)
    other = bool(orders) and said != "model" and orders != {said}
    silent = attention and version(source) is None
    return {"peft_version": ".".join(map(str, DOUBLES_OUT_PROJ))} if other or silent else {}


def _saved_field(adapter: Adapter, source: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """modules_to_save where the source's own does not have the modules of bare parameters."""
    told = source.get("modules_to_save") or []
    bare = [name for name in adapter.carried if not name.endswith((".weight", ".bias"))]
    if not bare or all(saved_whole(name, told) for name in bare):
        return {}
    modules = {name.rpartition(".")[0] for name in bare}
    return {"modules_to_save": sorted({*(_modules_to_save(adapter, pairs) or []), *told, *modules})}


def _parameter_fields(source: Mapping[str, Any], parameters: list[str]) -> dict[str, Any]:
    """target_parameters, and what PEFT does not allow beside it."""
    if not parameters:
        return {}
    told = source.get("target_parameters") or []
    same = told and not _moved(source, parameters)
    return {"target_parameters": told if same else parameters, "lora_dropout": 0.0}


def _moved(source: Mapping[str, Any], parameters: Iterable[str]) -> bool:
    """Whether parameters are not the source's own, or its parameters are modules here (``q_proj.weight``)."""
    told = source.get("target_parameters") or []
    return any(entry.endswith("weight") for entry in told) or not all(listed(name, told) for name in parameters)


def _token_fields(adapter: Adapter, source: Mapping[str, Any]) -> dict[str, Any]:
    """trainable_token_indices by module; the source's own list where there is one module."""
    rows = {name: update.indices for name, update in adapter.updates.items() if isinstance(update, Tokens)}
    if not rows:
        return {}
    told = source.get("trainable_token_indices")
    same = isinstance(told, list) and list(rows.values()) == [told]
    if isinstance(told, dict):
        same = all(rows_of == token_indices(name, source, Path(CONFIG)) for name, rows_of in rows.items())
    return {"trainable_token_indices": told if same else rows}


def still_says(
    config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], rank_stabilised: bool
) -> bool:
    """Whether a configuration gives every module this rank and alpha."""
    if not config or bool(config.get("use_rslora")) != rank_stabilised:
        return False
    by_rank = Patterns(config.get("rank_pattern") or {}, "rank_pattern", Path(CONFIG))
    by_alpha = Patterns(config.get("alpha_pattern") or {}, "alpha_pattern", Path(CONFIG))
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return all(by_rank.get(n, r) == rank and by_alpha.get(n, alpha) == alphas[n] for n, rank in ranks.items())


def patterned(values: Mapping[str, float], default: int) -> tuple[float, dict[str, float]]:
    """The commonest value, and by full name the modules that differ."""
    if not values:
        return default, {}
    common = Counter(values.values()).most_common(1)[0][0]
    anchored = {name: any(other.endswith(f".{name}") for other in values) for name in values}
    return common, {
        ("^" if anchored[name] else "") + re.escape(name).replace("\\_", "_"): value
        for name, value in values.items()
        if value != common
    }


def _bias_kind(adapter: Adapter, plain: Iterable[str]) -> str:
    """Whose biases were trained: of no module, of those with a LoRA, or of all."""
    whole = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    biased = {name.rpartition(".")[0] for name in adapter.carried if is_bias(name)} - whole
    return "none" if not biased else "lora_only" if biased <= set(plain) else "all"


def _modules_to_save(adapter: Adapter, plain: Iterable[str]) -> list[str] | None:
    """Modules whose whole weight travels along and that carry no LoRA."""
    names = {name.rpartition(".")[0] for name in adapter.carried if not is_bias(name)}
    return sorted(names - set(plain)) or None


def number(value: float) -> float:
    """An integer where it is one: some readers insist."""
    return int(value) if float(value).is_integer() else value


FORMAT = Format(
    name="peft",
    title="Hugging Face PEFT folder",
    kinds=("lora", "dora", "kasa", *peft_tuners.WORDS),
    container="folder",
    sniff=sniff,
    read=read,
    write=write,
    losses=losses,
)
