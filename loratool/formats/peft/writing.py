"""Writing a PEFT folder, and what it cannot say."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Loss, is_bias
from loratool.architectures import architecture
from loratool.architectures.llm import EMBEDDING_LEAVES, experts_transposed
from loratool.formats.base import CONFIG, IMAGE_FORMATS, kept
from loratool.formats.peft import tuners
from loratool.formats.peft.config import in_order, listed, out_proj_times
from loratool.formats.peft.keys import LAYOUT, OUT_PROJ, PREFIX, is_in_proj
from loratool.formats.peft.rows import Row
from loratool.formats.peft.writing_config import configuration
from loratool.kinds.experts import Experts
from loratool.kinds.tokens import Tokens
from loratool.kinds.truncated import Truncated
from loratool.lazy import np
from loratool.tensors import Tensor, write_safetensors
from loratool.update import Dense, DoRA, LowRank, Update, as_low_rank

_BARE = "a bare parameter, which PEFT does not save"


def losses(adapter: Adapter) -> list[Loss]:
    """What PEFT cannot say: of an adapter of one of its other tuners nothing, else what its LoRA cannot."""
    if tuners.row_of(adapter) is not None:
        bare = (name for name in adapter.carried if not _can_carry(name, adapter, adapter.updates))
        return [Loss(adapter.spelling(name), _BARE) for name in bare]
    modules = adapter.modules()
    kinds = {type(update) for update in modules.values()}
    parameters = Experts in kinds or any(map(is_in_proj, modules))
    reasons = {name: _loss(name, u, modules, kinds, parameters) for name, u in adapter.updates.items()}
    sayable = {name for name, reason in reasons.items() if reason is None}
    shared = {module for module, members in _by_parameter(adapter, sayable).items() if in_order(members) is None}
    found = []
    for name, reason in reasons.items():
        if reason is None and is_bias(name) and name.removesuffix(".bias") not in modules:
            reason = "a bias delta without a LoRA on its module"
        if reason is None and name.rpartition(".")[0] in shared and isinstance(modules.get(name), Experts):
            reason = "one of several parameters of a module whose order PEFT's reader must know"
        if reason:
            found.append(Loss(adapter.spelling(name), reason))
    bare = (name for name in adapter.carried if not _can_carry(name, adapter, sayable))
    return found + [Loss(adapter.spelling(name), _BARE) for name in bare]


def _loss(
    name: str, update: Update, modules: Container[str], kinds: Container[type[Update]], parameters: bool
) -> str | None:
    """Why PEFT's LoRA cannot say one update beside others of these ``kinds``, some of them of ``parameters``."""
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
    own = _kept(adapter)
    row = tuners.row_of(own)
    tensors, config = _written(own) if row is None else _written_tuner(own, row)
    path.mkdir()
    write_safetensors(
        path / "adapter_model.safetensors", tensors, {"format": "pt", **kept(adapter.metadata.strings, tensors)}
    )
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


def _written_tuner(adapter: Adapter, row: Row) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by key and the configuration of another type than LORA."""
    tensors, config = tuners.written(adapter, row)
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
        elif is_in_proj(name):
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
    keys = {f"{module}.in_proj_weight": module, f"{module}.out_proj": module + OUT_PROJ}
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
        module = one.rule if is_in_proj(name) else name.rpartition(".")[0] if one.parameter else name
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
